//! Which pages the source still owes a target that runs already. Whoever is to send a page claims it first, so that
//! none goes twice, however many lanes are at work.

use crate::kvm::{DirtyBitmap, LoggedSlot, words_of};
use godwit_wire::unit::PAGE_BYTES;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};

/// Pages owed, one bit each, per slot.
#[derive(Debug)]
pub(super) struct Claims {
    slots: Vec<(LoggedSlot, Vec<AtomicU64>)>,
    left: AtomicU64,
}

impl Claims {
    /// Owes the pages of `owed`, one map per slot.
    pub(super) fn new(slots: &[LoggedSlot], owed: &[DirtyBitmap]) -> Self {
        let left = owed.iter().map(DirtyBitmap::count).sum();
        let slots = slots.iter().zip(owed).map(|(slot, map)| {
            let words = map.words(0..map.pages());
            (*slot, words.iter().copied().map(AtomicU64::new).collect())
        });
        Self {
            slots: slots.collect(),
            left: AtomicU64::new(left),
        }
    }

    /// Pages that nobody has claimed.
    pub(super) fn left(&self) -> u64 {
        self.left.load(Ordering::Relaxed)
    }

    /// Claims what is owed of `pages` of the slot with this index; gives it as runs of (first page, number).
    pub(super) fn claim(&self, slot: usize, pages: Range<u64>) -> Vec<(u64, u64)> {
        let (_, words) = &self.slots[slot];
        let mut runs: Vec<(u64, u64)> = Vec::new();
        let mut claimed = 0;
        for (word, mask) in words_of(pages) {
            let mut mine = words[word].fetch_and(!mask, Ordering::Relaxed) & mask;
            claimed += u64::from(mine.count_ones());
            while mine != 0 {
                let start = word as u64 * 64 + u64::from(mine.trailing_zeros());
                let length = u64::from((mine >> (start % 64)).trailing_ones());
                mine &= !((u64::MAX >> (64 - length)) << (start % 64));
                match runs.last_mut() {
                    Some((first, run)) if *first + *run == start => *run += length,
                    _ => runs.push((start, length)),
                }
            }
        }
        self.left.fetch_sub(claimed, Ordering::Relaxed);
        runs
    }

    /// The slot with the page at this guest physical address, as its index and the page in it.
    pub(super) fn place(&self, address: u64) -> Option<(usize, u64)> {
        self.slots
            .iter()
            .position(|(slot, _)| {
                (slot.guest_address..slot.guest_address + slot.bytes).contains(&address)
            })
            .map(|index| {
                let start = self.slots[index].0.guest_address;
                (index, (address - start) / PAGE_BYTES)
            })
    }

    /// Where page `page` of a slot is.
    pub(super) fn address(&self, slot: usize, page: u64) -> u64 {
        self.slots[slot].0.guest_address + page * PAGE_BYTES
    }

    /// Number of pages of a slot.
    pub(super) fn pages(&self, slot: usize) -> u64 {
        self.slots[slot].0.bytes / PAGE_BYTES
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn slot(pages: u64) -> LoggedSlot {
        LoggedSlot {
            slot: 0,
            guest_address: 0x10_0000,
            host_address: 0,
            bytes: pages * PAGE_BYTES,
        }
    }

    proptest! {
        #[test]
        fn whoever_claims_every_page_is_claimed_once(
            words in prop::collection::vec(prop_oneof![Just(0), Just(u64::MAX), any::<u64>()], 1..20),
            cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..40),
        ) {
            let pages = words.len() as u64 * 64;
            let owed = DirtyBitmap::new(words, pages);
            let claims = Claims::new(&[slot(pages)], std::slice::from_ref(&owed));
            prop_assert_eq!(claims.left(), owed.count());
            let mut claimed = Vec::new();
            for cut in &cuts {
                let start = cut.index(pages as usize) as u64;
                claimed.extend(claims.claim(0, start..(start + 70).min(pages)));
            }
            claimed.extend(claims.claim(0, 0..pages));
            let mut seen = vec![0u8; pages as usize];
            for (first, number) in claimed {
                (first..first + number).for_each(|page| seen[page as usize] += 1);
            }
            for page in 0..pages {
                let owes = owed.runs(page..page + 1).next().is_some();
                prop_assert_eq!(seen[page as usize], u8::from(owes));
            }
            prop_assert_eq!(claims.left(), 0);
        }
    }

    #[test]
    fn an_address_has_its_place() {
        let claims = Claims::new(&[slot(4)], &[DirtyBitmap::new(vec![0b1111], 4)]);
        assert_eq!(claims.place(0x10_0000 + 2 * PAGE_BYTES), Some((0, 2)));
        assert_eq!(claims.place(0x10_0000 + 4 * PAGE_BYTES), None);
        assert_eq!(claims.place(0), None);
        assert_eq!(claims.address(0, 2), 0x10_0000 + 2 * PAGE_BYTES);
    }
}
