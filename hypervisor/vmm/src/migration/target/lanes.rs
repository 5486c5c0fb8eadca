//! The receiving ends of the lanes: pages go into guest memory as they come, each lane on a thread of its own.

use super::disks::{self, Arriving};
use super::pull::Pull;
use super::{Session, TargetError};
use crate::memory::GuestRam;
use crate::migration::compare::Holder;
use crate::migration::stream::{FrameStream, SILENCE_LIMIT, StreamError};
use godwit_wire::migration::{
    Codec, FRAME_HEADER_BYTES, FrameHeader, FrameKind, MAX_FRAME_PAGES, ToTarget,
};
use godwit_wire::unit::PAGE_BYTES;
use std::io::ErrorKind;
use std::net::{Shutdown, TcpStream};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread::Scope;
use std::time::{Duration, Instant};
use vm_memory::VolatileSlice;
use vm_memory::bitmap::{AtomicBitmap, BS};

/// What has arrived on all lanes.
pub(super) struct Arrivals {
    inner: Mutex<Inner>,
    changed: Condvar,
    /// How long lanes may take to end a round after the source has.
    patience: Duration,
    /// Where pages go that the guest may be waiting for.
    pull: OnceLock<(Arc<Pull>, u64)>,
}

struct Inner {
    /// Last round that is whole, per lane.
    rounds: Vec<u32>,
    received: Received,
    /// Pages that the source asked for.
    asked_pages: u64,
    failed: Option<TargetError>,
    /// Which lanes have ended between rounds, as all do when the source is done with them; others may still have to
    /// be read to their end then.
    ended: Vec<bool>,
    /// Lanes that are writing into guest memory, and whether none may any more.
    writing: usize,
    sealed: bool,
}

/// A lane writes into guest memory as long as this is there.
struct Writing<'a>(&'a Arrivals);

impl Drop for Writing<'_> {
    fn drop(&mut self) {
        self.0.lock().writing -= 1;
    }
}

/// Figures of what arrived.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Received {
    pub(super) pages: u64,
    pub(super) zero_pages: u64,
    pub(super) bytes: u64,
    /// Of disks, with their content and as zeros.
    pub(super) disk_bytes: u64,
    pub(super) disk_content_bytes: u64,
}

impl Arrivals {
    pub(super) fn new(lanes: usize, patience: Duration) -> Self {
        Self {
            inner: Mutex::new(Inner {
                rounds: vec![0; lanes],
                received: Received::default(),
                asked_pages: 0,
                failed: None,
                ended: vec![false; lanes],
                writing: 0,
                sealed: false,
            }),
            changed: Condvar::new(),
            patience,
            pull: OnceLock::new(),
        }
    }

    /// Of memory that follows.
    pub(super) fn following(lanes: usize, pull: Arc<Pull>, link: u64) -> Self {
        let arrivals = Self::new(lanes, SILENCE_LIMIT);
        arrivals.follow(pull, link);
        arrivals
    }

    /// From here on pages follow a guest that is here, over the link with this number.
    pub(super) fn follow(&self, pull: Arc<Pull>, link: u64) {
        // Asked for once for each set of lanes.
        let _ = self.pull.set((pull, link));
    }

    /// What has arrived so far.
    pub(super) fn received(&self) -> Received {
        self.lock().received
    }

    /// Why a lane gave up, if one did; asked for once.
    pub(super) fn take_failure(&self) -> Option<TargetError> {
        self.lock().failed.take()
    }

