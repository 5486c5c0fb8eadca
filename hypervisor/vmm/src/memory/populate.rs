//! Taking host memory for a guest before it is needed, and of which kind.

use super::ram::HUGE_PAGE_BYTES;
use super::{GuestRam, RamError};
use godwit_wire::devices::MemoryBacking;
use godwit_wire::migration::Stretch;
use godwit_wire::unit::PAGE_BYTES;
use std::num::NonZero;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Pages that one thread populates at a time (32 MiB).
const POPULATE_PIECE_PAGES: u64 = 8192;
/// More threads than this only fight over the kernel's locks.
const MAX_POPULATE_THREADS: usize = 8;

impl GuestRam {
    /// Takes host memory for all of `stretches`, on several CPUs at once, as long as `go_on` says so.
    pub fn populate_all(
        &self,
        stretches: &[Stretch],
        go_on: &(dyn Fn() -> bool + Sync),
    ) -> Result<(), RamError> {
        let pieces: Vec<Stretch> = stretches
            .iter()
            .flat_map(|stretch| {
                (0..stretch.pages)
                    .step_by(POPULATE_PIECE_PAGES as usize)
                    .map(|done| Stretch {
                        address: stretch.address.saturating_add(done * PAGE_BYTES),
                        pages: (stretch.pages - done).min(POPULATE_PIECE_PAGES),
                    })
            })
            .collect();
        let next = AtomicUsize::new(0);
        let work = || {
            while let Some(piece) = pieces.get(next.fetch_add(1, Ordering::Relaxed)) {
                if !go_on() {
                    break;
                }
                self.populate(piece.address, piece.pages)?;
            }
            Ok(())
        };
        let cpus = std::thread::available_parallelism().map_or(1, NonZero::get);
        std::thread::scope(|scope| {
            let workers: Vec<_> = (1..cpus.min(MAX_POPULATE_THREADS))
                .map(|_| scope.spawn(work))
                .collect();
            let own = work();
            workers.into_iter().fold(own, |done, worker| {
                done.and(
                    worker
                        .join()
                        .unwrap_or_else(|panic| std::panic::resume_unwind(panic)),
                )
            })
        })
    }

    /// Takes host memory for `pages` pages from `address` on in one go, which costs much less than a fault for each.
    /// Content stays as it is.
    fn populate(&self, address: u64, pages: u64) -> Result<(), RamError> {
        let bytes = pages.saturating_mul(PAGE_BYTES);
        let out_of_range = RamError::OutOfRange { address, bytes };
        let segment = self.segment_of(address, bytes).ok_or(out_of_range)?;
        let start = self.host_start(segment);
        let offset = (address - segment.start) as usize;
        if self.backing() == MemoryBacking::Standard && !self.small_pages.load(Ordering::Relaxed) {
            prefer_huge_pages(start.wrapping_add(offset), bytes as usize);
        }
        // SAFETY: the range lies within the segment's mapping, which this value keeps alive; populating changes
        // neither content nor protection.
        let done = unsafe {
            rustix::mm::madvise(
                start.add(offset).cast(),
                bytes as usize,
                rustix::mm::Advice::LinuxPopulateWrite,
            )
        };
        match done {
            // Linux before 5.14 does not know it: then the pages come one by one.
            Ok(()) | Err(rustix::io::Errno::INVAL) => Ok(()),
            Err(error) => Err(RamError::Access {
                address,
                source: error.into(),
            }),
        }
    }

    /// Lets the kernel use pages of 4 KiB only from here on; those of 2 MiB that are there stay.
    pub fn avoid_huge_pages(&self) {
        self.small_pages.store(true, Ordering::Relaxed);
        for segment in self.segments() {
            let start = self.host_start(segment);
            // SAFETY: the range is the segment's mapping, which this value keeps alive; the advice changes neither
            // content nor protection.
            let advised = unsafe {
                rustix::mm::madvise(
                    start.cast(),
                    segment.bytes as usize,
                    rustix::mm::Advice::LinuxNoHugepage,
                )
            };
            // A kernel without huge pages does not know it.
            if let Err(error) = advised {
                tracing::debug!(%error, "the kernel takes no advice on huge pages");
            }
        }
    }
}

/// Asks for huge pages where a whole one fits into the `bytes` of a mapping from `start` on. A host that gives them to
/// shared memory (`/sys/kernel/mm/transparent_hugepage/shmem_enabled`) has such memory ready in a fraction of the time;
/// the others do as they would have done.
fn prefer_huge_pages(start: *mut u8, bytes: usize) {
    let (first, end) = (start.addr(), start.addr() + bytes);
    let from = first.next_multiple_of(HUGE_PAGE_BYTES as usize);
    let to = end - end % HUGE_PAGE_BYTES as usize;
    if from >= to {
        return;
    }
    // SAFETY: the range lies within the caller's mapping; the advice changes neither content nor protection.
    let advised = unsafe {
        rustix::mm::madvise(
            start.add(from - first).cast(),
            to - from,
            rustix::mm::Advice::LinuxHugepage,
        )
    };
    // A kernel without huge pages does not know it.
    if let Err(error) = advised {
        tracing::debug!(%error, "the kernel takes no advice on huge pages");
    }
}
