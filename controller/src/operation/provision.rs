//! Making the disks of a VM: all of them, or none.
//!
//! ```text
//! disk ─▶ disk ─▶ … ─▶ started | done
//!   │ failed (written down) or called off
//!   ▼
//! erase those that were made ─▶ a new VM goes, a changed one loses the disks
//! ```

use super::Ended;
use super::context::{Conclusion, Context};
use super::storage::{Outcome, disk_made, disk_reason, erase_disk, make_disk, release_origin};
use crate::ledger::Draft;
use crate::model::{DiskState, Operation, ProvisionCause, StartCause, StepState, Subject, Work};
use crate::view::View;
use godwit_wire::devices::DiskSource;
use godwit_wire::id::{DiskId, VmId};
use godwit_wire::problem::Problem;

pub(super) async fn run(context: &Context<'_>) -> Ended {
    match provision(context).await {
        Ok(Next::Start) => super::start::run(context).await,
        Ok(Next::Ended) => Ended::Concluded,
        Err(ended) => ended,
    }
}

enum Next {
    Start,
    Ended,
}

async fn provision(context: &Context<'_>) -> Result<Next, Ended> {
    let operation = context.operation()?;
    let Work::Provision { vm, disks, .. } = &operation.work else {
        return Err(Ended::GaveUp);
    };
    for id in disks {
        let view = context.view();
        let disk = view.disks.get(id).ok_or(Ended::GaveUp)?;
        match disk.state {
            DiskState::Ready => continue,
            DiskState::Failed { .. } => return undo(context, *vm, disks).await,
            DiskState::Creating => {}
        }
        if operation.cancel.is_some() {
            return undo(context, *vm, disks).await;
        }
        match make_disk(context, *id).await? {
            Outcome::Ready(report) => {
                context
                    .change(|view, draft, operation| {
                        disk_made(view, draft, operation, *id, &report);
                    })
                    .await?;
            }
            Outcome::CalledOff | Outcome::Lost => return undo(context, *vm, disks).await,
            Outcome::Failed(problem) => {
                context
                    .change(|_, draft, operation| {
                        let reason = problem.detail.clone();
                        operation.end_step(StepState::Failed, Some(reason.clone()), draft.now());
                        if let Some(mut disk) = draft.disk(*id) {
                            disk.state = DiskState::Failed { reason };
                            draft.put_disk(disk);
                        }
                    })
                    .await?;
                return undo(context, *vm, disks).await;
            }
        }
    }
    context
        .change(|view, draft, operation| made(view, draft, operation, *vm, disks))
        .await
}

/// All disks are there.
fn made(
    view: &View,
    draft: &mut Draft<'_>,
    operation: &mut Operation,
    id: VmId,
    disks: &[DiskId],
) -> Next {
    for disk in disks.iter().filter_map(|id| view.disks.get(id)) {
        release_origin(draft, operation.id, disk);
    }
    let vm = Context::vm(view, id);
    let wants_vmm = vm.as_ref().is_some_and(|vm| vm.intent.wants_vmm());
    match operation.work.clone() {
        Work::Provision {
            cause: ProvisionCause::Create { wanted },
            ..
        } if wants_vmm => {
            operation.end_step(StepState::Done, None, draft.now());
            operation.work = Work::Start {
                vm: id,
                wanted,
                cause: StartCause::Asked,
                tried: Vec::new(),
                placed: None,
            };
            Next::Start
        }
        _ => {
            let done = Conclusion::Succeeded("the disks are made".into());
            Context::conclude(draft, operation, vm, done);
            Next::Ended
        }
    }
}

/// Erases the disks, then drops their records and whatever was to have them.
async fn undo(context: &Context<'_>, vm: VmId, disks: &[DiskId]) -> Result<Next, Ended> {
    let mut left: Vec<String> = Vec::new();
    for id in disks {
        let view = context.view();
        let Some(disk) = view.disks.get(id) else {
            continue;
        };
        if let Err(problem) = erase_disk(context, disk.pool, *id).await {
            left.push(format!("{}: {problem}", disk.name));
        }
    }
    context
        .change(|view, draft, operation| {
            let mut reasons: Vec<String> = Vec::new();
            for disk in disks.iter().filter_map(|id| view.disks.get(id)) {
                if matches!(disk.state, DiskState::Failed { .. }) {
                    reasons.push(format!("{}: {}", disk.name, disk_reason(disk)));
                }
                release_origin(draft, operation.id, disk);
                draft.delete_disk(disk);
            }
            if !left.is_empty() {
                reasons.push(format!("could not be deleted: {}", left.join("; ")));
            }
            drop_vm(view, draft, operation, vm, disks, &reasons.join("; "));
            Next::Ended
        })
        .await
}

fn drop_vm(
    view: &View,
    draft: &mut Draft<'_>,
    operation: &mut Operation,
    id: VmId,
    disks: &[DiskId],
    reasons: &str,
) {
    let name = operation.subject.name.clone();
    let is_new = matches!(
        operation.work,
        Work::Provision {
            cause: ProvisionCause::Create { .. },
            ..
        }
    );
    let vm = match Context::vm(view, id) {
        Some(vm) if is_new => {
            draft.delete_vm(&vm);
            None
        }
        Some(mut vm) => {
            vm.spec.devices.disks.retain(|disk| match disk.source {
                DiskSource::Volume { disk, .. } => !disks.contains(&disk),
                DiskSource::File { .. } => true,
            });
            Some(vm)
        }
        None => None,
    };
    let what = match is_new {
        true => format!("{name} was not created"),
        false => format!("{name} keeps the disks it had"),
    };
    let (subject, actor) = (Subject::vm(id, &name), operation.actor.clone());
    let conclusion = match &operation.cancel {
        Some(by) => {
            let detail = format!("{what}: called off by {by}");
            draft.info("vm.provision_cancelled", subject, &actor, &detail);
            Conclusion::Cancelled(detail)
        }
        None => {
            let detail = format!("{what}: {reasons}");
            draft.error("vm.provision_failed", subject, &actor, &detail);
            Conclusion::Failed(
                Problem::conflict("storage-failed", detail)
                    .with_remedy("mend what it failed on, then try again"),
            )
        }
    };
    Context::conclude(draft, operation, vm, conclusion);
}
