//! The process that the machine runs in, and shall leave.

use super::SuccessionError;
use super::channel::{Channel, SILENCE_LIMIT};
use crate::machine::{MachineError, SavedMachine};
use crate::memory::boot_time_ns;
use crate::migration::{HandOverError, Memory, SourceHandOver};
use godwit_wire::id::{Epoch, SuccessionId, VmId};
use godwit_wire::migration::{Arrival, Counted, MAX_STATE_BYTES};
use godwit_wire::succession::{
    HandedState, OLDEST_SUCCESSION_VERSION, Offer, SUCCESSION_VERSION, SuccessionPhase,
    SuccessionRole, SuccessionStatus, ToPredecessor, ToSuccessor,
};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::fs;
use std::io;
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// A successor that has not come after this time does not come any more.
const ACCEPT_PATIENCE: Duration = Duration::from_secs(60);
/// How often is looked whether it is still wanted: until it has come, its memory is kept for it.
const ACCEPT_LOOK: Timespec = Timespec {
    tv_sec: 0,
    tv_nsec: 200_000_000,
};
/// Building the machine takes a successor no longer than this.
const BUILD_PATIENCE: Duration = Duration::from_secs(180);

/// What the predecessor needs of the machine's owner.
pub trait PredecessorMachine: Send {
    /// Stops the guest; tells what it is to do next.
    fn pause(&self) -> Result<Arrival, MachineError>;
    /// Gives up what only one process may hold, and saves everything but memory. The guest has been stopped, and its
    /// last events have been dealt with.
    fn save(&self) -> Result<Handed, MachineError>;
    /// Lets the guest go on as it was, if this process may run it.
    fn resume(&self);
}

/// Everything of a machine that stands still, but memory.
#[derive(Debug)]
pub struct Handed {
    /// vCPUs and devices.
    pub saved: SavedMachine,
    /// When guest time was sampled.
    pub sampled: Instant,
    /// Descriptors, by the order of the functions on the bus.
    pub lent: Vec<Vec<OwnedFd>>,
    /// Counters up to here.
    pub counted: Counted,
    /// Latest console output, and where its end is in all there was.
    pub console: (Vec<u8>, u64),
}

/// A machine that may be taken over.
#[derive(Debug)]
pub struct Offered {
    /// Whose it is.
    pub vm: VmId,
    /// Under which epoch.
    pub epoch: Epoch,
    /// What a successor builds.
    pub offer: Offer,
    /// Its memory.
    pub memory: OwnedFd,
    /// Where the successor comes.
    pub listener: UnixListener,
    /// The listener's file, removed once it has come.
    pub socket: PathBuf,
}

/// A succession under way, at the predecessor.
#[derive(Debug)]
pub struct Yielding {
    succession: SuccessionId,
    inner: Mutex<Inner>,
}

#[derive(Debug)]
struct Inner {
    hand_over: SourceHandOver,
    phase: SuccessionPhase,
    reason: Option<String>,
    /// Ended when it is called off.
    stream: Option<UnixStream>,
}

impl Yielding {
    /// One that waits for its successor.
    pub const fn new(succession: SuccessionId) -> Self {
        Self {
            succession,
            inner: Mutex::new(Inner {
                hand_over: SourceHandOver::Copying,
                phase: SuccessionPhase::Prepared,
                reason: None,
                stream: None,
            }),
        }
    }

    /// Where it stands.
    pub fn status(&self) -> SuccessionStatus {
        let inner = self.lock();
        SuccessionStatus {
            succession: self.succession,
            role: SuccessionRole::Predecessor,
            phase: inner.phase,
            blackout: None,
            reason: inner.reason.clone(),
        }
    }

    /// Who may run the guest.
    pub fn hand_over(&self) -> SourceHandOver {
        self.lock().hand_over
    }

    /// Whether it may still come to something.
    pub fn is_under_way(&self) -> bool {
        self.lock().phase != SuccessionPhase::Failed
    }

    /// Calls it off, unless the state is out.
    pub fn cancel(&self, reason: &str) -> Result<(), HandOverError> {
        self.end(SourceHandOver::cancel, reason)
    }

    /// The agent's word that the machine stays this process's, at any time.
    pub fn abort(&self, reason: &str) -> Result<(), HandOverError> {
        self.end(SourceHandOver::abort, reason)
    }

    fn end(
        &self,
        step: fn(SourceHandOver) -> Result<SourceHandOver, HandOverError>,
        reason: &str,
    ) -> Result<(), HandOverError> {
        let mut inner = self.lock();
        inner.hand_over = step(inner.hand_over)?;
        if inner.phase != SuccessionPhase::Failed {
            inner.phase = SuccessionPhase::Failed;
            inner.reason = Some(reason.to_owned());
        }
        if let Some(stream) = inner.stream.take() {
            // It may be down already.
            let _ = stream.shutdown(Shutdown::Both);
        }
        Ok(())
    }

    /// The successor is here; whoever calls the succession off ends its connection.
    fn attach(&self, channel: &Channel) -> Result<(), SuccessionError> {
        let stream = channel.again()?;
        let mut inner = self.lock();
        if inner.phase == SuccessionPhase::Failed {
            return Err(called_off().into());
        }
        inner.stream = Some(stream);
        Ok(())
    }

    fn enter(&self, phase: SuccessionPhase) -> Result<(), HandOverError> {
        let mut inner = self.lock();
        if inner.phase == SuccessionPhase::Failed {
            return Err(called_off());
        }
        inner.phase = phase;
        Ok(())
    }

