//! Guest memory as frames: content as it is, zeros as a count.

use super::stream::StreamError;
use crate::kvm::{DirtyBitmap, DirtyLog, KvmError};
use crate::memory::{GuestRam, RamError};
use godwit_wire::migration::{FRAME_HEADER_BYTES, FrameHeader, MAX_FRAME_PAGES};
use godwit_wire::unit::PAGE_BYTES;
use std::io::Write;

const PAGE: usize = PAGE_BYTES as usize;
/// Pages whose dirty bits are cleared together, just before they are copied (8 MiB; a multiple of 64).
const SLICE_PAGES: u64 = 2048;
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
pub(super) struct PageSender<'a, W> {
    ram: &'a GuestRam,
    out: W,
    /// One frame: header, then content.
    frame: Vec<u8>,
    /// Zero run that may still grow: (address, pages).
    zeros: Option<(u64, u64)>,
    sent: Sent,
}

impl<'a, W: Write> PageSender<'a, W> {
    pub(super) fn new(ram: &'a GuestRam, out: W) -> Self {
        let frame = vec![0; FRAME_HEADER_BYTES + MAX_FRAME_PAGES as usize * PAGE];
        Self {
            ram,
            out,
            frame,
            zeros: None,
            sent: Sent::default(),
        }
    }

    /// What was sent so far.
    pub(super) const fn sent(&self) -> Sent {
        self.sent
    }

    /// The connection, for control messages between rounds.
    pub(super) const fn out(&mut self) -> &mut W {
        &mut self.out
    }

    /// Sends every page that `dirty` names. `observe` sees the figures after each frame and may stop it.
    pub(super) fn send_round(
        &mut self,
        log: &DirtyLog,
        dirty: &[DirtyBitmap],
        guest: Guest,
        mut observe: impl FnMut(Sent) -> std::ops::ControlFlow<()>,
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

    fn send_run(
        &mut self,
        mut address: u64,
        mut pages: u64,
        observe: &mut impl FnMut(Sent) -> std::ops::ControlFlow<()>,
    ) -> Result<(), PagesError> {
        while pages > 0 {
            let Some((skip, resident)) = self.ram.next_resident(address, pages)? else {
                return self.note_zeros(address, pages);
            };
            if skip > 0 {
                self.note_zeros(address, skip)?;
                address += skip * PAGE_BYTES;
            }
            for offset in (0..resident).step_by(MAX_FRAME_PAGES as usize) {
                let chunk = (resident - offset).min(u64::from(MAX_FRAME_PAGES));
                self.send_chunk(address + offset * PAGE_BYTES, chunk as usize)?;
                if observe(self.sent).is_break() {
                    return Err(PagesError::Stopped);
                }
            }
            address += resident * PAGE_BYTES;
            pages -= skip + resident;
        }
        Ok(())
    }

    /// Copies up to one frame of pages out of the guest and sends them, zeros apart. The copy makes sure that what
    /// was judged is what is sent, while the guest goes on writing.
    fn send_chunk(&mut self, address: u64, pages: usize) -> Result<(), PagesError> {
        self.ram.read(
            address,
            &mut self.frame[FRAME_HEADER_BYTES..FRAME_HEADER_BYTES + pages * PAGE],
        )?;
        let is_zero = |frame: &[u8], page: usize| {
            frame[FRAME_HEADER_BYTES + page * PAGE..FRAME_HEADER_BYTES + (page + 1) * PAGE]
                == ZERO_PAGE
        };
        let mut page = 0;
        while page < pages {
            let zero = is_zero(&self.frame, page);
            let end = (page + 1..pages)
                .find(|&next| is_zero(&self.frame, next) != zero)
                .unwrap_or(pages);
            let start = address + (page * PAGE) as u64;
            if zero {
                self.note_zeros(start, (end - page) as u64)?;
            } else {
                self.flush_zeros()?;
                // The header goes right before the content: over pages of this frame that are dealt with.
                let from = page * PAGE;
                let header = FrameHeader::pages(start, (end - page) as u32).encode();
                self.frame[from..from + FRAME_HEADER_BYTES].copy_from_slice(&header);
                let to = FRAME_HEADER_BYTES + end * PAGE;
                self.out
                    .write_all(&self.frame[from..to])
                    .map_err(StreamError::from)?;
                self.sent.content_pages += (end - page) as u64;
                self.sent.bytes += (to - from) as u64;
            }
            page = end;
        }
        Ok(())
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
            let header = FrameHeader::zero(address, pages as u32);
            self.out
                .write_all(&header.encode())
                .map_err(StreamError::from)?;
            self.sent.zero_pages += pages;
            self.sent.bytes += FRAME_HEADER_BYTES as u64;
        }
        Ok(())
    }
}
