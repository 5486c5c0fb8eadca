//! Guest memory as frames: content as it is, zeros as a count.

use super::stream::{FrameStream, StreamError};
use crate::kvm::{DirtyBitmap, DirtyLog, KvmError};
use crate::memory::{GuestRam, RamError};
use godwit_wire::migration::{FRAME_HEADER_BYTES, FrameHeader, MAX_FRAME_PAGES};
use godwit_wire::unit::PAGE_BYTES;
use std::ops::{ControlFlow, Range};

const PAGE: usize = PAGE_BYTES as usize;
/// Pages whose dirty bits are cleared together, just before they are copied (8 MiB; a multiple of 64).
const SLICE_PAGES: u64 = 2048;
/// Bytes looked at first to tell a zero page from another: one cache line.
const PROBE_BYTES: usize = 64;
static ZERO_PAGE: [u8; PAGE] = [0; PAGE];

/// Pages cannot be read or sent.
#[derive(Debug, thiserror::Error)]
pub(super) enum PagesError {
    #[error(transparent)]
    Stream(#[from] StreamError),
    #[error(transparent)]
    Ram(#[from] RamError),
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// The observer called it off.
    #[error("cancelled")]
    Stopped,
}

/// Whether dirty bits are cleared while pages are sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Guest {
    /// It runs: what it writes from now on must be noted.
    Runs,
    /// It stands still: nothing can become dirty.
    Paused,
}

/// Figures of what was sent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Sent {
    pub(super) content_pages: u64,
    pub(super) zero_pages: u64,
    pub(super) bytes: u64,
}

impl Sent {
    /// Pages of both kinds.
    pub(super) const fn pages(&self) -> u64 {
        self.content_pages + self.zero_pages
    }
}

/// Writes pages to a connection.
pub(super) struct PageSender<'a> {
    ram: &'a GuestRam,
    out: FrameStream,
    scratch: Box<[u8; PAGE]>,
    /// Memory known to have been touched; it stays so while the guest runs.
    touched: Range<u64>,
    /// Zero run that may still grow: (address, pages).
    zeros: Option<(u64, u64)>,
    sent: Sent,
}

impl<'a> PageSender<'a> {
    pub(super) fn new(ram: &'a GuestRam, out: FrameStream) -> Self {
        Self {
            ram,
            out,
            scratch: Box::new([0; PAGE]),
            touched: 0..0,
            zeros: None,
            sent: Sent::default(),
        }
    }

    /// What was sent so far.
    pub(super) const fn sent(&self) -> Sent {
        self.sent
    }

    /// The connection, for control messages between rounds.
    pub(super) const fn out(&mut self) -> &mut FrameStream {
        &mut self.out
    }

    /// Sends every page that `dirty` names. `observe` sees the figures after each frame and may stop it.
    pub(super) fn send_round(
        &mut self,
        log: &DirtyLog,
        dirty: &[DirtyBitmap],
        guest: Guest,
        mut observe: impl FnMut(Sent) -> ControlFlow<()>,
    ) -> Result<(), PagesError> {
        for (index, (slot, bitmap)) in log.slots().iter().zip(dirty).enumerate() {
            for start in (0..bitmap.pages()).step_by(SLICE_PAGES as usize) {
                let slice = start..(start + SLICE_PAGES).min(bitmap.pages());
                let mut runs = bitmap.runs(slice.clone()).peekable();
                if runs.peek().is_none() {
                    continue;
                }
                if guest == Guest::Runs {
                    log.clear(index, bitmap, slice.clone())?;
                }
                for (first, pages) in runs {
                    self.send_run(slot.guest_address + first * PAGE_BYTES, pages, &mut observe)?;
                }
            }
        }
        self.flush_zeros()
    }

    /// Sends the `pages` pages from `address` on; their dirty bits are clear by now, so whatever the guest writes
    /// from here on is noted for the next round.
    fn send_run(
        &mut self,
        address: u64,
        pages: u64,
        observe: &mut impl FnMut(Sent) -> ControlFlow<()>,
    ) -> Result<(), PagesError> {
        let end = address + pages * PAGE_BYTES;
        let mut next = address;
        while next < end {
            if !self.touched.contains(&next) {
                // Asked only now, behind the clearing: memory that is untouched at this moment is zero, and if it
                // is touched later that is noted.
                self.touched = self.ram.next_touched(next)?.unwrap_or(end..end);
                let untouched = self.touched.start.min(end) - next;
                if untouched > 0 {
                    self.note_zeros(next, untouched / PAGE_BYTES)?;
                    next += untouched;
                    continue;
                }
            }
            let stop = end
                .min(self.touched.end)
                .min(next + u64::from(MAX_FRAME_PAGES) * PAGE_BYTES);
            self.send_chunk(next, stop)?;
            next = stop;
            if observe(self.sent).is_break() {
                return Err(PagesError::Stopped);
            }
        }
        Ok(())
    }

    /// Sends up to one frame of touched pages, zero pages apart. Content goes from guest memory straight to the
    /// connection: if the guest writes meanwhile, the page is dirty again and its next copy settles it.
    fn send_chunk(&mut self, start: u64, end: u64) -> Result<(), PagesError> {
        let mut page = start;
        while page < end {
            if self.is_zero(page)? {
                self.note_zeros(page, 1)?;
                page += PAGE_BYTES;
                continue;
            }
            let mut stop = page + PAGE_BYTES;
            while stop < end && !self.is_zero(stop)? {
                stop += PAGE_BYTES;
            }
            self.flush_zeros()?;
            let pages = (stop - page) / PAGE_BYTES;
            self.out.send_memory(
                FrameHeader::pages(page, pages as u32),
                &self.ram.slice(page, stop - page)?,
            )?;
            self.sent.content_pages += pages;
            self.sent.bytes += FRAME_HEADER_BYTES as u64 + (stop - page);
            page = stop;
        }
        Ok(())
    }

    /// Whether a page is all zero. Most pages that are not show it in their first bytes.
    fn is_zero(&mut self, page: u64) -> Result<bool, PagesError> {
        for probe in [0..PROBE_BYTES, PROBE_BYTES..PAGE] {
            let bytes = &mut self.scratch[probe.clone()];
            self.ram.read(page + probe.start as u64, bytes)?;
            if *bytes != ZERO_PAGE[probe] {
                return Ok(false);
            }
        }
        Ok(true)
    }

    fn note_zeros(&mut self, address: u64, pages: u64) -> Result<(), PagesError> {
        match &mut self.zeros {
            Some((start, run))
                if *start + *run * PAGE_BYTES == address && *run + pages <= u64::from(u32::MAX) =>
            {
                *run += pages;
            }
            _ => {
                self.flush_zeros()?;
                self.zeros = Some((address, pages));
            }
        }
        Ok(())
    }

    fn flush_zeros(&mut self) -> Result<(), PagesError> {
        if let Some((address, pages)) = self.zeros.take() {
            self.out
                .send_frame(FrameHeader::zero(address, pages as u32), &[])?;
            self.sent.zero_pages += pages;
            self.sent.bytes += FRAME_HEADER_BYTES as u64;
        }
        Ok(())
    }
}
