//! The guest stands still: what is left of it is sent, and the store decides.

use super::error::{SourceError, out_of_turn};
use super::{AtRest, Dark, Rest, Session};
use crate::kvm::{DirtyBitmap, DirtyLog};
use crate::machine::{MachineError, SavedMachine};
use crate::memory::boot_time_ns;
use crate::migration::SourceMachine;
use crate::migration::connection::{Class, TakesIn};
use crate::migration::crew::Crew;
use crate::migration::disks;
use crate::migration::hand_over::{Memory, SourceHandOver};
use crate::migration::maps::send_map;
use crate::migration::packet_gap::last_frame_ns;
use crate::migration::round::{Guest, Round, Tally};
use crate::migration::stream::{FrameStream, SILENCE_LIMIT, StreamError};
use godwit_wire::id::Epoch;
use godwit_wire::migration::{
    Arrival, Blackout, Counted, Done, FrameHeader, MigrationPhase, ToSource, ToTarget, Verify,
};
use std::time::{Duration, Instant};

/// The last pass is broken off when it takes this many times the downtime limit,
const BLACKOUT_PATIENCE: u32 = 3;
/// but not sooner than this: below it a busy machine alone makes the difference.
const LEAST_PATIENCE: Duration = Duration::from_secs(2);

/// A guest that stands still, and what is to be sent of it.
struct Still {
    since: Instant,
    paused: Instant,
    saved_at: Instant,
    saved: SavedMachine,
    /// When guest time was sampled.
    sampled: Instant,
    counted: Counted,
    /// When the last frame passed a card, on CLOCK_BOOTTIME; `None` where the network was quiet before the pause.
    last_frame_ns: Option<u64>,
    then: Arrival,
    /// Every page that is not at the target as it is here.
    dirty: Vec<DirtyBitmap>,
    /// What of it is sent while the guest stands still.
    rest_bytes: u64,
}

