//! The sending end.
//!
//! ```text
//! connect ─▶ shake hands ─▶ round, round, … ─▶ pause, save, last pass ─▶ Done ─▶ wait for Running
//!    └──────────────┴──────────────┴───────────────────┘                          │
//!       any failure or cancel: the guest runs on here              the store decides, not this end
//! ```

use super::convergence::{Decision, RoundOutcome};
use super::hand_over::{HandOverError, SourceHandOver};
use super::ledger::Ledger;
use super::pages::{Guest, PageSender, PagesError};
use super::stream::{FrameStream, StreamError, brief};
use crate::kvm::{DirtyBitmap, DirtyLog, KvmError};
use crate::machine::{MachineError, SavedMachine};
use crate::memory::GuestRam;
use godwit_wire::cpu::GuestCpu;
use godwit_wire::id::{Epoch, VmId};
use godwit_wire::machine::{CpuFacts, MachineSpec};
use godwit_wire::migration::{
    Arrival, FrameHeader, MAX_TOUCHED_STRETCHES, MigrationPhase, OLDEST_PROTOCOL_VERSION,
    PROTOCOL_VERSION, ToSource, ToTarget, Verify,
};
use godwit_wire::unit::{Bytes, PAGE_BYTES};
use godwit_wire::vmm_api::OutgoingRequest;
use std::io;
use std::net::TcpStream;
use std::ops::ControlFlow;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// Device state, last acknowledgement and commit, before they have been measured.
const EXPECTED_FIXED_COST: Duration = Duration::from_millis(10);
/// The last pass is broken off when it takes this many times the downtime limit,
const BLACKOUT_PATIENCE: u32 = 3;
/// but not sooner than this: below it a busy machine alone makes the difference.
const LEAST_PATIENCE: Duration = Duration::from_secs(2);
/// Rounds shorter than this say little about the link.
const TELLING_ROUND: Duration = Duration::from_millis(50);

/// What the sending end needs of the machine's owner.
pub trait SourceMachine: Send {
    /// Stops the guest for the hand-over; says what the guest is to do afterwards.
    fn pause(&self) -> Result<Arrival, MachineError>;
    /// Saves everything but memory, and when guest time was sampled.
    fn save(&self) -> Result<(SavedMachine, Instant), MachineError>;
    /// The migration ended without a hand-over: the guest goes on if it ran.
    fn resume(&self);
    /// The guest runs at the target.
    fn gone(&self);
}

/// A migration away from here, as its owner holds it.
#[derive(Debug)]
pub struct Outgoing {
    /// What is known of it.
    pub ledger: Arc<Ledger<SourceHandOver>>,
    stream: Mutex<Option<FrameStream>>,
}

impl Outgoing {
    /// One that is about to begin.
    pub const fn new(ledger: Arc<Ledger<SourceHandOver>>) -> Self {
        Self {
            ledger,
            stream: Mutex::new(None),
        }
    }

    /// The operator calls it off; refused once only the store can decide.
    pub fn cancel(&self, reason: &str) -> Result<(), HandOverError> {
        self.ledger.step(
            SourceHandOver::cancel,
            MigrationPhase::Cancelled,
            Some(reason.to_owned()),
        )?;
        self.hang_up();
        Ok(())
    }

    /// The store has voided it.
    pub fn abort(&self) -> Result<(), HandOverError> {
        let reason = Some("the store voided the migration".to_owned());
        self.ledger
            .step(SourceHandOver::abort, MigrationPhase::Failed, reason)?;
        self.hang_up();
        Ok(())
    }

    /// The store has given the VM to the target.
    pub fn release(&self) -> Result<(), HandOverError> {
        self.ledger
            .step(SourceHandOver::gone, MigrationPhase::Completed, None)?;
        self.hang_up();
        Ok(())
    }

