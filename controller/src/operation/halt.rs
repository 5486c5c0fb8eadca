//! Stopping a VM: to be off, to be deleted, or to be started again.
//!
//! ```text
//! [counters written] ─▶ stop ─▶ destroy ─▶ owner let go
//! ```
//! A host that is given up for lost has stopped its watched VMs by itself; an unwatched VM waits for its host.

use super::Ended;
use super::context::{Conclusion, Context, Sent, never};
use crate::ledger::Draft;
use crate::model::{Operation, Placed, StartCause, Subject, Vm, Work};
use crate::view::View;
use godwit_wire::host_api::{LeasePolicy, StopMode, StopVm};
use godwit_wire::id::VmId;
use godwit_wire::problem::Problem;

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
        return let_go(context, id).await;
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
                if taken_by_silence(context, id).await {
                    break;
                }
                continue;
            }
        }
        match context
            .send(sent.host, |to| driver.destroy(to, id, sent.epoch), never)
            .await
        {
            Sent::Answer(()) | Sent::Refused(Problem { status: 404, .. }) => break,
            Sent::Refused(problem) => return refused(context, id, problem).await,
            Sent::HostLost | Sent::Interrupted => {
                if taken_by_silence(context, id).await {
                    break;
                }
            }
        }
    }
    let_go(context, id).await
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
                let host = vm.owner?;
                *slot = Some(Placed {
                    host,
                    epoch: vm.epoch,
                    generation: vm.next_generation(),
                });
                operation.begin_step("stop", format!("on {}", view.host_name(host)), draft.now());
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

/// Whether a lost host has certainly stopped the VM; an unwatched one waits for the host to come back.
async fn taken_by_silence(context: &Context<'_>, id: VmId) -> bool {
    let (core, view) = (context.core, context.view());
    let Some(vm) = view.vms.get(&id) else {
        return true;
    };
    let Some(owner) = vm.owner.filter(|owner| view.hosts.contains_key(owner)) else {
        return true;
    };
    if vm.lease == LeasePolicy::Watched && core.pulses.is_given_up(owner) {
        return true;
    }
    core.until(|view| (!view.liveness(owner).is_silent()).then_some(()))
        .await;
    false
}

async fn refused(context: &Context<'_>, id: VmId, problem: Problem) -> Result<(), Ended> {
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

async fn let_go(context: &Context<'_>, id: VmId) -> Result<(), Ended> {
    context
        .change(|view, draft, operation| match Context::vm(view, id) {
            Some(vm) => stopped(view, draft, operation, vm),
            None => Context::conclude(
                draft,
                operation,
                None,
                Conclusion::Succeeded("it was gone".into()),
            ),
        })
        .await
}

fn stopped(view: &View, draft: &mut Draft<'_>, operation: &mut Operation, mut vm: Vm) {
    let subject = Subject::vm(vm.id, &vm.name);
    let actor = operation.actor.clone();
    vm.owner = None;
    match operation.work.clone() {
        Work::Delete { .. } => {
            draft.info(
                "vm.deleted",
                subject,
                &actor,
                format!("{} deleted", vm.name),
            );
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
