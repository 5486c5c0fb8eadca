//! The sending end.
//!
//! ```text
//! connect ─▶ shake hands ─▶ round, round, … ─▶ pause, save, last pass ─▶ Done ─▶ wait for Running
//!    └──────────────┴──────────────┴───────────────────┘                          │
//!       any failure or cancel: the guest runs on here              the store decides, not this end
//! ```

use super::connection::Connection;
use super::convergence::{Decision, RoundOutcome};
use super::crew::Crew;
use super::hand_over::{HandOverError, SourceHandOver};
use super::lane::{Lane, PagesError};
use super::ledger::Ledger;
use super::pace::Pace;
use super::round::{Guest, Round, Sent, Tally, bytes_of};
use super::sockets::Sockets;
use super::squeeze::Squeeze;
use super::stream::{FrameStream, StreamError, brief};
use crate::kvm::{DirtyBitmap, DirtyLog, KvmError};
use crate::machine::{MachineError, SavedMachine, Throttle, Throttling};
use crate::memory::GuestRam;
use godwit_channel::tls::MigrationTls;
use godwit_wire::cpu::GuestCpu;
use godwit_wire::id::{Epoch, VmId};
use godwit_wire::machine::{CpuFacts, MachineSpec};
use godwit_wire::migration::{
    Arrival, Blackout, FrameHeader, MAX_LANES, MAX_TOUCHED_STRETCHES, MigrationPhase,
    OLDEST_PROTOCOL_VERSION, PROTOCOL_VERSION, ToSource, ToTarget, Verify,
};
use godwit_wire::unit::{Bytes, PAGE_BYTES};
use godwit_wire::vmm_api::OutgoingRequest;
use std::num::NonZero;
use std::ops::ControlFlow;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Pause, device state, last acknowledgement and commit, before they have been measured.
const EXPECTED_FIXED_COST: Duration = Duration::from_millis(10);
/// The last pass is broken off when it takes this many times the downtime limit,
const BLACKOUT_PATIENCE: u32 = 3;
/// but not sooner than this: below it a busy machine alone makes the difference.
const LEAST_PATIENCE: Duration = Duration::from_secs(2);
/// Rounds shorter than this say little about the link.
const TELLING_ROUND: Duration = Duration::from_millis(50);
/// How long a target that has ended its connections may take to say why.
const LAST_WORDS: Duration = Duration::from_millis(500);
/// Lanes where the operator leaves their number to the source: one for each CPU, but no more than a link needs.
const MAX_CHOSEN_LANES: usize = 8;

/// What the sending end needs of the machine's owner.
pub trait SourceMachine: Send {
    /// Stops the guest for the hand-over; says what the guest is to do afterwards.
    fn pause(&self) -> Result<Arrival, MachineError>;
    /// What slows the guest down, if that is needed.
    fn throttle(&self) -> Option<Throttle>;
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
    sockets: Sockets,
}

impl Outgoing {
    /// One that is about to begin.
    pub const fn new(ledger: Arc<Ledger<SourceHandOver>>) -> Self {
        Self {
            ledger,
            sockets: Sockets::new(),
        }
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

    /// The store has given the VM to the target.
    pub fn release(&self) -> Result<(), HandOverError> {
        self.ledger
            .step(SourceHandOver::gone, MigrationPhase::Completed, None)?;
        self.sockets.hang_up();
        Ok(())
    }

    /// From here on whoever calls the migration off ends this connection.
    fn publish(&self, stream: &FrameStream) -> Result<(), SourceError> {
        self.sockets.add(stream).map_err(StreamError::from)?;
        // One that came before there was a connection to end is heeded here.
        match self.ledger.hand_over() {
            SourceHandOver::Copying => Ok(()),
            _ => Err(SourceError::Cancelled),
        }
    }
}

/// Why nothing was handed over.
#[derive(Debug, thiserror::Error)]
enum SourceError {
    #[error("the target at {target} cannot be reached: {source}")]
    Connect {
        target: std::net::SocketAddr,
        source: StreamError,
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
    #[error(
        "the guest does not converge: {rest} would still stand {blackout_ms} ms of blackout after {deadline_s} s, the deadline"
    )]
    Deadline {
        rest: Bytes,
        blackout_ms: u128,
        deadline_s: u64,
    },
    #[error("round {round} was still under way after {deadline_s} s, the deadline")]
    RoundTooLong { round: u32, deadline_s: u64 },
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
        tls: request
            .identity
            .as_ref()
            .map(|identity| MigrationTls::new(request.migration, identity)),
        started: Instant::now(),
    };
    let mut control = match session.connect(identity) {
        Ok(control) => control,
        Err(error) => return session.stay(None, &error, machine),
    };
    let copied = start_log()
        .map_err(SourceError::from)
        .and_then(|log| session.copy(&mut control, &log, machine));
    match copied {
        Ok(blackout) => session.await_running(control, blackout, machine),
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
    tls: Option<MigrationTls>,
    started: Instant,
}

