//! Stopping a VM: to be off, to be deleted, or to be started again.
//!
//! ```text
//! [counters written] ─▶ stop ─▶ destroy ─▶ owner let go
//! ```
//! A host that is given up for lost has stopped its watched VMs by itself; an unwatched VM waits for its host.

use super::Ended;
use super::context::{Conclusion, Context, LAST_PAUSE, Sent, never};
use crate::core::Core;
use crate::ledger::Draft;
use crate::model::{Operation, Placed, StartCause, Subject, Vm, Work};
use crate::operation::storage::begin_deletion;
use crate::view::View;
use godwit_wire::host_api::{LeasePolicy, StopMode, StopVm};
use godwit_wire::id::VmId;
use godwit_wire::problem::Problem;
use tokio::time::Instant;

pub(super) async fn run(context: &Context<'_>) -> Ended {
    match halt(context).await {
        Ok(()) => {}
        Err(ended) => return ended,
    }
    let operation = match context.operation() {
        Ok(operation) => operation,
        Err(ended) => return ended,
    };
    match operation.work {
        // A reboot goes on as a start.
        Work::Start { .. } => super::start::run(context).await,
        _ => Ended::Concluded,
    }
}

async fn halt(context: &Context<'_>) -> Result<(), Ended> {
    let operation = context.operation()?;
    let (Some(id), Some(mode)) = (operation.work.vm(), mode(&operation.work)) else {
        return Err(Ended::GaveUp);
    };
    let Some(sent) = address(context, id).await? else {
        let_go(context, id, Evidence::Destroyed).await?;
        return Ok(());
    };
    let driver = &context.core.driver;
    let command = StopVm {
        epoch: sent.epoch,
        generation: sent.generation,
        mode,
    };
    loop {
        match context
            .send(sent.host, |to| driver.stop_vm(to, id, &command), never)
            .await
        {
            Sent::Answer(_) | Sent::Refused(Problem { status: 404, .. }) => {}
            Sent::Refused(problem) => {
                // What does not stop is killed by the destruction that follows.
                tracing::warn!(vm = %id, host = %sent.host, %problem, "stop refused; destroying it");
            }
            Sent::HostLost | Sent::Interrupted => {
                if taken_by_silence(context, id).await? {
                    return Ok(());
                }
                continue;
            }
        }
        match context
            .send(sent.host, |to| driver.destroy(to, id, sent.epoch), never)
            .await
        {
            Sent::Answer(()) | Sent::Refused(Problem { status: 404, .. }) => {
                let_go(context, id, Evidence::Destroyed).await?;
                return Ok(());
            }
            Sent::Refused(problem) if problem.status >= 500 => {
                tracing::warn!(vm = %id, host = %sent.host, %problem, "destruction failed; trying again");
                tokio::time::sleep(LAST_PAUSE).await;
            }
            Sent::Refused(problem) => return refused(context, id, problem).await,
            Sent::HostLost | Sent::Interrupted => {
                if taken_by_silence(context, id).await? {
                    return Ok(());
                }
            }
        }
    }
}

/// Why nothing of a VM runs any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Evidence {
    /// Its host has said so, or nobody had it.
    Destroyed,
    /// Its host is given up for lost.
    Silence,
}

/// Whether the VM could be let go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum LetGo {
    Yes,
    /// Its host is not given up any more.
    HostIsBack,
}

fn mode(work: &Work) -> Option<StopMode> {
    match work {
        Work::Stop { mode, .. } | Work::Restart { mode, .. } => Some(*mode),
        Work::Delete { .. } => Some(StopMode::Kill),
        _ => None,
    }
}

/// The counters of the command, written before it is sent; `None` when nobody has the VM.
async fn address(context: &Context<'_>, id: VmId) -> Result<Option<Placed>, Ended> {
    context
        .change(|view, draft, operation| {
            let mut vm = Context::vm(view, id)?;
            let slot = match &mut operation.work {
                Work::Stop { sent, .. }
                | Work::Delete { sent, .. }
                | Work::Restart { sent, .. } => sent,
                _ => return None,
            };
            if slot.is_none() {
                let placed = vm.address_next()?;
                *slot = Some(placed);
                let detail = format!("on {}", view.host_name(placed.host));
                operation.begin_step("stop", detail, draft.now());
                draft.put_vm(vm);
            }
            match &operation.work {
                Work::Stop { sent, .. }
                | Work::Delete { sent, .. }
                | Work::Restart { sent, .. } => *sent,
                _ => None,
            }
        })
        .await
}