    /// Waits until `round` is whole on every lane; then so many pages and bytes of disks must be there.
    pub(super) fn wait_for(
        &self,
        round: u32,
        (pages, disk_bytes): (u64, u64),
    ) -> Result<(), TargetError> {
        let deadline = Instant::now() + self.patience;
        let mut inner = self.lock();
        while inner.rounds.iter().any(|whole| *whole < round) {
            if let Some(failed) = inner.failed.take() {
                return Err(failed);
            }
            let mut lanes = inner.rounds.iter().zip(&inner.ended);
            if lanes.any(|(whole, ended)| *whole < round && *ended) {
                return Err(TargetError::LaneEnded(round));
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(TargetError::RoundIncomplete(round));
            }
            inner = self
                .changed
                .wait_timeout(inner, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
        let received = inner.received;
        if received.pages != pages {
            Err(TargetError::PagesMissing(received.pages, pages))
        } else if received.disk_bytes != disk_bytes {
            let arrived = received.disk_bytes;
            Err(TargetError::DiskBytesMissing(arrived, disk_bytes))
        } else {
            Ok(())
        }
    }

    /// Everything is here: nothing is written any more but what follows a guest that may be waiting for it. A source that
    /// has begun to send something else has not kept to its own word.
    pub(super) fn seal(&self) -> Result<(), TargetError> {
        let mut inner = self.lock();
        inner.sealed = true;
        match inner.writing {
            0 => Ok(()),
            _ => Err(too_late()),
        }
    }

    fn begin_writing(&self) -> Result<Writing<'_>, TargetError> {
        let mut inner = self.lock();
        if inner.sealed {
            return Err(too_late());
        }
        inner.writing += 1;
        Ok(Writing(self))
    }

    fn note(&self, note: impl FnOnce(&mut Inner)) {
        note(&mut self.lock());
        self.changed.notify_all();
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What a page or disk frame brings.
pub(super) enum Content<'a> {
    Zeros,
    Bytes(&'a [u8]),
}

impl<'a> Content<'a> {
    /// Reads the payload of a page or disk frame; `room` is for what has to be unpacked.
    pub(super) fn of(
        header: &FrameHeader,
        payload: &'a [u8],
        room: &'a mut Vec<u8>,
    ) -> Result<Self, TargetError> {
        match (header.kind, header.codec) {
            (FrameKind::Zero | FrameKind::DiskZero, _) => Ok(Self::Zeros),
            (_, Codec::Raw) => Ok(Self::Bytes(payload)),
            (_, Codec::Lz4) => {
                let bytes = header.content_bytes() as usize;
                room.resize(bytes, 0);
                match lz4_flex::block::decompress_into(payload, room) {
                    Ok(unpacked) if unpacked == bytes => Ok(Self::Bytes(room)),
                    _ => Err(TargetError::BadCompression),
                }
            }
        }
    }
}

impl Session<'_> {
    /// Puts lanes to work that begin with `first_round`.
    pub(super) fn take_in<'scope>(
        &'scope self,
        scope: &'scope Scope<'scope, '_>,
        (lanes, first_round): (Vec<FrameStream>, u32),
        (holder, disk_order): (impl Fn() -> Option<Holder>, &'scope [usize]),
        arrivals: &Arc<Arrivals>,
        control: &FrameStream,
    ) -> Result<(), TargetError> {
        for (lane, stream) in lanes.into_iter().enumerate() {
            let waker = control.socket().map_err(StreamError::from)?;
            let intake = Intake {
                ram: self.ram,
                disks: &self.disks,
                disk_order,
                arrivals: arrivals.clone(),
                lane,
                stream,
                first_round,
                holder: holder(),
            };
            scope.spawn(move || intake.run(&waker));
        }
        Ok(())
    }
}

/// One lane's receiving end.
struct Intake<'a> {
    ram: &'a GuestRam,
    disks: &'a Arriving,
    /// The disks as frames number them.
    disk_order: &'a [usize],
    arrivals: Arc<Arrivals>,
    lane: usize,
    stream: FrameStream,
    /// Rounds before it came over other connections.
    first_round: u32,
    /// Where there is memory from before: in the first round the source asks what of it is there.
    holder: Option<Holder>,
}

impl Intake<'_> {
    /// Takes pages until the lane ends. If it ends for a reason of its own, `control` is woken, whose owner asks why.
    ///
    /// A lane that ends between rounds has done its part: the source ends them all when everything is sent, which may
    /// be seen here before what it sent on the control connection.
    fn run(mut self, control: &TcpStream) {
        if let Err(error) = self.take_rounds() {
            if let Some((pull, link)) = self.arrivals.pull.get() {
                return pull.broke(*link, &error.to_string());
            }
            if matches!(error, TargetError::LaneEnded(_)) {
                return self.arrivals.note(|inner| inner.ended[self.lane] = true);
            }
            self.arrivals.note(|inner| {
                inner.failed.get_or_insert(error);
            });
            // It may be down already.
            let _ = control.shutdown(Shutdown::Read);
        }
    }

