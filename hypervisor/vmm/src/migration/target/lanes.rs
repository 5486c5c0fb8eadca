//! The receiving ends of the lanes: pages go into guest memory as they come, each lane on a thread of its own.

use super::TargetError;
use super::pull::{Pull, unpack};
use crate::memory::GuestRam;
use crate::migration::stream::{FrameStream, SILENCE_LIMIT, StreamError};
use godwit_wire::migration::{
    Codec, FRAME_HEADER_BYTES, FrameHeader, FrameKind, MAX_FRAME_PAGES, ToTarget,
};
use godwit_wire::unit::PAGE_BYTES;
use std::io::ErrorKind;
use std::net::{Shutdown, TcpStream};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Instant;

/// What has arrived on all lanes.
pub(super) struct Arrivals {
    inner: Mutex<Inner>,
    changed: Condvar,
    /// Where pages go that the guest may be waiting for.
    pull: OnceLock<(Arc<Pull>, u64)>,
}

struct Inner {
    /// Last round that is whole, per lane.
    rounds: Vec<u32>,
    received: Received,
    failed: Option<TargetError>,
    /// Which lanes have ended between rounds, as all do when the source is done with them; others may still have to
    /// be read to their end then.
    ended: Vec<bool>,
}

/// Figures of what arrived.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Received {
    pub(super) pages: u64,
    pub(super) zero_pages: u64,
    pub(super) bytes: u64,
}

impl Arrivals {
    pub(super) fn new(lanes: usize) -> Self {
        Self {
            inner: Mutex::new(Inner {
                rounds: vec![0; lanes],
                received: Received::default(),
                failed: None,
                ended: vec![false; lanes],
            }),
            changed: Condvar::new(),
            pull: OnceLock::new(),
        }
    }

    /// Of memory that follows.
    pub(super) fn following(lanes: usize, pull: Arc<Pull>, link: u64) -> Self {
        let arrivals = Self::new(lanes);
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

    /// Waits until `round` is whole on every lane; then `pages` must be there.
    pub(super) fn wait_for(&self, round: u32, pages: u64) -> Result<(), TargetError> {
        let deadline = Instant::now() + SILENCE_LIMIT;
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
        if inner.received.pages == pages {
            Ok(())
        } else {
            Err(TargetError::PagesMissing(inner.received.pages, pages))
        }
    }

    fn note(&self, note: impl FnOnce(&mut Inner)) {
        note(&mut self.lock());
        self.changed.notify_all();
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One lane's receiving end.
pub(super) struct Intake<'a> {
    pub(super) ram: &'a GuestRam,
    pub(super) arrivals: Arc<Arrivals>,
    pub(super) lane: usize,
    pub(super) stream: FrameStream,
    /// Rounds before it came over other connections.
    pub(super) first_round: u32,
}

impl Intake<'_> {
    /// Takes pages until the lane ends. If it ends for a reason of its own, `control` is woken, whose owner asks why.
    ///
    /// A lane that ends between rounds has done its part: the source ends them all when everything is sent, which may
    /// be seen here before what it sent on the control connection.
    pub(super) fn run(mut self, control: &TcpStream) {
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
        let mut content = Vec::new();
        let (mut round, mut pages, mut pages_before) = (self.first_round, 0, 0);
        loop {
            let announced = match self.stream.announced() {
                Err(StreamError::Io(error))
                    if error.kind() == ErrorKind::UnexpectedEof && pages == pages_before =>
                {
                    return Err(TargetError::LaneEnded(round));
                }
                announced => announced?,
            };
            let header = announced.header;
            match header.kind {
                FrameKind::Pages | FrameKind::Zero => {
                    if header.round != round {
                        return Err(TargetError::WrongRound {
                            got: header.round,
                            expected: round,
                        });
                    }
                    // Judged before anything is read for it.
                    self.check_place(&header)?;
                    let payload = &mut payload[..header.length as usize];
                    self.stream.read_payload(&announced, payload)?;
                    self.store(&header, payload, &mut content)?;
                    pages += u64::from(header.pages);
                    self.count(&header);
                }
                FrameKind::Control => match self.stream.message(&announced)? {
                    ToTarget::EndOfRound {
                        round: ended,
                        pages: sent,
                    } if ended == round && sent == pages => {
                        self.arrivals.note(|inner| inner.rounds[self.lane] = round);
                        (round, pages_before) = (round + 1, pages);
                    }
                    ToTarget::EndOfRound { pages: sent, .. } => {
                        return Err(TargetError::PagesMissing(pages, sent));
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

    fn check_place(&self, header: &FrameHeader) -> Result<(), TargetError> {
        let bytes = u64::from(header.pages) * PAGE_BYTES;
        self.ram.slice(header.address, bytes)?;
        Ok(())
    }

    fn store(
        &self,
        header: &FrameHeader,
        payload: &[u8],
        content: &mut Vec<u8>,
    ) -> Result<(), TargetError> {
        if let Some((pull, _)) = self.arrivals.pull.get() {
            return match pull.fill(header, payload, content)? {
                true => Ok(()),
                false => Err(TargetError::BadCompression),
            };
        }
        match (header.kind, header.codec) {
            (FrameKind::Zero, _) => self.ram.discard(header.address, u64::from(header.pages))?,
            (_, Codec::Raw) => self.ram.write(header.address, payload)?,
            (_, Codec::Lz4) => {
                if !unpack(header, payload, content) {
                    return Err(TargetError::BadCompression);
                }
                self.ram.write(header.address, content)?;
            }
        }
        Ok(())
    }

    fn count(&self, header: &FrameHeader) {
        let received = &mut self.arrivals.lock().received;
        received.pages += u64::from(header.pages);
        if header.kind == FrameKind::Zero {
            received.zero_pages += u64::from(header.pages);
        }
        received.bytes += FRAME_HEADER_BYTES as u64 + u64::from(header.length);
    }
}