impl Session<'_> {
    /// Pauses the guest and sends what is left of it.
    pub(super) fn black_out(
        &self,
        log: &DirtyLog,
        (crew, tally): (&Crew, &Tally),
        control: &mut FrameStream,
        machine: &dyn SourceMachine,
        rest: Rest,
    ) -> Result<Dark, SourceError> {
        crew.mark(Class::Usual);
        let mut still = self.stand_still(log, machine, &rest)?;
        let patience = self.patience();
        crew.expect_to_take_in(TakesIn::Within(patience))
            .map_err(StreamError::from)?;
        control.limit_writes(patience).map_err(StreamError::from)?;
        let dirty = std::mem::take(&mut still.dirty);
        let changed = disks::changed(&self.disks);
        let round = Round::new(rest.round + 1, Guest::Paused, dirty, crew.lanes())
            .with_disks(changed, crew.lanes());
        still.rest_bytes = round.bytes() + round.disk_bytes();
        self.send_round((crew, tally), round, Some(still.since + patience))?;
        self.send_done(control, still, (rest.round + 1, tally), &rest, Vec::new())
    }

    /// Pauses the guest and sends all but memory, what is left of its disks first; what is left of memory follows, in
    /// the round whose number comes back. The target hears beforehand of nearly all of it, so that making room for it
    /// does not lengthen the blackout.
    pub(super) fn go_ahead(
        &self,
        log: &DirtyLog,
        (crew, tally): (&Crew, &Tally),
        control: &mut FrameStream,
        machine: &dyn SourceMachine,
        rest: Rest,
    ) -> Result<(Dark, u32), SourceError> {
        tracing::info!(migration = %self.request.migration, "the guest goes ahead of its memory");
        crew.mark(Class::Usual);
        for (slot, map) in log.slots().iter().zip(&rest.dirty) {
            send_map(control, slot.guest_address, map)?;
        }
        let pages = rest.dirty.iter().map(DirtyBitmap::count).sum();
        control.send(&ToTarget::WillMiss { pages })?;
        match control.receive()? {
            ToSource::Discarded => {}
            other => return Err(out_of_turn(other, "Discarded")),
        }
        let patience = self.patience();
        control.limit_writes(patience).map_err(StreamError::from)?;
        let mut still = self.stand_still(log, machine, &rest)?;
        let owed = std::mem::take(&mut still.dirty);
        for ((slot, owed), named) in log.slots().iter().zip(&owed).zip(&rest.dirty) {
            let mut more = owed.clone();
            more.subtract(named);
            send_map(control, slot.guest_address, &more)?;
        }
        let mut last = rest.round;
        if !self.disks.is_empty() {
            last += 1;
            crew.expect_to_take_in(TakesIn::Within(patience))
                .map_err(StreamError::from)?;
            // No memory: it follows, but no disk does.
            let round = Round::new(last, Guest::Paused, Vec::new(), crew.lanes())
                .with_disks(disks::changed(&self.disks), crew.lanes());
            still.rest_bytes = round.disk_bytes();
            self.send_round((crew, tally), round, Some(still.since + patience))?;
            crew.expect_to_take_in(TakesIn::Within(SILENCE_LIMIT))
                .map_err(StreamError::from)?;
        }
        let dark = self.send_done(control, still, (last, tally), &rest, owed)?;
        Ok((dark, last + 1))
    }

    fn stand_still(
        &self,
        log: &DirtyLog,
        machine: &dyn SourceMachine,
        rest: &Rest,
    ) -> Result<Still, SourceError> {
        let (since, since_ns) = (Instant::now(), boot_time_ns());
        let then = machine.pause()?;
        self.ledger.enter(MigrationPhase::Blackout);
        let paused = Instant::now();
        let AtRest {
            saved,
            sampled,
            counted,
            cards,
        } = machine.save()?;
        let saved_at = Instant::now();
        // Read after the save: saving may itself write guest memory (kvmclock, steal time, used rings).
        let mut dirty = self.read_dirty(log)?;
        for (bitmap, left) in dirty.iter_mut().zip(&rest.dirty) {
            bitmap.merge(left);
        }
        Ok(Still {
            since,
            paused,
            saved_at,
            saved,
            sampled,
            counted,
            last_frame_ns: last_frame_ns(&cards, since_ns),
            then,
            dirty,
            rest_bytes: 0,
        })
    }

    /// Sends the machine's state and `Done`. On return only the store can decide.
    fn send_done(
        &self,
        control: &mut FrameStream,
        still: Still,
        (round, tally): (u32, &Tally),
        rest: &Rest,
        owed: Vec<DirtyBitmap>,
    ) -> Result<Dark, SourceError> {
        let mut state = Vec::new();
        ciborium::into_writer(&still.saved, &mut state)
            .map_err(|error| SourceError::Encode(error.to_string()))?;
        let state_hash = format!("{:032x}", xxhash_rust::xxh3::xxh3_128(&state));
        control.send_frame(FrameHeader::state(state.len() as u32), &state)?;
        let verify = self.request.policy.verify;
        let memory_hash = match verify {
            Verify::Frames => None,
            Verify::WholeMemory => {
                let begun = Instant::now();
                let hash = self.ram.hash().map_err(MachineError::from)?;
                let hashing_us = begun.elapsed().as_micros() as u64;
                self.ledger
                    .progress(|progress| progress.hashing_us = Some(hashing_us));
                Some(hash)
            }
        };
        if still.since.elapsed() > self.patience() && verify == Verify::Frames {
            return Err(self.blackout_too_long());
        }
        let missing_pages = owed.iter().map(DirtyBitmap::count).sum();
        let memory = if rest.ahead {
            Memory::Owed
        } else {
            Memory::Sent
        };
        if rest.ahead {
            // Told before the store may be asked: whoever ends this VMM must know that memory is owed.
            self.note_owed(missing_pages);
        }
        // From here on the target may become whole, so this end must not run the guest by itself.
        self.ledger.step(
            |state| state.done_sent(memory),
            MigrationPhase::AwaitingCommit,
            None,
        )?;
        let done = ToTarget::Done(Done {
            round,
            pages: tally.read().pages(),
            disk_bytes: tally.read().disk_bytes(),
            state_hash,
            clock_age_ns: still.sampled.elapsed().as_nanos() as u64,
            packet_age_ns: still
                .last_frame_ns
                .map(|last_ns| boot_time_ns().saturating_sub(last_ns)),
            missing_pages,
            then: still.then,
            counted: still.counted,
            memory_hash,
        });
        if let Err(error) = control.send(&done) {
            // It may have arrived all the same.
            tracing::warn!(%error, "the connection broke while the hand-over was sent");
            self.ledger.disconnected();
        }
        let sent = Instant::now();
        let micros = |from: Instant, to: Instant| (to - from).as_micros() as u64;
        Ok(Dark {
            since: still.since,
            sent,
            whole: None,
            ran_since: None,
            parts: Blackout {
                predicted_us: rest.predicted.as_micros() as u64,
                pause_us: micros(still.since, still.paused),
                save_us: micros(still.paused, still.saved_at),
                pages_us: micros(still.saved_at, sent),
                rest_bytes: still.rest_bytes,
                rest_bytes_per_s: rest.bytes_per_s,
                ..Blackout::default()
            },
            owed,
        })
    }

    /// How long the last pass may take before the guest goes on here after all: the link is not what it was.
    pub(super) fn patience(&self) -> Duration {
        let limit = Duration::from_millis(self.request.policy.downtime_limit_ms);
        (limit * BLACKOUT_PATIENCE).max(LEAST_PATIENCE)
    }

    /// Everything is sent: hears what the target says, but decides nothing that the store has not decided.
    pub(super) fn await_running(
        &self,
        mut control: FrameStream,
        mut dark: Dark,
        machine: &dyn SourceMachine,
    ) {
        if let Err(error) = control.wait_without_limit() {
            tracing::warn!(%error, "the connection failed; only the store can decide now");
            return self.ledger.disconnected();
        }
        match self.hear(&mut control, &mut dark) {
            Heard::Running => machine.gone(),
            Heard::Complete | Heard::GaveUp => self.ledger.disconnected(),
            Heard::Broken(error) => {
                tracing::warn!(%error, "the target is silent; only the store can decide now");
                self.ledger.disconnected();
            }
        }
    }

    /// What the target has to say after `Done`, up to the next thing that matters.
    pub(super) fn hear(&self, control: &mut FrameStream, dark: &mut Dark) -> Heard {
        loop {
            match control.receive() {
                Ok(ToSource::Ready) => {
                    dark.whole = Some(Instant::now());
                    if matches!(self.ledger.hand_over(), SourceHandOver::InDoubt(_)) {
                        self.ledger.enter(MigrationPhase::AwaitingCommit);
                    }
                }
                Ok(ToSource::Running { epoch }) => {
                    return if self.ran_there(epoch, dark) {
                        Heard::Running
                    } else {
                        Heard::GaveUp
                    };
                }
                Ok(ToSource::Complete) => return Heard::Complete,
                Ok(ToSource::Abort { reason }) => {
                    tracing::warn!(%reason, "the target gave up after everything was sent");
                    return Heard::GaveUp;
                }
                Ok(other) => {
                    tracing::warn!(?other, "the target spoke out of turn");
                    return Heard::GaveUp;
                }
                Err(error) => return Heard::Broken(error),
            }
        }
    }

    /// The target says that the guest runs there under `epoch`. Whether that can be, and is so.
    pub(super) fn ran_there(&self, epoch: Epoch, dark: &mut Dark) -> bool {
        if epoch <= self.request.epoch {
            tracing::error!(
                %epoch,
                "the target claims to run under an epoch that is not newer; the store decides"
            );
            return false;
        }
        let downtime_us = dark.since.elapsed().as_micros() as u64;
        dark.ran_since = Some(Instant::now());
        let whole = dark.whole.unwrap_or(dark.sent);
        dark.parts.restore_us = (whole - dark.sent).as_micros() as u64;
        dark.parts.commit_us = whole.elapsed().as_micros() as u64;
        self.ledger.progress(|progress| {
            progress.downtime_us = Some(downtime_us);
            progress.blackout = Some(dark.parts);
        });
        let gone = self.outgoing.step_away().is_ok();
        if gone {
            tracing::info!(migration = %self.request.migration, downtime_us, %epoch, parts = ?dark.parts, "the guest runs at the target");
        }
        gone
    }
}

/// What came of waiting for the target's word.
pub(super) enum Heard {
    /// The guest runs there.
    Running,
    /// It has all of its memory.
    Complete,
    /// It will not say anything more that counts; the store decides.
    GaveUp,
    /// The connection is no more.
    Broken(StreamError),
}
