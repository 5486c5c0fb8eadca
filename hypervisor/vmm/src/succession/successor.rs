//! The process that the machine shall run in.

use super::SuccessionError;
use super::channel::Channel;
use crate::machine::SavedMachine;
use crate::memory::boot_time_ns;
use crate::migration::{HandOverError, TargetHandOver};
use godwit_wire::id::{Epoch, SuccessionId};
use godwit_wire::migration::MAX_STATE_BYTES;
use godwit_wire::succession::{
    HandedState, MAX_CONSOLE_BYTES, OLDEST_SUCCESSION_VERSION, Offer, PrepareSuccession,
    SUCCESSION_VERSION, SuccessionBlackout, SuccessionPhase, SuccessionRole, SuccessionStatus,
    ToPredecessor, ToSuccessor,
};
use rustix::event::{PollFd, PollFlags, poll};
use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// What a predecessor offers.
#[derive(Debug)]
pub struct Offering {
    /// The machine.
    pub offer: Offer,
    /// Its memory.
    pub memory: File,
    channel: Channel,
}

impl Offering {
    /// Asks the predecessor for its machine.
    pub fn ask(request: &PrepareSuccession) -> Result<Self, SuccessionError> {
        let channel = Channel::new(UnixStream::connect(&request.socket)?)?;
        let hello = ToPredecessor::Hello {
            version: SUCCESSION_VERSION,
            oldest_version: OLDEST_SUCCESSION_VERSION,
            succession: request.succession,
            vm: request.vm,
            epoch: request.epoch,
        };
        channel.send(&hello, &[])?;
        let (offer, lent) = match channel.receive()? {
            (ToSuccessor::Offer(offer), lent) => (offer, lent),
            (ToSuccessor::Refuse { problem }, _) => return Err(SuccessionError::Refused(problem)),
            (ToSuccessor::State(_), _) => return Err(SuccessionError::OutOfTurn),
        };
        if !(OLDEST_SUCCESSION_VERSION..=SUCCESSION_VERSION).contains(&offer.version) {
            return Err(SuccessionError::Version {
                oldest: offer.version,
                newest: offer.version,
            });
        }
        let count = lent.len();
        let [memory] = <[OwnedFd; 1]>::try_from(lent)
            .map_err(|_| SuccessionError::Descriptors { count, expected: 1 })?;
        Ok(Self {
            offer: *offer,
            memory: memory.into(),
            channel,
        })
    }
}

/// Everything of a machine that has come, but memory, which was here before.
#[derive(Debug)]
pub struct Arrived {
    /// What was said about it.
    pub state: HandedState,
    /// vCPUs and devices.
    pub saved: SavedMachine,
    /// Descriptors, by the order of the functions on the bus.
    pub lent: Vec<Vec<OwnedFd>>,
    /// Latest console output.
    pub console: Vec<u8>,
}

/// A succession under way, at the successor.
#[derive(Debug)]
pub struct TakingOver {
    succession: SuccessionId,
    channel: Channel,
    inner: Mutex<Inner>,
}

#[derive(Debug)]
struct Inner {
    hand_over: TargetHandOver,
    phase: SuccessionPhase,
    reason: Option<String>,
    paused_at_ns: u64,
    ready_at_ns: u64,
    blackout: SuccessionBlackout,
}

impl TakingOver {
    /// One whose machine is being built; gives what it is built from besides.
    pub fn begin(succession: SuccessionId, offering: Offering) -> (Self, Offer, File) {
        let Offering {
            offer,
            memory,
            channel,
        } = offering;
        let inner = Inner {
            hand_over: TargetHandOver::Filling,
            phase: SuccessionPhase::Prepared,
            reason: None,
            paused_at_ns: 0,
            ready_at_ns: 0,
            blackout: SuccessionBlackout::default(),
        };
        let taking = Self {
            succession,
            channel,
            inner: Mutex::new(inner),
        };
        (taking, offer, memory)
    }

    /// Where it stands.
    pub fn status(&self) -> SuccessionStatus {
        let inner = self.lock();
        SuccessionStatus {
            succession: self.succession,
            role: SuccessionRole::Successor,
            phase: inner.phase,
            blackout: (inner.phase == SuccessionPhase::Completed).then_some(inner.blackout),
            reason: inner.reason.clone(),
        }
    }

    /// Whether it waits for the machine's state, and nobody has asked for that yet.
    pub fn waits(&self) -> bool {
        self.lock().phase == SuccessionPhase::Prepared
    }

    /// Returns when the predecessor has closed the connection, or this end has.
    pub fn wait_for_end(&self) {
        let Ok(stream) = self.channel.again() else {
            return;
        };
        let mut watched = [PollFd::new(&stream, PollFlags::RDHUP)];
        if let Err(error) = rustix::io::retry_on_intr(|| poll(&mut watched, None)) {
            tracing::warn!(%error, "the predecessor's end cannot be watched");
        }
    }

