//! Saving VMs and deleting what was saved.
//!
//! ```text
//! counters written ─▶ [pause] ─▶ save ─▶ ask until it is done ─▶ ready ─▶ [goes on as a stop]
//!                        │ refused   │ refused, failed, called off, host lost: what there is of it is erased
//!                        └───────────┴──▶ failed; the reconciler lets the VM run again
//! ```
//! A VM that stops with its snapshot stands still before it is saved and never runs in between, so that its disks are
//! as the snapshot knows them.

use super::Ended;
use super::context::{Conclusion, Context, Sent, never};
use super::halt;
use super::storage::{Outcome, deleted, erase, follow, not_made, note_deletion, reason, unwatched};
use crate::model::{
    AfterSnapshot, Placed, PowerIntent, Snapshot, SnapshotState, StepState, Subject, Work,
};
use crate::view::View;
use godwit_wire::host_api::{StopMode, VmCommand};
use godwit_wire::id::{SnapshotId, VmId};
use godwit_wire::problem::Problem;
use godwit_wire::storage::{SnapshotReport, TakeSnapshot};

pub(super) async fn run(context: &Context<'_>) -> Ended {
    let done = match context.operation().map(|operation| operation.work.clone()) {
        Ok(Work::CreateSnapshot {
            snapshot, vm, then, ..
        }) => create(context, snapshot, vm, then).await,
        Ok(Work::DeleteSnapshot { snapshot }) => delete(context, snapshot).await,
        _ => Err(Ended::GaveUp),
    };
    match done {
        Ok(Next::Ended) => Ended::Concluded,
        Ok(Next::Stop) => halt::run(context).await,
        Err(ended) => ended,
    }
}

enum Next {
    Ended,
    /// It goes on as a stop.
    Stop,
}

fn record(view: &View, id: SnapshotId) -> Result<Snapshot, Ended> {
    let found = view.snapshots.get(&id);
    found
        .map(|snapshot| snapshot.as_ref().clone())
        .ok_or(Ended::GaveUp)
}

async fn create(
    context: &Context<'_>,
    id: SnapshotId,
    vm: VmId,
    then: AfterSnapshot,
) -> Result<Next, Ended> {
    if record(&context.view(), id)?.state == SnapshotState::Creating {
        let problem = match save(context, id, vm, then).await? {
            Outcome::Ready(report) => return made(context, id, then, &report).await,
            Outcome::Failed(problem) => reason(&problem),
            Outcome::CalledOff => "called off".into(),
            Outcome::Lost => "its host fell silent, or was restarted".into(),
        };
        context
            .change(|_, draft, operation| {
                operation.end_step(StepState::Failed, Some(problem.clone()), draft.now());
                if let Some(mut snapshot) = draft.snapshot(id) {
                    let reason = problem.clone();
                    snapshot.state = SnapshotState::Failed { reason };
                    draft.put_snapshot(snapshot);
                }
            })
            .await?;
    }
    undo(context, id, vm).await
}

/// Lets the host save the VM. May be repeated.
async fn save(
    context: &Context<'_>,
    id: SnapshotId,
    vm: VmId,
    then: AfterSnapshot,
) -> Result<Outcome<SnapshotReport>, Ended> {
    let Some(sent) = address(context, vm).await? else {
        let problem = Problem::conflict("not-running", "the VM is off");
        return Ok(Outcome::Failed(problem));
    };
    let driver = &context.core.driver;
    if then == AfterSnapshot::Stop {
        let command = VmCommand {
            epoch: sent.epoch,
            generation: sent.generation,
        };
        match context
            .send(sent.host, |to| driver.pause_vm(to, vm, &command), never)
            .await
        {
            Sent::Answer(_) => {}
            Sent::Refused(problem) => return Ok(Outcome::Failed(problem)),
            Sent::HostLost | Sent::Interrupted => return Ok(Outcome::Lost),
        }
    }
    let pool = record(&context.view(), id)?.pool;
    let command = TakeSnapshot {
        epoch: sent.epoch,
        pool,
    };
    Ok(follow(
        context,
        sent.host,
        |to| driver.take_snapshot(to, vm, id, &command),
        |to| driver.snapshot(to, pool, id),
        |report: &SnapshotReport| report.state.clone(),
        unwatched,
    )
    .await)
}

