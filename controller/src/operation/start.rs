//! Starting a VM: place it, give it to the host, tell the host.
//!
//! ```text
//! place ──owner and epoch written──▶ tell the host ──▶ done
//!   ▲                                  │ refused: destroy what is left, let go of the owner
//!   └──────────────────────────────────┘ host lost: take the VM from it once that is safe
//! ```
//! Placing takes the VM from an owner only with evidence that nothing of it runs there (DESIGN: never twice).

use super::Ended;
use super::context::{Conclusion, Context, Sent, never};
use crate::core::Core;
use crate::ledger::Draft;
use crate::model::limits::{MAX_AUTOMATIC_RESTARTS, MAX_START_ATTEMPTS};
use crate::model::rejection::{remedies, summary};
use crate::model::{
    Liveness, Operation, Placed, PowerIntent, Retry, StartCause, StepState, Subject, Trouble, Vm,
    Work,
};
use crate::plan::picture;
use crate::plan::placement::{Among, choose};
use crate::plan::reconcile::{MISSING_HEARTBEATS, place_after_crash};
use crate::view::View;
use godwit_wire::host_api::{LeasePolicy, StartVm};
use godwit_wire::id::{HostId, VmId};
use godwit_wire::problem::Problem;
use godwit_wire::storage::{DISKS_MOVED_ON, RestoreFrom};
use godwit_wire::vmm_api::VmmState;
use tokio::time::Instant;

pub(super) async fn run(context: &Context<'_>) -> Ended {
    loop {
        match step(context).await {
            Ok(Next::Again) => {}
            Ok(Next::Ended) => return Ended::Concluded,
            Err(ended) => return ended,
        }
    }
}

enum Next {
    Again,
    Ended,
}

async fn step(context: &Context<'_>) -> Result<Next, Ended> {
    let operation = context.operation()?;
    let Work::Start { vm, placed, .. } = &operation.work else {
        return Err(Ended::GaveUp);
    };
    match placed {
        None => place(context).await,
        Some(placed) => tell(context, *vm, *placed).await,
    }
}

/// Why a VM may be given a new owner.
enum Taking {
    /// Nobody has it, or nothing of it runs at its owner.
    Allowed,
    /// Only its owner can make sure that nothing of it runs.
    OnlyAt(HostId),
    /// Its owner runs it, or may.
    Refused(String),
    /// It may become possible.
    NotYet,
}

/// Called during a turn: what it finds holds until the turn ends.
fn may_take(core: &Core, view: &View, vm: &Vm) -> Taking {
    let Some(owner) = vm.owner else {
        return Taking::Allowed;
    };
    let name = view.host_name(owner);
    if core.pulses.is_given_up(owner) {
        return match vm.lease {
            LeasePolicy::Watched => Taking::Allowed,
            LeasePolicy::Unwatched => Taking::NotYet,
        };
    }
    match view.report(vm) {
        Some(report) if matches!(report.state, None | Some(VmmState::Stopped { .. })) => {
            Taking::Allowed
        }
        Some(_) => Taking::Refused(format!("{name} has it")),
        None => {
            let observed = view.observed.get(&owner);
            match observed.and_then(|observed| observed.missing.get(&vm.id)) {
                Some(missing) if *missing >= MISSING_HEARTBEATS => Taking::OnlyAt(owner),
                _ => Taking::NotYet,
            }
        }
    }
}

enum Placing {
    Placed,
    Ended,
    Wait,
}

async fn place(context: &Context<'_>) -> Result<Next, Ended> {
    let version = context.view().version;
    let placing = context
        .change(|view, draft, operation| place_in_turn(context.core, view, draft, operation))
        .await?;
    match placing {
        Placing::Placed => Ok(Next::Again),
        Placing::Ended => Ok(Next::Ended),
        Placing::Wait => {
            context
                .core
                .until(|view| (view.version > version).then_some(()))
                .await;
            Ok(Next::Again)
        }
    }
}