    fn take_rounds(&mut self) -> Result<(), TargetError> {
        let mut payload = vec![0; MAX_FRAME_PAGES as usize * PAGE_BYTES as usize];
        let mut room = Vec::new();
        let (mut round, mut pages, mut disk_bytes) = (self.first_round, 0, 0);
        let mut before = (pages, disk_bytes);
        let mut unflushed = self.disks.unflushed();
        loop {
            let announced = match self.stream.announced() {
                Err(StreamError::Io(error))
                    if error.kind() == ErrorKind::UnexpectedEof
                        && (pages, disk_bytes) == before =>
                {
                    return Err(TargetError::LaneEnded(round));
                }
                announced => announced?,
            };
            let header = announced.header;
            match header.kind {
                FrameKind::Pages | FrameKind::Zero => {
                    check_round(&header, round)?;
                    // Judged before anything is read for it.
                    let place = place(self.ram, &header)?;
                    let payload = &mut payload[..header.length as usize];
                    if self.goes_straight(&header) {
                        let _writing = self.arrivals.begin_writing()?;
                        self.stream.read_payload_into(&announced, &place, payload)?;
                    } else {
                        self.stream.read_payload(&announced, payload)?;
                        self.store(&header, payload, &mut room)?;
                    }
                    pages += u64::from(header.pages);
                    self.count(&header);
                }
                FrameKind::DiskContent | FrameKind::DiskZero => {
                    check_round(&header, round)?;
                    let place = self.disks.place(self.disk_order, &header)?;
                    let payload = &mut payload[..header.length as usize];
                    self.stream.read_payload(&announced, payload)?;
                    let content = Content::of(&header, payload, &mut room)?;
                    disks::store(place, &header, content, &mut unflushed)?;
                    disk_bytes += header.content_bytes();
                    self.count(&header);
                }
                FrameKind::Compare => {
                    place(self.ram, &header)?;
                    self.stream.read_payload(&announced, &mut [])?;
                    self.tell_what_is_held(&header)?;
                }
                FrameKind::Control => match self.stream.message(&announced)? {
                    ToTarget::EndOfRound {
                        round: ended,
                        pages: sent,
                        disk_bytes: sent_of_disks,
                    } if ended == round && (sent, sent_of_disks) == (pages, disk_bytes) => {
                        self.arrivals.note(|inner| inner.rounds[self.lane] = round);
                        // Later rounds bring what has changed since; nobody has to ask any more.
                        self.holder = None;
                        round += 1;
                        before = (pages, disk_bytes);
                        // What a round brought is made durable at its end, for all lanes together.
                        unflushed = self.disks.unflushed();
                    }
                    ToTarget::EndOfRound {
                        pages: sent,
                        disk_bytes: sent_of_disks,
                        ..
                    } => {
                        return Err(match sent == pages {
                            true => TargetError::DiskBytesMissing(disk_bytes, sent_of_disks),
                            false => TargetError::PagesMissing(pages, sent),
                        });
                    }
                    other => {
                        return Err(TargetError::OutOfTurn {
                            got: other.name().into(),
                            expected: "pages",
                        });
                    }
                },
                other => {
                    return Err(StreamError::Unexpected {
                        got: other,
                        expected: "pages",
                    }
                    .into());
                }
            }
        }
    }

