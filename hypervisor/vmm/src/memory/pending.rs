//! Which parts of guest memory have not arrived yet (pure).
//!
//! ```text
//! Waiting ──claim──▶ Taken ──settle──▶ Settled
//! ```
//!
//! Memory that is brought in on demand is not there, and yet not zero. Whoever asks what was ever touched is told of
//! it too; reading it makes it arrive.

use std::ops::Range;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};

const SETTLED: u8 = 0;
const WAITING: u8 = 1;
const TAKEN: u8 = 2;

/// Units of guest memory, by their place in the file behind it, and what has become of each.
#[derive(Debug)]
pub struct Pending {
    unit_bytes: u64,
    units: Vec<AtomicU8>,
    left: AtomicU64,
}

/// What a unit that was asked for is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Claim {
    /// The caller's to bring in; nobody else gets it.
    Mine,
    /// On its way.
    Taken,
    /// There, or never was anything but zeros.
    Settled,
}

impl Pending {
    /// Units of `unit_bytes` each; those are waited for of which `waiting` says so.
    pub fn new(unit_bytes: u64, waiting: impl Iterator<Item = bool>) -> Self {
        let mut left = 0;
        let units = waiting
            .map(|waits| {
                left += u64::from(waits);
                AtomicU8::new(if waits { WAITING } else { SETTLED })
            })
            .collect();
        Self {
            unit_bytes,
            units,
            left: AtomicU64::new(left),
        }
    }

    /// Bytes of a unit; the last one may be shorter.
    pub const fn unit_bytes(&self) -> u64 {
        self.unit_bytes
    }

    /// Number of units.
    pub const fn units(&self) -> usize {
        self.units.len()
    }

    /// Units that have not arrived.
    pub fn left(&self) -> u64 {
        self.left.load(Ordering::Acquire)
    }

    /// Takes the unit, if it is still waited for.
    pub fn claim(&self, unit: usize) -> Claim {
        let Some(state) = self.units.get(unit) else {
            return Claim::Settled;
        };
        match state.compare_exchange(WAITING, TAKEN, Ordering::AcqRel, Ordering::Acquire) {
            Ok(_) => Claim::Mine,
            Err(TAKEN) => Claim::Taken,
            Err(_) => Claim::Settled,
        }
    }

    /// The claimed unit is there. Gives how many are left.
    pub fn settle(&self, unit: usize) -> u64 {
        let before = self.units[unit].swap(SETTLED, Ordering::AcqRel);
        assert_eq!(before, TAKEN, "only a claimed unit arrives");
        self.left.fetch_sub(1, Ordering::AcqRel) - 1
    }

    /// The first stretch of units within `range` that have not arrived.
    pub fn next(&self, range: Range<u64>) -> Option<Range<u64>> {
        if self.left() == 0 || range.is_empty() {
            return None;
        }
        let arrives = |unit: &usize| self.units[*unit].load(Ordering::Acquire) != SETTLED;
        let units = (range.start / self.unit_bytes) as usize
            ..(range.end.div_ceil(self.unit_bytes) as usize).min(self.units.len());
        let first = units.clone().find(arrives)?;
        let end = (first..units.end)
            .find(|unit| !arrives(unit))
            .unwrap_or(units.end);
        Some(
            (first as u64 * self.unit_bytes).max(range.start)
                ..(end as u64 * self.unit_bytes).min(range.end),
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_unit_is_claimed_once_and_counted_until_it_is_there() {
        let pending = Pending::new(16, [false, true, true].into_iter());
        assert_eq!(pending.left(), 2);
        assert_eq!(pending.claim(0), Claim::Settled);
        assert_eq!(pending.claim(9), Claim::Settled);
        assert_eq!(pending.claim(1), Claim::Mine);
        assert_eq!(pending.claim(1), Claim::Taken);
        assert_eq!(pending.next(0..48), Some(16..48), "it is not there yet");
        assert_eq!(pending.settle(1), 1);
        assert_eq!(pending.claim(1), Claim::Settled);
        assert_eq!(pending.next(0..48), Some(32..48));
    }

    #[test]
    fn stretches_begin_and_end_within_what_was_asked_for() {
        let pending = Pending::new(16, [true, true, false, true].into_iter());
        assert_eq!(pending.next(5..64), Some(5..32));
        assert_eq!(pending.next(0..20), Some(0..20));
        assert_eq!(pending.next(32..48), None);
        assert_eq!(pending.next(40..50), Some(48..50));
        assert_eq!(pending.next(64..99), None);
        assert_eq!(pending.next(7..7), None);
    }
}
