//! The sending end.
//!
//! ```text
//! connect ─▶ shake hands ─▶ round, round, … ─▶ pause, save, last pass ─▶ Done ─▶ wait for Running ─▶ gone
//!    └──────────────┴──────────────┴───────────────────┘                  │             └─(post-copy)─▶ serve memory
//!       any failure or cancel: the guest runs on here       the store decides, not this end
//! ```

mod black_out;
mod connect;
mod error;
mod follow;
mod lanes_at_work;
mod rounds;

use super::crew::Crew;
use super::disks;
use super::hand_over::{HandOverError, SourceHandOver};
use super::ledger::Ledger;
use super::pace::Pace;
use super::round::Tally;
use super::sockets::Sockets;
use super::stream::{FrameStream, StreamError, brief};
use crate::kvm::{DirtyBitmap, DirtyLog};
use crate::machine::{MachineError, SavedMachine, Throttle, Throttling};
use crate::memory::GuestRam;
use connect::Agreed;
use error::SourceError;
use godwit_channel::tls::MigrationTls;
use godwit_devices::block::LeavingDisk;
use godwit_devices::net::FrameTimes;
use godwit_wire::cpu::GuestCpu;
use godwit_wire::id::VmId;
use godwit_wire::machine::{CpuFacts, MachineSpec};
use godwit_wire::migration::{Arrival, Blackout, Counted, MigrationPhase, ToSource, ToTarget};
use godwit_wire::unit::Bytes;
use godwit_wire::vmm_api::OutgoingRequest;
use lanes_at_work::LanesAtWork;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// How long a target that has ended its connections may take to say why.
const LAST_WORDS: Duration = Duration::from_millis(500);

/// What the sending end needs of the machine's owner.
pub trait SourceMachine: Send {
    /// Stops the guest for the hand-over; says what the guest is to do afterwards.
    fn pause(&self) -> Result<Arrival, MachineError>;
    /// What slows the guest down, if that is needed.
    fn throttle(&self) -> Option<Throttle>;
    /// Saves everything but memory.
    fn save(&self) -> Result<AtRest, MachineError>;
    /// The migration ended without a hand-over: the guest goes on if it ran.
    fn resume(&self);
    /// The guest runs at the target, which has all of it.
    fn gone(&self);
}

/// What there is of a guest that stands still, besides its memory.
#[derive(Debug)]
pub struct AtRest {
    /// vCPUs and devices.
    pub saved: SavedMachine,
    /// When guest time was sampled.
    pub sampled: Instant,
    /// What was counted up to then.
    pub counted: Counted,
    /// When frames passed its network cards.
    pub cards: Vec<Arc<FrameTimes>>,
}

/// The guest stands still for its hand-over.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the guest stands still to be handed over")]
pub struct StandsStill;

/// A migration away from here, as its owner holds it.
#[derive(Debug)]
pub struct Outgoing {
    /// What is known of it.
    pub ledger: Arc<Ledger<SourceHandOver>>,
    sockets: Sockets,
    /// What all lanes but the urgent ones keep to.
    pace: Pace,
    /// Held while the pace is changed.
    pacing: Mutex<Pacing>,
}

/// Whether the pace may be changed before the guest stands still.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Pacing {
    /// It may.
    Free,
    /// It is decided that the guest stands still next, with the pace there is.
    Settled,
}

impl Outgoing {
    /// One that is about to begin, and may send so much per second; without a limit if that is absent.
    pub fn new(
        ledger: Arc<Ledger<SourceHandOver>>,
        max_bandwidth_bytes_per_s: Option<u64>,
    ) -> Self {
        Self {
            ledger,
            sockets: Sockets::new(),
            pace: Pace::new(max_bandwidth_bytes_per_s),
            pacing: Mutex::new(Pacing::Free),
        }
    }

    /// From now on it sends no more than so much per second. Refused while the guest stands still or is about to: its
    /// blackout was predicted with the limit there was. What follows the guest keeps to other limits again.
    pub fn set_bandwidth(&self, max_bytes_per_s: Option<u64>) -> Result<(), StandsStill> {
        let pacing = self.pacing();
        match self.ledger.status().phase {
            MigrationPhase::Blackout | MigrationPhase::AwaitingCommit => Err(StandsStill),
            MigrationPhase::Connecting | MigrationPhase::PreCopy if *pacing == Pacing::Settled => {
                Err(StandsStill)
            }
            _ => {
                self.pace.set(max_bytes_per_s);
                Ok(())
            }
        }
    }

    /// Keeps the pace as it is until the guest runs at the target; false if it is not `reckoned_with` any more.
    fn settle_pace(&self, reckoned_with: Option<u64>) -> bool {
        let mut pacing = self.pacing();
        let same = self.pace.bytes_per_s() == reckoned_with;
        if same {
            *pacing = Pacing::Settled;
        }
        same
    }

