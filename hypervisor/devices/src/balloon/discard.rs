//! Giving guest memory back to the host.
//!
//! Memory is given back in grains: pages, or huge pages where the file behind it has those. The balloon names single
//! pages, in any order, so where grains are larger the pages of a grain are collected until it is complete. That
//! needs a driver that asks before it takes a page back (`VIRTIO_BALLOON_F_MUST_TELL_HOST`): otherwise a page that is
//! counted here could be in use again when the last one of its grain arrives. What was collected is forgotten when
//! the machine moves or is restored; those grains then stay as they are until the guest gives them up again.

use super::{Counters, DiscardHook};
use crate::memory::GuestMemory;
use godwit_wire::unit::PAGE_BYTES;
use rustix::fs::FallocateFlags;
use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::ops::Range;
use std::sync::Arc;
use vm_memory::bitmap::Bitmap;
use vm_memory::{Address, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

/// `f_type` of hugetlbfs; its files are punched in whole huge pages.
const HUGETLBFS_MAGIC: u64 = 0x9584_58f6;

/// Whether the driver asks before it takes a page back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Deflation {
    Asked,
    Untold,
}

/// One region of guest memory whose file can be punched.
#[derive(Debug)]
struct Backing {
    /// Guest physical addresses.
    range: Range<u64>,
    file: Arc<File>,
    /// Where the region begins in the file.
    offset: u64,
    grain_bytes: u64,
}

pub(super) struct Discarder {
    memory: GuestMemory,
    backings: Vec<Backing>,
    deflation: Deflation,
    /// Pages of incomplete grains, by the address of the grain.
    incomplete: BTreeMap<u64, BTreeSet<u64>>,
    hook: Option<DiscardHook>,
}

impl Discarder {
    pub(super) fn new(
        memory: GuestMemory,
        deflation: Deflation,
        hook: Option<DiscardHook>,
    ) -> Self {
        let backings = memory.iter().filter_map(Backing::of).collect();
        Self {
            memory,
            backings,
            deflation,
            incomplete: BTreeMap::new(),
            hook,
        }
    }

    /// The guest has given up these page frames.
    pub(super) fn inflate(&mut self, frames: &mut Vec<u32>, counters: &Counters) {
        frames.sort_unstable();
        frames.dedup();
        let mut given: Vec<Range<u64>> = Vec::new();
        for frame in frames.iter() {
            let page = u64::from(*frame) * PAGE_BYTES;
            if !self.memory.address_in_range(GuestAddress(page)) {
                counters.foreign_pages.add(1);
                continue;
            }
            let Some(grain) = self.complete(page) else {
                continue;
            };
            match given.last_mut() {
                Some(last) if last.end == grain.start => last.end = grain.end,
                _ => given.push(grain),
            }
        }
        for range in given {
            self.discard(range, counters);
        }
    }

    /// The guest takes these page frames again.
    pub(super) fn deflate(&mut self, frames: &[u32]) {
        for frame in frames {
            let page = u64::from(*frame) * PAGE_BYTES;
            let Some(backing) = self.backing(page) else {
                continue;
            };
            let grain = backing.grain_of(page).start;
            if let Some(pages) = self.incomplete.get_mut(&grain) {
                pages.remove(&page);
                if pages.is_empty() {
                    self.incomplete.remove(&grain);
                }
            }
        }
    }

    /// Gives back every whole grain in `range`, which lies in guest memory.
    pub(super) fn discard(&mut self, range: Range<u64>, counters: &Counters) {
        for backing in &self.backings {
            let Some(whole) = backing.whole_grains(&range) else {
                continue;
            };
            let bytes = whole.end - whole.start;
            if let Err(error) = backing.punch(&whole) {
                tracing::warn!(%error, address = whole.start, bytes, "guest memory cannot be given back");
                counters.discard_failures.add(1);
                continue;
            }
            self.mark_written(&whole);
            counters.discarded_bytes.add(bytes);
            if let Some(hook) = &self.hook {
                hook(whole.start, bytes);
            }
        }
    }

    /// The grain of which `page` was the last one missing.
    fn complete(&mut self, page: u64) -> Option<Range<u64>> {
        let backing = self.backing(page)?;
        let grain = backing.grain_of(page);
        if backing.grain_bytes == PAGE_BYTES {
            return Some(grain);
        }
        if self.deflation == Deflation::Untold {
            return None;
        }
        let pages = self.incomplete.entry(grain.start).or_default();
        pages.insert(page);
        if (pages.len() as u64) < (grain.end - grain.start) / PAGE_BYTES {
            return None;
        }
        self.incomplete.remove(&grain.start);
        Some(grain)
    }

    fn backing(&self, address: u64) -> Option<&Backing> {
        self.backings
            .iter()
            .find(|backing| backing.range.contains(&address))
    }

    fn mark_written(&self, range: &Range<u64>) {
        if let Some(region) = self.memory.find_region(GuestAddress(range.start)) {
            let offset = range.start - region.start_addr().raw_value();
            region
                .bitmap()
                .mark_dirty(offset as usize, (range.end - range.start) as usize);
        }
    }
}

