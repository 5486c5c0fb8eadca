//! Post-copy: the guest runs at the target, or is about to, and its memory follows.
//!
//! ```text
//!        ┌──────────── connections made again ───────────┐
//!        ▼                                               │
//!   serving ── connections break ──▶ connecting again ───┘
//!        │ the target has everything      │ the store voids it: the guest runs here again
//!        ▼                                ▼
//!      gone                             over
//! ```
//!
//! This end's memory stays as it is all the while, whatever the target has of it. It is given up only when the target
//! says that it has everything, or the store that the guest never went.

use super::black_out::Heard;
use super::connect::Resumed;
use super::{Dark, Session, Shared, SourceMachine};
use crate::kvm::DirtyBitmap;
use crate::migration::claims::Claims;
use crate::migration::crew::Crew;
use crate::migration::hand_over::SourceHandOver;
use crate::migration::lane::Lane;
use crate::migration::round::{Round, Sent};
use crate::migration::stream::FrameStream;
use godwit_wire::migration::{MigrationPhase, PostCopyProgress, ToSource};
use godwit_wire::unit::{Bytes, PAGE_BYTES};
use std::ops::ControlFlow;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// First and longest pause between two attempts to connect again.
const FIRST_PAUSE: Duration = Duration::from_millis(50);
const LONGEST_PAUSE: Duration = Duration::from_secs(2);
/// How often it is looked at, meanwhile, whether that is still wanted.
const LOOK: Duration = Duration::from_millis(50);

/// The pages a target lacks, and the round they are sent in.
pub(super) type Owed = (u32, Vec<DirtyBitmap>);

