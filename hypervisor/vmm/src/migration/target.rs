//! The receiving end. Everything that arrives is judged before it is believed: lengths by the frame header,
//! addresses by guest memory's own bounds, the order of messages here.

mod doorway;
mod lanes;

use super::hand_over::{HandOverError, TargetHandOver};
use super::ledger::Ledger;
use super::sockets::Sockets;
use super::stream::{FrameStream, StreamError, brief};
use crate::machine::{MachineError, SavedMachine};
use crate::memory::{GuestRam, RamError};
use godwit_channel::tls::MigrationTls;
use godwit_wire::cpu::{GuestCpu, TscScaling};
use godwit_wire::id::Epoch;
use godwit_wire::machine::CpuFacts;
use godwit_wire::migration::{
    Arrival, FrameKind, MigrationPhase, MigrationToken, ToSource, ToTarget, Verify,
};
use godwit_wire::unit::Bytes;
use godwit_wire::vmm_api::IncomingRequest;
use lanes::Arrivals;
use std::io;
use std::net::{SocketAddr, TcpListener};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// What the receiving end needs of the machine's owner.
pub trait TargetMachine: Send {
    /// Makes the machine what was saved; it does not run yet.
    fn restore(&self, saved: SavedMachine, age: Duration) -> Result<(), MachineError>;
    /// The migration ended without a grant: nothing of the machine may ever run.
    fn void(&self);
}

/// This host's CPU.
#[derive(Clone, Debug)]
pub struct ThisCpu {
    /// What it can give.
    pub facts: CpuFacts,
    /// What the machine that waits here shows of it.
    pub guest: GuestCpu,
    /// Whether it can run at the source's clock rate.
    pub scaling: TscScaling,
}

/// A migration to here, as its owner holds it.
#[derive(Debug)]
pub struct Incoming {
    /// What is known of it.
    pub ledger: Arc<Ledger<TargetHandOver>>,
    token: MigrationToken,
    arrival: Mutex<Option<Arrival>>,
    /// The control connection, once the machine is whole.
    control: Mutex<Option<FrameStream>>,
    sockets: Sockets,
    listener: MigrationListener,
}

/// The socket a target waits on.
#[derive(Clone, Debug)]
pub struct MigrationListener(Arc<TcpListener>);

impl MigrationListener {
    /// Listens on `address`.
    pub fn bind(address: SocketAddr) -> io::Result<(Self, SocketAddr)> {
        let listener = TcpListener::bind(address)?;
        let bound = listener.local_addr()?;
        Ok((Self(Arc::new(listener)), bound))
    }

    fn close(&self) {
        // Wakes an accept that waits; later connections are refused when the last handle goes.
        let _ = rustix::net::shutdown(&*self.0, rustix::net::Shutdown::Both);
    }
}

impl Incoming {
    /// One that waits for its source, which must name `token`.
    pub const fn new(
        ledger: Arc<Ledger<TargetHandOver>>,
        listener: MigrationListener,
        token: MigrationToken,
    ) -> Self {
        Self {
            ledger,
            token,
            arrival: Mutex::new(None),
            control: Mutex::new(None),
            sockets: Sockets::new(),
            listener,
        }
    }

