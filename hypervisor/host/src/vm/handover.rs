//! Carrying out what [`handover`](crate::handover) decides: the driver's side of a migration.
//!
//! A *watcher* brings the VMM's word, a *courier* asks the store until it answers; both belong to the [`Handover`] and
//! end with it.

use super::driver::Driver;
use super::observe::watch_migration;
use crate::backoff::{Backoff, random};
use crate::handover::{Verdict, source_step, target_step};
use crate::kept::HeldMemory;
use godwit_wire::host_api::{CancelMigration, CommitReply, Resolution, ResolveRequest, VmReport};
use godwit_wire::id::{Epoch, MigrationId};
use godwit_wire::migration::{MigrationPhase, MigrationRole, MigrationStatus};
use godwit_wire::problem::Problem;
use godwit_wire::vmm_api::{MigrationCommand, StopReason};
use std::time::Duration;
use tokio::sync::OwnedMutexGuard;
use tokio::time::Instant;
use tokio_util::task::AbortOnDropHandle;

/// First and longest pause between two questions to a store that does not answer, and two words to a VMM that does
/// not obey.
const FIRST_PAUSE: Duration = Duration::from_millis(50);
const LONGEST_PAUSE: Duration = Duration::from_secs(1);
/// How long a VMM may take to obey in the blackout.
pub(super) const OBEY_TIMEOUT: Duration = Duration::from_secs(5);

/// Pauses of one who asks until there is an answer.
pub(super) fn pauses() -> Backoff {
    Backoff::new(FIRST_PAUSE, LONGEST_PAUSE)
}

/// A migration under way, seen from this end.
#[derive(Debug)]
pub(super) struct Handover {
    pub(super) migration: MigrationId,
    pub(super) role: MigrationRole,
    /// Epoch the source has.
    pub(super) source_epoch: Epoch,
    pub(super) verdict: Verdict,
    pub(super) resolution: Option<Resolution>,
    /// Since when the VMM has been waiting for the commit.
    pub(super) awaiting_since: Option<Instant>,
    pub(super) look_again: Option<Instant>,
    pub(super) pauses: Backoff,
    pub(super) warm: Warm,
    pub(super) _watcher: AbortOnDropHandle<()>,
    pub(super) courier: Option<AbortOnDropHandle<()>>,
    pub(super) _dirty_log: Option<OwnedMutexGuard<()>>,
    /// The memory of a VM that leaves, should it be kept for its return.
    pub(super) memory: Option<HeldMemory>,
}

/// Whether a connection to the server has been opened for the commit, which falls into the guest's blackout.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Warm {
    NotYet,
    Asked,
}

impl Handover {
    pub(super) fn look_again_at(&self) -> Option<Instant> {
        self.look_again
    }

    pub(super) fn look_now(&mut self) {
        self.look_again = Some(Instant::now());
    }

    pub(super) fn look_later(&mut self) {
        self.look_again = Some(Instant::now() + self.pauses.next(random()));
    }

    /// Whether only the store can decide now.
    pub(super) fn is_decided_by_store(&self) -> bool {
        self.verdict != Verdict::NotAsked
    }

    pub(super) fn awaiting(&self) -> Duration {
        self.awaiting_since
            .map_or(Duration::ZERO, |since| since.elapsed())
    }
}

impl Driver {
    pub(super) fn handover(&self) -> Option<&Handover> {
        self.holding.as_ref()?.handover.as_ref()
    }

    pub(super) fn handover_mut(&mut self) -> Option<&mut Handover> {
        self.holding.as_mut()?.handover.as_mut()
    }

    /// Refuses while a migration is under way: its outcome is not for others to decide.
    pub(super) fn nothing_moves(&self) -> Result<(), Problem> {
        match self.handover() {
            None => Ok(()),
            Some(handover) => {
                let detail = format!(
                    "migration {} of VM {} is under way",
                    handover.migration, self.vm
                );
                Err(Problem::conflict("migration-under-way", detail)
                    .with_remedy("cancel it or wait for its end"))
            }
        }
    }

    pub(super) fn begin_handover(
        &mut self,
        status: MigrationStatus,
        role: MigrationRole,
        source_epoch: Epoch,
        dirty_log: Option<OwnedMutexGuard<()>>,
    ) {
        let migration = status.migration;
        if let Some(holding) = &mut self.holding {
            holding.migration = Some(status);
        }
        self.watch_handover(migration, role, source_epoch, dirty_log);
    }

    pub(super) fn watch_handover(
        &mut self,
        migration: MigrationId,
        role: MigrationRole,
        source_epoch: Epoch,
        dirty_log: Option<OwnedMutexGuard<()>>,
    ) {
        let news = self.news.clone();
        let Some(holding) = &mut self.holding else {
            return;
        };
        let Some(live) = &holding.live else { return };
        let watcher = watch_migration(live.vmm.clone(), news);
        let memory = match role {
            // Only now is it certain to be there: the VMM lets go of it as soon as the VM runs elsewhere.
            MigrationRole::Source => self.context.kept.hold(&live.process, &holding.record.spec),
            MigrationRole::Target => None,
        };
        holding.handover = Some(Handover {
            migration,
            role,
            source_epoch,
            verdict: Verdict::NotAsked,
            resolution: None,
            awaiting_since: None,
            look_again: None,
            pauses: pauses(),
            warm: Warm::NotYet,
            _watcher: watcher,
            courier: None,
            _dirty_log: dirty_log,
            memory,
        });
    }

