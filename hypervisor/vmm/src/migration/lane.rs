//! One connection that carries pages to the target: content as it is or compressed, zeros as a count.

mod disk;

use super::claims::Claims;
use super::compare::{Fate, Seed, Theirs};
use super::pace::Pace;
use super::places::Turn;
use super::round::{Guest, Round, Slice, Tally};
use super::squeeze::Squeeze;
use super::stream::{FrameStream, StreamError};
use crate::kvm::{DirtyLog, KvmError};
use crate::memory::{GuestRam, RamError};
use disk::DiskState;
use godwit_devices::block::{ContentError, LeavingDisk};
use godwit_wire::migration::{
    FRAME_HEADER_BYTES, FrameHeader, FrameKind, HeldError, HeldPages, ToTarget,
};
use godwit_wire::unit::PAGE_BYTES;
use std::ops::Range;
use std::time::Instant;

const PAGE: usize = PAGE_BYTES as usize;
/// Pages copied out of guest memory at a time (256 KiB): they stay in the CPU's cache until they are sent.
const CHUNK_PAGES: u64 = 64;
/// Pages around a wanted one that go with it (64 KiB): what lies together is used together.
const NEIGHBOUR_PAGES: u64 = 16;
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
    #[error(transparent)]
    Disk(#[from] ContentError),
    /// No memory is there.
    #[error("the target wants a page at {0:#x}, where the guest has no memory")]
    NoSuchPage(u64),
    /// The target contradicts itself.
    #[error("the target says what it has kept, and that cannot be: {0}")]
    Held(#[from] HeldError),
    /// The round was called off.
    #[error("cancelled")]
    Stopped,
}

/// A lane at the source.
pub(super) struct Lane<'a> {
    ram: &'a GuestRam,
    log: &'a DirtyLog,
    disks: &'a [LeavingDisk],
    pace: &'a Pace,
    tally: &'a Tally,
    out: FrameStream,
    /// Room for a header and a chunk.
    buffer: Vec<u8>,
    packed: Vec<u8>,
    squeeze: Squeeze,
    /// Memory known to have been touched; it stays so while the guest runs.
    touched: Range<u64>,
    /// Zero run that may still grow: (address, pages).
    zeros: Option<(u64, u64)>,
    /// What the target holds of the slice that is being sent, where that is compared.
    theirs: Option<Theirs>,
    pages: u64,
    disk: DiskState,
}

