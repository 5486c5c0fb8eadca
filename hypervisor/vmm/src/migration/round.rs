//! One pass over dirty memory, shared out among the lanes.

use super::claims::Claims;
use super::compare::Seed;
use super::disks::{self, DiskSlice};
use crate::kvm::DirtyBitmap;
use godwit_wire::migration::{FRAME_HEADER_BYTES, MAX_COMPARED_PAGES, MigrationProgress};
use godwit_wire::unit::{Bytes, PAGE_BYTES};
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};

/// Dirty bits are cleared in multiples of this.
const WORD_PAGES: u64 = 64;
/// Most pages whose dirty bits are cleared together, just before they are copied (8 MiB).
const MAX_SLICE_PAGES: u64 = 2048;
/// Fewest while the guest runs: each clearing costs a system call that stops its vCPUs for a moment.
const MIN_RUNNING_SLICE_PAGES: u64 = 512;
/// Slices for each lane, so that all of them end at about the same time.
const SLICES_PER_LANE: u64 = 16;

/// Whether dirty bits are cleared while pages are sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Guest {
    /// It runs: what it writes from now on must be noted.
    Runs,
    /// It stands still: nothing can become dirty.
    Paused,
}

/// A piece of one memory slot that has dirty pages.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Slice {
    pub(super) slot: usize,
    pub(super) pages: Range<u64>,
}

/// What is to be sent, and how far it is given out.
#[derive(Debug)]
pub(super) struct Round {
    /// From 1.
    pub(super) number: u32,
    pub(super) guest: Guest,
    pub(super) dirty: Vec<DirtyBitmap>,
    /// Where pages have to be claimed before they are sent: others send them too.
    pub(super) claims: Option<Arc<Claims>>,
    /// Where pages are compared before they are sent: the target may have them.
    pub(super) seed: Option<Seed>,
    /// What of each disk that travels is to be sent, before any memory.
    pub(super) disks: Vec<DirtyBitmap>,
    disk_slices: Vec<DiskSlice>,
    next_disk_slice: AtomicUsize,
    slices: Vec<Slice>,
    next: AtomicUsize,
    stopped: AtomicBool,
}

impl Round {
    pub(super) fn new(number: u32, guest: Guest, dirty: Vec<DirtyBitmap>, lanes: usize) -> Self {
        Self::cut(number, guest, dirty, lanes, MAX_SLICE_PAGES)
    }

    /// The first round to a target that has kept memory from an earlier stay.
    pub(super) fn comparing(seed: Seed, dirty: Vec<DirtyBitmap>, lanes: usize) -> Self {
        let most = u64::from(MAX_COMPARED_PAGES);
        Self {
            seed: Some(seed),
            ..Self::cut(1, Guest::Runs, dirty, lanes, most)
        }
    }

    fn cut(
        number: u32,
        guest: Guest,
        dirty: Vec<DirtyBitmap>,
        lanes: usize,
        most_pages: u64,
    ) -> Self {
        let slices = slices(&dirty, guest, lanes as u64, most_pages);
        Self {
            number,
            guest,
            dirty,
            claims: None,
            seed: None,
            disks: Vec::new(),
            disk_slices: Vec::new(),
            next_disk_slice: AtomicUsize::new(0),
            slices,
            next: AtomicUsize::new(0),
            stopped: AtomicBool::new(false),
        }
    }

    /// The pages that follow a guest which runs at the target already.
    pub(super) fn following(
        number: u32,
        owed: Vec<DirtyBitmap>,
        lanes: usize,
        claims: Arc<Claims>,
    ) -> Self {
        Self {
            claims: Some(claims),
            ..Self::new(number, Guest::Paused, owed, lanes)
        }
    }

    /// The same round with disks.
    pub(super) fn with_disks(self, changed: Vec<DirtyBitmap>, lanes: usize) -> Self {
        Self {
            disk_slices: disks::cut(&changed, lanes),
            disks: changed,
            ..self
        }
    }

    /// The next slice of a disk for whichever lane asks first.
    pub(super) fn take_disk(&self) -> Option<DiskSlice> {
        self.disk_slices
            .get(self.next_disk_slice.fetch_add(1, Ordering::Relaxed))
            .cloned()
    }