    /// Tells the target that nothing more will come, so that it frees what it has.
    fn say_goodbye(&self, reason: &str) {
        if let Some(mut stream) = self
            .stream
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take()
        {
            // In the middle of a frame it reads as garbage, which ends the target's part just as well.
            let _ = stream.send(&ToTarget::Abort {
                reason: brief(reason),
            });
            stream.shutdown();
        }
    }

    fn hang_up(&self) {
        if let Some(stream) = &*self.stream.lock().unwrap_or_else(PoisonError::into_inner) {
            stream.shutdown();
        }
    }
}

/// Why nothing was handed over.
#[derive(Debug, thiserror::Error)]
enum SourceError {
    #[error("the target at {target} cannot be reached: {source}")]
    Connect {
        target: std::net::SocketAddr,
        source: io::Error,
    },
    #[error(transparent)]
    Stream(#[from] StreamError),
    #[error("the target refused: {0}")]
    Refused(String),
    #[error("the target ended it: {0}")]
    Aborted(String),
    #[error("the target answered {got} where {expected} was expected")]
    OutOfTurn { got: String, expected: &'static str },
    #[error(
        "the guest does not converge: after {rounds} rounds {rest} would still stand {blackout_ms} ms of blackout, above the limit of {limit_ms} ms"
    )]
    DoesNotConverge {
        rounds: u32,
        rest: Bytes,
        blackout_ms: u128,
        limit_ms: u64,
    },
    #[error(transparent)]
    Machine(#[from] MachineError),
    #[error(transparent)]
    Kvm(#[from] KvmError),
    #[error("the machine's state cannot be encoded: {0}")]
    Encode(String),
    #[error(transparent)]
    Pages(PagesError),
    #[error(
        "the last pass took several times the limit of {limit_ms} ms, because the link became slow"
    )]
    BlackoutTooLong { limit_ms: u64 },
    #[error(transparent)]
    HandOver(#[from] HandOverError),
    #[error("cancelled")]
    Cancelled,
}

impl From<PagesError> for SourceError {
    fn from(error: PagesError) -> Self {
        match error {
            PagesError::Stopped => Self::Cancelled,
            PagesError::Stream(error) => Self::Stream(error),
            error => Self::Pages(error),
        }
    }
}

/// Sends the machine; returns when it is over or only the store can end it. Runs on a thread of its own.
pub fn send_machine(
    outgoing: &Outgoing,
    request: &OutgoingRequest,
    identity: (VmId, &MachineSpec, &CpuFacts, &GuestCpu),
    ram: &GuestRam,
    start_log: impl FnOnce() -> Result<DirtyLog, MachineError>,
    machine: &dyn SourceMachine,
) {
    let session = Session {
        outgoing,
        ledger: &outgoing.ledger,
        request,
        ram,
    };
    let copied = session.connect(identity).and_then(|stream| {
        let log = start_log()?;
        session.copy(stream, &log, machine)
    });
    match copied {
        Ok((stream, paused)) => session.await_running(stream, paused, machine),
        Err(error) => {
            let (phase, reason) = match session.ledger.status().phase {
                MigrationPhase::Cancelled => (MigrationPhase::Cancelled, None),
                _ => (MigrationPhase::Failed, Some(brief(&error.to_string()))),
            };
            // Refused only when the store has already decided; then the owner has acted on it.
            if session
                .ledger
                .step(SourceHandOver::cancel, phase, reason)
                .is_ok()
            {
                tracing::warn!(migration = %request.migration, %error, "the migration ended; the guest stays here");
                machine.resume();
            }
            outgoing.say_goodbye(&error.to_string());
        }
    }
}

struct Session<'a> {
    outgoing: &'a Outgoing,
    ledger: &'a Ledger<SourceHandOver>,
    request: &'a OutgoingRequest,
    ram: &'a GuestRam,
}