impl Backing {
    /// `None` for memory that has no file, or shares nothing with it: punching would not free it, and could destroy
    /// what others read from the file.
    fn of(region: &vm_memory::GuestRegionMmap<vm_memory::bitmap::AtomicBitmap>) -> Option<Self> {
        let file = region.file_offset()?;
        if region.flags() & libc::MAP_SHARED == 0 {
            return None;
        }
        let start = region.start_addr().raw_value();
        let grain_bytes = match rustix::fs::fstatfs(file.file()) {
            Ok(fs) if fs.f_type as u64 == HUGETLBFS_MAGIC => fs.f_bsize as u64,
            Ok(_) => PAGE_BYTES,
            Err(error) => {
                tracing::warn!(%error, start, "the file behind guest memory cannot be asked; nothing of it is given back");
                return None;
            }
        };
        // Grains are those of the file; a region that begins within one has none that is wholly its own in step.
        let aligned = file.start().is_multiple_of(grain_bytes) && start.is_multiple_of(grain_bytes);
        aligned.then(|| Self {
            range: start..start + region.len(),
            file: file.arc().clone(),
            offset: file.start(),
            grain_bytes,
        })
    }

    fn grain_of(&self, address: u64) -> Range<u64> {
        let start = address - address % self.grain_bytes;
        start..start + self.grain_bytes
    }

    fn whole_grains(&self, range: &Range<u64>) -> Option<Range<u64>> {
        let start = range.start.max(self.range.start);
        let end = range.end.min(self.range.end);
        let start = start.checked_next_multiple_of(self.grain_bytes)?;
        let end = end - end % self.grain_bytes;
        (start < end).then_some(start..end)
    }

    fn punch(&self, range: &Range<u64>) -> Result<(), rustix::io::Errno> {
        loop {
            let done = rustix::fs::fallocate(
                &*self.file,
                FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE,
                self.offset + (range.start - self.range.start),
                range.end - range.start,
            );
            if done != Err(rustix::io::Errno::INTR) {
                return done;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Mutex;
    use vm_memory::FileOffset;

    const HUGE: u64 = 2 << 20;
    const MEMORY: u64 = 4 * HUGE;

    type Discarded = Arc<Mutex<Vec<(u64, u64)>>>;

    /// Over a file that could be punched page by page, but is treated as one of huge pages.
    fn huge(deflation: Deflation) -> (Discarder, Discarded) {
        let file = tempfile::tempfile().unwrap();
        file.set_len(MEMORY).unwrap();
        let memory = GuestMemory::from_ranges_with_files([(
            GuestAddress(0),
            MEMORY as usize,
            Some(FileOffset::new(file, 0)),
        )])
        .unwrap();
        let discarded = Discarded::default();
        let theirs = discarded.clone();
        let hook: DiscardHook = Arc::new(move |address, bytes| {
            theirs.lock().unwrap().push((address, bytes));
        });
        let mut discarder = Discarder::new(memory, deflation, Some(hook));
        discarder.backings[0].grain_bytes = HUGE;
        (discarder, discarded)
    }

    #[test]
    fn a_huge_page_goes_back_when_its_last_page_is_given_up() {
        let (mut discarder, discarded) = huge(Deflation::Asked);
        let counters = Counters::default();
        discarder.inflate(&mut (512..1023).rev().collect(), &counters);
        assert!(discarded.lock().unwrap().is_empty());
        discarder.inflate(&mut vec![1023, 0], &counters);
        assert_eq!(*discarded.lock().unwrap(), [(HUGE, HUGE)]);
    }

    #[test]
    fn a_page_that_was_taken_again_keeps_its_huge_page() {
        let (mut discarder, discarded) = huge(Deflation::Asked);
        let counters = Counters::default();
        discarder.inflate(&mut (0..511).collect(), &counters);
        discarder.deflate(&[7, 600, u32::MAX]);
        discarder.inflate(&mut vec![511], &counters);
        assert!(discarded.lock().unwrap().is_empty());
        discarder.inflate(&mut vec![7], &counters);
        assert_eq!(*discarded.lock().unwrap(), [(0, HUGE)]);
    }

    #[test]
    fn nothing_is_collected_from_a_driver_that_does_not_tell() {
        let (mut discarder, discarded) = huge(Deflation::Untold);
        discarder.inflate(&mut (0..1024).collect(), &Counters::default());
        assert!(discarded.lock().unwrap().is_empty());
    }

    #[test]
    fn only_whole_huge_pages_of_what_is_free_go_back() {
        let (mut discarder, discarded) = huge(Deflation::Untold);
        let counters = Counters::default();
        discarder.discard(4096..HUGE, &counters);
        discarder.discard(HUGE - 4096..3 * HUGE + 4096, &counters);
        assert_eq!(*discarded.lock().unwrap(), [(HUGE, 2 * HUGE)]);
    }
}