    /// Bytes of disks to send.
    pub(super) fn disk_bytes(&self) -> u64 {
        disks::bytes_of(&self.disks)
    }

    /// The next slice for whichever lane asks first.
    pub(super) fn take(&self) -> Option<Slice> {
        self.slices
            .get(self.next.fetch_add(1, Ordering::Relaxed))
            .cloned()
    }

    /// Bytes of memory to send.
    pub(super) fn bytes(&self) -> u64 {
        bytes_of(&self.dirty)
    }

    /// Every lane breaks off.
    pub(super) fn stop(&self) {
        self.stopped.store(true, Ordering::Relaxed);
    }

    pub(super) fn is_stopped(&self) -> bool {
        self.stopped.load(Ordering::Relaxed)
    }
}

/// Bytes of dirty pages.
pub(super) fn bytes_of(dirty: &[DirtyBitmap]) -> u64 {
    dirty.iter().map(DirtyBitmap::count).sum::<u64>() * PAGE_BYTES
}

fn slices(dirty: &[DirtyBitmap], guest: Guest, lanes: u64, most_pages: u64) -> Vec<Slice> {
    let total = bytes_of(dirty) / PAGE_BYTES;
    let least = match guest {
        Guest::Runs => MIN_RUNNING_SLICE_PAGES,
        Guest::Paused => WORD_PAGES,
    };
    let wanted = (total / (lanes.max(1) * SLICES_PER_LANE)).clamp(least, most_pages);
    let step = wanted.next_multiple_of(WORD_PAGES);
    let mut slices = Vec::new();
    for (slot, bitmap) in dirty.iter().enumerate() {
        for start in (0..bitmap.pages()).step_by(step as usize) {
            let pages = start..(start + step).min(bitmap.pages());
            if bitmap.runs(pages.clone()).next().is_some() {
                slices.push(Slice { slot, pages });
            }
        }
    }
    slices
}

/// What all lanes have sent.
#[derive(Debug, Default)]
pub(super) struct Tally {
    content_pages: AtomicU64,
    zero_pages: AtomicU64,
    kept_pages: AtomicU64,
    bytes: AtomicU64,
    saved_bytes: AtomicU64,
    wanted_pages: AtomicU64,
    disk_content_bytes: AtomicU64,
    disk_zero_bytes: AtomicU64,
}

/// A reading of a [`Tally`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Sent {
    pub(super) content_pages: u64,
    pub(super) zero_pages: u64,
    pub(super) kept_pages: u64,
    pub(super) bytes: u64,
    pub(super) saved_bytes: u64,
    pub(super) wanted_pages: u64,
    pub(super) disk_content_bytes: u64,
    pub(super) disk_zero_bytes: u64,
}

impl Sent {
    /// Shows it in the figures of a migration.
    pub(super) fn show(&self, progress: &mut MigrationProgress) {
        progress.transferred_bytes = Bytes(self.bytes);
        progress.saved_bytes = Bytes(self.saved_bytes);
        progress.content_pages = self.content_pages;
        progress.zero_pages = self.zero_pages;
        progress.kept_pages = self.kept_pages;
        progress.disk_transferred_bytes = Bytes(self.disk_content_bytes);
    }

    /// Bytes of disks sent, of both kinds.
    pub(super) const fn disk_bytes(&self) -> u64 {
        self.disk_content_bytes + self.disk_zero_bytes
    }

    /// Pages sent, of both kinds.
    pub(super) const fn pages(&self) -> u64 {
        self.content_pages + self.zero_pages
    }

    /// Pages sent with their content, and as many as the content of disks would have: it goes over the same link.
    pub(super) const fn content(&self) -> u64 {
        self.content_pages + self.disk_content_bytes / PAGE_BYTES
    }

    /// The same of what needs no content.
    pub(super) const fn bare(&self) -> u64 {
        self.zero_pages + self.kept_pages + self.disk_zero_bytes / PAGE_BYTES
    }

    /// Pages dealt with, sent or not.
    pub(super) const fn settled_pages(&self) -> u64 {
        self.pages() + self.kept_pages
    }
}