/// A blackout under way.
struct Dark {
    since: Instant,
    /// When everything was sent.
    sent: Instant,
    parts: Blackout,
}

/// What pre-copy leaves to be sent while the guest stands still.
struct Rest {
    round: u32,
    dirty: Vec<DirtyBitmap>,
    predicted: Duration,
}

impl Session<'_> {
    /// The guest stays here; the target hears why.
    fn stay(&self, control: Option<FrameStream>, error: &SourceError, machine: &dyn SourceMachine) {
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

    fn dial(&self) -> Result<FrameStream, SourceError> {
        let target = self.request.target;
        let connection = Connection::to_target(target, self.tls.as_ref())
            .map_err(|source| SourceError::Connect { target, source })?;
        let stream = FrameStream::new(connection);
        self.outgoing.publish(&stream)?;
        Ok(stream)
    }

    fn connect(
        &self,
        (vm, spec, cpu, guest_cpu): (VmId, &MachineSpec, &CpuFacts, &GuestCpu),
    ) -> Result<FrameStream, SourceError> {
        let mut stream = self.dial()?;
        let lanes = self.lane_count();
        stream.send(&ToTarget::Hello {
            version: PROTOCOL_VERSION,
            oldest_version: OLDEST_PROTOCOL_VERSION,
            required: Default::default(),
            migration: self.request.migration,
            token: self.request.token.clone(),
            lanes,
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
        let asked = Instant::now();
        stream.wait_without_limit().map_err(StreamError::from)?;
        let answer = stream.receive()?;
        stream.limit_silence().map_err(StreamError::from)?;
        self.ledger.progress(|progress| {
            progress.prefault_ms = asked.elapsed().as_millis() as u64;
            progress.lanes = lanes;
        });
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

    fn lane_count(&self) -> u8 {
        match self.request.policy.lanes {
            0 => {
                let cpus = std::thread::available_parallelism().map_or(1, NonZero::get);
                cpus.min(MAX_CHOSEN_LANES) as u8
            }
            asked => asked.min(MAX_LANES),
        }
    }

    fn open_lane(&self, lane: u8) -> Result<FrameStream, SourceError> {
        let mut stream = self.dial()?;
        stream.send(&ToTarget::Join {
            migration: self.request.migration,
            token: self.request.token.clone(),
            lane,
        })?;
        match stream.receive()? {
            ToSource::Joined => Ok(stream),
            other => Err(out_of_turn(other, "Joined")),
        }
    }

    /// Copies everything; on return only the store can decide.
    fn copy(
        &self,
        control: &mut FrameStream,
        log: &DirtyLog,
        machine: &dyn SourceMachine,
    ) -> Result<Dark, SourceError> {
        let policy = &self.request.policy;
        let (pace, tally) = (
            Pace::new(policy.max_bandwidth_bytes_per_s),
            Tally::default(),
        );
        let lanes = (0..self.lane_count())
            .map(|lane| {
                let out = self.open_lane(lane)?;
                let socket = out.socket().map_err(StreamError::from)?;
                let squeeze = Squeeze::new(policy.compression);
                let lane = Lane::new(out, (self.ram, log), &pace, &tally, squeeze);
                Ok((lane, socket))
            })
            .collect::<Result<Vec<_>, SourceError>>()?;
        let memory_bytes = self.ram.size();
        self.ledger
            .progress(|progress| progress.memory_bytes = memory_bytes);
        self.ledger.enter(MigrationPhase::PreCopy);
        // What devices wrote up to now is sent by the first round anyhow.
        self.ram.take_written();
        std::thread::scope(|scope| {
            let crew = Crew::start(scope, lanes);
            let mut slowed = machine.throttle().map(Throttling::start);
            let rest = self.pre_copy(log, (&crew, &tally), control, slowed.as_mut())?;
            self.black_out(log, (&crew, &tally), control, machine, rest)
        })
    }

    /// Pauses the guest and sends what is left of it.
    fn black_out(
        &self,
        log: &DirtyLog,
        (crew, tally): (&Crew, &Tally),
        control: &mut FrameStream,
        machine: &dyn SourceMachine,
        rest: Rest,
    ) -> Result<Dark, SourceError> {
        let since = Instant::now();
        let then = machine.pause()?;
        self.ledger.enter(MigrationPhase::Blackout);
        let paused = Instant::now();
        let (saved, sampled) = machine.save()?;
        let state_saved = Instant::now();
        // Read after the save: saving may itself write guest memory (kvmclock, steal time, used rings).
        let mut last = self.read_dirty(log)?;
        for (bitmap, left) in last.iter_mut().zip(&rest.dirty) {
            bitmap.merge(left);
        }
        let patience = self.patience();
        crew.limit_writes(patience).map_err(StreamError::from)?;
        control.limit_writes(patience).map_err(StreamError::from)?;
        let round = Round::new(rest.round + 1, Guest::Paused, last, crew.lanes());
        self.send_round((crew, tally), round, Some(since + patience))?;
        let mut state = Vec::new();
        ciborium::into_writer(&saved, &mut state)
            .map_err(|error| SourceError::Encode(error.to_string()))?;
        let state_hash = format!("{:032x}", xxhash_rust::xxh3::xxh3_128(&state));
        control.send_frame(FrameHeader::state(state.len() as u32), &state)?;
        let verify = self.request.policy.verify;
        let memory_hash = match verify {
            Verify::Frames => None,
            Verify::WholeMemory => Some(self.ram.hash().map_err(MachineError::from)?),
        };
        if since.elapsed() > patience && verify == Verify::Frames {
            return Err(self.blackout_too_long());
        }
        // From here on the target may become whole, so this end must not run the guest by itself.
        self.ledger.step(
            SourceHandOver::done_sent,
            MigrationPhase::AwaitingCommit,
            None,
        )?;
        let done = ToTarget::Done {
            round: rest.round + 1,
            pages: tally.read().pages(),
            state_hash,
            clock_age_ns: sampled.elapsed().as_nanos() as u64,
            then,
            memory_hash,
        };
        if let Err(error) = control.send(&done) {
            // It may have arrived all the same.
            tracing::warn!(%error, "the connection broke while the hand-over was sent");
            self.ledger.disconnected();
        }
        let sent = Instant::now();
        let micros = |from: Instant, to: Instant| (to - from).as_micros() as u64;
        Ok(Dark {
            since,
            sent,
            parts: Blackout {
                predicted_us: rest.predicted.as_micros() as u64,
                pause_us: micros(since, paused),
                save_us: micros(paused, state_saved),
                pages_us: micros(state_saved, sent),
                ..Blackout::default()
            },
        })
    }

    /// Rounds with the guest running, until pausing it is the next thing to do.
    fn pre_copy(
        &self,
        log: &DirtyLog,
        (crew, tally): (&Crew, &Tally),
        control: &mut FrameStream,
        mut slowed: Option<&mut Throttling>,
    ) -> Result<Rest, SourceError> {
        let policy = &self.request.policy;
        let mut dirty = log.first_round();
        let (mut rest_bytes, mut rate, mut throttle_percent) = (bytes_of(&dirty), 0, 0);
        for number in 1.. {
            let (began, before) = (Instant::now(), tally.read());
            let round = Round::new(number, Guest::Runs, dirty, crew.lanes());
            let deadline = policy.deadline_s.map(Duration::from_secs);
            let deadline = deadline.and_then(|limit| self.started.checked_add(limit));
            self.send_round((crew, tally), round, deadline)?;
            let sent = tally.read();
            control.send(&ToTarget::EndOfRound {
                round: number,
                pages: sent.pages(),
            })?;
            match control.receive()? {
                ToSource::RoundReceived { round } if round == number => {}
                other => return Err(out_of_turn(other, "RoundReceived")),
            }
            let duration = began.elapsed();
            let measured = per_second(
                (sent.content_pages - before.content_pages) * PAGE_BYTES,
                duration,
            );
            // A short round says little, and one over untouched memory sends little; but what was seen can be done.
            if duration >= TELLING_ROUND && measured * 2 > rate || measured > rate {
                rate = measured;
            }
            let previous_rest_bytes = rest_bytes;
            dirty = self.read_dirty(log)?;
            rest_bytes = bytes_of(&dirty);
            let outcome = RoundOutcome {
                round: number,
                elapsed: self.started.elapsed(),
                rest_bytes,
                previous_rest_bytes,
                bytes_per_s: rate,
                fixed_cost: EXPECTED_FIXED_COST,
                throttle_percent,
            };
            let predicted = outcome.predicted_blackout();
            self.ledger.progress(|progress| {
                progress.rate_bytes_per_s = rate;
                progress.remaining_bytes = Bytes(rest_bytes);
                progress.dirty_bytes_per_s = per_second(rest_bytes, duration);
                progress.predicted_blackout_ms = predicted.as_millis() as u64;
            });
            let gave_up = || SourceError::DoesNotConverge {
                rounds: number,
                rest: Bytes(rest_bytes),
                blackout_ms: predicted.as_millis(),
                limit_ms: policy.downtime_limit_ms,
            };
            tracing::debug!(
                number,
                ?duration,
                rest_bytes,
                rate,
                ?predicted,
                throttle_percent,
                "round finished"
            );
            match outcome.decide(policy) {
                Decision::AnotherRound => {}
                Decision::Throttle { percent } => {
                    if let Some(slowed) = &mut slowed {
                        slowed.set(percent);
                        tracing::info!(migration = %self.request.migration, percent, "the guest dirties memory faster than it can be sent: its busiest vCPUs are slowed down");
                    }
                    throttle_percent = percent;
                    self.ledger
                        .progress(|progress| progress.throttle_percent = percent);
                }
                Decision::Pause => {
                    return Ok(Rest {
                        round: number,
                        dirty,
                        predicted,
                    });
                }
                Decision::GiveUp => return Err(gave_up()),
                Decision::OutOfTime => {
                    return Err(SourceError::Deadline {
                        rest: Bytes(rest_bytes),
                        blackout_ms: predicted.as_millis(),
                        deadline_s: policy.deadline_s.unwrap_or_default(),
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
        (crew, tally): (&Crew, &Tally),
        round: Round,
        deadline: Option<Instant>,
    ) -> Result<(), SourceError> {
        let (began, before) = (Instant::now(), tally.read());
        let (number, guest, planned) = (round.number, round.guest, round.bytes());
        let note = |sent: Sent| {
            let done = (sent.pages() - before.pages()) * PAGE_BYTES;
            self.ledger.progress(|progress| {
                progress.round = number;
                progress.transferred_bytes = Bytes(sent.bytes);
                progress.saved_bytes = Bytes(sent.saved_bytes);
                progress.content_pages = sent.content_pages;
                progress.zero_pages = sent.zero_pages;
                progress.remaining_bytes = Bytes(planned.saturating_sub(done));
                let elapsed = began.elapsed();
                if elapsed >= TELLING_ROUND {
                    progress.rate_bytes_per_s = per_second(sent.bytes - before.bytes, elapsed);
                }
            });
        };
        let late = || deadline.is_some_and(|deadline| Instant::now() > deadline);
        let result = crew.send(round, || {
            note(tally.read());
            if late() || self.ledger.hand_over() != SourceHandOver::Copying {
                return ControlFlow::Break(());
            }
            ControlFlow::Continue(())
        });
        note(tally.read());
        match (result, guest) {
            (Err(PagesError::Stopped), Guest::Paused) if late() => Err(self.blackout_too_long()),
            (Err(PagesError::Stopped), Guest::Runs) if late() => Err(SourceError::RoundTooLong {
                round: number,
                deadline_s: self.request.policy.deadline_s.unwrap_or_default(),
            }),
            (result, _) => Ok(result?),
        }
    }

    const fn blackout_too_long(&self) -> SourceError {
        SourceError::BlackoutTooLong {
            limit_ms: self.request.policy.downtime_limit_ms,
        }
    }

    /// How long the last pass may take before the guest goes on here after all: the link is not what it was.
    fn patience(&self) -> Duration {
        let limit = Duration::from_millis(self.request.policy.downtime_limit_ms);
        (limit * BLACKOUT_PATIENCE).max(LEAST_PATIENCE)
    }

    /// Everything is sent: hears what the target says, but decides nothing that the store has not decided.
    fn await_running(&self, mut stream: FrameStream, mut dark: Dark, machine: &dyn SourceMachine) {
        let mut whole = None;
        let heard = stream
            .wait_without_limit()
            .map_err(StreamError::from)
            .and_then(|()| {
                loop {
                    match stream.receive()? {
                        ToSource::Ready => {
                            whole = Some(Instant::now());
                            self.ledger.enter(MigrationPhase::AwaitingCommit);
                        }
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
                let downtime_us = dark.since.elapsed().as_micros() as u64;
                let whole = whole.unwrap_or(dark.sent);
                dark.parts.restore_us = (whole - dark.sent).as_micros() as u64;
                dark.parts.commit_us = whole.elapsed().as_micros() as u64;
                self.ledger.progress(|progress| {
                    progress.downtime_us = Some(downtime_us);
                    progress.blackout = Some(dark.parts);
                });
                if self
                    .ledger
                    .step(SourceHandOver::gone, MigrationPhase::Completed, None)
                    .is_ok()
                {
                    machine.gone();
                    tracing::info!(migration = %self.request.migration, downtime_us, %epoch, parts = ?dark.parts, "the guest runs at the target");
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

fn per_second(bytes: u64, duration: Duration) -> u64 {
    (bytes as f64 / duration.as_secs_f64().max(1e-6)) as u64
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
