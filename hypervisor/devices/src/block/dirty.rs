//! Which parts of a disk the guest has changed while the disk's content is being copied to another host.
//!
//! One bit per cluster. Whoever copies clears the bits of some clusters and *then* reads them; the disk's thread sets
//! the bits of what a request changed when the request is *done*, before the driver hears of it. So no change is lost:
//!
//! - A read that missed any part of a change came before the change was in the file, and so before the request was
//!   done. Its bits had been cleared before that, so they are set again afterwards, and a later round sends what the
//!   read missed. Clearing and setting are read-modify-writes of one word that acquire and release: had the bit been
//!   set before it was cleared, then the change would have been in the file before the read, which would have seen it.
//! - A request that was under way when tracking began is like any other: it is noted when it is done. One that was done
//!   before had changed the file before anything was read.
//! - A request that fails may have been carried out in part, so it is noted too; and one that is tried again is noted
//!   each time.
//! - Before the last round the device is paused, which waits for everything under way and notes it. What could not
//!   begin or has to be done again travels with the device's state and is done at the target.
//! - A driver that resets the disk hears of nothing any more, but what it had asked for is still done: it is waited for
//!   and noted (`BlockService::settle`).

use super::request::Range;
use std::sync::atomic::{AtomicU64, Ordering};

/// Bytes that share a bit.
pub const CLUSTER_BYTES: u64 = 64 << 10;

/// Bits of a word.
const BITS: u64 = u64::BITS as u64;

/// No limit.
const UNLIMITED: u64 = 0;

/// What has changed on a disk, and how fast it may.
#[derive(Debug)]
pub(crate) struct Dirty {
    clusters: u64,
    words: Box<[AtomicU64]>,
    written_bytes: AtomicU64,
    write_limit: AtomicU64,
}

impl Dirty {
    /// Of a disk of `capacity` bytes that nobody has changed yet.
    pub(crate) fn new(capacity: u64) -> Self {
        let clusters = capacity.div_ceil(CLUSTER_BYTES);
        Self {
            clusters,
            words: (0..clusters.div_ceil(BITS))
                .map(|_| AtomicU64::new(0))
                .collect(),
            written_bytes: AtomicU64::new(0),
            write_limit: AtomicU64::new(UNLIMITED),
        }
    }

    /// The driver wrote or zeroed `bytes` bytes at `offset`.
    pub(crate) fn wrote(&self, offset: u64, bytes: u64) {
        self.written_bytes.fetch_add(bytes, Ordering::Relaxed);
        self.mark(Range { offset, bytes });
    }

    /// `range` may not be what it was.
    pub(crate) fn mark(&self, range: Range) {
        if range.bytes == 0 {
            return;
        }
        let end = range.offset.saturating_add(range.bytes);
        let clusters = range.offset / CLUSTER_BYTES..end.div_ceil(CLUSTER_BYTES);
        self.each_word(clusters, |word, bits| {
            word.fetch_or(bits, Ordering::AcqRel);
        });
    }

    /// These clusters are about to be read.
    pub(crate) fn clear(&self, clusters: std::ops::Range<u64>) {
        self.each_word(clusters, |word, bits| {
            word.fetch_and(!bits, Ordering::AcqRel);
        });
    }

    /// One bit per cluster that has changed since it was cleared.
    pub(crate) fn words(&self) -> Vec<u64> {
        let words = self.words.iter();
        words.map(|word| word.load(Ordering::Acquire)).collect()
    }

    /// What the driver has written in all, zeros included.
    pub(crate) fn written_bytes(&self) -> u64 {
        self.written_bytes.load(Ordering::Relaxed)
    }

    /// Bytes that may be written per second.
    pub(crate) fn write_limit(&self) -> Option<u64> {
        Some(self.write_limit.load(Ordering::Relaxed)).filter(|limit| *limit != UNLIMITED)
    }