impl<'a> Lane<'a> {
    pub(super) fn new(
        out: FrameStream,
        (ram, log, disks): (&'a GuestRam, &'a DirtyLog, &'a [LeavingDisk]),
        pace: &'a Pace,
        tally: &'a Tally,
        squeeze: Squeeze,
    ) -> Self {
        let room = FRAME_HEADER_BYTES + CHUNK_PAGES as usize * PAGE;
        Self {
            ram,
            log,
            disks,
            pace,
            tally,
            out,
            buffer: vec![0; room],
            packed: Vec::new(),
            squeeze,
            touched: 0..0,
            zeros: None,
            theirs: None,
            pages: 0,
            disk: DiskState::default(),
        }
    }

    /// Sends slices of `round` when it is this lane's turn, until none is left, and that this was all.
    pub(super) fn send(&mut self, round: &Round, turn: Turn<'_>) -> Result<(), PagesError> {
        // Disks first: in a long first round memory is then copied last, when it is freshest.
        self.send_disks(round, turn)?;
        match round.seed {
            None => {
                while let Some(slice) = turn.take(round) {
                    self.send_slice(round, &slice)?;
                }
            }
            Some(seed) => self.compare_and_send(round, seed, turn)?,
        }
        // A lane that rested may learn of it only here.
        if round.is_stopped() {
            return Err(PagesError::Stopped);
        }
        self.flush_zeros(round.number)?;
        Ok(self.out.send(&ToTarget::EndOfRound {
            round: round.number,
            pages: self.pages,
            disk_bytes: self.disk.bytes,
        })?)
    }

    /// Asks what the target holds of each slice of `round` and sends what differs. It is asked about the next slice
    /// before this one is sent, so that it hashes while this end compares.
    fn compare_and_send(
        &mut self,
        round: &Round,
        seed: Seed,
        turn: Turn<'_>,
    ) -> Result<(), PagesError> {
        let mut next = self.ask(round, turn.take(round))?;
        while let Some((slice, asked)) = next {
            next = self.ask(round, turn.take_at_once(round))?;
            let held = self.hear_what_is_held(&asked)?;
            self.theirs = Some(Theirs::new(seed, asked.address, held));
            self.send_slice(round, &slice)?;
            self.theirs = None;
            if next.is_none() {
                // It may only have to rest; then it does so with nothing in hand.
                next = self.ask(round, turn.take(round))?;
            }
        }
        Ok(())
    }

    fn ask(
        &mut self,
        round: &Round,
        slice: Option<Slice>,
    ) -> Result<Option<(Slice, FrameHeader)>, PagesError> {
        if round.is_stopped() {
            return Err(PagesError::Stopped);
        }
        let Some(slice) = slice else {
            return Ok(None);
        };
        let start = self.log.slots()[slice.slot].guest_address;
        let pages = (slice.pages.end - slice.pages.start) as u32;
        let asked = FrameHeader::compare(start + slice.pages.start * PAGE_BYTES, pages);
        self.out.send_frame(asked, &[])?;
        Ok(Some((slice, asked)))
    }

    fn hear_what_is_held(&mut self, asked: &FrameHeader) -> Result<HeldPages, PagesError> {
        let announced = self.out.announced()?;
        if announced.header.kind != FrameKind::Held {
            return Err(PagesError::Stream(StreamError::Unexpected {
                got: announced.header.kind,
                expected: "what the target holds",
            }));
        }
        let payload = self.out.payload(&announced)?;
        self.tally.compared(payload.len());
        Ok(HeldPages::decode(asked, &announced.header, &payload)?)
    }

    fn send_slice(&mut self, round: &Round, slice: &Slice) -> Result<(), PagesError> {
        let bitmap = &round.dirty[slice.slot];
        if round.guest == Guest::Runs {
            self.log.clear(slice.slot, bitmap, slice.pages.clone())?;
        }
        let start = self.log.slots()[slice.slot].guest_address;
        for (first, pages) in bitmap.runs(slice.pages.clone()) {
            match &round.claims {
                None => self.send_run(round, start + first * PAGE_BYTES, pages)?,
                Some(claims) => {
                    self.send_claimed(round, claims, slice.slot, first..first + pages)?
                }
            }
        }
        Ok(())
    }

    /// Sends each page of `round` that the guest at the target waits for, and after it its neighbours, until the
    /// connection ends.
    pub(super) fn serve(&mut self, round: &Round, claims: &Claims) -> Result<(), PagesError> {
        loop {
            let announced = self.out.announced()?;
            let header = announced.header;
            if header.kind != FrameKind::Want {
                return Err(PagesError::Stream(StreamError::Unexpected {
                    got: header.kind,
                    expected: "the address of a page",
                }));
            }
            self.out.read_payload(&announced, &mut [])?;
            let (slot, page) = claims
                .place(header.address)
                .ok_or(PagesError::NoSuchPage(header.address))?;
            let around = page / NEIGHBOUR_PAGES * NEIGHBOUR_PAGES;
            let end = (around + NEIGHBOUR_PAGES).min(claims.pages(slot));
            self.send_claimed(round, claims, slot, page..page + 1)?;
            self.send_claimed(round, claims, slot, page..end)?;
            self.send_claimed(round, claims, slot, around..page)?;
            self.out.send_frame(FrameHeader::served(), &[])?;
            self.tally.wanted();
        }
    }

    /// Sends what nobody else has claimed of these pages. Few are claimed at a time: what is claimed cannot be
    /// preferred any more when the guest comes to wait for it.
    fn send_claimed(
        &mut self,
        round: &Round,
        claims: &Claims,
        slot: usize,
        pages: Range<u64>,
    ) -> Result<(), PagesError> {
        let mut next = pages.start;
        while next < pages.end {
            let stop = pages.end.min(next + CHUNK_PAGES);
            for (first, number) in claims.claim(slot, next..stop) {
                self.send_run(round, claims.address(slot, first), number)?;
            }
            // Somebody may be waiting for one of them.
            self.flush_zeros(round.number)?;
            next = stop;
        }
        Ok(())
    }

    /// Sends the `pages` pages from `address` on; their dirty bits are clear by now, so whatever the guest writes
    /// from here on is noted for the next round.
    fn send_run(&mut self, round: &Round, address: u64, pages: u64) -> Result<(), PagesError> {
        let end = address + pages * PAGE_BYTES;
        let mut next = address;
        while next < end {
            if round.is_stopped() {
                return Err(PagesError::Stopped);
            }
            if !self.touched.contains(&next) {
                // Asked only now, behind the clearing: memory that is untouched at this moment is zero, and if it
                // is touched later that is noted.
                self.touched = self.ram.next_touched(next)?.unwrap_or(end..end);
                let untouched = self.touched.start.min(end) - next;
                if untouched > 0 {
                    self.note_untouched(round.number, next, untouched / PAGE_BYTES)?;
                    next += untouched;
                    continue;
                }
            }
            let stop = end
                .min(self.touched.end)
                .min(next + CHUNK_PAGES * PAGE_BYTES);
            self.send_chunk(round, next, (stop - next) as usize)?;
            next = stop;
        }
        Ok(())
    }

    /// Sends that pages are zero which were never touched here, where the target does not know that.
    fn note_untouched(&mut self, round: u32, address: u64, pages: u64) -> Result<(), PagesError> {
        let Some(theirs) = self.theirs.take() else {
            return self.note_zeros(round, address, pages);
        };
        for page in 0..pages {
            let address = address + page * PAGE_BYTES;
            match theirs.fate_of_untouched(address) {
                Fate::Kept => self.tally.kept(1),
                Fate::Zero | Fate::Content => self.note_zeros(round, address, 1)?,
            }
        }
        self.theirs = Some(theirs);
        Ok(())
    }

    /// Sends up to a chunk of touched pages, zero pages apart and without those that the target has. They are copied
    /// first, so that a checksum is of what is sent even if the guest writes meanwhile; the page is dirty again then
    /// and its next copy settles it.
    fn send_chunk(&mut self, round: &Round, address: u64, bytes: usize) -> Result<(), PagesError> {
        let chunk = FRAME_HEADER_BYTES..FRAME_HEADER_BYTES + bytes;
        self.ram.read(address, &mut self.buffer[chunk.clone()])?;
        let guest_address = |at: usize| address + (at - chunk.start) as u64;
        let mut content = chunk.start..chunk.start;
        for at in chunk.clone().step_by(PAGE) {
            let fate = self.fate(guest_address(at), at);
            if fate == Fate::Content {
                content.end = at + PAGE;
                continue;
            }
            self.send_content(round, guest_address(content.start), content)?;
            content = at + PAGE..at + PAGE;
            match fate {
                Fate::Kept => self.tally.kept(1),
                Fate::Zero | Fate::Content => {
                    self.note_zeros(round.number, guest_address(at), 1)?
                }
            }
        }
        self.send_content(round, guest_address(content.start), content)
    }

    /// What is to be done with the page at this place in the buffer.
    fn fate(&self, address: u64, at: usize) -> Fate {
        let page = &self.buffer[at..at + PAGE];
        match (&self.theirs, *page == ZERO_PAGE) {
            (Some(theirs), zero) => theirs.fate(address, page, zero),
            (None, true) => Fate::Zero,
            (None, false) => Fate::Content,
        }
    }

    fn send_content(
        &mut self,
        round: &Round,
        address: u64,
        range: Range<usize>,
    ) -> Result<(), PagesError> {
        if range.is_empty() {
            return Ok(());
        }
        self.flush_zeros(round.number)?;
        self.send_pages(round, address, range)
    }

    fn send_pages(
        &mut self,
        round: &Round,
        address: u64,
        range: Range<usize>,
    ) -> Result<(), PagesError> {
        let (pages, bytes) = (range.len() / PAGE, range.len());
        let raw = FrameHeader::pages(round.number, address, pages as u32);
        let sent = self.send_framed(round, raw, range)?;
        self.pages += pages as u64;
        self.tally
            .content(pages as u64, sent, FRAME_HEADER_BYTES + bytes);
        Ok(())
    }

    /// Sends what is in `range` of the buffer behind `raw`, compressed if that pays; the length of the frame. What stood
    /// before it in the buffer has been dealt with and gives room for the header.
    fn send_framed(
        &mut self,
        round: &Round,
        raw: FrameHeader,
        range: Range<usize>,
    ) -> Result<usize, PagesError> {
        let begun = Instant::now();
        let packed = self.squeeze.next().then(|| {
            self.packed.resize(
                FRAME_HEADER_BYTES + lz4_flex::block::get_maximum_output_size(range.len()),
                0,
            );
            let room = &mut self.packed[FRAME_HEADER_BYTES..];
            let length = lz4_flex::block::compress_into(&self.buffer[range.clone()], room)
                .expect("there is room for the worst case");
            self.squeeze
                .compressed(range.len(), length, begun.elapsed());
            length
        });
        let frame = match packed {
            Some(length) if length < range.len() => {
                let frame = &mut self.packed[..FRAME_HEADER_BYTES + length];
                let (head, payload) = frame.split_at_mut(FRAME_HEADER_BYTES);
                head.copy_from_slice(&raw.compressed(length as u32).encode(payload));
                &*frame
            }
            _ => {
                let frame = &mut self.buffer[range.start - FRAME_HEADER_BYTES..range.end];
                let (head, payload) = frame.split_at_mut(FRAME_HEADER_BYTES);
                head.copy_from_slice(&raw.encode(payload));
                &*frame
            }
        };
        self.pace.wait(frame.len(), || round.is_stopped());
        if round.is_stopped() {
            return Err(PagesError::Stopped);
        }
        let begun = Instant::now();
        self.out.write(frame)?;
        self.squeeze.sent(frame.len(), begun.elapsed());
        Ok(frame.len())
    }

    fn note_zeros(&mut self, round: u32, address: u64, pages: u64) -> Result<(), PagesError> {
        match &mut self.zeros {
            Some((start, run))
                if *start + *run * PAGE_BYTES == address && *run + pages <= u64::from(u32::MAX) =>
            {
                *run += pages;
            }
            _ => {
                self.flush_zeros(round)?;
                self.zeros = Some((address, pages));
            }
        }
        Ok(())
    }

    fn flush_zeros(&mut self, round: u32) -> Result<(), PagesError> {
        if let Some((address, pages)) = self.zeros.take() {
            self.out
                .send_frame(FrameHeader::zero(round, address, pages as u32), &[])?;
            self.pages += pages;
            self.tally.zeros(pages);
        }
        Ok(())
    }
}
