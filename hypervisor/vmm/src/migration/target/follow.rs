//! The guest is here, or about to be, and its memory follows: waits for it, and for a source whose connections broke.

use super::lanes::Arrivals;
use super::pull::{Event, Pull};
use super::urgent::Urgent;
use super::{Session, TargetError, TargetMachine};
use crate::migration::maps::send_map;
use crate::migration::stream::{FrameStream, StreamError};
use crate::migration::{TargetHandOver, target::doorway::Joined};
use godwit_wire::migration::{MigrationPhase, ToSource};
use std::sync::Arc;
use std::thread::Scope;
use std::time::{Duration, Instant};

/// How often a target whose source is gone looks whether it is still to wait.
const LOOK: Duration = Duration::from_secs(1);
/// How long the source may take to hang up once it knows that everything is here.
const FAREWELL: Duration = Duration::from_secs(2);
/// How long its lanes may take to join; another attempt comes soon.
const JOIN_AGAIN: Duration = Duration::from_secs(5);
/// After a connection could not be taken.
const BREATH: Duration = Duration::from_millis(100);

impl<'s> Session<'s> {
    /// Puts urgent lanes to work for memory that follows; the number of their link.
    pub(super) fn pull_over<'scope>(
        &'scope self,
        scope: &'scope Scope<'scope, '_>,
        pull: &Arc<Pull>,
        urgent: Vec<FrameStream>,
    ) -> Result<u64, TargetError> {
        let link = pull.link().map_err(StreamError::from)?;
        for stream in urgent {
            let urgent = Urgent {
                pull: pull.clone(),
                stream,
                link: link.clone(),
            };
            scope.spawn(|| urgent.run());
        }
        Ok(link.number)
    }

    /// Waits until everything is here, or is not needed any more.
    pub(super) fn await_rest<'scope>(
        &'scope self,
        scope: &'scope Scope<'scope, '_>,
        pull: &Arc<Pull>,
        machine: &dyn TargetMachine,
    ) {
        let ledger = &self.incoming.ledger;
        let started = Instant::now();
        loop {
            let event = pull.wait(|mut figures| {
                figures.took_ms = started.elapsed().as_millis() as u64;
                ledger.progress(|progress| {
                    progress.remaining_bytes = figures.missing_bytes;
                    progress.post_copy = Some(figures);
                });
            });
            match event {
                Event::Complete => {
                    pull.absent().end();
                    tracing::info!(migration = %self.request.migration, "all of the guest's memory is here");
                    ledger.enter(MigrationPhase::Completed);
                    machine.all_is_here();
                    return self.take_leave();
                }
                Event::Abandoned => return self.take_leave(),
                Event::Broken(reason) => {
                    tracing::warn!(migration = %self.request.migration, reason, "memory does not arrive any more; waiting for the source to connect again");
                    self.incoming.sockets.hang_up();
                    drop(self.incoming.control().take());
                    ledger.disconnected();
                    machine.stall(reason);
                    pull.was_interrupted();
                    if self.take_up_again(scope, pull) {
                        ledger.connected();
                        machine.go_on();
                    }
                }
            }
        }
    }

    /// Waits for the source to connect again; `false` when that is not needed any more.
    fn take_up_again<'scope>(
        &'scope self,
        scope: &'scope Scope<'scope, '_>,
        pull: &Arc<Pull>,
    ) -> bool {
        while !pull.is_over() {
            match self.take_source_again(scope, pull) {
                Ok(true) => return true,
                Ok(false) => {}
                // Its listener was closed for that.
                Err(_) if pull.is_abandoned() => {}
                Err(error) => {
                    tracing::warn!(%error, "the source could not be taken up again");
                    std::thread::sleep(BREATH);
                }
            }
        }
        false
    }

    fn take_source_again<'scope>(
        &'scope self,
        scope: &'scope Scope<'scope, '_>,
        pull: &Arc<Pull>,
    ) -> Result<bool, TargetError> {
        if self.wait_for_connection(Instant::now() + LOOK)?.is_none() {
            return Ok(false);
        }
        self.incoming.sockets.keep(0);
        let greeted = self.take_one(|stream, deadline| self.greet_again(stream, deadline))?;
        let Some((mut control, lanes, urgent_lanes)) = greeted else {
            return Ok(false);
        };
        let mut missing_pages = 0;
        for (slot, map) in pull.absent().missing() {
            send_map(&mut control, slot.guest_address, &map)?;
            missing_pages += map.count();
        }
        let running = match self.incoming.ledger.hand_over() {
            TargetHandOver::Running(epoch) => Some(epoch),
            _ => None,
        };
        control.send(&ToSource::Resumed {
            round: pull.round,
            missing_pages,
            running,
        })?;
        let Joined { bulk, urgent } = self.join_lanes((lanes, urgent_lanes), JOIN_AGAIN)?;
        let link = self.pull_over(scope, pull, urgent)?;
        let arrivals = Arrivals::following(usize::from(lanes), pull.clone(), link);
        self.take_in(
            scope,
            (bulk, pull.round),
            (|| None, &[]),
            &Arc::new(arrivals),
            &control,
        )?;
        // The commit may have come while this was not here to pass it on.
        let mut held = self.incoming.control();
        if running.is_none()
            && let TargetHandOver::Running(epoch) = self.incoming.ledger.hand_over()
        {
            control.send(&ToSource::Running { epoch })?;
        }
        *held = Some(control);
        Ok(true)
    }

    /// Tells the source that its memory is not needed any more.
    fn take_leave(&self) {
        self.incoming.listener.close();
        let control = self.incoming.control().take();
        if let Some(mut control) = control
            && control.send(&ToSource::Complete).is_ok()
        {
            // It hangs up when it has heard; whatever it says instead does not matter.
            let _: Result<ToSource, _> = control.receive_before(Instant::now() + FAREWELL);
        }
        self.incoming.sockets.end_lanes();
    }
}