fn place_in_turn(
    core: &Core,
    view: &View,
    draft: &mut Draft<'_>,
    operation: &mut Operation,
) -> Placing {
    let Work::Start {
        vm: id,
        wanted,
        cause,
        tried,
        ..
    } = operation.work.clone()
    else {
        return Placing::Ended;
    };
    let Some(mut vm) = Context::vm(view, id) else {
        Context::conclude(
            draft,
            operation,
            None,
            Conclusion::Failed(Problem::not_found("VM", id)),
        );
        return Placing::Ended;
    };
    if let Some(actor) = &operation.cancel {
        let detail = format!("called off by {actor}");
        // One that was only asked for is not wanted any more, also where nobody knows yet what its owner made of it.
        let asked = matches!(cause, StartCause::Asked | StartCause::Restored { .. });
        if asked || vm.owner.is_none() {
            vm.intent = PowerIntent::Stopped;
        }
        Context::conclude(draft, operation, Some(vm), Conclusion::Cancelled(detail));
        return Placing::Ended;
    }
    if view.busy_disk(&vm).is_some() {
        return Placing::Wait;
    }
    // An order that is sent to any other host is lost at once.
    let hears = |host: HostId| view.liveness(host) != Liveness::RestartAllowed;
    let only = match may_take(core, view, &vm) {
        // It was to go on where it was, because only its owner could say that nothing of it runs.
        Taking::Allowed
            if matches!(cause, StartCause::Crashed { .. })
                && vm.owner.is_some_and(|owner| !hears(owner)) =>
        {
            None
        }
        Taking::Allowed => wanted,
        // No order reaches it: it is given up in a moment, or it comes back.
        Taking::OnlyAt(owner) if !hears(owner) => return Placing::Wait,
        Taking::OnlyAt(owner) => Some(owner),
        Taking::NotYet
            if !matches!(cause, StartCause::HostSilent { .. })
                || vm.lease == LeasePolicy::Unwatched
                || vm
                    .owner
                    .is_some_and(|owner| view.liveness(owner) != Liveness::Up) =>
        {
            return Placing::Wait;
        }
        Taking::NotYet => {
            let detail = "its host is back".to_owned();
            Context::conclude(draft, operation, Some(vm), Conclusion::Succeeded(detail));
            return Placing::Ended;
        }
        Taking::Refused(detail) => {
            Context::conclude(draft, operation, Some(vm), Conclusion::Succeeded(detail));
            return Placing::Ended;
        }
    };
    let hosts = picture::hosts(view);
    let demand = match &cause {
        StartCause::Restored { snapshot } => match view.snapshots.get(snapshot) {
            Some(snapshot) => picture::restoring(view, &vm, snapshot),
            None => picture::booting(view, &vm),
        },
        _ => picture::booting(view, &vm),
    };
    let at_owner = vm.owner.filter(|owner| hears(*owner));
    let preferred = match (&cause, at_owner) {
        (_, Some(owner)) => {
            place_after_crash(&hosts, &demand, owner).filter(|host| only.is_none_or(|o| o == *host))
        }
        (StartCause::Rebooted { target }, None) if !tried.contains(target) => choose(
            &hosts,
            &demand,
            Among {
                only: Some(*target),
                failed: &tried,
            },
        )
        .best
        .map(|(host, _)| host),
        _ => None,
    };
    let in_place = only.filter(|only| vm.owner == Some(*only) && hears(*only));
    let choice = choose(
        &hosts,
        &demand,
        Among {
            only,
            failed: &tried,
        },
    );
    let target = in_place.or(preferred).or(choice.best.map(|(host, _)| host));
    let Some((target, facts)) = target.and_then(|id| Some((id, &view.hosts.get(&id)?.facts)))
    else {
        no_room(draft, operation, vm, &choice.rejections);
        return Placing::Ended;
    };
    let before = vm.owner;
    if before.is_some_and(|before| before != target) {
        vm.leave_behind();
    }
    vm.give_to(target);
    vm.home.get_or_insert(target);
    // One that goes on sees the CPU it was booted on.
    vm.booted_on = match &cause {
        StartCause::Restored { snapshot } => view
            .snapshots
            .get(snapshot)
            .and_then(|snapshot| snapshot.booted_on.clone()),
        _ => Some(facts.cpu.signature.clone()),
    };
    let placed = Placed {
        host: target,
        epoch: vm.epoch,
        generation: vm.next_generation(),
    };
    let from = before
        .filter(|before| *before != target)
        .map(|host| format!(", taken from {}", view.host_name(host)));
    let detail = format!(
        "on {} under epoch {}{}",
        facts.name,
        vm.epoch,
        from.unwrap_or_default()
    );
    operation.begin_step("start", detail, draft.now());
    operation.work = Work::Start {
        vm: id,
        wanted,
        cause,
        tried,
        placed: Some(placed),
    };
    draft.put_vm(vm);
    Placing::Placed
}

