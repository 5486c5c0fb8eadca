//! What the guest tells about its memory (virtio 1.2, 5.5.6.3).

use crate::chain::Chain;
use crate::memory::GuestMemory;

/// Bytes of one entry: a 16-bit tag and a 64-bit value.
const ENTRY_BYTES: usize = 10;
/// Most entries that are read at once.
const MAX_ENTRIES: usize = 64;

/// Names of the values, by tag.
const NAMES: [&str; 16] = [
    "guest_swapped_in_bytes",
    "guest_swapped_out_bytes",
    "guest_major_faults",
    "guest_minor_faults",
    "guest_free_bytes",
    "guest_total_bytes",
    "guest_available_bytes",
    "guest_cache_bytes",
    "guest_huge_page_allocations",
    "guest_huge_page_failures",
    "guest_oom_kills",
    "guest_allocation_stalls",
    "guest_async_scanned_pages",
    "guest_direct_scanned_pages",
    "guest_async_reclaimed_pages",
    "guest_direct_reclaimed_pages",
];

/// The newest value of each kind. A guest may tell anything: these are for people to look at.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Stats([Option<u64>; NAMES.len()]);

impl Stats {
    /// Reads what the driver wrote into `chain`; unknown kinds are skipped.
    pub(super) fn read(&mut self, chain: &Chain, memory: &GuestMemory) {
        let mut bytes = [0; ENTRY_BYTES * MAX_ENTRIES];
        let read = chain.read(memory, 0, &mut bytes);
        self.update(&bytes[..read]);
    }

    fn update(&mut self, bytes: &[u8]) {
        for entry in bytes.chunks_exact(ENTRY_BYTES) {
            let (tag, value) = entry.split_at(2);
            let (Ok(tag), Ok(value)) = (tag.try_into(), value.try_into()) else {
                continue;
            };
            if let Some(known) = self.0.get_mut(usize::from(u16::from_le_bytes(tag))) {
                // All ones is how Linux says that it does not know.
                let value = u64::from_le_bytes(value);
                *known = (value != u64::MAX).then_some(value);
            }
        }
    }

    /// What is known.
    pub(super) fn metrics(&self) -> impl Iterator<Item = (&'static str, u64)> {
        NAMES
            .into_iter()
            .zip(self.0)
            .filter_map(|(name, value)| Some((name, value?)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_newest_value_counts_and_unknown_kinds_do_not() {
        let mut bytes = Vec::new();
        for (tag, value) in [(4u16, 100u64), (900, 1), (4, 200), (0, u64::MAX)] {
            bytes.extend(tag.to_le_bytes());
            bytes.extend(value.to_le_bytes());
        }
        bytes.push(5);
        let mut stats = Stats::default();
        stats.update(&bytes);
        assert_eq!(
            stats.metrics().collect::<Vec<_>>(),
            [("guest_free_bytes", 200)]
        );
    }

    proptest! {
        #[test]
        fn no_bytes_panic_the_parser(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            Stats::default().update(&bytes);
        }
    }
}
