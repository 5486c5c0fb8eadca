//! Making, growing and deleting disks.

use super::{
    MAX_ATTEMPTS, Outcome, able_host, any_host, deleted, erase, follow, given_up, not_made,
    note_deletion, reason, unwatched,
};
use crate::ledger::Draft;
use crate::model::{Actor, Disk, DiskState, Operation, StepState, Subject, Work};
use crate::operation::context::{Conclusion, Context};
use crate::operation::{Ended, fresh};
use crate::view::View;
use godwit_wire::id::{DiskId, HostId, OperationId, PoolId};
use godwit_wire::problem::Problem;
use godwit_wire::storage::{CreateDisk, DiskOrigin, DiskReport, GrowDisk};
use godwit_wire::unit::Bytes;

/// Begins to delete a disk that nobody has.
pub(crate) fn begin_deletion(
    draft: &mut Draft<'_>,
    mut disk: Disk,
    actor: &Actor,
    parent: Option<OperationId>,
) -> OperationId {
    let work = Work::DeleteDisk { disk: disk.id };
    let subject = Subject::disk(disk.id, &disk.name);
    let operation = fresh(work, subject, actor, parent, draft.now());
    let id = operation.id;
    disk.operation = Some(id);
    draft.put_operation(operation);
    draft.put_disk(disk);
    id
}

/// Makes a disk; its record says what.
pub(in crate::operation) async fn make_disk(
    context: &Context<'_>,
    id: DiskId,
) -> Result<Outcome<DiskReport>, Ended> {
    let view = context.view();
    let disk = view.disks.get(&id).ok_or(Ended::GaveUp)?;
    let command = CreateDisk {
        bytes: disk.bytes,
        format: disk.format,
        from: disk.origin.clone(),
        made_for: None,
    };
    let (pool, driver) = (disk.pool, &context.core.driver);
    for _ in 0..MAX_ATTEMPTS {
        let Some(host) = able_host(context, pool, None).await? else {
            return Ok(Outcome::CalledOff);
        };
        context
            .change(|view, draft, operation| {
                let name = format!("create disk {}", disk.name);
                let detail = format!("in {} at {}", view.pool_name(pool), view.host_name(host));
                operation.begin_step(name, detail, draft.now());
            })
            .await?;
        let outcome = follow(
            context,
            host,
            |to| driver.create_disk(to, pool, id, &command),
            |to| driver.disk(to, pool, id),
            |report: &DiskReport| report.state.clone(),
            unwatched,
        )
        .await;
        if !matches!(outcome, Outcome::Lost) {
            return Ok(outcome);
        }
    }
    Ok(Outcome::Failed(given_up(&disk.name)))
}

/// Writes that a disk is there.
pub(in crate::operation) fn disk_made(
    view: &View,
    draft: &mut Draft<'_>,
    operation: &Operation,
    id: DiskId,
    report: &DiskReport,
) {
    let Some(mut disk) = draft.disk(id) else {
        return;
    };
    disk.state = DiskState::Ready;
    disk.bytes = Some(report.virtual_bytes);
    disk.format = report.format;
    disk.operation = None;
    let message = format!(
        "disk {} of {} made in {}",
        disk.name,
        report.virtual_bytes,
        view.pool_name(disk.pool)
    );
    let subject = Subject::disk(id, &disk.name);
    draft.info("disk.created", subject, &operation.actor, message);
    draft.put_disk(disk);
}

/// Lets go of what disks were made from.
pub(in crate::operation) fn release_origin(
    draft: &mut Draft<'_>,
    operation: OperationId,
    disk: &Disk,
) {
    if let DiskOrigin::Disk { disk: origin } = disk.origin
        && let Some(mut origin) = draft.disk(origin)
        && origin.operation == Some(operation)
    {
        origin.operation = None;
        draft.put_disk(origin);
    }
}

/// Erases what there is of a disk.
pub(in crate::operation) async fn erase_disk(
    context: &Context<'_>,
    pool: PoolId,
    disk: DiskId,
) -> Result<(), Problem> {
    let driver = &context.core.driver;
    erase(context, pool, |to| driver.delete_disk(to, pool, disk)).await
}

