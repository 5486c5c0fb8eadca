//! Rounds over dirty memory while the guest runs here.

use super::connect::Agreed;
use super::error::{SourceError, out_of_turn};
use super::{Rest, Session};
use crate::kvm::{DirtyBitmap, DirtyLog};
use crate::machine::Throttling;
use crate::migration::connection::{Class, TakesIn};
use crate::migration::crew::Crew;
use crate::migration::disks::{self, WriteRates};
use crate::migration::hand_over::SourceHandOver;
use crate::migration::lane::PagesError;
use crate::migration::link_rate::{LinkRate, SentRound, TELLING_ROUND, per_second};
use crate::migration::round::{Guest, Round, Sent, Tally, bytes_of};
use crate::migration::stream::{FLUSH_LIMIT, FrameStream, StreamError};
use godwit_wire::migration::convergence::{Decision, DiskOutcome, RoundOutcome, fixed_cost};
use godwit_wire::migration::{PostCopy, ToSource, ToTarget};
use godwit_wire::unit::{Bytes, PAGE_BYTES};
use std::ops::ControlFlow;
use std::time::{Duration, Instant};

impl Session<'_> {
    /// Rounds with the guest running, until pausing it is the next thing to do.
    pub(super) fn pre_copy(
        &self,
        log: &DirtyLog,
        (crew, tally): (&Crew, &Tally),
        control: &mut FrameStream,
        mut slowed: Option<&mut Throttling>,
        agreed: &Agreed,
    ) -> Result<Rest, SourceError> {
        let policy = &self.request.policy;
        let post_copy = match agreed.urgent_lanes {
            0 => PostCopy::Forbidden,
            _ => policy.post_copy,
        };
        let mut dirty = log.first_round();
        let mut changed = disks::first_round(&self.disks);
        let (mut rest_bytes, mut throttle_percent) = (bytes_of(&dirty), 0);
        let mut disk_rest_bytes = disks::bytes_of(&changed);
        let mut writes = WriteRates::new(&self.disks);
        crew.mark(Class::Bulk);
        if !self.disks.is_empty() {
            // The target is silent, and reads nothing, for as long as its disks take.
            control
                .limit_reads(FLUSH_LIMIT)
                .map_err(StreamError::from)?;
            crew.expect_to_take_in(TakesIn::AsDisksAllow)
                .map_err(StreamError::from)?;
        }
        let mut link = LinkRate::new(self.outgoing.pace.bytes_per_s());
        let fixed_cost = fixed_cost(self.request.fixed_cost_us, policy.downtime_limit_ms);
        for number in 1.. {
            let (began, before) = (Instant::now(), tally.read());
            let round = match agreed.seed.filter(|_| number == 1) {
                Some(seed) => Round::comparing(seed, dirty, crew.lanes()),
                None => Round::new(number, Guest::Runs, dirty, crew.lanes()),
            };
            let round = round.with_disks(changed, crew.lanes());
            let deadline = policy.deadline_s.map(Duration::from_secs);
            let deadline = deadline.and_then(|limit| self.started.checked_add(limit));
            self.send_round((crew, tally), round, deadline)?;
            let sent = tally.read();
            let flushing = await_round_received(control, number, &sent)?;
            let duration = began.elapsed();
            let limit = self.outgoing.pace.bytes_per_s();
            link.limit_to(limit);
            let flushing = flushing.min(duration);
            link.observe(sent_since(
                &before,
                &sent,
                duration.saturating_sub(flushing),
            ));
            let rate = link.bytes_per_s();
            let previous_rest_bytes = rest_bytes;
            dirty = self.read_dirty(log)?;
            rest_bytes = bytes_of(&dirty);
            let previous_disk_rest_bytes = disk_rest_bytes;
            changed = disks::changed(&self.disks);
            disk_rest_bytes = disks::bytes_of(&changed);
            writes.observe(&self.disks, duration);
            let outcome = RoundOutcome {
                round: number,
                elapsed: self.started.elapsed(),
                took: duration,
                rest_bytes,
                previous_rest_bytes,
                disks: DiskOutcome {
                    rest_bytes: disk_rest_bytes,
                    previous_rest_bytes: previous_disk_rest_bytes,
                    throttle_percent: writes.percent(),
                },
                bytes_per_s: rate,
                // What this round brought of disks was made durable in that time; the last one's will be, too.
                fixed_cost: fixed_cost + flushing,
                throttle_percent,
                post_copy,
            };
            let predicted = outcome.predicted_blackout();
            let stalled_us = match (throttle_percent, &slowed) {
                (1.., Some(slowed)) => slowed.stalled_us(),
                _ => Vec::new(),
            };
            self.ledger.progress(|progress| {
                progress.stalled_us = stalled_us;
                progress.rate_bytes_per_s = rate;
                progress.remaining_bytes = Bytes(rest_bytes);
                progress.disk_remaining_bytes = Bytes(disk_rest_bytes);
                progress.dirty_bytes_per_s = per_second(rest_bytes, duration);
                progress.predicted_blackout_ms = predicted.as_millis() as u64;
            });
            let gave_up = || SourceError::DoesNotConverge {
                rounds: number,
                rest: Bytes(outcome.whole_rest()),
                blackout_ms: predicted.as_millis(),
                limit_ms: policy.downtime_limit_ms,
            };
            tracing::debug!(
                number,
                ?duration,
                rest_bytes,
                disk_rest_bytes,
                rate,
                ?predicted,
                throttle_percent,
                "round finished"
            );
            match outcome.decide(policy) {
                Decision::AnotherRound => {}
                // The pace was changed meanwhile: what was reckoned with does not hold.
                Decision::Pause | Decision::GoAhead if !self.outgoing.settle_pace(limit) => {}
                Decision::Throttle { percent } => {
                    if let Some(slowed) = &mut slowed {
                        slowed.set(percent);
                        tracing::info!(migration = %self.request.migration, percent, "the guest dirties memory faster than it can be sent: its busiest vCPUs are slowed down");
                    }
                    throttle_percent = percent;
                    self.ledger
                        .progress(|progress| progress.throttle_percent = percent);
                }
                Decision::SlowDisks { percent } => {
                    writes.slow(&self.disks, &changed, percent, rate);
                    tracing::info!(migration = %self.request.migration, percent, "the guest writes its disks faster than they can be sent: its writes are slowed down");
                }
                Decision::Pause => {
                    return Ok(Rest {
                        round: number,
                        dirty,
                        predicted,
                        bytes_per_s: rate,
                        ahead: false,
                    });
                }
                Decision::GoAhead => {
                    return Ok(Rest {
                        round: number,
                        dirty,
                        predicted: outcome.predicted_ahead(),
                        bytes_per_s: rate,
                        ahead: true,
                    });
                }
                Decision::GiveUp => return Err(gave_up()),
                Decision::OutOfTime => {
                    return Err(SourceError::Deadline {
                        rest: Bytes(outcome.whole_rest()),
                        blackout_ms: predicted.as_millis(),
                        deadline_s: policy.deadline_s.unwrap_or_default(),
                    });
                }
            }
        }
        unreachable!("the last round decides")
    }

    /// Pages that the guest or its devices wrote since they were last cleared, per slot.
    pub(super) fn read_dirty(&self, log: &DirtyLog) -> Result<Vec<DirtyBitmap>, SourceError> {
        let mut dirty = log.read()?;
        for (bitmap, devices) in dirty.iter_mut().zip(self.ram.take_written()) {
            bitmap.merge(&devices);
        }
        Ok(dirty)
    }

    pub(super) fn send_round(
        &self,
        (crew, tally): (&Crew, &Tally),
        round: Round,
        deadline: Option<Instant>,
    ) -> Result<(), SourceError> {
        let (began, before) = (Instant::now(), tally.read());
        let (number, guest, planned) = (round.number, round.guest, round.bytes());
        let planned_disks = round.disk_bytes();
        let note = |sent: Sent| {
            let done = (sent.settled_pages() - before.settled_pages()) * PAGE_BYTES;
            self.ledger.progress(|progress| {
                progress.round = number;
                sent.show(progress);
                progress.remaining_bytes = Bytes(planned.saturating_sub(done));
                let done = sent.disk_bytes() - before.disk_bytes();
                progress.disk_remaining_bytes = Bytes(planned_disks.saturating_sub(done));
                let elapsed = began.elapsed();
                if elapsed >= TELLING_ROUND {
                    progress.rate_bytes_per_s = per_second(sent.bytes - before.bytes, elapsed);
                }
            });
        };
        let late = || deadline.is_some_and(|deadline| Instant::now() > deadline);
        let result = crew.send(round, || {
            let sent = tally.read();
            note(sent);
            if guest == Guest::Runs {
                let limit = self.outgoing.pace.bytes_per_s();
                self.note_lanes(self.lanes.look(number, sent, limit));
            }
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

    /// Tells of another number of lanes at work.
    pub(super) fn note_lanes(&self, changed: Option<u8>) {
        let Some(lanes) = changed else {
            return;
        };
        let opened = self.lanes.opened();
        tracing::info!(migration = %self.request.migration, lanes, opened, "another number of lanes carries pages");
        self.ledger.progress(|progress| progress.lanes = lanes);
    }

    pub(super) const fn blackout_too_long(&self) -> SourceError {
        SourceError::BlackoutTooLong {
            limit_ms: self.request.policy.downtime_limit_ms,
        }
    }
}

/// Says that a round is sent and waits until the target has all of it; how long that took to make durable what came of
/// disks.
fn await_round_received(
    control: &mut FrameStream,
    number: u32,
    sent: &Sent,
) -> Result<Duration, SourceError> {
    control.send(&ToTarget::EndOfRound {
        round: number,
        pages: sent.pages(),
        disk_bytes: sent.disk_bytes(),
    })?;
    match control.receive()? {
        ToSource::RoundReceived { round, flush_us } if round == number => {
            Ok(Duration::from_micros(flush_us))
        }
        other => Err(out_of_turn(other, "RoundReceived")),
    }
}

/// What a round sent that took so long.
fn sent_since(before: &Sent, sent: &Sent, took: Duration) -> SentRound {
    SentRound {
        content_pages: sent.content() - before.content(),
        bare_pages: sent.bare() - before.bare(),
        wire_bytes: sent.bytes - before.bytes,
        took,
    }
}