fn no_room(
    draft: &mut Draft<'_>,
    operation: &mut Operation,
    mut vm: Vm,
    rejections: &[crate::model::HostRejection],
) {
    let reason = summary(rejections);
    let problem = Problem::conflict("no-room", format!("no host takes {}: {reason}", vm.name))
        .with_remedy(remedies(rejections));
    if let Work::Start {
        cause: StartCause::Restored { .. },
        ..
    } = operation.work
    {
        // Room may come; but then it would boot instead of going on.
        vm.intent = PowerIntent::Stopped;
    }
    let failed_before = matches!(vm.trouble, Some(Trouble::StartFailed { .. }));
    if !failed_before {
        vm.trouble = Some(Trouble::NoRoom {
            reason: reason.clone(),
        });
    }
    let message = format!("{} cannot be started: no host takes it: {reason}", vm.name);
    draft.error(
        "vm.no_room",
        Subject::vm(vm.id, &vm.name),
        &operation.actor,
        message,
    );
    Context::conclude(draft, operation, Some(vm), Conclusion::Failed(problem));
}

async fn tell(context: &Context<'_>, id: VmId, placed: Placed) -> Result<Next, Ended> {
    let view = context.view();
    let Some(vm) = view.vms.get(&id) else {
        return Err(Ended::GaveUp);
    };
    let restore = match &context.operation()?.work {
        Work::Start {
            cause: StartCause::Restored { snapshot },
            ..
        } => match view.snapshots.get(snapshot) {
            Some(snapshot) => Some(RestoreFrom {
                pool: snapshot.pool,
                snapshot: snapshot.id,
                epoch: snapshot.epoch,
            }),
            // Then it must not boot instead.
            None => {
                let problem = Problem::not_found("snapshot", snapshot);
                return refused(context, id, placed, problem).await;
            }
        },
        _ => None,
    };
    let command = StartVm {
        restore,
        networks: view.networks_of(&vm.spec),
        name: vm.name.clone(),
        epoch: placed.epoch,
        generation: placed.generation,
        spec: vm.spec.clone(),
        lease: vm.lease,
    };
    let driver = &context.core.driver;
    let own = context.id;
    let called_off = |view: &View| {
        view.operations
            .get(&own)
            .is_some_and(|op| op.cancel.is_some())
    };
    match context
        .send(
            placed.host,
            |to| driver.start_vm(to, id, &command),
            called_off,
        )
        .await
    {
        Sent::Answer(_) => started(context, id, placed).await,
        Sent::Refused(problem) => refused(context, id, placed, problem).await,
        Sent::Interrupted => {
            let problem = Problem::conflict("cancelled", "the start was called off");
            refused(context, id, placed, problem).await
        }
        Sent::HostLost => lost(context, id, placed).await,
    }
}