    /// Holds writes to this many bytes per second.
    pub(crate) fn limit_writes(&self, bytes_per_s: u64) {
        let limit = bytes_per_s.max(UNLIMITED + 1);
        self.write_limit.store(limit, Ordering::Relaxed);
    }

    fn each_word(&self, clusters: std::ops::Range<u64>, each: impl Fn(&AtomicU64, u64)) {
        let (mut cluster, end) = (clusters.start, clusters.end.min(self.clusters));
        while cluster < end {
            let (bit, number) = (cluster % BITS, (BITS - cluster % BITS).min(end - cluster));
            let bits = (u64::MAX >> (BITS - number)) << bit;
            each(&self.words[(cluster / BITS) as usize], bits);
            cluster += number;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    fn clusters_of(dirty: &Dirty) -> BTreeSet<u64> {
        let set = |(index, word): (u64, u64)| {
            (0..BITS)
                .filter(move |bit| word >> bit & 1 == 1)
                .map(move |bit| index * BITS + bit)
        };
        (0..).zip(dirty.words()).flat_map(set).collect()
    }

    #[derive(Clone, Debug)]
    enum Step {
        Mark(u64, u64),
        Clear(u64, u64),
    }

    fn step(capacity: u64) -> impl Strategy<Value = Step> {
        let clusters = capacity.div_ceil(CLUSTER_BYTES);
        prop_oneof![
            (0..capacity, 0u64..1 << 20).prop_map(|(at, bytes)| Step::Mark(at, bytes)),
            (0..clusters, 0u64..100).prop_map(|(at, number)| Step::Clear(at, number)),
        ]
    }

    proptest! {
        #[test]
        fn every_cluster_that_a_change_touches_is_dirty_until_it_is_cleared(
            sectors in 1u64..200_000,
            steps in prop::collection::vec(step(100_000 * 512), 1..40),
        ) {
            let capacity = sectors * 512;
            let dirty = Dirty::new(capacity);
            let clusters = capacity.div_ceil(CLUSTER_BYTES);
            let mut expected = BTreeSet::new();
            for step in steps {
                match step {
                    Step::Mark(offset, bytes) => {
                        dirty.mark(Range { offset, bytes });
                        let touched = (0..clusters).filter(|cluster| {
                            let start = cluster * CLUSTER_BYTES;
                            start < offset + bytes && offset < start + CLUSTER_BYTES
                        });
                        if bytes > 0 {
                            expected.extend(touched);
                        }
                    }
                    Step::Clear(first, number) => {
                        dirty.clear(first..first + number);
                        expected.retain(|cluster| !(first..first + number).contains(cluster));
                    }
                }
                prop_assert_eq!(&clusters_of(&dirty), &expected);
            }
        }
    }

    /// A copier that clears before it reads, against a writer that notes after it has written, on a disk of words: in
    /// the end the copy is what the writer left.
    #[test]
    fn a_copy_made_while_the_disk_is_written_ends_up_the_same() {
        const CLUSTERS: u64 = 3;
        const WRITES: u64 = 200_000;
        let dirty = Dirty::new(CLUSTERS * CLUSTER_BYTES);
        let disk: [AtomicU64; CLUSTERS as usize] = Default::default();
        let mut copy = [0; CLUSTERS as usize];
        std::thread::scope(|scope| {
            let writer = scope.spawn(|| {
                for write in 1..=WRITES {
                    let cluster = write % CLUSTERS;
                    disk[cluster as usize].store(write, Ordering::Relaxed);
                    dirty.wrote(cluster * CLUSTER_BYTES, 512);
                }
            });
            let mut round = || {
                for cluster in clusters_of(&dirty) {
                    dirty.clear(cluster..cluster + 1);
                    copy[cluster as usize] = disk[cluster as usize].load(Ordering::Relaxed);
                }
            };
            while !writer.is_finished() {
                round();
            }
            writer.join().unwrap();
            round();
        });
        assert_eq!(copy, disk.map(AtomicU64::into_inner));
        assert_eq!(dirty.written_bytes(), WRITES * 512);
    }
}
