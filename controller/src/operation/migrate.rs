//! Moving a VM live.
//!
//! ```text
//! wait for a place ─▶ record the migration (open) ─▶ prepare the target ─▶ tell the source ─▶ watch
//!                                (blank disks first, where disks move along)
//!                                                        │ refused, failed, cancelled, lost      │
//!                                                        ▼                                       ▼
//!                                     void (unless committed meanwhile)          committed, by the target's word
//!                                     source runs on, target's copy destroyed    source's copy released
//! ```
//! The decision is the record's: whatever this executor sees or misses, an open migration is voided or committed
//! exactly once, and everything after follows the record. So do disks that move along: with the commit they are at the
//! target, and what the source has left of them is erased; else what the target has of them is.

mod begin;

mod disks;

mod drive;
mod fair_share;

use super::Ended;
use super::context::{Conclusion, Context};
use crate::ledger::Draft;
use crate::model::{Liveness, Migration, MigrationState, Operation, Subject, Vm};
use crate::view::View;
use begin::begin;
use disks::let_go_of_disks;
use drive::{Why, drive, has_ended, source_is_gone, status};
use fair_share::keep_to_share;
use godwit_wire::host_api::CancelMigration;
use godwit_wire::id::MigrationId;
use godwit_wire::migration::{MigrationPhase, MigrationProgress, MigrationRole, PostCopy};
use godwit_wire::problem::Problem;
use godwit_wire::vmm_api::VmmState;
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

/// How long the executor waits, after the commit, for both ends to say that they have followed.
const FOLLOW_TIME: Duration = Duration::from_secs(10);

pub(super) async fn run(context: &Context<'_>) -> Ended {
    match migrate(context).await {
        Ok(()) => Ended::Concluded,
        Err(ended) => ended,
    }
}

async fn migrate(context: &Context<'_>) -> Result<(), Ended> {
    let Some(id) = begin(context).await? else {
        return Ok(());
    };
    let migration = record(context, id)?;
    if migration.is_open()
        && let Err(why) = drive(context, &migration).await
    {
        void(context, id, why).await?;
    }
    match record(context, id)?.state {
        MigrationState::Committed { .. } => follow(context, &migration).await,
        MigrationState::Void { .. } | MigrationState::Open => clean_up(context, &migration).await,
    }
}

fn record(context: &Context<'_>, id: MigrationId) -> Result<Arc<Migration>, Ended> {
    context
        .view()
        .migrations
        .get(&id)
        .cloned()
        .ok_or(Ended::GaveUp)
}

/// Asks the source to stop sending, then voids the migration unless it was committed meanwhile.
async fn void(context: &Context<'_>, id: MigrationId, why: Why) -> Result<(), Ended> {
    let migration = record(context, id)?;
    if migration.is_open() {
        let command = CancelMigration {
            migration: id,
            epoch: migration.epoch,
        };
        let driver = &context.core.driver;
        if let Some(source) = context.core.address(migration.source) {
            // `too-late` and silence alike leave the decision to the record.
            let asked = driver.cancel_migration(source, migration.vm, &command);
            if let Err(error) = bounded(asked).await {
                tracing::info!(migration = %id, vm = migration.vm_name, error, "the source did not cancel");
            }
        }
    }
    context
        .change(|view, draft, operation| {
            let Some(migration) = view.migrations.get(&id).filter(|m| m.is_open()) else {
                return;
            };
            let mut migration = migration.as_ref().clone();
            let actor = operation.actor.clone();
            migration.state = MigrationState::Void {
                reason: why.reason.clone(),
            };
            migration.ended_at = Some(draft.now());
            let message = format!(
                "the migration of {} from {} to {} is void: {}",
                migration.vm_name, migration.source_name, migration.target_name, why.reason
            );
            let subject = Subject::vm(migration.vm, &migration.vm_name);
            if why.cancelled {
                draft.info("migration.cancelled", subject, &actor, message);
            } else {
                draft.warning("migration.failed", subject, &actor, message);
            }
            draft.put_migration(migration);
        })
        .await
}

/// For courtesies to a host that may be silent: what matters has another way to happen.
async fn bounded<T>(
    call: impl Future<Output = Result<T, godwit_channel::CallError>>,
) -> Result<(), String> {
    match tokio::time::timeout(Duration::from_secs(3), call).await {
        Ok(Ok(_)) => Ok(()),
        Ok(Err(error)) => Err(error.to_string()),
        Err(_) => Err("no answer in time".into()),
    }
}