    /// From here on only the agent decides.
    fn state_sent(&self) -> Result<(), HandOverError> {
        let mut inner = self.lock();
        inner.hand_over = inner.hand_over.done_sent(Memory::Sent)?;
        inner.phase = SuccessionPhase::Ready;
        inner.stream = None;
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

const fn called_off() -> HandOverError {
    HandOverError::Over("it was called off")
}

/// Waits for the successor and hands the machine over to it. Whatever fails before the state is out leaves the guest
/// running here.
pub fn yield_machine(yielding: &Yielding, offered: Offered, machine: &dyn PredecessorMachine) {
    let Err(error) = attempt(yielding, offered, machine) else {
        return;
    };
    match yielding.cancel(&error.to_string()) {
        Ok(()) => {
            tracing::warn!(succession = %yielding.succession, %error, "no successor took the machine over");
            machine.resume();
        }
        Err(_) => {
            tracing::warn!(succession = %yielding.succession, %error, "the state is out; the agent decides");
        }
    }
}

fn attempt(
    yielding: &Yielding,
    offered: Offered,
    machine: &dyn PredecessorMachine,
) -> Result<(), SuccessionError> {
    let channel = accept(yielding, &offered)?;
    // The file has served its purpose, and may be gone already.
    let _ = fs::remove_file(&offered.socket);
    yielding.attach(&channel)?;
    let (hello, _) = channel.receive()?;
    if let Err(error) = judge(yielding, &offered, &hello) {
        let problem = error.problem();
        channel.send(&ToSuccessor::Refuse { problem }, &[])?;
        return Err(error);
    }
    let Offered { offer, memory, .. } = offered;
    channel.send(&ToSuccessor::Offer(Box::new(offer)), &[memory.as_fd()])?;
    drop(memory);
    channel.limit_silence(BUILD_PATIENCE)?;
    match channel.receive()? {
        (ToPredecessor::Take, _) => hand_over(yielding, &channel, machine),
        (ToPredecessor::Hello { .. }, _) => Err(SuccessionError::OutOfTurn),
    }
}

/// The successor's connection: of this process's own user.
fn accept(yielding: &Yielding, offered: &Offered) -> Result<Channel, SuccessionError> {
    let mut waiting = [PollFd::new(&offered.listener, PollFlags::IN)];
    let deadline = Instant::now() + ACCEPT_PATIENCE;
    while rustix::io::retry_on_intr(|| poll(&mut waiting, Some(&ACCEPT_LOOK)))
        .map_err(io::Error::from)?
        == 0
    {
        if !yielding.is_under_way() {
            return Err(called_off().into());
        }
        if Instant::now() > deadline {
            return Err(io::Error::from(io::ErrorKind::TimedOut).into());
        }
    }
    let (stream, _) = offered.listener.accept()?;
    let peer = rustix::net::sockopt::socket_peercred(&stream).map_err(io::Error::from)?;
    if peer.uid != rustix::process::geteuid() {
        return Err(SuccessionError::Stranger {
            uid: peer.uid.as_raw(),
        });
    }
    Ok(Channel::new(stream)?)
}

fn judge(
    yielding: &Yielding,
    offered: &Offered,
    hello: &ToPredecessor,
) -> Result<(), SuccessionError> {
    let ToPredecessor::Hello {
        version,
        oldest_version,
        succession,
        vm,
        epoch,
    } = hello
    else {
        return Err(SuccessionError::OutOfTurn);
    };
    if *oldest_version > SUCCESSION_VERSION || *version < OLDEST_SUCCESSION_VERSION {
        return Err(SuccessionError::Version {
            oldest: *oldest_version,
            newest: *version,
        });
    }
    if (*succession, *vm, *epoch) != (yielding.succession, offered.vm, offered.epoch) {
        return Err(SuccessionError::OtherMachine {
            vm: *vm,
            epoch: *epoch,
        });
    }
    Ok(())
}

/// The guest stands still: everything else goes to the successor.
fn hand_over(
    yielding: &Yielding,
    channel: &Channel,
    machine: &dyn PredecessorMachine,
) -> Result<(), SuccessionError> {
    channel.limit_silence(SILENCE_LIMIT)?;
    yielding.enter(SuccessionPhase::Blackout)?;
    let (since, paused_at_ns) = (Instant::now(), boot_time_ns());
    let then = machine.pause()?;
    let pause = since.elapsed();
    let handed = machine.save()?;
    let save = since.elapsed() - pause;
    let mut state = Vec::new();
    ciborium::into_writer(&handed.saved, &mut state)
        .map_err(|error| SuccessionError::State(error.to_string()))?;
    if state.len() > MAX_STATE_BYTES as usize {
        return Err(SuccessionError::TooLong {
            what: "the machine's state",
            bytes: state.len() as u64,
            limit: MAX_STATE_BYTES,
        });
    }
    let lent: Vec<BorrowedFd<'_>> = handed.lent.iter().flatten().map(AsFd::as_fd).collect();
    let (console, console_end) = &handed.console;
    let message = ToSuccessor::State(Box::new(HandedState {
        state_bytes: state.len() as u32,
        state_hash: format!("{:032x}", xxhash_rust::xxh3::xxh3_128(&state)),
        lent: handed.lent.iter().map(|lent| lent.len() as u16).collect(),
        sampled_at_ns: boot_time_ns().saturating_sub(handed.sampled.elapsed().as_nanos() as u64),
        paused_at_ns,
        pause_us: pause.as_micros() as u64,
        save_us: save.as_micros() as u64,
        then,
        counted: handed.counted,
        console_bytes: console.len() as u32,
        console_end: *console_end,
    }));
    // From here on the successor may become whole, so this process must not run the guest by itself.
    yielding.state_sent()?;
    channel.send(&message, &lent)?;
    channel.send_bytes(&state)?;
    channel.send_bytes(console)
}