    pub(super) async fn migration_seen(&mut self, status: MigrationStatus) {
        let Some(holding) = &mut self.holding else {
            return;
        };
        let Some(handover) = &mut holding.handover else {
            return;
        };
        if handover.migration != status.migration {
            return;
        }
        let former = holding.migration.as_ref().map(|status| status.phase);
        if former != Some(status.phase) {
            tracing::info!(
                vm = %self.vm, migration = %status.migration, role = ?status.role, phase = ?status.phase,
                connected = status.connected, reason = status.reason, "migration"
            );
        }
        if status.phase == MigrationPhase::AwaitingCommit && handover.awaiting_since.is_none() {
            handover.awaiting_since = Some(Instant::now());
        }
        if status.phase == MigrationPhase::PreCopy && status.role == MigrationRole::Target {
            self.warm_up();
        }
        if let Some(holding) = &mut self.holding {
            holding.migration = Some(status);
        }
        self.advance_handover().await;
    }

    pub(super) async fn resolution_given(&mut self, resolution: Resolution) {
        let vm = self.vm;
        let Some(handover) = self.handover_mut() else {
            return;
        };
        match handover.role {
            MigrationRole::Source => {
                tracing::info!(%vm, migration = %handover.migration, ?resolution, "the store has decided");
                handover.courier = None;
                handover.resolution = Some(resolution);
            }
            MigrationRole::Target
                if resolution == Resolution::End && !handover.is_decided_by_store() =>
            {
                let reason = "the migration is void".to_owned();
                handover.verdict = Verdict::Given(CommitReply::Refused { reason });
            }
            MigrationRole::Target => {}
        }
        self.advance_handover().await;
    }

    /// Takes the next steps of a migration until it has to wait for something.
    pub(super) async fn advance_handover(&mut self) {
        let Some(holding) = &mut self.holding else {
            return;
        };
        let Some(handover) = &mut holding.handover else {
            return;
        };
        handover.look_again = None;
        let status = holding
            .migration
            .as_ref()
            .filter(|status| status.migration == handover.migration);
        let alive = holding.live.is_some();
        match handover.role {
            // A live VMM that has not said anything yet is not one that failed.
            MigrationRole::Target if alive && status.is_none() => {}
            MigrationRole::Target => {
                let step = target_step(status.filter(|_| alive), &handover.verdict);
                self.take_target_step(step).await;
            }
            MigrationRole::Source => {
                let Some(status) = status else { return };
                // Of a source that died only this is known: if it had completed, the VM runs elsewhere.
                if !alive && status.phase != MigrationPhase::Completed {
                    holding.handover = None;
                    return;
                }
                let step = source_step(status, handover.awaiting(), handover.resolution);
                self.take_source_step(step).await;
            }
        }
    }

    pub(super) fn resolve_request(&self) -> Option<ResolveRequest> {
        let handover = self.holding.as_ref()?.handover.as_ref()?;
        Some(ResolveRequest {
            vm: self.vm,
            host: self.context.host,
            role: handover.role,
            epoch: handover.source_epoch,
        })
    }

    pub(super) fn look_again_later(&mut self) {
        if let Some(handover) = self.handover_mut() {
            handover.look_later();
        }
    }

    /// `POST /v1/vms/{vm}/migration/cancel`.
    pub(super) async fn cancel(&mut self, ask: CancelMigration) -> Result<VmReport, Problem> {
        self.present_under(ask.epoch)?;
        let holding = self
            .holding
            .as_ref()
            .ok_or_else(|| Problem::not_found("VM", self.vm))?;
        let Some(handover) = holding
            .handover
            .as_ref()
            .filter(|handover| handover.migration == ask.migration)
        else {
            let known = holding
                .migration
                .as_ref()
                .is_some_and(|status| status.migration == ask.migration);
            return if known {
                self.answer()
            } else {
                Err(Problem::not_found("migration", ask.migration))
            };
        };
        match handover.role {
            MigrationRole::Target if handover.is_decided_by_store() => {
                let detail = format!(
                    "the commit of migration {} has been asked for; the store decides",
                    ask.migration
                );
                Err(Problem::conflict("too-late", detail))
            }
            MigrationRole::Target => {
                tracing::info!(vm = %self.vm, migration = %ask.migration, "an incoming migration is called off");
                self.depart(StopReason::IncomingAborted)
                    .await
                    .ok_or_else(|| Problem::not_found("VM", self.vm))
            }
            MigrationRole::Source => {
                let Some(live) = &holding.live else {
                    return Err(not_running(self.vm));
                };
                live.observer.command_sent();
                let vmm = live.vmm.clone();
                let command = MigrationCommand {
                    migration: ask.migration,
                    epoch: ask.epoch,
                };
                let status: MigrationStatus = self
                    .vmm_answer(vmm.post("/v1/migration/cancel", &command))
                    .await?;
                self.migration_seen(status).await;
                self.answer()
            }
        }
    }
}

pub(super) fn not_running(vm: godwit_wire::id::VmId) -> Problem {
    Problem::conflict("not-running", format!("the machine of VM {vm} is no more"))
        .with_remedy("start the VM first")
}
