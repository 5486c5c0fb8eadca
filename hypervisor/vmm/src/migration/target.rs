//! The receiving end. Everything that arrives is judged before it is believed: lengths by the frame header,
//! addresses by guest memory's own bounds, the order of messages here.

use super::hand_over::{HandOverError, TargetHandOver};
use super::ledger::Ledger;
use super::stream::{FrameStream, StreamError, brief};
use crate::machine::{MachineError, SavedMachine};
use crate::memory::{GuestRam, RamError};
use godwit_wire::cpu::{GuestCpu, TscScaling};
use godwit_wire::id::Epoch;
use godwit_wire::machine::{CpuFacts, CpuMismatch};
use godwit_wire::migration::{
    Arrival, FrameHeader, FrameKind, MAX_TOUCHED_STRETCHES, MigrationPhase,
    OLDEST_PROTOCOL_VERSION, PROTOCOL_VERSION, Stretch, ToSource, ToTarget, Verify,
};
use godwit_wire::unit::{Bytes, PAGE_BYTES};
use godwit_wire::vmm_api::IncomingRequest;
use std::io;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use vm_memory::ReadVolatile;

/// How long whoever connects may take to say who it is; meanwhile the right one waits.
const HELLO_TIMEOUT: Duration = Duration::from_secs(5);
/// How often progress is noted, in frames.
const FRAMES_PER_NOTE: u64 = 16;

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
    arrival: Mutex<Option<Arrival>>,
    stream: Mutex<Option<FrameStream>>,
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
    /// One that waits for its source.
    pub const fn new(ledger: Arc<Ledger<TargetHandOver>>, listener: MigrationListener) -> Self {
        Self {
            ledger,
            arrival: Mutex::new(None),
            stream: Mutex::new(None),
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
        if let Some(mut stream) = self.take_stream()
            && let Err(error) = stream.send(&ToSource::Running { epoch })
        {
            tracing::warn!(%error, "the source was not told that the guest runs here; the store will tell it");
        }
    }

    /// The migration is void.
    pub fn abort(&self, reason: &str) -> Result<(), HandOverError> {
        let reason = brief(reason);
        self.ledger.step(
            TargetHandOver::abort,
            MigrationPhase::Failed,
            Some(reason.clone()),
        )?;
        self.listener.close();
        if let Some(mut stream) = self.take_stream() {
            let _ = stream.send(&ToSource::Abort { reason });
            stream.shutdown();
        }
        Ok(())
    }

    /// From here on an abort ends this connection, whatever it is waiting for.
    fn publish(&self, stream: &FrameStream) -> io::Result<()> {
        let mut published = self.stream.lock().unwrap_or_else(PoisonError::into_inner);
        if self.ledger.hand_over() == TargetHandOver::Void {
            stream.shutdown();
        }
        *published = Some(stream.try_clone()?);
        Ok(())
    }

    fn take_stream(&self) -> Option<FrameStream> {
        self.stream
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take()
    }

    fn wanted(&self) -> bool {
        self.ledger.hand_over() == TargetHandOver::Filling
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

/// Why a source is turned away before it sends anything.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
enum Refusal {
    #[error(
        "it speaks protocol versions {oldest} to {newest}, this end {OLDEST_PROTOCOL_VERSION} to {PROTOCOL_VERSION}"
    )]
    Version { oldest: u32, newest: u32 },
    #[error("it requires {0}, which this end does not know")]
    Capability(String),
    #[error("this end waits for another migration")]
    OtherMigration,
    #[error("the VM, its epoch or its machine differ from what was announced")]
    OtherMachine,
    #[error(transparent)]
    Cpu(CpuMismatch),
    #[error("it names more touched memory than the machine has")]
    Touched,
    #[error("memory for the guest cannot be had: {0}")]
    NoMemory(String),
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
    };
    if let Err(error) = session.serve(machine) {
        // Refused when it was aborted meanwhile, which its owner knows.
        if incoming.abort(&error.to_string()).is_ok() {
            tracing::warn!(migration = %request.migration, %error, "the incoming migration ended");
        }
        machine.void();
    }
}

