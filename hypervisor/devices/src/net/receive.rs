//! Frames to the guest: from the tap into its buffers.
//!
//! A frame is read straight into the buffers at the head of the ring, and what they do not hold into `rest`, from
//! where it is copied into the buffers behind them. With mergeable buffers a frame may wait for more of them to come:
//!
//! ```text
//!              read                       enough buffers
//!   listening ──────▶ in hand ─────────────────────────────────▶ listening
//!       │                │  too few: the tap is silenced   ▲
//!       │ no buffers     └───────────────▶ starved ────────┘
//!       └────────────────────────────────▶ starved ──▶ listening      (the driver rings)
//! ```

use super::filter::Filter;
use super::limit::Timer;
use super::ring::Ring;
use super::shared::Shared;
use super::transmit::MAX_FRAME_BYTES;
use super::{Link, Progress};
use crate::chain::{Chain, ChainError, MAX_SEGMENTS, Segment};
use crate::sys::tap::{HEADER_BYTES, Tap};
use godwit_wire::devices::MacAddress;
use rustix::io::Errno;
use std::collections::VecDeque;
use std::io;
use std::sync::Arc;
use vm_memory::{Bytes, GuestAddress};

/// Most frames received before the other direction has its turn.
const FRAMES_PER_TURN: usize = 64;
/// Most segments a frame is read into; the kernel takes 1024 with `rest`, and a segment may lie in two regions.
const MAX_FRAME_SEGMENTS: usize = MAX_SEGMENTS - 64;
/// Bytes of Ethernet header and two VLAN tags around a packet of the network's largest size.
const LINK_BYTES: usize = 14 + 8;
/// Where `num_buffers` is in the header.
const NUM_BUFFERS_OFFSET: u32 = 10;
/// Frames up to this are read into few buffers, larger ones into all that are at hand: describing hundreds of
/// buffers to the kernel costs more than a small frame does.
const SMALL_FRAME_BYTES: usize = 4096;

/// What receiving buffers a driver has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Buffers {
    /// Each holds a frame.
    Whole,
    /// A frame may fill several.
    Mergeable,
}

/// A frame that was read.
#[derive(Clone, Copy, Debug)]
struct InHand {
    /// With its header.
    len: usize,
    /// How many of its bytes are in guest buffers already; the others are in `rest`.
    placed: usize,
}

#[derive(Debug)]
pub(super) struct Receiver {
    pub(super) ring: Ring,
    tap: Arc<Tap>,
    shared: Arc<Shared>,
    pub(super) timer: Timer,
    buffers: Buffers,
    /// Longest frame that is expected, with its header.
    longest: usize,
    /// Chains taken from the ring and not used yet.
    taken: VecDeque<Chain>,
    taken_bytes: usize,
    taken_segments: usize,
    /// The chains taken have as many segments as a frame may.
    full: bool,
    rest: Box<[u8]>,
    in_hand: Option<InHand>,
    /// Frames given to the driver in this turn.
    delivered: u32,
    /// Bytes of guest buffers to offer for the next frame.
    offer: usize,
}

/// What receiving waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Waiting {
    /// Frames: the tap.
    Frames,
    /// Buffers: the driver.
    Buffers,
    /// The rate limit: the timer.
    Limit,
    /// Nothing: the tap is gone.
    Nothing,
}

impl Receiver {
    pub(super) fn new(
        ring: Ring,
        tap: Arc<Tap>,
        shared: Arc<Shared>,
        features: u64,
    ) -> io::Result<Self> {
        use super::feature;
        let longest = if feature::takes_unsegmented(features) {
            MAX_FRAME_BYTES
        } else {
            usize::from(shared.config.mtu) + LINK_BYTES
        };
        let buffers = if features & feature::MRG_RXBUF != 0 {
            Buffers::Mergeable
        } else {
            Buffers::Whole
        };
        Ok(Self {
            ring,
            tap,
            shared,
            timer: Timer::new()?,
            buffers,
            longest: longest + HEADER_BYTES,
            taken: VecDeque::new(),
            taken_bytes: 0,
            taken_segments: 0,
            full: false,
            // One byte more than any frame, so that a longer one is seen to be.
            rest: vec![0; MAX_FRAME_BYTES + HEADER_BYTES + 1].into(),
            in_hand: None,
            delivered: 0,
            offer: SMALL_FRAME_BYTES,
        })
    }

    /// Receives up to a turn's worth; says what to wait for.
    pub(super) fn serve(&mut self) -> Result<Waiting, ReceiveError> {
        let waiting = self.receive_some();
        if std::mem::take(&mut self.delivered) > 0 {
            self.shared.frame_times.note();
        }
        self.ring.signal();
        waiting
    }