    fn tell_what_is_held(&mut self, asked: &FrameHeader) -> Result<(), TargetError> {
        let Some(holder) = &mut self.holder else {
            return Err(TargetError::OutOfTurn {
                got: "a question about pages".into(),
                expected: "pages",
            });
        };
        {
            let mut inner = self.arrivals.lock();
            inner.asked_pages += u64::from(asked.pages);
            // Each page is asked for once: hashing is not to be had without end.
            if inner.asked_pages > self.ram.size().pages() {
                return Err(TargetError::ComparesTooMuch);
            }
        }
        let payload = holder.answer(self.ram, asked)?.encode();
        let header = FrameHeader::held(asked.address, asked.pages, payload.len() as u32);
        self.stream.send_frame(header, &payload)?;
        let told = 2 * FRAME_HEADER_BYTES + payload.len();
        self.arrivals.lock().received.bytes += told as u64;
        Ok(())
    }

    /// Whether what comes can be written where it belongs before it was checked: no guest looks at it until all is here
    /// and found to be good ([`Arrivals::seal`]).
    fn goes_straight(&self, header: &FrameHeader) -> bool {
        let nobody_looks = self.arrivals.pull.get().is_none();
        nobody_looks && (header.kind, header.codec) == (FrameKind::Pages, Codec::Raw)
    }

    fn store(
        &self,
        header: &FrameHeader,
        payload: &[u8],
        room: &mut Vec<u8>,
    ) -> Result<(), TargetError> {
        let content = Content::of(header, payload, room)?;
        if let Some((pull, _)) = self.arrivals.pull.get() {
            return Ok(pull.fill(header, content)?);
        }
        let _writing = self.arrivals.begin_writing()?;
        match content {
            Content::Zeros => self.ram.discard(header.address, u64::from(header.pages))?,
            Content::Bytes(bytes) => self.ram.write(header.address, bytes)?,
        }
        Ok(())
    }

    fn count(&self, header: &FrameHeader) {
        let received = &mut self.arrivals.lock().received;
        match header.kind {
            FrameKind::DiskZero => received.disk_bytes += header.content_bytes(),
            FrameKind::DiskContent => {
                received.disk_bytes += header.content_bytes();
                received.disk_content_bytes += header.content_bytes();
            }
            FrameKind::Zero => {
                received.pages += u64::from(header.pages);
                received.zero_pages += u64::from(header.pages);
            }
            _ => received.pages += u64::from(header.pages),
        }
        received.bytes += FRAME_HEADER_BYTES as u64 + u64::from(header.length);
    }
}

/// Where the pages that `header` announces belong.
fn place<'r>(
    ram: &'r GuestRam,
    header: &FrameHeader,
) -> Result<VolatileSlice<'r, BS<'r, AtomicBitmap>>, TargetError> {
    let bytes = u64::from(header.pages) * PAGE_BYTES;
    Ok(ram.slice(header.address, bytes)?)
}

fn too_late() -> TargetError {
    TargetError::OutOfTurn {
        got: "pages".into(),
        expected: "none after the last round",
    }
}

/// What belongs to another round came too early or too late.
fn check_round(header: &FrameHeader, expected: u32) -> Result<(), TargetError> {
    match header.round == expected {
        true => Ok(()),
        false => Err(TargetError::WrongRound {
            got: header.round,
            expected,
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_written_when_everything_is_said_to_be_here() {
        let arrivals = Arrivals::new(1, SILENCE_LIMIT);
        drop(arrivals.begin_writing().unwrap());
        arrivals.seal().unwrap();
        assert!(arrivals.begin_writing().is_err());
    }

    /// A source that holds a page back until the guest runs finds that it does not.
    #[test]
    fn everything_is_not_here_while_a_page_is_on_its_way() {
        let arrivals = Arrivals::new(1, SILENCE_LIMIT);
        let _writing = arrivals.begin_writing().unwrap();
        assert!(arrivals.seal().is_err());
    }
}
