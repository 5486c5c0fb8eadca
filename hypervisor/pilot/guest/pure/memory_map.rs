//! Which physical memory may be filled, and where its n-th page lies.

use super::constants::PAGE_BYTES;

/// More ranges than any boot protocol's map holds on a virtual machine; further ones are ignored.
const RANGES_MAX: usize = 32;

/// Physical addresses `start..end`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Range {
    pub start: u64,
    pub end: u64,
}

/// Ranges of RAM, in the order they were added.
#[derive(Clone, Debug)]
pub struct MemoryMap {
    ranges: [Range; RANGES_MAX],
    len: usize,
}

impl MemoryMap {
    pub const fn new() -> Self {
        Self {
            ranges: [Range { start: 0, end: 0 }; RANGES_MAX],
            len: 0,
        }
    }

    /// Adds RAM as the boot protocol gives it; an empty or wrapping range is ignored.
    pub fn add(&mut self, start: u64, bytes: u64) {
        let Some(end) = start.checked_add(bytes) else {
            return;
        };
        if let (true, Some(slot)) = (start < end, self.ranges.get_mut(self.len)) {
            *slot = Range { start, end };
            self.len += 1;
        }
    }

    pub fn ranges(&self) -> &[Range] {
        &self.ranges[..self.len]
    }

    pub fn total_bytes(&self) -> u64 {
        self.ranges()
            .iter()
            .fold(0, |sum, range| sum.saturating_add(range.end - range.start))
    }

    pub fn end(&self) -> u64 {
        self.ranges()
            .iter()
            .fold(0, |end, range| end.max(range.end))
    }

    /// Whether one range of RAM holds all of `start..end`.
    pub fn contains(&self, start: u64, end: u64) -> bool {
        self.ranges()
            .iter()
            .any(|range| range.start <= start && end <= range.end)
    }

    /// The whole pages at or above `floor` and below `ceiling`.
    pub fn usable(&self, floor: u64, ceiling: u64) -> MemoryMap {
        let mut usable = MemoryMap::new();
        for range in self.ranges() {
            let start = range.start.max(floor).next_multiple_of(PAGE_BYTES);
            let end = range.end.min(ceiling) / PAGE_BYTES * PAGE_BYTES;
            usable.add(start, end.saturating_sub(start));
        }
        usable
    }

    /// Takes page-aligned memory from the start of the first range that has it.
    pub fn take(&mut self, bytes: u64) -> Option<u64> {
        let bytes = bytes.next_multiple_of(PAGE_BYTES);
        let ranges = &mut self.ranges[..self.len];
        let range = ranges
            .iter_mut()
            .find(|range| range.end - range.start >= bytes)?;
        let start = range.start;
        range.start += bytes;
        Some(start)
    }

    pub fn pages(&self) -> u64 {
        self.total_bytes() / PAGE_BYTES
    }

    /// The address of the n-th page, counted through the ranges in order.
    pub fn page_address(&self, page: u64) -> Option<u64> {
        let mut offset = page.checked_mul(PAGE_BYTES)?;
        for range in self.ranges() {
            let bytes = range.end - range.start;
            if offset < bytes {
                return Some(range.start + offset);
            }
            offset -= bytes;
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const MIB: u64 = 1 << 20;

    fn map(ranges: &[(u64, u64)]) -> MemoryMap {
        let mut map = MemoryMap::new();
        for &(start, bytes) in ranges {
            map.add(start, bytes);
        }
        map
    }

    #[test]
    fn empty_and_wrapping_ranges_are_ignored() {
        assert_eq!(map(&[(5, 0), (u64::MAX, 2)]).ranges(), []);
    }

    #[test]
    fn more_ranges_than_there_is_room_for_are_ignored() {
        let ranges: Vec<_> = (0..100).map(|n| (n * MIB, 1)).collect();
        assert_eq!(map(&ranges).ranges().len(), RANGES_MAX);
    }

    #[test]
    fn usable_memory_is_whole_pages_above_the_image() {
        let usable = map(&[(0, 0x9_fc00), (MIB, 63 * MIB + 7)]).usable(3 * MIB + 1, u64::MAX);
        assert_eq!(
            usable.ranges(),
            [Range {
                start: 3 * MIB + PAGE_BYTES,
                end: 64 * MIB
            }]
        );
    }

    #[test]
    fn taken_memory_is_no_longer_counted() {
        let mut memory = map(&[(0, PAGE_BYTES), (MIB, 4 * PAGE_BYTES)]);
        assert_eq!(memory.take(PAGE_BYTES + 1), Some(MIB));
        assert_eq!(memory.pages(), 3);
        assert_eq!(memory.take(3 * PAGE_BYTES), None);
    }

    proptest! {
        #[test]
        fn every_page_has_its_own_address_inside_ram(
            sizes in proptest::collection::vec((1_u64..5, 1_u64..5), 1..6)
        ) {
            let mut start = 0;
            let mut memory = MemoryMap::new();
            for (hole, pages) in sizes {
                start += hole * PAGE_BYTES;
                memory.add(start, pages * PAGE_BYTES);
                start += pages * PAGE_BYTES;
            }
            let addresses: Vec<_> = (0..memory.pages())
                .map(|page| memory.page_address(page).expect("the page is counted"))
                .collect();
            prop_assert!(addresses.is_sorted_by(|a, b| a < b));
            prop_assert!(addresses.iter().all(|&a| memory.contains(a, a + PAGE_BYTES)));
            prop_assert_eq!(memory.page_address(memory.pages()), None);
        }
    }
}
