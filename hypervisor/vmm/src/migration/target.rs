//! The receiving end. Everything that arrives is judged before it is believed: lengths by the frame header,
//! addresses by guest memory's own bounds, the order of messages here.

mod disks;
mod doorway;
mod follow;
mod lanes;
mod pull;
mod urgent;

use super::compare::{Holder, Seed};
use super::hand_over::{HandOverError, TargetHandOver};
use super::ledger::Ledger;
use super::maps::{MAX_MAPS, read_map};
use super::packet_gap::PacketGap;
use super::sockets::Sockets;
use super::stream::{FLUSH_LIMIT, FrameStream, SILENCE_LIMIT, StreamError, brief};
use crate::machine::{MachineError, SavedMachine};
use crate::memory::{Absent, AbsentError, GuestRam, RamError, boot_time_ns};
use disks::Arriving;
use doorway::Joined;
use godwit_channel::tls::MigrationTls;
use godwit_devices::block::{ArrivingDisk, ContentError};
use godwit_devices::net::FrameTimes;
use godwit_wire::cpu::{GuestCpu, TscScaling};
use godwit_wire::id::Epoch;
use godwit_wire::machine::CpuFacts;
use godwit_wire::migration::{
    Arrival, Counted, Done, FrameKind, MigrationPhase, MigrationStatus, MigrationToken,
    TargetMemory, ToSource, ToTarget, Verify,
};
use godwit_wire::unit::Bytes;
use godwit_wire::vmm_api::IncomingRequest;
use lanes::Arrivals;
use pull::{FIRST_LINK, Pull};
use std::io;
use std::net::{SocketAddr, TcpListener};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Rounds are counted from here.
const FIRST_ROUND: u32 = 1;

/// What the receiving end needs of the machine's owner.
pub trait TargetMachine: Send {
    /// Makes the machine what was saved, and counts on from what it had counted; it does not run yet.
    fn restore(
        &self,
        saved: SavedMachine,
        age: Duration,
        counted: Counted,
    ) -> Result<(), MachineError>;
    /// The migration ended without a grant: nothing of the machine may ever run.
    fn void(&self);
    /// The guest, if it runs, stands still until [`Self::go_on`], because memory it may need does not arrive. Nobody
    /// waits for its vCPUs: some may be waiting for just that memory.
    fn stall(&self, reason: String);
    /// Memory arrives again.
    fn go_on(&self);
    /// All memory that followed the guest is here.
    fn all_is_here(&self);
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
    packet_gap: PacketGap,
    /// The control connection, once the machine is whole.
    control: Mutex<Option<FrameStream>>,
    /// Memory that follows the guest.
    pull: Mutex<Option<Arc<Pull>>>,
    sockets: Sockets,
    listener: MigrationListener,
}

/// The socket a target waits on.
#[derive(Clone, Debug)]
pub struct MigrationListener(Arc<TcpListener>);

impl MigrationListener {
    /// Listens on `first`, or on the first free port behind it up to `last_port`.
    ///
    /// # Errors
    /// What the host says to the first port that is not merely taken, or to the last one.
    pub fn bind(first: SocketAddr, last_port: Option<u16>) -> io::Result<(Self, SocketAddr)> {
        let last_port = last_port.unwrap_or(0).max(first.port());
        let mut address = first;
        let listener = loop {
            match TcpListener::bind(address) {
                Err(error)
                    if error.kind() == io::ErrorKind::AddrInUse && address.port() < last_port =>
                {
                    address.set_port(address.port() + 1);
                }
                bound => break bound?,
            }
        };
        let bound = listener.local_addr()?;
        Ok((Self(Arc::new(listener)), bound))
    }

    fn close(&self) {
        // Wakes an accept that waits; later connections are refused when the last handle goes.
        let _ = rustix::net::shutdown(&*self.0, rustix::net::Shutdown::Both);
    }
}

impl Incoming {
    /// One that waits for its source, which must name `token`. The machine that it fills has these network `cards`.
    pub const fn new(
        ledger: Arc<Ledger<TargetHandOver>>,
        listener: MigrationListener,
        token: MigrationToken,
        cards: Vec<Arc<FrameTimes>>,
    ) -> Self {
        Self {
            ledger,
            token,
            arrival: Mutex::new(None),
            packet_gap: PacketGap::until_first_of(cards),
            control: Mutex::new(None),
            pull: Mutex::new(None),
            sockets: Sockets::new(),
            listener,
        }
    }

    /// The status as the API shows it, with what the guest's cards tell.
    pub fn status(&self) -> MigrationStatus {
        let mut status = self.ledger.status();
        status.progress.packet_gap_us = self.packet_gap.length_us();
        status
    }