struct Session<'a> {
    incoming: &'a Incoming,
    request: &'a IncomingRequest,
    cpu: &'a ThisCpu,
    ram: &'a GuestRam,
}

impl Session<'_> {
    fn serve(&self, machine: &dyn TargetMachine) -> Result<(), TargetError> {
        let (mut stream, verify) = self.accept()?;
        self.incoming
            .ledger
            .progress(|progress| progress.memory_bytes = self.ram.size());
        self.incoming.ledger.enter(MigrationPhase::PreCopy);
        let mut intake = Intake {
            ram: self.ram,
            pages: 0,
            zero_pages: 0,
            bytes: 0,
            frames: 0,
        };
        let mut state = None;
        let started = Instant::now();
        loop {
            let header = stream.header()?;
            match header.kind {
                FrameKind::Pages | FrameKind::Zero => {
                    intake.take(&header, stream.socket())?;
                    if intake.frames.is_multiple_of(FRAMES_PER_NOTE) {
                        self.note(&intake, started);
                    }
                }
                FrameKind::State if state.is_none() => {
                    self.incoming.ledger.enter(MigrationPhase::Blackout);
                    state = Some(stream.payload(&header)?);
                }
                FrameKind::State => {
                    return Err(TargetError::OutOfTurn {
                        got: "a second state".into(),
                        expected: "Done",
                    });
                }
                FrameKind::Control => {
                    let message = serde_json::from_slice(&stream.payload(&header)?)
                        .map_err(StreamError::from)?;
                    match message {
                        ToTarget::EndOfRound { round, pages } => {
                            intake.expect(pages)?;
                            self.incoming
                                .ledger
                                .progress(|progress| progress.round = round);
                            self.note(&intake, started);
                            stream.send(&ToSource::RoundReceived { round })?;
                        }
                        ToTarget::Done {
                            pages,
                            state_hash,
                            clock_age_ns,
                            then,
                            memory_hash,
                        } => {
                            let arrived = Instant::now();
                            self.note(&intake, started);
                            intake.expect(pages)?;
                            let saved = decode_state(state, &state_hash)?;
                            self.check_memory(verify, memory_hash)?;
                            machine.restore(
                                saved,
                                Duration::from_nanos(clock_age_ns) + arrived.elapsed(),
                            )?;
                            *self
                                .incoming
                                .arrival
                                .lock()
                                .unwrap_or_else(PoisonError::into_inner) = Some(then);
                            self.incoming.ledger.step(
                                TargetHandOver::whole,
                                MigrationPhase::AwaitingCommit,
                                None,
                            )?;
                            // A source that cannot hear it any more asks the store.
                            let _ = stream.send(&ToSource::Ready);
                            return Ok(());
                        }
                        ToTarget::Abort { reason } => return Err(TargetError::Aborted(reason)),
                        ToTarget::Hello { .. } => {
                            return Err(TargetError::OutOfTurn {
                                got: "a second hello".into(),
                                expected: "pages",
                            });
                        }
                    }
                }
            }
        }
    }

    /// Takes connections until one is the expected source; the others are told why not and dropped.
    fn accept(&self) -> Result<(FrameStream, Verify), TargetError> {
        while self.incoming.wanted() {
            let (socket, peer) = self
                .incoming
                .listener
                .0
                .accept()
                .map_err(TargetError::Listen)?;
            let greeted = FrameStream::new(socket)
                .map_err(StreamError::from)
                .and_then(|stream| {
                    self.incoming.publish(&stream)?;
                    self.shake_hands(stream)
                });
            match greeted {
                Ok(Ok(accepted)) => {
                    self.incoming.listener.close();
                    return Ok(accepted);
                }
                Ok(Err(refusal)) => {
                    tracing::warn!(%peer, %refusal, "a migration connection was refused")
                }
                Err(error) => {
                    tracing::warn!(%peer, %error, "a connection to the migration port was dropped")
                }
            }
            drop(self.incoming.take_stream());
        }
        Err(TargetError::Aborted("nobody waits for it any more".into()))
    }

    fn shake_hands(
        &self,
        mut stream: FrameStream,
    ) -> Result<Result<(FrameStream, Verify), Refusal>, StreamError> {
        let hello: ToTarget = stream.receive_within(HELLO_TIMEOUT)?;
        stream.limit_silence()?;
        let judged = self.judge(&hello).and_then(|(verify, touched)| {
            let populated = self.ram.populate_all(touched, &|| self.incoming.wanted());
            populated
                .map(|()| verify)
                .map_err(|error| Refusal::NoMemory(error.to_string()))
        });
        match judged {
            Ok(verify) => {
                stream.send(&ToSource::Accept {
                    version: PROTOCOL_VERSION,
                })?;
                Ok(Ok((stream, verify)))
            }
            Err(refusal) => {
                stream.send(&ToSource::Refuse {
                    reason: brief(&refusal.to_string()),
                })?;
                Ok(Err(refusal))
            }
        }
    }

    fn judge<'h>(&self, hello: &'h ToTarget) -> Result<(Verify, &'h [Stretch]), Refusal> {
        let ToTarget::Hello {
            version,
            oldest_version,
            required,
            migration,
            vm,
            epoch,
            spec,
            cpu,
            guest_cpu,
            verify,
            touched,
        } = hello
        else {
            return Err(Refusal::OtherMigration);
        };
        if *migration != self.request.migration {
            return Err(Refusal::OtherMigration);
        }
        if *oldest_version > PROTOCOL_VERSION || *version < OLDEST_PROTOCOL_VERSION {
            return Err(Refusal::Version {
                oldest: *oldest_version,
                newest: *version,
            });
        }
        if let Some(unknown) = required.first() {
            return Err(Refusal::Capability(unknown.clone()));
        }
        if (*vm, *epoch, spec) != (self.request.vm, self.request.epoch, &self.request.spec) {
            return Err(Refusal::OtherMachine);
        }
        let ours = self.cpu;
        ours.facts
            .admits(spec.cpu, Some(&cpu.signature))
            .map_err(Refusal::Cpu)?;
        if let Some(guest_cpu) = guest_cpu {
            guest_cpu
                .can_go_on(&ours.guest, ours.scaling)
                .map_err(Refusal::Cpu)?;
        }
        let pages = touched
            .iter()
            .fold(0, |sum: u64, stretch| sum.saturating_add(stretch.pages));
        if touched.len() > MAX_TOUCHED_STRETCHES || pages > self.ram.size().pages() {
            return Err(Refusal::Touched);
        }
        Ok((*verify, touched))
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

    fn note(&self, intake: &Intake<'_>, started: Instant) {
        self.incoming.ledger.progress(|progress| {
            progress.content_pages = intake.pages - intake.zero_pages;
            progress.zero_pages = intake.zero_pages;
            progress.transferred_bytes = Bytes(intake.bytes);
            progress.rate_bytes_per_s =
                (intake.bytes as f64 / started.elapsed().as_secs_f64().max(1e-3)) as u64;
        });
    }
}

/// Pages on their way into guest memory.
struct Intake<'a> {
    ram: &'a GuestRam,
    pages: u64,
    zero_pages: u64,
    bytes: u64,
    frames: u64,
}

impl Intake<'_> {
    fn take(&mut self, header: &FrameHeader, socket: &mut TcpStream) -> Result<(), TargetError> {
        let pages = u64::from(header.pages);
        match header.kind {
            FrameKind::Zero => {
                self.ram.discard(header.address, pages)?;
                self.zero_pages += pages;
            }
            _ => {
                let mut room = self.ram.slice(header.address, pages * PAGE_BYTES)?;
                socket
                    .read_exact_volatile(&mut room)
                    .map_err(|error| StreamError::Io(io::Error::other(error.to_string())))?;
            }
        }
        self.pages += pages;
        self.frames += 1;
        self.bytes += header.encode().len() as u64 + u64::from(header.length);
        Ok(())
    }

    /// The source counts the same pages.
    const fn expect(&self, sent: u64) -> Result<(), TargetError> {
        if self.pages == sent {
            Ok(())
        } else {
            Err(TargetError::PagesMissing(self.pages, sent))
        }
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