    fn pacing(&self) -> MutexGuard<'_, Pacing> {
        self.pacing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The operator calls it off; refused once only the store can decide.
    pub fn cancel(&self, reason: &str) -> Result<(), HandOverError> {
        self.ledger.step(
            SourceHandOver::cancel,
            MigrationPhase::Cancelled,
            Some(reason.to_owned()),
        )?;
        self.sockets.hang_up();
        Ok(())
    }

    /// The store has voided it.
    pub fn abort(&self) -> Result<(), HandOverError> {
        let reason = Some("the store voided the migration".to_owned());
        self.ledger
            .step(SourceHandOver::abort, MigrationPhase::Failed, reason)?;
        self.sockets.hang_up();
        Ok(())
    }

    /// The store has given the VM to the target. Says whether the target still needs memory from here.
    pub fn release(&self) -> Result<SourceHandOver, HandOverError> {
        let reached = self.step_away()?;
        if reached == SourceHandOver::Gone {
            self.sockets.hang_up();
        }
        Ok(reached)
    }

    fn step_away(&self) -> Result<SourceHandOver, HandOverError> {
        let phase = |reached| match reached {
            SourceHandOver::Serving => MigrationPhase::PostCopy,
            _ => MigrationPhase::Completed,
        };
        self.ledger.step_to(SourceHandOver::gone, phase, None)
    }

    /// From here on whoever calls the migration off ends this connection.
    fn publish(&self, stream: &FrameStream) -> Result<(), SourceError> {
        self.sockets.add(stream).map_err(StreamError::from)?;
        // One that came before there was a connection to end is heeded here.
        match self.ledger.hand_over() {
            SourceHandOver::Copying | SourceHandOver::InDoubt(_) | SourceHandOver::Serving => {
                Ok(())
            }
            SourceHandOver::Gone | SourceHandOver::Returned => Err(SourceError::Cancelled),
        }
    }
}

/// Sends the machine, the content of `disks` with it; returns when it is over or only the store can end it. Runs on a
/// thread of its own.
pub fn send_machine(
    outgoing: &Outgoing,
    request: &OutgoingRequest,
    identity: (VmId, &MachineSpec, &CpuFacts, &GuestCpu),
    (ram, disks): (&GuestRam, Vec<LeavingDisk>),
    start_log: impl FnOnce() -> Result<DirtyLog, MachineError>,
    machine: &dyn SourceMachine,
) {
    let session = Session {
        outgoing,
        ledger: &outgoing.ledger,
        request,
        ram,
        lanes: LanesAtWork::new(request.policy.lanes),
        disks,
        tls: request
            .identity
            .as_ref()
            .map(|identity| MigrationTls::new(request.migration, identity)),
        started: Instant::now(),
    };
    let (mut control, agreed) = match session.connect(identity) {
        Ok(connected) => connected,
        Err(error) => return session.stay(None, &error, machine),
    };
    let copied = start_log()
        .map_err(SourceError::from)
        .and_then(|log| session.copy(&mut control, &agreed, &log, machine));
    match copied {
        Ok(Some(dark)) => session.await_running(control, dark, machine),
        Ok(None) => {}
        Err(error) => {
            let error = session.hear_why(&mut control, error);
            session.stay(Some(control), &error, machine);
        }
    }
}

struct Session<'a> {
    outgoing: &'a Outgoing,
    ledger: &'a Ledger<SourceHandOver>,
    request: &'a OutgoingRequest,
    ram: &'a GuestRam,
    lanes: LanesAtWork,
    /// In the order in which frames number them.
    disks: Vec<LeavingDisk>,
    tls: Option<MigrationTls>,
    started: Instant,
}

/// A blackout under way.
struct Dark {
    since: Instant,
    /// When everything was sent.
    sent: Instant,
    /// When the target said that it is whole.
    whole: Option<Instant>,
    /// When the target said that the guest runs there.
    ran_since: Option<Instant>,
    parts: Blackout,
    /// What was not sent; empty without post-copy.
    owed: Vec<DirtyBitmap>,
}

/// What pre-copy leaves to be sent while the guest stands still, or afterwards.
struct Rest {
    round: u32,
    dirty: Vec<DirtyBitmap>,
    predicted: Duration,
    /// Rate that was reckoned with.
    bytes_per_s: u64,
    /// Whether the guest goes ahead of it.
    ahead: bool,
}