    /// What the guest is to do once it is granted; known when the machine is whole.
    pub fn arrival(&self) -> Option<Arrival> {
        *self.arrival.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The store granted `epoch`. The caller lets the guest run and then calls [`Self::announce_running`].
    pub fn commit(&self, epoch: Epoch, source_epoch: Epoch) -> Result<(), HandOverError> {
        self.ledger.step(
            |state| state.commit(epoch, source_epoch),
            MigrationPhase::Completed,
            None,
        )
    }

    /// Tells the source that the guest runs here, which ends the connection.
    pub fn announce_running(&self, epoch: Epoch) {
        if let Some(mut control) = self.control().take()
            && let Err(error) = control.send(&ToSource::Running { epoch })
        {
            tracing::warn!(%error, "the source was not told that the guest runs here; the store will tell it");
        }
    }

    /// The migration is void. Whoever holds the control connection tells the source.
    pub fn abort(&self, reason: &str) -> Result<(), HandOverError> {
        self.ledger.step(
            TargetHandOver::abort,
            MigrationPhase::Failed,
            Some(brief(reason)),
        )?;
        self.listener.close();
        self.sockets.hang_up();
        if let Some(control) = self.control().take() {
            self.say_goodbye(control);
        }
        Ok(())
    }

    fn say_goodbye(&self, mut control: FrameStream) {
        let reason = self.ledger.status().reason.unwrap_or_default();
        // A source that cannot hear it notices that the connection ends.
        let _ = control.send(&ToSource::Abort { reason });
        control.shutdown();
    }

    /// From here on an abort ends this connection, whatever it is waiting for.
    fn publish(&self, stream: &FrameStream) -> io::Result<()> {
        self.sockets.add(stream)?;
        if !self.wanted() {
            stream.shutdown();
        }
        Ok(())
    }

    fn wanted(&self) -> bool {
        self.ledger.hand_over() == TargetHandOver::Filling
    }

    fn control(&self) -> MutexGuard<'_, Option<FrameStream>> {
        self.control.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Why nothing was taken over.
#[derive(Debug, thiserror::Error)]
enum TargetError {
    #[error(transparent)]
    Stream(#[from] StreamError),
    #[error("the source called it off: {0}")]
    Aborted(String),
    #[error("{got} came where {expected} was expected")]
    OutOfTurn { got: String, expected: &'static str },
    #[error(transparent)]
    Ram(#[from] RamError),
    #[error("{0} pages arrived and the source sent {1}")]
    PagesMissing(u64, u64),
    #[error("not every lane had ended round {0} in time")]
    RoundIncomplete(u32),
    #[error("a lane ended before round {0} was whole")]
    LaneEnded(u32),
    #[error("pages of round {got} came in round {expected}")]
    WrongRound { got: u32, expected: u32 },
    #[error("compressed pages cannot be unpacked")]
    BadCompression,
    #[error("only {joined} of {expected} lanes joined in time")]
    LanesMissing { joined: usize, expected: usize },
    #[error("the machine's state arrived damaged")]
    StateDamaged,
    #[error("the machine's state cannot be read: {0}")]
    StateUnreadable(String),
    #[error("guest memory differs from the source's: {ours} here, {theirs} there")]
    MemoryDiffers { ours: String, theirs: String },
    #[error(transparent)]
    Machine(#[from] MachineError),
    #[error(transparent)]
    HandOver(#[from] HandOverError),
    #[error("listening for the source failed: {0}")]
    Listen(#[source] io::Error),
}

/// Waits for the source, fills the machine and reports it whole. Runs on a thread of its own.
pub fn receive_machine(
    incoming: &Incoming,
    request: &IncomingRequest,
    cpu: &ThisCpu,
    ram: &GuestRam,
    machine: &dyn TargetMachine,
) {
    let session = Session {
        incoming,
        request,
        cpu,
        ram,
        tls: request
            .identity
            .as_ref()
            .map(|identity| MigrationTls::new(request.migration, identity)),
    };
    let (control, error) = match session.accept() {
        Err(error) => (None, error),
        Ok(greeting) => match session.serve(greeting, machine) {
            Ok(()) => return,
            Err((control, error)) => (Some(control), error),
        },
    };
    // Refused when it was aborted meanwhile, which its owner knows.
    if incoming.abort(&error.to_string()).is_ok() {
        tracing::warn!(migration = %request.migration, %error, "the incoming migration ended");
    }
    if let Some(control) = control {
        incoming.say_goodbye(control);
    }
    machine.void();
}

struct Session<'a> {
    incoming: &'a Incoming,
    request: &'a IncomingRequest,
    cpu: &'a ThisCpu,
    ram: &'a GuestRam,
    tls: Option<MigrationTls>,
}

/// The rightful source, and what it asked for.
struct Greeting {
    control: FrameStream,
    verify: Verify,
    lanes: u8,
}

/// What [`ToTarget::Done`] says.
struct Whole {
    round: u32,
    pages: u64,
    state_hash: String,
    clock_age_ns: u64,
    then: Arrival,
    memory_hash: Option<String>,
}

impl Session<'_> {
    /// Fills the machine. An error gives the control connection back, so that the source hears of it.
    fn serve(
        &self,
        greeting: Greeting,
        machine: &dyn TargetMachine,
    ) -> Result<(), (FrameStream, TargetError)> {
        let Greeting {
            mut control,
            verify,
            lanes,
        } = greeting;
        let arrivals = Arrivals::new(usize::from(lanes));
        let filled = std::thread::scope(|scope| {
            let filled = self
                .join_lanes(lanes, &arrivals)
                .and_then(|intakes| {
                    for intake in intakes {
                        let waker = control.socket().map_err(StreamError::from)?;
                        scope.spawn(move || intake.run(&waker));
                    }
                    self.fill(&mut control, &arrivals, verify, machine)
                })
                // A lane that failed woke the control connection; its reason is the better one.
                .map_err(|error| arrivals.take_failure().unwrap_or(error));
            self.incoming.sockets.end_lanes();
            filled
        });
        if let Err(error) = filled {
            return Err((control, error));
        }
        // Held until the source has heard `Ready`: the commit may come at once, and `Running` goes after it.
        let mut held = self.incoming.control();
        let whole =
            self.incoming
                .ledger
                .step(TargetHandOver::whole, MigrationPhase::AwaitingCommit, None);
        if let Err(error) = whole {
            drop(held);
            return Err((control, error.into()));
        }
        // A source that cannot hear it any more asks the store.
        let _ = control.send(&ToSource::Ready);
        *held = Some(control);
        Ok(())
    }

    /// Rounds, the machine's state, and `Done`: then everything is here and the machine is what it was.
    fn fill(
        &self,
        control: &mut FrameStream,
        arrivals: &Arrivals,
        verify: Verify,
        machine: &dyn TargetMachine,
    ) -> Result<(), TargetError> {
        let ledger = &self.incoming.ledger;
        ledger.progress(|progress| progress.memory_bytes = self.ram.size());
        ledger.enter(MigrationPhase::PreCopy);
        let (mut state, started) = (None, Instant::now());
        loop {
            let announced = control.announced()?;
            match announced.header.kind {
                FrameKind::State if state.is_none() => {
                    ledger.enter(MigrationPhase::Blackout);
                    state = Some(control.payload(&announced)?);
                    continue;
                }
                FrameKind::State => {
                    return Err(TargetError::OutOfTurn {
                        got: "a second state".into(),
                        expected: "Done",
                    });
                }
                FrameKind::Pages | FrameKind::Zero | FrameKind::Control => {}
            }
            match control.message(&announced)? {
                ToTarget::EndOfRound { round, pages } => {
                    arrivals.wait_for(round, pages)?;
                    ledger.progress(|progress| progress.round = round);
                    self.note(arrivals, started);
                    control.send(&ToSource::RoundReceived { round })?;
                }
                ToTarget::Done {
                    round,
                    pages,
                    state_hash,
                    clock_age_ns,
                    then,
                    memory_hash,
                } => {
                    let whole = Whole {
                        round,
                        pages,
                        state_hash,
                        clock_age_ns,
                        then,
                        memory_hash,
                    };
                    let done = self.complete(whole, state, arrivals, verify, machine);
                    self.note(arrivals, started);
                    return done;
                }
                ToTarget::Abort { reason } => return Err(TargetError::Aborted(reason)),
                other @ (ToTarget::Hello { .. } | ToTarget::Join { .. }) => {
                    return Err(TargetError::OutOfTurn {
                        got: other.name().into(),
                        expected: "the end of a round",
                    });
                }
            }
        }
    }

    fn complete(
        &self,
        whole: Whole,
        state: Option<Vec<u8>>,
        arrivals: &Arrivals,
        verify: Verify,
        machine: &dyn TargetMachine,
    ) -> Result<(), TargetError> {
        let arrived = Instant::now();
        let saved = decode_state(state, &whole.state_hash)?;
        arrivals.wait_for(whole.round, whole.pages)?;
        self.check_memory(verify, whole.memory_hash)?;
        let age = Duration::from_nanos(whole.clock_age_ns) + arrived.elapsed();
        machine.restore(saved, age)?;
        let arrival = &mut *self
            .incoming
            .arrival
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        *arrival = Some(whole.then);
        Ok(())
    }

    fn check_memory(&self, verify: Verify, theirs: Option<String>) -> Result<(), TargetError> {
        match (verify, theirs) {
            (Verify::Frames, _) => Ok(()),
            (Verify::WholeMemory, Some(theirs)) => {
                let ours = self.ram.hash()?;
                if ours == theirs {
                    Ok(())
                } else {
                    Err(TargetError::MemoryDiffers { ours, theirs })
                }
            }
            (Verify::WholeMemory, None) => Err(TargetError::OutOfTurn {
                got: "Done without a memory hash".into(),
                expected: "one with it",
            }),
        }
    }

    fn note(&self, arrivals: &Arrivals, started: Instant) {
        let received = arrivals.received();
        self.incoming.ledger.progress(|progress| {
            progress.content_pages = received.pages - received.zero_pages;
            progress.zero_pages = received.zero_pages;
            progress.transferred_bytes = Bytes(received.bytes);
            progress.rate_bytes_per_s =
                (received.bytes as f64 / started.elapsed().as_secs_f64().max(1e-3)) as u64;
        });
    }
}

fn decode_state(state: Option<Vec<u8>>, hash: &str) -> Result<SavedMachine, TargetError> {
    let state = state.ok_or(TargetError::OutOfTurn {
        got: "Done".into(),
        expected: "the machine's state",
    })?;
    if format!("{:032x}", xxhash_rust::xxh3::xxh3_128(&state)) != hash {
        return Err(TargetError::StateDamaged);
    }
    ciborium::from_reader(state.as_slice())
        .map_err(|error| TargetError::StateUnreadable(error.to_string()))
}

#[cfg(test)]
mod tests;
