//! Frames from the guest: from its memory to the tap, without a copy.

use super::limit::Timer;
use super::ring::Ring;
use super::shared::Shared;
use super::{Link, Progress};
use crate::chain::{Chain, ChainError};
use crate::sys::tap::{HEADER_BYTES, Tap};
use std::io;
use std::sync::Arc;

/// Most frames sent before the other direction has its turn.
pub(super) const FRAMES_PER_TURN: usize = 64;
/// Longest frame behind its header: the largest IP packet, an Ethernet header and two VLAN tags.
pub(super) const MAX_FRAME_BYTES: usize = 65_535 + 14 + 8;
/// Shortest frame: an Ethernet header.
pub(super) const MIN_FRAME_BYTES: usize = 14;

#[derive(Debug)]
pub(super) struct Transmitter {
    pub(super) ring: Ring,
    tap: Arc<Tap>,
    shared: Arc<Shared>,
    pub(super) timer: Timer,
    /// Frames that the host took in this turn.
    taken: u32,
}

impl Transmitter {
    pub(super) fn new(ring: Ring, tap: Arc<Tap>, shared: Arc<Shared>) -> io::Result<Self> {
        Ok(Self {
            ring,
            tap,
            shared,
            timer: Timer::new()?,
            taken: 0,
        })
    }

    /// Sends what the driver has made available, up to a turn's worth.
    pub(super) fn serve(&mut self) -> Result<(), TransmitError> {
        self.ring.needs_no_ringing()?;
        let progress = self.send_some();
        if std::mem::take(&mut self.taken) > 0 {
            self.shared.frame_times.note();
        }
        self.ring.signal();
        if progress? == Progress::More {
            self.ring.come_back();
        }
        Ok(())
    }

    fn send_some(&mut self) -> Result<Progress, TransmitError> {
        let link = self.shared.settings().link;
        for _ in 0..FRAMES_PER_TURN {
            if let Err(wait) = self.shared.transmit_limit.check() {
                self.shared.counters.tx_limited.add(1);
                self.timer.ring_after(wait)?;
                return Ok(Progress::Waiting);
            }
            let Some(chain) = self.ring.pop()? else {
                if self.ring.has_more_or_rings()? {
                    continue;
                }
                return Ok(Progress::Waiting);
            };
            self.send(&chain, link)?;
            self.ring.publish(&[(chain.head(), 0)])?;
        }
        Ok(Progress::More)
    }

    fn send(&mut self, chain: &Chain, link: Link) -> Result<(), TransmitError> {
        let counters = &self.shared.counters;
        let len = chain.readable_bytes() as usize;
        let Some(frame) = len.checked_sub(HEADER_BYTES) else {
            return Err(TransmitError::NoHeader { len });
        };
        if !(MIN_FRAME_BYTES..=MAX_FRAME_BYTES).contains(&frame) || link == Link::Down {
            counters.tx_dropped.add(1);
            return Ok(());
        }
        // The header goes through unread: the kernel copies it once and checks it against the frame.
        let segments = chain.readable().iter().copied();
        match self.tap.send(self.ring.memory(), segments) {
            Ok(_) => {
                self.taken += 1;
                counters.tx_packets.add(1);
                counters.tx_bytes.add(frame as u64);
            }
            // An interface that is down, a malformed header, a full queue: frames may be lost.
            Err(error) => {
                tracing::trace!(tap = self.tap.name(), %error, "frame lost");
                counters.tx_dropped.add(1);
            }
        }
        self.shared.transmit_limit.passed(frame as u64);
        Ok(())
    }
}

/// Why sending stops.
#[derive(Debug, thiserror::Error)]
pub(super) enum TransmitError {
    #[error(transparent)]
    Chain(#[from] ChainError),
    #[error("a frame of {len} bytes has no header")]
    NoHeader { len: usize },
    #[error("a timer cannot be set")]
    Timer(#[from] io::Error),
}