async fn started(context: &Context<'_>, id: VmId, placed: Placed) -> Result<Next, Ended> {
    context
        .change(|view, draft, operation| {
            let mut vm = Context::vm(view, id);
            let host = view.host_name(placed.host);
            if let Some(vm) = &mut vm {
                vm.trouble = None;
                let subject = Subject::vm(vm.id, &vm.name);
                let Work::Start { cause, .. } = &operation.work else {
                    return;
                };
                let actor = &operation.actor;
                match cause {
                    StartCause::HostSilent { host: lost } => {
                        let lost = view.host_name(*lost);
                        let message =
                            format!("{} restarted on {host} because {lost} is silent", vm.name);
                        draft.warning("vm.restarted", subject, actor, message);
                    }
                    StartCause::Crashed { .. } => {
                        let message =
                            format!("{} restarted on {host} because its VMM was gone", vm.name);
                        draft.warning("vm.restarted", subject, actor, message);
                    }
                    _ => draft.info(
                        "vm.started",
                        subject,
                        actor,
                        format!("{} started on {host}", vm.name),
                    ),
                }
            }
            Context::conclude(
                draft,
                operation,
                vm,
                Conclusion::Succeeded(format!("runs on {host}")),
            );
        })
        .await?;
    Ok(Next::Ended)
}

/// Undoes an attempt: nothing may be left at the host before the VM is let go.
async fn refused(
    context: &Context<'_>,
    id: VmId,
    placed: Placed,
    problem: Problem,
) -> Result<Next, Ended> {
    let driver = &context.core.driver;
    tracing::warn!(vm = %id, host = %placed.host, %problem, "start refused");
    match context
        .send(
            placed.host,
            |to| driver.destroy(to, id, placed.epoch),
            never,
        )
        .await
    {
        Sent::Answer(()) => {}
        Sent::Refused(problem) if problem.status == 404 => {}
        Sent::HostLost => return lost(context, id, placed).await,
        Sent::Refused(_) | Sent::Interrupted => return Err(Ended::GaveUp),
    }
    let attempts = context.core.count_restart(id, Instant::now());
    context
        .change(|view, draft, operation| {
            let Work::Start {
                wanted,
                cause,
                tried,
                placed: at,
                ..
            } = &mut operation.work
            else {
                return Next::Ended;
            };
            tried.push(placed.host);
            *at = None;
            let restores = matches!(cause, StartCause::Restored { .. });
            let automatic =
                !restores && !matches!(cause, StartCause::Asked | StartCause::Rebooted { .. });
            let over = wanted.is_some()
                || tried.len() >= MAX_START_ATTEMPTS
                || problem.kind == DISKS_MOVED_ON
                || operation.cancel.is_some();
            let Some(mut vm) = Context::vm(view, id) else {
                return Next::Ended;
            };
            vm.owner = None;
            let detail = format!("{}: {}", view.host_name(placed.host), problem.detail);
            operation.end_step(StepState::Failed, Some(detail.clone()), draft.now());
            if operation.cancel.is_some() {
                vm.intent = PowerIntent::Stopped;
                Context::conclude(
                    draft,
                    operation,
                    Some(vm),
                    Conclusion::Cancelled("called off".into()),
                );
                return Next::Ended;
            }
            let retry = if automatic && attempts < MAX_AUTOMATIC_RESTARTS {
                Retry::Later
            } else {
                Retry::Never
            };
            vm.trouble = Some(Trouble::StartFailed {
                reason: detail.clone(),
                attempts,
                retry,
            });
            if !over {
                draft.put_vm(vm);
                return Next::Again;
            }
            if restores {
                vm.intent = PowerIntent::Stopped;
            }
            let message = format!("{} could not be started: {detail}", vm.name);
            draft.error(
                "vm.start_failed",
                Subject::vm(vm.id, &vm.name),
                &operation.actor,
                message,
            );
            Context::conclude(
                draft,
                operation,
                Some(vm),
                Conclusion::Failed(problem.clone()),
            );
            Next::Ended
        })
        .await
}

/// The host fell silent with the order in hand: it may have started the VM. Placing decides what is safe.
async fn lost(context: &Context<'_>, id: VmId, placed: Placed) -> Result<Next, Ended> {
    context
        .change(|view, draft, operation| {
            let name = view.host_name(placed.host);
            operation.end_step(StepState::Failed, Some(format!("{name} fell silent")), draft.now());
            if let Work::Start { tried, placed: at, .. } = &mut operation.work {
                if !tried.contains(&placed.host) {
                    tried.push(placed.host);
                }
                *at = None;
            }
            tracing::warn!(vm = %id, host = name, "the host fell silent while it was starting the VM");
        })
        .await?;
    Ok(Next::Again)
}