    /// The state is about to be asked for.
    pub fn enter_blackout(&self) -> Result<(), HandOverError> {
        let mut inner = self.lock();
        match (inner.phase, inner.hand_over) {
            (SuccessionPhase::Prepared, TargetHandOver::Filling) => {
                inner.phase = SuccessionPhase::Blackout;
                Ok(())
            }
            _ => Err(HandOverError::Over("its state was asked for before")),
        }
    }

    /// Has the predecessor pause the guest and hand its state over. Once only, after [`Self::enter_blackout`].
    pub fn take(&self) -> Result<Arrived, SuccessionError> {
        self.channel.send(&ToPredecessor::Take, &[])?;
        let (state, lent) = match self.channel.receive()? {
            (ToSuccessor::State(state), lent) => (*state, lent),
            (ToSuccessor::Refuse { problem }, _) => return Err(SuccessionError::Refused(problem)),
            (ToSuccessor::Offer(_), _) => return Err(SuccessionError::OutOfTurn),
        };
        for (what, bytes, limit) in [
            ("the machine's state", state.state_bytes, MAX_STATE_BYTES),
            ("console output", state.console_bytes, MAX_CONSOLE_BYTES),
        ] {
            if bytes > limit {
                return Err(SuccessionError::TooLong {
                    what,
                    bytes: bytes.into(),
                    limit,
                });
            }
        }
        let lent = shared_out(lent, &state.lent)?;
        let bytes = self.channel.receive_bytes(state.state_bytes)?;
        let console = self.channel.receive_bytes(state.console_bytes)?;
        if format!("{:032x}", xxhash_rust::xxh3::xxh3_128(&bytes)) != state.state_hash {
            return Err(SuccessionError::State("its hash is another".into()));
        }
        let saved = ciborium::from_reader(bytes.as_slice())
            .map_err(|error| SuccessionError::State(error.to_string()))?;
        Ok(Arrived {
            state,
            saved,
            lent,
            console,
        })
    }

    /// The machine is whole; `state` is what came.
    pub fn ready(&self, state: &HandedState) -> Result<(), HandOverError> {
        let mut inner = self.lock();
        inner.hand_over = inner.hand_over.whole()?;
        inner.phase = SuccessionPhase::Ready;
        inner.paused_at_ns = state.paused_at_ns;
        inner.ready_at_ns = boot_time_ns();
        let saved_us = state.pause_us + state.save_us;
        inner.blackout = SuccessionBlackout {
            pause_us: state.pause_us,
            save_us: state.save_us,
            restore_us: since_us(inner.paused_at_ns, inner.ready_at_ns).saturating_sub(saved_us),
            ..SuccessionBlackout::default()
        };
        self.channel.close();
        Ok(())
    }

    /// The agent's record names this process: the machine may run here from now on. `true` the first time.
    pub fn commit(&self, epoch: Epoch) -> Result<bool, HandOverError> {
        let mut inner = self.lock();
        let first = !inner.hand_over.may_run();
        inner.hand_over = inner.hand_over.succeed(epoch)?;
        Ok(first)
    }

    /// The machine goes on.
    pub fn completed(&self) {
        let mut inner = self.lock();
        let now = boot_time_ns();
        inner.phase = SuccessionPhase::Completed;
        inner.blackout.total_us = since_us(inner.paused_at_ns, now);
        inner.blackout.commit_us = since_us(inner.ready_at_ns, now);
    }

    /// Nothing of it may ever run.
    pub fn void(&self, reason: &str) -> Result<(), HandOverError> {
        let mut inner = self.lock();
        inner.hand_over = inner.hand_over.abort()?;
        if inner.phase != SuccessionPhase::Failed {
            inner.phase = SuccessionPhase::Failed;
            inner.reason = Some(reason.to_owned());
        }
        self.channel.close();
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Deals descriptors out as they were lent.
fn shared_out(lent: Vec<OwnedFd>, counts: &[u16]) -> Result<Vec<Vec<OwnedFd>>, SuccessionError> {
    let expected = counts.iter().map(|count| usize::from(*count)).sum();
    if lent.len() != expected {
        return Err(SuccessionError::Descriptors {
            count: lent.len(),
            expected,
        });
    }
    let mut lent = lent.into_iter();
    let deal = |count: &u16| lent.by_ref().take(usize::from(*count)).collect();
    Ok(counts.iter().map(deal).collect())
}

const fn since_us(from_ns: u64, to_ns: u64) -> u64 {
    to_ns.saturating_sub(from_ns) / 1_000
}