impl Session<'_> {
    /// The guest stays here; the target hears why.
    fn stay(&self, control: Option<FrameStream>, error: &SourceError, machine: &dyn SourceMachine) {
        self.disks.iter().for_each(LeavingDisk::end);
        let (phase, reason) = match self.ledger.status().phase {
            MigrationPhase::Cancelled => (MigrationPhase::Cancelled, None),
            _ => (MigrationPhase::Failed, Some(brief(&error.to_string()))),
        };
        // Refused only when the store has already decided; then the owner has acted on it.
        if self
            .ledger
            .step(SourceHandOver::cancel, phase, reason)
            .is_ok()
        {
            tracing::warn!(migration = %self.request.migration, %error, "the migration ended; the guest stays here");
            machine.resume();
        }
        if let Some(mut control) = control {
            let reason = brief(&error.to_string());
            // So that it frees what it has; a broken connection tells it just as well.
            let _ = control.send(&ToTarget::Abort { reason });
            control.shutdown();
        }
    }

    /// A target that gives up ends its connections and says why on the control connection; that is the better reason
    /// than the broken connection that was noticed first.
    fn hear_why(&self, control: &mut FrameStream, error: SourceError) -> SourceError {
        let broken = matches!(error, SourceError::Stream(StreamError::Io(_)));
        if !broken {
            return error;
        }
        match control.receive_before(Instant::now() + LAST_WORDS) {
            Ok(ToSource::Abort { reason }) => SourceError::Aborted(reason),
            _ => error,
        }
    }

    /// Copies everything; on return only the store can decide. `None` when memory has followed the guest and there is
    /// nothing more to wait for.
    fn copy(
        &self,
        control: &mut FrameStream,
        agreed: &Agreed,
        log: &DirtyLog,
        machine: &dyn SourceMachine,
    ) -> Result<Option<Dark>, SourceError> {
        let shared = Shared {
            log,
            pace: &self.outgoing.pace,
            at_once: Pace::new(None),
            tally: Tally::default(),
        };
        let lanes = self.open_lanes(self.lanes.opened(), agreed.urgent_lanes, &shared)?;
        let memory_bytes = self.ram.size();
        self.ledger.progress(|progress| {
            progress.memory_bytes = memory_bytes;
            progress.disk_bytes = Bytes(disks::size(&self.disks));
        });
        self.ledger.enter(MigrationPhase::PreCopy);
        // What devices wrote up to now is sent by the first round anyhow.
        self.ram.take_written();
        std::thread::scope(|scope| {
            let crew = Crew::start(scope, lanes.bulk, &self.lanes.places);
            let counted = (&crew, &shared.tally);
            let mut slowed = machine.throttle().map(Throttling::start);
            let rest = self.pre_copy(log, counted, control, slowed.as_mut(), agreed)?;
            self.note_lanes(self.lanes.settle());
            if !rest.ahead {
                return Ok(Some(self.black_out(log, counted, control, machine, rest)?));
            }
            let (mut dark, round) = self.go_ahead(log, counted, control, machine, rest)?;
            drop(slowed);
            let owed = std::mem::take(&mut dark.owed);
            let link = (control, &crew, lanes.urgent);
            self.follow(link, &shared, (round, owed), dark, machine);
            Ok(None)
        })
    }
}

/// What all lanes of a migration have in common.
struct Shared<'a> {
    log: &'a DirtyLog,
    pace: &'a Pace,
    /// For urgent lanes: the guest waits for what they carry.
    at_once: Pace,
    tally: Tally,
}

#[cfg(test)]
mod tests {
    use super::*;
    use godwit_wire::id::MigrationId;
    use godwit_wire::migration::MigrationRole;

    #[test]
    fn the_pace_that_the_blackout_was_reckoned_with_stays_until_the_guest_has_left() {
        let ledger = Ledger::new(
            MigrationId::fresh(),
            MigrationRole::Source,
            SourceHandOver::Copying,
        );
        let outgoing = Outgoing::new(Arc::new(ledger), Some(1 << 20));
        outgoing.ledger.enter(MigrationPhase::PreCopy);
        outgoing.set_bandwidth(Some(2 << 20)).unwrap();
        assert!(!outgoing.settle_pace(Some(1 << 20)), "it was changed");
        outgoing.set_bandwidth(Some(3 << 20)).unwrap();
        assert!(outgoing.settle_pace(Some(3 << 20)));
        assert_eq!(outgoing.set_bandwidth(None), Err(StandsStill));
        assert_eq!(outgoing.pace.bytes_per_s(), Some(3 << 20));
        outgoing.ledger.enter(MigrationPhase::Blackout);
        assert_eq!(outgoing.set_bandwidth(None), Err(StandsStill));
        outgoing.ledger.enter(MigrationPhase::PostCopy);
        outgoing.set_bandwidth(None).unwrap();
        assert_eq!(outgoing.pace.bytes_per_s(), None);
    }
}