pub(super) async fn create_disk(context: &Context<'_>, id: DiskId) -> Result<(), Ended> {
    let record = |view: &View| view.disks.get(&id).cloned().ok_or(Ended::GaveUp);
    let mut problem = None;
    if record(&context.view())?.state == DiskState::Creating {
        match make_disk(context, id).await? {
            Outcome::Ready(report) => {
                return context
                    .change(|view, draft, operation| {
                        disk_made(view, draft, operation, id, &report);
                        if let Some(disk) = draft.disk(id) {
                            release_origin(draft, operation.id, &disk);
                        }
                        let done = Conclusion::Succeeded("made".into());
                        Context::conclude(draft, operation, None, done);
                    })
                    .await;
            }
            Outcome::Failed(why) => problem = Some(why),
            Outcome::CalledOff | Outcome::Lost => {}
        }
        context
            .change(|_, draft, operation| {
                if let Some(mut disk) = draft.disk(id) {
                    let reason = problem.as_ref().map_or("called off".into(), reason);
                    operation.end_step(StepState::Failed, Some(reason.clone()), draft.now());
                    disk.state = DiskState::Failed { reason };
                    draft.put_disk(disk);
                }
            })
            .await?;
    }
    let disk = record(&context.view())?;
    let erased = erase_disk(context, disk.pool, id).await;
    context
        .change(|view, draft, operation| {
            let Some(disk) = view.disks.get(&id) else {
                return;
            };
            release_origin(draft, operation.id, disk);
            draft.delete_disk(disk);
            let conclusion = not_made(
                draft,
                operation,
                "disk.create_failed",
                Subject::disk(id, &disk.name),
                disk_reason(disk),
                &erased,
            );
            Context::conclude(draft, operation, None, conclusion);
        })
        .await
}

pub(in crate::operation) fn disk_reason(disk: &Disk) -> String {
    match &disk.state {
        DiskState::Failed { reason } => reason.clone(),
        _ => "called off".into(),
    }
}

/// The host that must be told of a larger disk: the one where a VM runs with it, else any with the pool.
fn runs_with(view: &View, disk: DiskId) -> Option<HostId> {
    let users = view.users_of(disk).iter();
    users
        .filter_map(|(vm, _)| view.vms.get(vm))
        .find_map(|vm| vm.owner)
}

pub(super) async fn grow_disk(
    context: &Context<'_>,
    id: DiskId,
    bytes: Bytes,
) -> Result<(), Ended> {
    let view = context.view();
    let disk = view.disks.get(&id).ok_or(Ended::GaveUp)?;
    let (pool, driver, command) = (disk.pool, &context.core.driver, GrowDisk { bytes });
    let host = match runs_with(&view, id) {
        Some(host) => host,
        None => any_host(context, pool).await,
    };
    context
        .change(|view, draft, operation| {
            operation.begin_step(
                "grow",
                format!("to {bytes} at {}", view.host_name(host)),
                draft.now(),
            );
        })
        .await?;
    let outcome = follow(
        context,
        host,
        |to| driver.grow_disk(to, pool, id, &command),
        |to| driver.disk(to, pool, id),
        |report: &DiskReport| report.state.clone(),
        unwatched,
    )
    .await;
    context
        .change(|view, draft, operation| {
            let Some(mut disk) = draft.disk(id) else {
                return;
            };
            disk.operation = None;
            let subject = Subject::disk(id, &disk.name);
            let conclusion = match &outcome {
                Outcome::Ready(report) => {
                    disk.bytes = Some(report.virtual_bytes);
                    let message = format!("{} has {} now", disk.name, report.virtual_bytes);
                    draft.info("disk.grown", subject, &operation.actor, &message);
                    Conclusion::Succeeded(message)
                }
                Outcome::Failed(problem) => {
                    let message = format!("{} did not grow: {}", disk.name, problem.detail);
                    draft.error("disk.grow_failed", subject, &operation.actor, message);
                    Conclusion::Failed(problem.clone())
                }
                // A VM that has the disk must not wait for a host that may never come back.
                Outcome::CalledOff | Outcome::Lost => {
                    let name = view.host_name(host);
                    let detail = format!("{name} fell silent while {} was growing", disk.name);
                    draft.error("disk.grow_failed", subject, &operation.actor, &detail);
                    Conclusion::Failed(
                        Problem::conflict("host-silent", detail).with_remedy("grow it again"),
                    )
                }
            };
            draft.put_disk(disk);
            Context::conclude(draft, operation, None, conclusion);
        })
        .await
}

pub(super) async fn delete_disk(context: &Context<'_>, id: DiskId) -> Result<(), Ended> {
    let view = context.view();
    let pool = view.disks.get(&id).ok_or(Ended::GaveUp)?.pool;
    note_deletion(context, pool).await?;
    let erased = erase_disk(context, pool, id).await;
    context
        .change(|_, draft, operation| {
            let Some(mut disk) = draft.disk(id) else {
                return;
            };
            let subject = Subject::disk(id, &disk.name);
            let name = disk.name.clone();
            if erased.is_ok() {
                draft.delete_disk(&disk);
            } else {
                disk.operation = None;
                draft.put_disk(disk);
            }
            let conclusion = deleted(draft, operation, "disk", &name, subject, &erased);
            Context::conclude(draft, operation, None, conclusion);
        })
        .await
}
