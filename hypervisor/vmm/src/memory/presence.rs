//! Which pages of guest memory are there, asked for one slice after another.
//!
//! Finding the end of a stretch of memory takes time in proportion to its length, so the stretch found last is
//! remembered.

use super::{GuestRam, RamError};
use std::ops::Range;

/// What one asker knows. It must not be asked again about pages that were discarded or filled since.
#[derive(Debug, Default)]
pub struct Presence {
    /// Between its start and that of `there` nothing was there.
    known: Range<u64>,
    there: Range<u64>,
}

impl Presence {
    /// The first stretch of memory within `pages` (guest physical addresses, in one segment) that is there.
    pub fn first(&mut self, ram: &GuestRam, pages: Range<u64>) -> Result<Range<u64>, RamError> {
        if !self.known.contains(&pages.start) {
            let end = ram
                .segment_of(pages.start, 1)
                .map_or(pages.end, |segment| segment.start + segment.bytes);
            self.there = ram.next_touched(pages.start)?.unwrap_or(end..end);
            self.known = pages.start..self.there.end;
        }
        let start = self.there.start.max(pages.start).min(pages.end);
        Ok(start..self.there.end.min(pages.end).max(start))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use godwit_wire::unit::{Mib, PAGE_BYTES};

    #[test]
    fn slices_show_the_stretches_in_them() {
        let ram = GuestRam::new(Mib(16)).unwrap();
        let page = |number: u64| number * PAGE_BYTES;
        ram.write(page(5), &[1]).unwrap();
        ram.write(page(6), &[1]).unwrap();
        ram.write(page(9), &[1]).unwrap();
        let mut presence = Presence::default();
        let mut first = |pages: Range<u64>| {
            let found = presence
                .first(&ram, page(pages.start)..page(pages.end))
                .unwrap();
            (!found.is_empty()).then_some(found.start / PAGE_BYTES..found.end / PAGE_BYTES)
        };
        assert_eq!(first(0..4), None);
        assert_eq!(first(4..8), Some(5..7));
        assert_eq!(first(6..8), Some(6..7));
        assert_eq!(first(7..8), None);
        assert_eq!(first(8..4096), Some(9..10));
        assert_eq!(first(10..4096), None);
        // Backwards as well.
        assert_eq!(first(6..7), Some(6..7));
    }
}