impl Session<'_> {
    /// Serves memory until the target has all of it, or until the guest is not there to need it.
    pub(super) fn follow(
        &self,
        (control, crew, urgent): (&mut FrameStream, &Crew, Vec<Lane<'_>>),
        shared: &Shared<'_>,
        owed: Owed,
        mut dark: Dark,
        machine: &dyn SourceMachine,
    ) {
        let (lanes, urgent_lanes) = (crew.lanes() as u8, urgent.len() as u8);
        let armed = await_armed(control);
        let mut heard = match armed {
            Ok(()) => self.serve((control, crew, urgent), shared, owed, &mut dark),
            Err(heard) => heard,
        };
        loop {
            match heard {
                Heard::Complete => return self.all_is_there(&dark, machine),
                Heard::Running | Heard::GaveUp => return self.ledger.disconnected(),
                Heard::Broken(error) => {
                    tracing::warn!(migration = %self.request.migration, %error, "connections of a post-copy broke");
                    self.ledger.disconnected();
                }
            }
            self.outgoing.sockets.close();
            let Some(resumed) = self.connect_again(lanes, urgent_lanes, shared) else {
                return;
            };
            self.note(|post_copy| post_copy.interruptions += 1);
            heard = self.serve_again(resumed, shared, &mut dark);
        }
    }

    fn serve_again(&self, resumed: Resumed<'_>, shared: &Shared<'_>, dark: &mut Dark) -> Heard {
        let Resumed {
            mut control,
            lanes,
            owed,
            running,
        } = resumed;
        if let Some(epoch) = running
            && self.ledger.hand_over() != SourceHandOver::Serving
            && !self.ran_there(epoch, dark)
        {
            return Heard::GaveUp;
        }
        self.ledger.connected();
        if let Err(error) = control.wait_without_limit() {
            return Heard::Broken(error.into());
        }
        std::thread::scope(|scope| {
            let crew = Crew::start(scope, lanes.bulk, &self.lanes.places);
            self.serve((&mut control, &crew, lanes.urgent), shared, owed, dark)
        })
    }

    /// Sends what is owed, wanted pages first, and hears what the target says.
    fn serve(
        &self,
        (control, crew, urgent): (&mut FrameStream, &Crew, Vec<Lane<'_>>),
        shared: &Shared<'_>,
        (round, owed): Owed,
        dark: &mut Dark,
    ) -> Heard {
        let claims = Arc::new(Claims::new(shared.log.slots(), &owed));
        let asked = Round::following(round, Vec::new(), 1, claims.clone());
        let all = Round::following(round, owed, crew.lanes(), claims.clone());
        let over = AtomicBool::new(false);
        let waker = match control.socket() {
            Ok(waker) => waker,
            Err(error) => return Heard::Broken(error.into()),
        };
        // A lane that breaks wakes this thread, which waits on the control connection.
        let wake = || {
            if !over.load(Ordering::SeqCst) {
                let _ = waker.shutdown(std::net::Shutdown::Read);
            }
        };
        std::thread::scope(|scope| {
            for mut lane in urgent {
                let (asked, claims) = (&asked, &claims);
                scope.spawn(move || {
                    if let Err(error) = lane.serve(asked, claims) {
                        tracing::debug!(%error, "an urgent lane ended");
                        wake();
                    }
                });
            }
            let hearing = scope.spawn(|| {
                let heard = self.hear_to_the_end(control, dark);
                over.store(true, Ordering::SeqCst);
                asked.stop();
                self.outgoing.sockets.end_lanes();
                heard
            });
            let pushed = crew.send(all, || {
                self.note_sent(shared.tally.read(), &claims);
                match over.load(Ordering::SeqCst) {
                    true => ControlFlow::Break(()),
                    false => ControlFlow::Continue(()),
                }
            });
            self.note_sent(shared.tally.read(), &claims);
            if pushed.is_err() {
                wake();
            }
            hearing
                .join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }

    fn hear_to_the_end(&self, control: &mut FrameStream, dark: &mut Dark) -> Heard {
        loop {
            match self.hear(control, dark) {
                Heard::Running => {}
                heard => return heard,
            }
        }
    }

    fn connect_again<'s>(
        &'s self,
        lanes: u8,
        urgent_lanes: u8,
        shared: &'s Shared<'s>,
    ) -> Option<Resumed<'s>> {
        let mut pause = FIRST_PAUSE;
        while self.owes() {
            match self.resume(lanes, urgent_lanes, shared) {
                Ok(resumed) => return Some(resumed),
                Err(error) => {
                    // The target may be waiting for the rest of them.
                    self.outgoing.sockets.close();
                    tracing::info!(migration = %self.request.migration, %error, "memory cannot be sent yet")
                }
            }
            let until = Instant::now() + pause;
            while self.owes() && Instant::now() < until {
                // Time itself is what is waited for.
                std::thread::sleep(LOOK.min(pause));
            }
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
        None
    }

    /// Whether the target may still need memory from here.
    fn owes(&self) -> bool {
        matches!(
            self.ledger.hand_over(),
            SourceHandOver::InDoubt(_) | SourceHandOver::Serving
        )
    }

    fn all_is_there(&self, dark: &Dark, machine: &dyn SourceMachine) {
        let took = dark
            .ran_since
            .map_or(Duration::ZERO, |since| since.elapsed());
        self.note(|post_copy| {
            post_copy.missing_bytes = Bytes(0);
            post_copy.took_ms = took.as_millis() as u64;
        });
        let phase = MigrationPhase::Completed;
        match self.ledger.step(SourceHandOver::complete, phase, None) {
            Ok(()) => {
                let post_copy = self.ledger.status().progress.post_copy;
                tracing::info!(migration = %self.request.migration, ?post_copy, "the guest has all of its memory at the target");
                machine.gone();
            }
            Err(error) => {
                tracing::error!(%error, "the target spoke out of turn");
                self.ledger.disconnected();
            }
        }
    }

    fn note_sent(&self, sent: Sent, claims: &Claims) {
        let missing = Bytes(claims.left() * PAGE_BYTES);
        self.ledger.progress(|progress| {
            sent.show(progress);
            progress.remaining_bytes = missing;
        });
        self.note(|post_copy| {
            post_copy.missing_bytes = missing;
            post_copy.wanted_pages = sent.wanted_pages;
        });
    }

    /// So much has not been sent and follows the guest.
    pub(super) fn note_owed(&self, pages: u64) {
        self.note(|post_copy| {
            post_copy.owed_bytes = Bytes(pages * PAGE_BYTES);
            post_copy.missing_bytes = post_copy.owed_bytes;
        });
    }

    fn note(&self, note: impl FnOnce(&mut PostCopyProgress)) {
        self.ledger.progress(|progress| {
            note(progress.post_copy.get_or_insert_default());
        });
    }
}

fn await_armed(control: &mut FrameStream) -> Result<(), Heard> {
    match control.receive() {
        Ok(ToSource::Armed) => control
            .wait_without_limit()
            .map_err(|error| Heard::Broken(error.into())),
        Ok(other) => {
            tracing::warn!(?other, "the target gave up");
            Err(Heard::GaveUp)
        }
        Err(error) => Err(Heard::Broken(error)),
    }
}