    /// Gives all chains back to the ring. A frame in hand is lost.
    pub(super) fn give_back(&mut self) {
        if self.in_hand.take().is_some() {
            self.shared.counters.rx_dropped.add(1);
        }
        self.ring.put_back(self.taken.len() as u16);
        self.taken.clear();
        (self.taken_bytes, self.taken_segments) = (0, 0);
    }

    fn receive_some(&mut self) -> Result<Waiting, ReceiveError> {
        let (filter, link) = {
            let settings = self.shared.settings();
            (Arc::clone(&settings.filter), settings.link)
        };
        for _ in 0..FRAMES_PER_TURN {
            if self.in_hand.is_none()
                && let Err(wait) = self.shared.receive_limit.check()
            {
                self.shared.counters.rx_limited.add(1);
                self.timer.ring_after(wait)?;
                return Ok(Waiting::Limit);
            }
            self.take_chains()?;
            if self.taken.is_empty() {
                if self.ring.has_more_or_rings()? {
                    continue;
                }
                return Ok(Waiting::Buffers);
            }
            if self.in_hand.is_none() {
                match self.read() {
                    Ok(()) => {}
                    Err(error) => return Ok(after_error(self.tap.name(), &error)),
                }
            }
            if self.deliver(&filter, link)? == Progress::Waiting {
                if self.ring.has_more_or_rings()? {
                    continue;
                }
                return Ok(Waiting::Buffers);
            }
        }
        // Still readable, so the tap calls again; a frame in hand waits for buffers and returned above, unless
        // the driver kept adding single ones: then its doorbell is rung for it.
        if self.in_hand.is_some() {
            self.ring.come_back();
            return Ok(Waiting::Buffers);
        }
        Ok(Waiting::Frames)
    }

    /// Takes chains until the longest frame fits, as far as there are any.
    fn take_chains(&mut self) -> Result<(), ReceiveError> {
        let enough = match (self.buffers, self.in_hand) {
            (Buffers::Whole, _) => 1,
            (Buffers::Mergeable, None) => self.longest,
            (Buffers::Mergeable, Some(frame)) => frame.len.max(self.longest),
        };
        self.full = false;
        while self.taken_bytes < enough {
            let Some(chain) = self.ring.pop()? else {
                return Ok(());
            };
            let len = chain.writable_bytes() as usize;
            if len < HEADER_BYTES {
                return Err(ReceiveError::SmallBuffer { len });
            }
            let segments = chain.writable().len();
            if self.taken.is_empty() && segments > MAX_FRAME_SEGMENTS {
                return Err(ReceiveError::Scattered { segments });
            }
            if self.taken_segments + segments > MAX_FRAME_SEGMENTS {
                self.ring.put_back(1);
                self.full = true;
                return Ok(());
            }
            self.taken_bytes += len;
            self.taken_segments += segments;
            self.taken.push_back(chain);
        }
        self.ring.needs_no_ringing()?;
        Ok(())
    }

    fn read(&mut self) -> io::Result<()> {
        let offered = match self.buffers {
            Buffers::Whole => self.taken_bytes,
            Buffers::Mergeable => self.taken_bytes.min(self.offer),
        };
        let segments = span(&self.taken, 0, offered);
        let len = self
            .tap
            .receive(self.ring.memory(), segments, &mut self.rest)?;
        self.offer = if len > SMALL_FRAME_BYTES {
            usize::MAX
        } else {
            SMALL_FRAME_BYTES
        };
        self.in_hand = Some(InHand {
            len,
            placed: len.min(offered),
        });
        Ok(())
    }