impl Session<'_> {
    fn connect(
        &self,
        (vm, spec, cpu, guest_cpu): (VmId, &MachineSpec, &CpuFacts, &GuestCpu),
    ) -> Result<FrameStream, SourceError> {
        let target = self.request.target;
        let connect = |source| SourceError::Connect { target, source };
        let socket = TcpStream::connect_timeout(&target, CONNECT_TIMEOUT).map_err(connect)?;
        let mut stream = FrameStream::new(socket).map_err(connect)?;
        *self
            .outgoing
            .stream
            .lock()
            .unwrap_or_else(PoisonError::into_inner) = Some(stream.try_clone().map_err(connect)?);
        // A cancel that came before there was a connection to hang up is heeded here.
        if self.ledger.hand_over() != SourceHandOver::Copying {
            return Err(SourceError::Cancelled);
        }
        stream.send(&ToTarget::Hello {
            version: PROTOCOL_VERSION,
            oldest_version: OLDEST_PROTOCOL_VERSION,
            required: Default::default(),
            migration: self.request.migration,
            vm,
            epoch: self.request.epoch,
            spec: spec.clone(),
            cpu: cpu.clone(),
            guest_cpu: Some(guest_cpu.clone()),
            verify: self.request.policy.verify,
            touched: self
                .ram
                .touched(MAX_TOUCHED_STRETCHES)
                .map_err(MachineError::from)?,
        })?;
        // The target populates that memory first, which takes as long as there is memory.
        stream.wait_without_limit().map_err(StreamError::from)?;
        let answer = stream.receive()?;
        stream.limit_silence().map_err(StreamError::from)?;
        match answer {
            ToSource::Accept {
                version: PROTOCOL_VERSION,
            } => Ok(stream),
            ToSource::Accept { version } => Err(SourceError::Refused(format!(
                "it wants protocol version {version}, which this end does not speak"
            ))),
            ToSource::Refuse { reason } => Err(SourceError::Refused(reason)),
            other => Err(out_of_turn(other, "Accept")),
        }
    }

    /// Copies everything; on return only the store can decide. Gives the moment the guest was paused.
    fn copy(
        &self,
        stream: FrameStream,
        log: &DirtyLog,
        machine: &dyn SourceMachine,
    ) -> Result<(FrameStream, Instant), SourceError> {
        let memory_bytes = self.ram.size();
        self.ledger
            .progress(|progress| progress.memory_bytes = memory_bytes);
        self.ledger.enter(MigrationPhase::PreCopy);
        let mut receiver = stream.try_clone().map_err(StreamError::from)?;
        let mut pages = PageSender::new(self.ram, stream);
        // What devices wrote up to now is sent by the first round anyhow.
        self.ram.take_written();
        let (round, rest) = self.pre_copy(log, &mut pages, &mut receiver)?;

        let paused = Instant::now();
        let then = machine.pause()?;
        self.ledger.enter(MigrationPhase::Blackout);
        let (saved, sampled) = machine.save()?;
        // Read after the save: saving may itself write guest memory (kvmclock, steal time, used rings).
        let mut last = self.read_dirty(log)?;
        for (bitmap, left) in last.iter_mut().zip(&rest) {
            bitmap.merge(left);
        }
        let patience = self.patience();
        pages
            .out()
            .limit_writes(patience)
            .map_err(StreamError::from)?;
        self.send_round(
            &mut pages,
            log,
            &last,
            round + 1,
            Guest::Paused,
            Some(paused + patience),
        )?;
        let mut state = Vec::new();
        ciborium::into_writer(&saved, &mut state)
            .map_err(|error| SourceError::Encode(error.to_string()))?;
        let state_hash = format!("{:032x}", xxhash_rust::xxh3::xxh3_128(&state));
        let sent_pages = pages.sent().pages();
        pages
            .out()
            .send_frame(FrameHeader::state(state.len() as u32), &state)?;
        let memory_hash = match self.request.policy.verify {
            Verify::Frames => None,
            Verify::WholeMemory => Some(self.ram.hash().map_err(MachineError::from)?),
        };
        // From here on the target may become whole, so this end must not run the guest by itself.
        self.ledger.step(
            SourceHandOver::done_sent,
            MigrationPhase::AwaitingCommit,
            None,
        )?;
        let clock_age_ns = sampled.elapsed().as_nanos() as u64;
        let done = ToTarget::Done {
            pages: sent_pages,
            state_hash,
            clock_age_ns,
            then,
            memory_hash,
        };
        if let Err(error) = pages.out().send(&done) {
            // It may have arrived all the same.
            tracing::warn!(%error, "the connection broke while the hand-over was sent");
            self.ledger.disconnected();
        }
        Ok((receiver, paused))
    }

    /// Rounds with the guest running, until pausing it is the next thing to do.
    fn pre_copy(
        &self,
        log: &DirtyLog,
        pages: &mut PageSender<'_>,
        receiver: &mut FrameStream,
    ) -> Result<(u32, Vec<DirtyBitmap>), SourceError> {
        let mut rest = log.first_round();
        let mut rest_bytes = bytes_of(&rest);
        let mut rate = 0;
        for round in 1.. {
            let (started, sent_before) = (Instant::now(), pages.sent().bytes);
            self.send_round(pages, log, &rest, round, Guest::Runs, None)?;
            let sent_pages = pages.sent().pages();
            pages.out().send(&ToTarget::EndOfRound {
                round,
                pages: sent_pages,
            })?;
            match receiver.receive()? {
                ToSource::RoundReceived { round: received } if received == round => {}
                other => return Err(out_of_turn(other, "RoundReceived")),
            }
            let duration = started.elapsed();
            let measured = ((pages.sent().bytes - sent_before) as f64
                / duration.as_secs_f64().max(1e-6)) as u64;
            // A short round says little, and one over untouched memory sends little; but what was seen can be done.
            if duration >= TELLING_ROUND && measured * 2 > rate || measured > rate {
                rate = measured;
            }
            let previous_rest_bytes = rest_bytes;
            rest = self.read_dirty(log)?;
            rest_bytes = bytes_of(&rest);
            let outcome = RoundOutcome {
                round,
                duration,
                rest_bytes,
                previous_rest_bytes,
                bytes_per_s: rate,
                fixed_cost: EXPECTED_FIXED_COST,
            };
            let blackout = outcome.predicted_blackout();
            self.ledger.progress(|progress| {
                progress.rate_bytes_per_s = rate;
                progress.remaining_bytes = Bytes(rest_bytes);
                progress.dirty_bytes_per_s =
                    (rest_bytes as f64 / duration.as_secs_f64().max(1e-6)) as u64;
                progress.predicted_blackout_ms = blackout.as_millis() as u64;
            });
            tracing::debug!(
                round,
                ?duration,
                rest_bytes,
                rate,
                ?blackout,
                "round finished"
            );
            match outcome.decide(&self.request.policy) {
                Decision::AnotherRound => {}
                Decision::Pause => return Ok((round, rest)),
                Decision::GiveUp => {
                    return Err(SourceError::DoesNotConverge {
                        rounds: round,
                        rest: Bytes(rest_bytes),
                        blackout_ms: blackout.as_millis(),
                        limit_ms: self.request.policy.downtime_limit_ms,
                    });
                }
            }
        }
        unreachable!("the last round decides")
    }

    /// Pages that the guest or its devices wrote since they were last cleared, per slot.
    fn read_dirty(&self, log: &DirtyLog) -> Result<Vec<DirtyBitmap>, SourceError> {
        let mut dirty = log.read()?;
        for (bitmap, devices) in dirty.iter_mut().zip(self.ram.take_written()) {
            bitmap.merge(&devices);
        }
        Ok(dirty)
    }

    fn send_round(
        &self,
        pages: &mut PageSender<'_>,
        log: &DirtyLog,
        dirty: &[DirtyBitmap],
        round: u32,
        guest: Guest,
        deadline: Option<Instant>,
    ) -> Result<(), SourceError> {
        let (started, before, planned) = (Instant::now(), pages.sent(), bytes_of(dirty));
        let note = |sent: super::pages::Sent| {
            let done = (sent.pages() - before.pages()) * PAGE_BYTES;
            self.ledger.progress(|progress| {
                progress.round = round;
                progress.transferred_bytes = Bytes(sent.bytes);
                progress.content_pages = sent.content_pages;
                progress.zero_pages = sent.zero_pages;
                progress.remaining_bytes = Bytes(planned.saturating_sub(done));
                let elapsed = started.elapsed();
                if elapsed >= TELLING_ROUND {
                    progress.rate_bytes_per_s =
                        ((sent.bytes - before.bytes) as f64 / elapsed.as_secs_f64()) as u64;
                }
            });
        };
        let result = pages.send_round(log, dirty, guest, |sent| {
            note(sent);
            let late = deadline.is_some_and(|deadline| Instant::now() > deadline);
            if late || self.ledger.hand_over() != SourceHandOver::Copying {
                return ControlFlow::Break(());
            }
            ControlFlow::Continue(())
        });
        note(pages.sent());
        match result {
            Err(PagesError::Stopped)
                if deadline.is_some_and(|deadline| Instant::now() > deadline) =>
            {
                Err(SourceError::BlackoutTooLong {
                    limit_ms: self.request.policy.downtime_limit_ms,
                })
            }
            result => Ok(result?),
        }
    }

    /// How long the last pass may take before the guest goes on here after all: the link is not what it was.
    fn patience(&self) -> Duration {
        let limit = Duration::from_millis(self.request.policy.downtime_limit_ms);
        (limit * BLACKOUT_PATIENCE).max(LEAST_PATIENCE)
    }

    /// Everything is sent: hears what the target says, but decides nothing that the store has not decided.
    fn await_running(&self, mut stream: FrameStream, paused: Instant, machine: &dyn SourceMachine) {
        let heard = stream
            .wait_without_limit()
            .map_err(StreamError::from)
            .and_then(|()| {
                loop {
                    match stream.receive()? {
                        ToSource::Ready => self.ledger.enter(MigrationPhase::AwaitingCommit),
                        ToSource::Running { epoch } => return Ok(Some(epoch)),
                        ToSource::Abort { reason } => {
                            tracing::warn!(%reason, "the target gave up after everything was sent");
                            return Ok(None);
                        }
                        other => {
                            tracing::warn!(?other, "the target spoke out of turn");
                            return Ok(None);
                        }
                    }
                }
            });
        match heard {
            Ok(Some(epoch)) if epoch > self.request.epoch => {
                let downtime_us = paused.elapsed().as_micros() as u64;
                self.ledger
                    .progress(|progress| progress.downtime_us = Some(downtime_us));
                if self
                    .ledger
                    .step(SourceHandOver::gone, MigrationPhase::Completed, None)
                    .is_ok()
                {
                    tracing::info!(migration = %self.request.migration, downtime_us, %epoch, "the guest runs at the target");
                    machine.gone();
                }
            }
            Ok(Some(Epoch(epoch))) => {
                tracing::error!(
                    epoch,
                    "the target claims to run under an epoch that is not newer; the store decides"
                );
                self.ledger.disconnected();
            }
            Ok(None) => self.ledger.disconnected(),
            Err(error) => {
                tracing::warn!(%error, "the target is silent; only the store can decide now");
                self.ledger.disconnected();
            }
        }
    }
}

fn bytes_of(dirty: &[DirtyBitmap]) -> u64 {
    dirty.iter().map(DirtyBitmap::count).sum::<u64>() * PAGE_BYTES
}

fn out_of_turn(message: ToSource, expected: &'static str) -> SourceError {
    match message {
        ToSource::Abort { reason } => SourceError::Aborted(reason),
        other => SourceError::OutOfTurn {
            got: format!("{other:?}"),
            expected,
        },
    }
}