/// After the decision for the source: nothing may be left at the target.
async fn clean_up(context: &Context<'_>, migration: &Migration) -> Result<(), Ended> {
    let (vm, driver) = (migration.vm, &context.core.driver);
    // A target that does not answer is told with its next heartbeat.
    if let Some(target) = context.core.address(migration.target)
        && let Err(error) = bounded(driver.destroy(target, vm, migration.epoch)).await
    {
        tracing::info!(migration = %migration.id, error, "the target did not destroy its copy yet");
    }
    if let Some(source) = context.core.address(migration.source) {
        let command = CancelMigration {
            migration: migration.id,
            epoch: migration.epoch,
        };
        // The source may still be waiting for a commit that will not come.
        let _ = bounded(driver.cancel_migration(source, vm, &command)).await;
    }
    conclude(context, migration).await
}

/// After the decision for the target: waits until both ends have followed, then releases the source.
async fn follow(context: &Context<'_>, migration: &Migration) -> Result<(), Ended> {
    if migration.policy.post_copy == PostCopy::Allowed {
        // What follows the guest keeps to its share, too.
        let memory = tokio::select! {
            memory = await_memory(context, migration) => memory?,
            never = keep_to_share(context, migration) => match never {},
        };
        if memory == Memory::GivenUp {
            return lose_memory(context, migration).await;
        }
    }
    let mut figures = None;
    let followed = context.core.until(|view| {
        if let Some(status) = status(view, migration.source, migration) {
            figures = Some(status.clone());
        }
        let lost = |host| view.liveness(host) == Liveness::RestartAllowed;
        let source_done = lost(migration.source)
            || figures
                .as_ref()
                .is_some_and(|status| status.phase == MigrationPhase::Completed)
            || view
                .report_at(migration.source, migration.vm)
                .is_none_or(has_ended);
        let target_done = lost(migration.target)
            || view.vms.get(&migration.vm).is_none_or(|vm| {
                view.report(vm).is_some_and(|report| {
                    matches!(
                        report.state,
                        Some(VmmState::Running | VmmState::Paused { .. })
                    )
                })
            });
        (source_done && target_done).then_some(())
    });
    if tokio::time::timeout(FOLLOW_TIME, followed).await.is_err() {
        tracing::warn!(migration = %migration.id, vm = migration.vm_name, "an end has not followed the commit yet");
    }
    let driver = &context.core.driver;
    if let Some(source) = context.core.address(migration.source)
        && let Err(error) = bounded(driver.destroy(source, migration.vm, migration.epoch)).await
    {
        tracing::info!(migration = %migration.id, error, "the source did not release its copy yet");
    }
    if let Some(status) = figures {
        context
            .change(|view, draft, _| {
                if let Some(record) = view.migrations.get(&migration.id) {
                    let mut record = record.as_ref().clone();
                    let progress = view.with_target_figures(&record, status.progress.clone());
                    // Whatever the source said last: it has ended.
                    (record.phase, record.progress) =
                        (Some(MigrationPhase::Completed), Some(progress));
                    draft.put_migration(record);
                }
            })
            .await?;
    }
    conclude(context, migration).await
}

/// What became of the memory that a guest had gone ahead of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Memory {
    /// The guest has it, or does not need it any more.
    Followed,
    /// The guest waits for it in vain: the source's machine is no more, or the operator does not want to wait for it.
    GivenUp,
}

/// A guest that went ahead of its memory needs the source until all of it has followed, however long that takes. Both
/// copies stay as they are meanwhile; only the end of the guest at the target, whatever ended it, or the operator ends
/// the wait.
async fn await_memory(context: &Context<'_>, migration: &Migration) -> Result<Memory, Ended> {
    // A wish to call it off that lost against the commit is not one to give up the guest.
    context
        .change(|_, _, operation| operation.cancel = None)
        .await?;
    let mut told = false;
    loop {
        let seen = context
            .core
            .until(|view| {
                let waits = waits_for_memory(view, migration);
                let cancelled = view
                    .operations
                    .get(&context.id)
                    .is_some_and(|operation| operation.cancel.is_some());
                if !may_owe_memory(view, migration) {
                    Some(Some(Memory::Followed))
                } else if waits
                    && (told && cancelled || source_is_gone(view, migration) == Some(true))
                {
                    Some(Some(Memory::GivenUp))
                } else {
                    (waits && !told).then_some(None)
                }
            })
            .await;
        if let Some(memory) = seen {
            return Ok(memory);
        }
        told = true;
        let message = format!(
            "{} on {} waits for memory that is still on {}, which cannot be reached",
            migration.vm_name, migration.target_name, migration.source_name
        );
        context
            .change(|_, draft, operation| {
                let subject = Subject::vm(migration.vm, &migration.vm_name);
                draft.warning(
                    "vm.memory-awaited",
                    subject,
                    &operation.actor,
                    message.clone(),
                );
            })
            .await?;
    }
}

fn waits_for_memory(view: &View, migration: &Migration) -> bool {
    view.report_at(migration.target, migration.vm)
        .and_then(|report| report.state.as_ref())
        .is_some_and(VmmState::waits_for_memory)
}