/// Lets the VM go if its lost host has certainly stopped it; an unwatched one waits for the host to come back, or
/// for the operator to say that the host is off. False when the host is to be told again.
async fn taken_by_silence(context: &Context<'_>, id: VmId) -> Result<bool, Ended> {
    if let_go(context, id, Evidence::Silence).await? == LetGo::Yes {
        return Ok(true);
    }
    let sure = |view: &View| {
        let owner = view.vms.get(&id).and_then(|vm| vm.owner);
        owner.is_none_or(|owner| !view.liveness(owner).is_silent())
    };
    context.core.until(|view| sure(view).then_some(())).await;
    Ok(false)
}

/// Called during a turn: what it finds holds until the turn ends.
fn is_silenced(core: &Core, view: &View, vm: &Vm) -> bool {
    vm.owner.is_none_or(|owner| {
        let given_up = core.pulses.is_given_up(owner);
        !view.hosts.contains_key(&owner) || (vm.lease == LeasePolicy::Watched && given_up)
    })
}

/// The controller tries again after a pause, as with starts.
async fn refused(context: &Context<'_>, id: VmId, problem: Problem) -> Result<(), Ended> {
    context.core.count_restart(id, Instant::now());
    context
        .change(|view, draft, operation| {
            let vm = Context::vm(view, id);
            if let Some(vm) = &vm {
                let message = format!("{} could not be stopped: {problem}", vm.name);
                draft.error(
                    "vm.stop_failed",
                    Subject::vm(vm.id, &vm.name),
                    &operation.actor,
                    message,
                );
            }
            Context::conclude(draft, operation, vm, Conclusion::Failed(problem.clone()));
        })
        .await
}

async fn let_go(context: &Context<'_>, id: VmId, evidence: Evidence) -> Result<LetGo, Ended> {
    context
        .change(|view, draft, operation| {
            let Some(mut vm) = Context::vm(view, id) else {
                let conclusion = Conclusion::Succeeded("it was gone".into());
                Context::conclude(draft, operation, None, conclusion);
                return LetGo::Yes;
            };
            match evidence {
                Evidence::Destroyed => vm.owner = None,
                // The host may have come back since it was found to be lost.
                Evidence::Silence if !is_silenced(context.core, view, &vm) => {
                    return LetGo::HostIsBack;
                }
                Evidence::Silence => vm.leave_behind(),
            }
            stopped(view, draft, operation, vm);
            LetGo::Yes
        })
        .await
}

/// The VM has no owner any more.
fn stopped(view: &View, draft: &mut Draft<'_>, operation: &mut Operation, vm: Vm) {
    let subject = Subject::vm(vm.id, &vm.name);
    let actor = operation.actor.clone();
    match operation.work.clone() {
        Work::Delete { disks, .. } => {
            draft.info(
                "vm.deleted",
                subject,
                &actor,
                format!("{} deleted", vm.name),
            );
            // Nothing of the VM runs any more: now, and not earlier, its disks may go.
            for disk in view.disks_that_go_with(&vm, disks) {
                let disk = disk.as_ref().clone();
                begin_deletion(draft, disk, &actor, Some(operation.id));
            }
            draft.delete_vm(&vm);
            Context::conclude(
                draft,
                operation,
                None,
                Conclusion::Succeeded("deleted".into()),
            );
        }
        Work::Restart { vm: id, target, .. } => {
            let name = view.host_name(target);
            operation.begin_step("start again", format!("on {name}"), draft.now());
            let cause = StartCause::Rebooted { target };
            operation.work = Work::Start {
                vm: id,
                wanted: None,
                cause,
                tried: Vec::new(),
                placed: None,
            };
            draft.put_vm(vm);
        }
        _ => {
            let message = match vm.held_by.and_then(|id| view.maintenances.get(&id)) {
                Some(maintenance) => format!(
                    "{} stopped for the maintenance of {}",
                    vm.name, maintenance.host_name
                ),
                None => format!("{} stopped", vm.name),
            };
            draft.info("vm.stopped", subject, &actor, message);
            Context::conclude(
                draft,
                operation,
                Some(vm),
                Conclusion::Succeeded("stopped".into()),
            );
        }
    }
}