/// The counters of the commands, written before they are sent; `None` when nobody has the VM any more.
async fn address(context: &Context<'_>, id: VmId) -> Result<Option<Placed>, Ended> {
    context
        .change(|view, draft, operation| {
            let mut vm = Context::vm(view, id)?;
            let Work::CreateSnapshot { sent, .. } = &mut operation.work else {
                return None;
            };
            if sent.is_none() {
                let placed = vm.address_next()?;
                *sent = Some(placed);
                let detail = format!("on {}", view.host_name(placed.host));
                operation.begin_step("save", detail, draft.now());
                draft.put_vm(vm);
                return Some(placed);
            }
            *sent
        })
        .await
}

async fn made(
    context: &Context<'_>,
    id: SnapshotId,
    then: AfterSnapshot,
    report: &SnapshotReport,
) -> Result<Next, Ended> {
    context
        .change(|view, draft, operation| {
            let Some(mut snapshot) = draft.snapshot(id) else {
                return Next::Ended;
            };
            snapshot.state = SnapshotState::Ready;
            (snapshot.bytes, snapshot.pause_us) = (report.bytes, report.pause_us);
            snapshot.operation = None;
            let vm = Context::vm(view, snapshot.vm);
            let whose = vm.as_ref().map_or("?", |vm| vm.name.as_str());
            let message = format!("{whose} saved as {}: {}", snapshot.name, report.bytes);
            let subject = Subject::snapshot(id, &snapshot.name);
            draft.info("snapshot.created", subject, &operation.actor, &message);
            draft.put_snapshot(snapshot);
            match (then, vm) {
                (AfterSnapshot::Stop, Some(mut vm)) => {
                    operation.end_step(StepState::Done, Some(message), draft.now());
                    operation.work = Work::Stop {
                        vm: vm.id,
                        mode: StopMode::Kill,
                        sent: None,
                    };
                    // It is saved: nothing is left to call off.
                    operation.cancel = None;
                    vm.intent = PowerIntent::Stopped;
                    draft.put_vm(vm);
                    Next::Stop
                }
                (_, vm) => {
                    Context::conclude(draft, operation, vm, Conclusion::Succeeded(message));
                    Next::Ended
                }
            }
        })
        .await
}

/// Erases what there is of a snapshot that could not be taken, and lets go of the VM.
async fn undo(context: &Context<'_>, id: SnapshotId, vm: VmId) -> Result<Next, Ended> {
    let pool = record(&context.view(), id)?.pool;
    let driver = &context.core.driver;
    let erased = erase(context, pool, |to| driver.delete_snapshot(to, pool, id)).await;
    context
        .change(|view, draft, operation| {
            let Some(snapshot) = draft.snapshot(id) else {
                return Next::Ended;
            };
            let why = match &snapshot.state {
                SnapshotState::Failed { reason } => reason.clone(),
                _ => "called off".into(),
            };
            draft.delete_snapshot(&snapshot);
            let subject = Subject::snapshot(id, &snapshot.name);
            let kind = "snapshot.create_failed";
            let conclusion = not_made(draft, operation, kind, subject, why, &erased);
            Context::conclude(draft, operation, Context::vm(view, vm), conclusion);
            Next::Ended
        })
        .await
}

async fn delete(context: &Context<'_>, id: SnapshotId) -> Result<Next, Ended> {
    let pool = record(&context.view(), id)?.pool;
    note_deletion(context, pool).await?;
    let driver = &context.core.driver;
    let erased = erase(context, pool, |to| driver.delete_snapshot(to, pool, id)).await;
    context
        .change(|_, draft, operation| {
            let Some(mut snapshot) = draft.snapshot(id) else {
                return Next::Ended;
            };
            let subject = Subject::snapshot(id, &snapshot.name);
            let name = snapshot.name.clone();
            if erased.is_ok() {
                draft.delete_snapshot(&snapshot);
            } else {
                snapshot.operation = None;
                draft.put_snapshot(snapshot);
            }
            let conclusion = deleted(draft, operation, "snapshot", &name, subject, &erased);
            Context::conclude(draft, operation, None, conclusion);
            Next::Ended
        })
        .await
}