/// The guest cannot go on. What is left of it ends, and it starts anew as after the death of its VMM.
async fn lose_memory(context: &Context<'_>, migration: &Migration) -> Result<(), Ended> {
    // Nobody tells it any more once the copies are gone.
    let last = last_progress(&context.view(), migration);
    let driver = &context.core.driver;
    for (host, epoch) in [
        (migration.target, migration.epoch.next()),
        (migration.source, migration.epoch),
    ] {
        if let Some(address) = context.core.address(host)
            && let Err(error) = bounded(driver.destroy(address, migration.vm, epoch)).await
        {
            tracing::info!(migration = %migration.id, error, "a copy of the VM is not destroyed yet");
        }
    }
    context
        .change(|view, draft, operation| {
            let detail = format!(
                "{} went ahead of memory that is lost on {}",
                migration.vm_name, migration.source_name
            );
            let problem = Problem::conflict("memory-lost", detail);
            let vm = Context::vm(view, migration.vm);
            if let Some(record) = view.migrations.get(&migration.id) {
                let mut record = record.as_ref().clone();
                record.phase = Some(MigrationPhase::Failed);
                record.progress = record.progress.or_else(|| last.clone());
                let_go_of_disks(view, draft, operation, &record);
                draft.put_migration(record);
            }
            Context::conclude(draft, operation, vm, Conclusion::Failed(problem));
        })
        .await
}

/// What one of its ends said last, the source rather than the target.
fn last_progress(view: &View, migration: &Migration) -> Option<MigrationProgress> {
    let said = status(view, migration.source, migration)
        .or_else(|| status(view, migration.target, migration))?;
    Some(view.with_target_figures(migration, said.progress.clone()))
}

/// Whether the guest may still need memory from the source. That is so until one of its ends says otherwise, or the
/// guest is gone: silence, of a server that has just started or of a host, says nothing.
fn may_owe_memory(view: &View, migration: &Migration) -> bool {
    let Some(vm) = view.vms.get(&migration.vm) else {
        return false;
    };
    let has_all = [migration.source, migration.target].iter().any(|host| {
        status(view, *host, migration)
            .is_some_and(|status| status.phase == MigrationPhase::Completed)
    });
    let gone = vm.owner != Some(migration.target)
        || view.liveness(migration.target) == Liveness::RestartAllowed
        || view.report(vm).is_some_and(has_ended);
    !has_all && !gone
}

async fn conclude(context: &Context<'_>, migration: &Migration) -> Result<(), Ended> {
    context
        .change(|view, draft, operation| {
            let Some(record) = view.migrations.get(&migration.id) else {
                return;
            };
            let mut record = record.as_ref().clone();
            if record.progress.is_none() {
                let said = status(view, record.source, &record)
                    .filter(|s| s.role == MigrationRole::Source);
                record.phase = said.map(|status| status.phase);
                record.progress =
                    said.map(|status| view.with_target_figures(&record, status.progress.clone()));
            }
            let vm = Context::vm(view, migration.vm);
            let conclusion = match &record.state {
                MigrationState::Committed { .. } => {
                    record.phase = Some(MigrationPhase::Completed);
                    arrived(draft, operation, &record, vm.as_ref());
                    Conclusion::Succeeded(format!("runs on {}", record.target_name))
                }
                MigrationState::Void { reason } if operation.cancel.is_some() => {
                    Conclusion::Cancelled(reason.clone())
                }
                MigrationState::Void { reason } => {
                    let detail = format!(
                        "{} stays on {}: {reason}",
                        record.vm_name, record.source_name
                    );
                    Conclusion::Failed(Problem::conflict("migration-failed", detail))
                }
                MigrationState::Open => {
                    Conclusion::Failed(Problem::internal("an open migration was concluded"))
                }
            };
            let_go_of_disks(view, draft, operation, &record);
            draft.put_migration(record);
            Context::conclude(draft, operation, vm, conclusion);
        })
        .await
}

fn arrived(draft: &mut Draft<'_>, operation: &Operation, record: &Migration, vm: Option<&Vm>) {
    let figures = record.progress.as_ref();
    let downtime = figures.and_then(|progress| progress.downtime_us);
    let sent = figures.map(|progress| format!(", {} sent", progress.transferred_bytes));
    let disks = match record.disk_names() {
        names if names.is_empty() => String::new(),
        names => {
            let names: Vec<String> = names.into_iter().collect();
            format!(" with its disks {}", names.join(", "))
        }
    };
    let message = format!(
        "{} moved from {} to {}{disks}{}{}",
        record.vm_name,
        record.source_name,
        record.target_name,
        sent.unwrap_or_default(),
        downtime
            .map(|us| format!(", downtime {:.1} ms", us as f64 / 1_000.0))
            .unwrap_or_default(),
    );
    let subject = vm.map_or_else(
        || Subject::vm(record.vm, &record.vm_name),
        |vm| Subject::vm(vm.id, &vm.name),
    );
    draft.info("vm.migrated", subject, &operation.actor, message);
}