    /// What the guest is to do once it is granted; known when the machine is whole.
    pub fn arrival(&self) -> Option<Arrival> {
        *self.arrival.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The store granted `epoch`. The caller lets the guest run and then calls [`Self::announce_running`].
    pub fn commit(&self, epoch: Epoch, source_epoch: Epoch) -> Result<(), HandOverError> {
        let pull = self.pull().clone();
        let phase = |_| match &pull {
            Some(_) => MigrationPhase::PostCopy,
            None => MigrationPhase::Completed,
        };
        self.ledger
            .step_to(|state| state.commit(epoch, source_epoch), phase, None)
            .map(drop)
    }

    /// Tells the source that the guest runs here, which ends the connection unless memory is still to follow.
    pub fn announce_running(&self, epoch: Epoch) {
        let mut control = self.control();
        if let Some(stream) = control.as_mut()
            && let Err(error) = stream.send(&ToSource::Running { epoch })
        {
            tracing::warn!(%error, "the source was not told that the guest runs here; the store will tell it");
        }
        let pull = self.pull().clone();
        match pull {
            None => *control = None,
            // Only now: what is said when everything is here comes after this.
            Some(pull) => {
                drop(control);
                pull.committed();
            }
        }
    }

    /// Whether the guest is this side's and some of its memory is not here yet.
    pub fn lacks_memory(&self) -> bool {
        let committed = matches!(self.ledger.hand_over(), TargetHandOver::Running(_));
        committed && self.pull().as_ref().is_some_and(|pull| pull.lacks_some())
    }

    /// Why memory does not arrive, if it should and does not.
    pub fn memory_is_cut_off(&self) -> Option<String> {
        self.pull().as_ref().and_then(|pull| pull.cut_off())
    }

    /// The machine will never run: what is missing reads as zeros from here on.
    fn forget_memory(&self) {
        if let Some(pull) = &*self.pull() {
            pull.abandon();
        }
    }

    /// The migration is void. Whoever holds the control connection tells the source.
    pub fn abort(&self, reason: &str) -> Result<(), HandOverError> {
        self.ledger.step(
            TargetHandOver::abort,
            MigrationPhase::Failed,
            Some(brief(reason)),
        )?;
        self.forget_memory();
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
        match &*self.pull() {
            Some(pull) => !pull.is_abandoned(),
            None => self.ledger.hand_over() == TargetHandOver::Filling,
        }
    }

    fn pull(&self) -> MutexGuard<'_, Option<Arc<Pull>>> {
        self.pull.lock().unwrap_or_else(PoisonError::into_inner)
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
    #[error(transparent)]
    Absent(#[from] AbsentError),
    #[error("the source asks for more pages than the guest has")]
    ComparesTooMuch,
    #[error("{named} missing pages were named and the source spoke of {told}")]
    OtherPagesMissing { named: u64, told: u64 },
    #[error("{0} pages arrived and the source sent {1}")]
    PagesMissing(u64, u64),
    #[error("{0} bytes of disks arrived and the source sent {1}")]
    DiskBytesMissing(u64, u64),
    #[error("a frame for disk {0} came, and no such disk travels")]
    NoSuchDisk(u8),
    #[error("{bytes} bytes at byte {offset} of disk {disk} came, which is smaller")]
    PastDiskEnd {
        disk: String,
        offset: u64,
        bytes: u64,
    },
    #[error(transparent)]
    Disk(#[from] ContentError),
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

/// Waits for the source, fills the machine and reports it whole. Runs on a thread of its own. `memory` says what is in
/// the guest's memory before; `disks` are filled too.
pub fn receive_machine(
    incoming: &Incoming,
    request: &IncomingRequest,
    cpu: &ThisCpu,
    (ram, memory): (&GuestRam, TargetMemory),
    disks: Vec<ArrivingDisk>,
    machine: &dyn TargetMachine,
) {
    let session = Session {
        incoming,
        request,
        cpu,
        ram,
        memory,
        disks: Arriving::new(disks),
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
    /// What was in it before the source came.
    memory: TargetMemory,
    /// What comes of disks goes there.
    disks: Arriving,
    tls: Option<MigrationTls>,
}

/// The rightful source, and what it asked for.
struct Greeting {
    control: FrameStream,
    verify: Verify,
    lanes: u8,
    urgent_lanes: u8,
    /// Where post-copy is allowed and can be had.
    absent: Option<Absent>,
    /// Where there is memory from before that the source compares.
    seed: Option<Seed>,
    /// The arriving disks as the source numbers them.
    disk_order: Vec<usize>,
}

/// What arrives before `Done`, apart from pages.
struct Content {
    verify: Verify,
    state: Option<Vec<u8>>,
    absent: Option<Absent>,
    /// Whether pages were named that come later.
    ahead: bool,
    /// Maps of missing pages that came.
    maps: u32,
    /// What had come of disks, by the source's count, when that was last made durable.
    disk_bytes: u64,
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
            urgent_lanes,
            absent,
            seed,
            disk_order,
        } = greeting;
        let patience = match self.disks.is_empty() {
            true => SILENCE_LIMIT,
            false => FLUSH_LIMIT,
        };
        let arrivals = Arc::new(Arrivals::new(usize::from(lanes), patience));
        let disks = &disk_order;
        let holder = || seed.map(Holder::new);
        std::thread::scope(|scope| {
            let filled = self
                .join_lanes((lanes, urgent_lanes), doorway::JOIN_TIMEOUT)
                .and_then(|Joined { bulk, urgent }| {
                    if urgent.is_empty() {
                        self.incoming.listener.close();
                    }
                    self.take_in(
                        scope,
                        (bulk, FIRST_ROUND),
                        (holder, disks),
                        &arrivals,
                        &control,
                    )?;
                    let content = Content {
                        verify,
                        state: None,
                        absent,
                        ahead: false,
                        maps: 0,
                        disk_bytes: 0,
                    };
                    let pull_over =
                        |pull: &Arc<Pull>| self.pull_over(scope, pull, urgent).map(drop);
                    self.fill(&mut control, &arrivals, content, machine, pull_over)
                })
                // A lane that failed woke the control connection; its reason is the better one.
                .map_err(|error| arrivals.take_failure().unwrap_or(error))
                .and_then(|()| self.report_whole(&mut control));
            match filled {
                Ok(mut held) => *held = Some(control),
                Err(error) => {
                    self.incoming.forget_memory();
                    self.incoming.sockets.end_lanes();
                    return Err((control, error));
                }
            }
            let pull = self.incoming.pull().clone();
            match pull {
                None => self.incoming.sockets.end_lanes(),
                Some(pull) => self.await_rest(scope, &pull, machine),
            }
            Ok(())
        })
    }

    /// The machine is whole. What is returned is held until the source has heard `Ready`: the commit may come at once,
    /// and `Running` goes after it.
    fn report_whole(
        &self,
        control: &mut FrameStream,
    ) -> Result<MutexGuard<'_, Option<FrameStream>>, TargetError> {
        let held = self.incoming.control();
        self.incoming
            .ledger
            .step(TargetHandOver::whole, MigrationPhase::AwaitingCommit, None)?;
        // A source that cannot hear it any more asks the store.
        let _ = control.send(&ToSource::Ready);
        Ok(held)
    }

    /// Rounds, the machine's state, and `Done`: then everything is here and the machine is what it was, or what is
    /// missing is named, waited for and fetched by what `pull_over` starts.
    fn fill(
        &self,
        control: &mut FrameStream,
        arrivals: &Arrivals,
        mut content: Content,
        machine: &dyn TargetMachine,
        pull_over: impl FnOnce(&Arc<Pull>) -> Result<(), TargetError>,
    ) -> Result<(), TargetError> {
        let ledger = &self.incoming.ledger;
        ledger.progress(|progress| {
            progress.memory_bytes = self.ram.size();
            progress.disk_bytes = self.disks.size();
        });
        ledger.enter(MigrationPhase::PreCopy);
        let started = Instant::now();
        loop {
            let announced = control.announced()?;
            match announced.header.kind {
                FrameKind::State if content.state.is_none() => {
                    ledger.enter(MigrationPhase::Blackout);
                    content.state = Some(control.payload(&announced)?);
                    continue;
                }
                FrameKind::State => {
                    return Err(TargetError::OutOfTurn {
                        got: "a second state".into(),
                        expected: "Done",
                    });
                }
                FrameKind::Missing => {
                    let payload = control.payload(&announced)?;
                    let map = read_map(&announced.header, &payload);
                    content.maps += 1;
                    if content.maps > MAX_MAPS {
                        return Err(TargetError::OutOfTurn {
                            got: "yet another map of missing pages".into(),
                            expected: "WillMiss or Done",
                        });
                    }
                    content.absent()?.expect(announced.header.address, &map)?;
                    continue;
                }
                _ => {}
            }
            match control.message(&announced)? {
                ToTarget::EndOfRound {
                    round,
                    pages,
                    disk_bytes,
                } => {
                    arrivals.wait_for(round, (pages, disk_bytes))?;
                    let flush_us = self.settle_disks(disk_bytes, &mut content)?;
                    ledger.progress(|progress| progress.round = round);
                    self.note(arrivals, started);
                    control.send(&ToSource::RoundReceived { round, flush_us })?;
                }
                ToTarget::WillMiss { pages } => {
                    content.check_missing(pages)?;
                    content.ahead = true;
                    control.send(&ToSource::Discarded)?;
                }
                ToTarget::Done(done) => {
                    let completed =
                        self.complete(done, content, (control, arrivals), machine, pull_over);
                    self.note(arrivals, started);
                    return completed;
                }
                ToTarget::Abort { reason } => return Err(TargetError::Aborted(reason)),
                other @ (ToTarget::Hello { .. }
                | ToTarget::Join { .. }
                | ToTarget::Resume { .. }) => {
                    return Err(TargetError::OutOfTurn {
                        got: other.name().into(),
                        expected: "the end of a round",
                    });
                }
            }
        }
    }

    /// Makes durable what a round brought of disks, if it brought anything; how many microseconds that took. So little
    /// is left to do for the round that comes while the guest stands still.
    fn settle_disks(&self, disk_bytes: u64, content: &mut Content) -> Result<u64, TargetError> {
        if std::mem::replace(&mut content.disk_bytes, disk_bytes) == disk_bytes {
            return Ok(0);
        }
        Ok(self.disks.flush()?.as_micros() as u64)
    }

    fn complete(
        &self,
        done: Done,
        content: Content,
        (control, arrivals): (&mut FrameStream, &Arrivals),
        machine: &dyn TargetMachine,
        pull_over: impl FnOnce(&Arc<Pull>) -> Result<(), TargetError>,
    ) -> Result<(), TargetError> {
        let (arrived, arrived_ns) = (Instant::now(), boot_time_ns());
        let saved = decode_state(content.state.as_deref(), &done.state_hash)?;
        arrivals.wait_for(done.round, (done.pages, done.disk_bytes))?;
        arrivals.seal()?;
        content.check_missing(done.missing_pages)?;
        // Before anybody hears that this end is whole: what the store then commits to outlives a power cut.
        self.disks.seal()?;
        match content.absent {
            Some(absent) if content.ahead => {
                let pull = Arc::new(Pull::arm(absent, done.round + 1)?);
                arrivals.follow(pull.clone(), FIRST_LINK);
                *self.incoming.pull() = Some(pull.clone());
                pull_over(&pull)?;
                control.send(&ToSource::Armed)?;
            }
            Some(absent) if absent.left() > 0 => {
                return Err(TargetError::OutOfTurn {
                    got: "Done with missing pages".into(),
                    expected: "WillMiss",
                });
            }
            _ => {
                self.check_memory(content.verify, done.memory_hash)?;
                self.incoming.listener.close();
            }
        }
        let age = Duration::from_nanos(done.clock_age_ns) + arrived.elapsed();
        machine.restore(saved, age, done.counted)?;
        // A guest that stays paused is silent because its operator wants it to be.
        if let (Arrival::Run, Some(age_ns)) = (done.then, done.packet_age_ns) {
            self.incoming.packet_gap.opened(age_ns, arrived_ns);
        }
        let arrival = &mut *self
            .incoming
            .arrival
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        *arrival = Some(done.then);
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
            progress.disk_transferred_bytes = Bytes(received.disk_content_bytes);
            progress.rate_bytes_per_s =
                (received.bytes as f64 / started.elapsed().as_secs_f64().max(1e-3)) as u64;
        });
    }
}

impl Content {
    fn absent(&self) -> Result<&Absent, TargetError> {
        self.absent.as_ref().ok_or(TargetError::OutOfTurn {
            got: "a map of missing pages".into(),
            expected: "all of them, as was agreed",
        })
    }

    fn check_missing(&self, told: u64) -> Result<(), TargetError> {
        let named = self.absent.as_ref().map_or(0, Absent::left);
        if named == told {
            Ok(())
        } else {
            Err(TargetError::OtherPagesMissing { named, told })
        }
    }
}

fn decode_state(state: Option<&[u8]>, hash: &str) -> Result<SavedMachine, TargetError> {
    let state = state.ok_or(TargetError::OutOfTurn {
        got: "Done".into(),
        expected: "the machine's state",
    })?;
    if format!("{:032x}", xxhash_rust::xxh3::xxh3_128(state)) != hash {
        return Err(TargetError::StateDamaged);
    }
    ciborium::from_reader(state).map_err(|error| TargetError::StateUnreadable(error.to_string()))
}

#[cfg(test)]
mod tests;