    /// Gives the frame in hand to the driver, or loses it if it must be.
    fn deliver(&mut self, filter: &Filter, link: Link) -> Result<Progress, ReceiveError> {
        let Some(frame) = self.in_hand else {
            return Ok(Progress::More);
        };
        let counters = &self.shared.counters;
        let too_long = frame.len > HEADER_BYTES + MAX_FRAME_BYTES;
        let runt = frame.len < HEADER_BYTES + 14;
        if link == Link::Down || too_long || runt {
            counters.rx_dropped.add(1);
            self.in_hand = None;
            return Ok(Progress::More);
        }
        if !filter.accepts(self.destination(frame)) {
            counters.rx_filtered.add(1);
            self.in_hand = None;
            return Ok(Progress::More);
        }
        if frame.len > self.taken_bytes {
            let may_come = self.buffers == Buffers::Mergeable
                && self.taken.len() < usize::from(self.ring.size())
                && !self.full;
            if may_come {
                return Ok(Progress::Waiting);
            }
            counters.rx_dropped.add(1);
            self.in_hand = None;
            return Ok(Progress::More);
        }
        let mut copied = 0;
        for piece in span(&self.taken, frame.placed, frame.len - frame.placed) {
            let end = copied + piece.len as usize;
            self.ring
                .memory()
                .write_slice(&self.rest[copied..end], piece.address)
                .map_err(|_| ReceiveError::Memory(piece.address))?;
            copied = end;
        }
        self.in_hand = None;
        self.use_buffers(frame.len)?;
        let bytes = (frame.len - HEADER_BYTES) as u64;
        self.delivered += 1;
        self.shared.counters.rx_packets.add(1);
        self.shared.counters.rx_bytes.add(bytes);
        self.shared.receive_limit.passed(bytes);
        Ok(Progress::More)
    }

    /// Returns the buffers that hold the frame of `len` bytes.
    fn use_buffers(&mut self, len: usize) -> Result<(), ReceiveError> {
        let mut used = Vec::with_capacity(1);
        let (mut left, mut first) = (len, None);
        while left > 0 {
            let Some(chain) = self.taken.pop_front() else {
                break;
            };
            let room = chain.writable_bytes() as usize;
            self.taken_bytes -= room;
            self.taken_segments -= chain.writable().len();
            let filled = left.min(room);
            left -= filled;
            used.push((chain.head(), filled as u32));
            first.get_or_insert(chain);
        }
        if let Some(first) = first {
            let count = (used.len() as u16).to_le_bytes();
            first.write(self.ring.memory(), NUM_BUFFERS_OFFSET, &count);
        }
        Ok(self.ring.publish(&used)?)
    }

    /// Where a frame goes to. It may lie in guest memory, where the guest may change it: it fools only itself.
    fn destination(&self, frame: InHand) -> MacAddress {
        let mut mac = [0; 6];
        let in_guest = frame.placed.saturating_sub(HEADER_BYTES).min(mac.len());
        let mut read = 0;
        for piece in span(&self.taken, HEADER_BYTES, in_guest) {
            let end = read + piece.len as usize;
            // Checked when the chain was taken; what could not be read is no address of this card.
            let _ = self
                .ring
                .memory()
                .read_slice(&mut mac[read..end], piece.address);
            read = end;
        }
        for (nth, byte) in mac.iter_mut().enumerate().skip(in_guest) {
            let at = HEADER_BYTES + nth - frame.placed;
            *byte = self.rest.get(at).copied().unwrap_or(0);
        }
        MacAddress(mac)
    }
}

/// What there is to wait for after a frame could not be read.
fn after_error(tap: &str, error: &io::Error) -> Waiting {
    match Errno::from_io_error(error) {
        Some(Errno::AGAIN | Errno::INTR) => Waiting::Frames,
        _ => {
            tracing::warn!(tap, %error, "the tap device gives no more frames");
            Waiting::Nothing
        }
    }
}

/// The parts of the chains' writable bytes from `offset` on that hold `len` bytes, as far as they reach.
fn span(chains: &VecDeque<Chain>, offset: usize, len: usize) -> impl Iterator<Item = Segment> + '_ {
    let (mut skip, mut left) = (offset, len);
    chains
        .iter()
        .flat_map(|chain| chain.writable())
        .take_while({
            // Stops walking as soon as everything is found.
            let mut found = 0;
            move |segment| {
                let wanted = found < offset.saturating_add(len);
                found = found.saturating_add(segment.len as usize);
                wanted
            }
        })
        .filter_map(move |segment| {
            let skipped = skip.min(segment.len as usize);
            skip -= skipped;
            let taken = (segment.len as usize - skipped).min(left);
            left -= taken;
            (taken > 0).then(|| Segment {
                // In range: the whole segment is inside guest memory.
                address: GuestAddress(segment.address.0 + skipped as u64),
                len: taken as u32,
            })
        })
}

/// Why receiving stops.
#[derive(Debug, thiserror::Error)]
pub(super) enum ReceiveError {
    #[error(transparent)]
    Chain(#[from] ChainError),
    #[error("a receive buffer of {len} bytes holds no header")]
    SmallBuffer { len: usize },
    #[error("a receive buffer of {segments} segments is too scattered")]
    Scattered { segments: usize },
    #[error("{0:?} is no guest memory any more")]
    Memory(GuestAddress),
    #[error("a timer cannot be set")]
    Timer(#[from] io::Error),
}