impl Tally {
    /// Pages went in a frame of `bytes` that would have had `raw_bytes` without compression.
    pub(super) fn content(&self, pages: u64, bytes: usize, raw_bytes: usize) {
        self.content_pages.fetch_add(pages, Ordering::Relaxed);
        self.bytes.fetch_add(bytes as u64, Ordering::Relaxed);
        self.saved_bytes
            .fetch_add(raw_bytes.saturating_sub(bytes) as u64, Ordering::Relaxed);
    }

    /// Pages went as a count.
    pub(super) fn zeros(&self, pages: u64) {
        self.zero_pages.fetch_add(pages, Ordering::Relaxed);
        self.bytes
            .fetch_add(FRAME_HEADER_BYTES as u64, Ordering::Relaxed);
    }

    /// Content of a disk went in a frame of `frame_bytes` that would have had `raw_bytes` without compression.
    pub(super) fn disk_content(&self, bytes: u64, frame_bytes: usize, raw_bytes: usize) {
        self.disk_content_bytes.fetch_add(bytes, Ordering::Relaxed);
        self.bytes.fetch_add(frame_bytes as u64, Ordering::Relaxed);
        let saved = raw_bytes.saturating_sub(frame_bytes) as u64;
        self.saved_bytes.fetch_add(saved, Ordering::Relaxed);
    }

    /// Zeros of a disk went as a count.
    pub(super) fn disk_zeros(&self, bytes: u64) {
        self.disk_zero_bytes.fetch_add(bytes, Ordering::Relaxed);
        self.bytes
            .fetch_add(FRAME_HEADER_BYTES as u64, Ordering::Relaxed);
    }

    /// Pages need not go.
    pub(super) fn kept(&self, pages: u64) {
        self.kept_pages.fetch_add(pages, Ordering::Relaxed);
    }

    /// A question and its answer of `payload` bytes went over the wire.
    pub(super) fn compared(&self, payload: usize) {
        let bytes = 2 * FRAME_HEADER_BYTES + payload;
        self.bytes.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    /// A page went because the guest waited for it.
    pub(super) fn wanted(&self) {
        self.wanted_pages.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn read(&self) -> Sent {
        Sent {
            content_pages: self.content_pages.load(Ordering::Relaxed),
            zero_pages: self.zero_pages.load(Ordering::Relaxed),
            kept_pages: self.kept_pages.load(Ordering::Relaxed),
            bytes: self.bytes.load(Ordering::Relaxed),
            saved_bytes: self.saved_bytes.load(Ordering::Relaxed),
            wanted_pages: self.wanted_pages.load(Ordering::Relaxed),
            disk_content_bytes: self.disk_content_bytes.load(Ordering::Relaxed),
            disk_zero_bytes: self.disk_zero_bytes.load(Ordering::Relaxed),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn the_lanes_together_send_every_dirty_page_once(
            words in prop::collection::vec(prop_oneof![Just(0), any::<u64>()], 1..200),
            cut in 0u64..64,
            lanes in 1usize..16,
            runs in any::<bool>(),
            compares in any::<bool>(),
        ) {
            let pages = words.len() as u64 * 64 - cut;
            let bitmap = DirtyBitmap::new(words, pages);
            let guest = if runs { Guest::Runs } else { Guest::Paused };
            let round = match compares {
                true => Round::comparing(Seed(1), vec![bitmap.clone()], lanes),
                false => Round::new(1, guest, vec![bitmap.clone()], lanes),
            };
            let mut sent = vec![0u8; pages as usize];
            while let Some(slice) = round.take() {
                prop_assert!(slice.pages.start.is_multiple_of(WORD_PAGES));
                let pages = slice.pages.end - slice.pages.start;
                prop_assert!(!compares || pages <= u64::from(MAX_COMPARED_PAGES));
                for (first, number) in bitmap.runs(slice.pages.clone()) {
                    (first..first + number).for_each(|page| sent[page as usize] += 1);
                }
            }
            for page in 0..pages {
                let dirty = bitmap.runs(page..page + 1).next().is_some();
                prop_assert_eq!(sent[page as usize], u8::from(dirty));
            }
        }
    }
}
