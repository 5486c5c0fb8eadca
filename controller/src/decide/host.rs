//! Intents about hosts.

use super::Decision;
use crate::intent::Resource;
use crate::ledger::Draft;
use crate::model::{
    Actor, Cordon, Host, Liveness, MaintenancePlan, MaintenancePolicy, MoveAction, MoveState,
    MoveTask, Subject, UpgradeState, UpgradeTask, Vm, Work,
};
use crate::operation::fresh;
use crate::plan::maintenance::{DrainInput, plan_drain};
use crate::view::View;
use godwit_wire::id::HostId;
use godwit_wire::problem::{FieldProblem, Problem};

/// Longest reason kept.
pub(super) const MAX_REASON_BYTES: usize = 1_000;

pub(super) fn find_host(view: &View, id: HostId) -> Result<Host, Problem> {
    view.hosts
        .get(&id)
        .map(|host| host.as_ref().clone())
        .ok_or_else(|| Problem::not_found("host", id))
}

pub(super) fn check_reason(reason: &str) -> Result<(), Problem> {
    if reason.len() <= MAX_REASON_BYTES {
        return Ok(());
    }
    let problem = format!("{} bytes are more than {MAX_REASON_BYTES}", reason.len());
    Err(Problem::invalid(vec![FieldProblem::new(
        "reason",
        problem,
        "make it shorter",
    )]))
}

fn not_in_maintenance(host: &Host) -> Result<(), Problem> {
    match host.maintenance {
        None => Ok(()),
        Some(id) => {
            let detail = format!("{} is in maintenance {id}", host.name());
            Err(Problem::conflict("in-maintenance", detail)
                .with_remedy("finish or cancel that maintenance first"))
        }
    }
}

pub(super) fn cordon(
    view: &View,
    draft: &mut Draft<'_>,
    id: HostId,
    reason: &str,
    actor: &Actor,
) -> Result<Decision, Problem> {
    check_reason(reason)?;
    let mut host = find_host(view, id)?;
    if host.cordon.is_some() {
        return Ok(Decision::new(
            Resource::Host(id),
            None,
            format!("{} is cordoned already", host.name()),
        ));
    }
    let effect = format!("{} takes no new VMs", host.name());
    host.cordon = Some(Cordon {
        reason: reason.into(),
        actor: actor.clone(),
        at: draft.now(),
    });
    let message = format!("{} cordoned: {reason}", host.name());
    draft.info(
        "host.cordoned",
        Subject::host(id, host.name()),
        actor,
        message,
    );
    draft.put_host(host);
    Ok(Decision::new(Resource::Host(id), None, effect))
}

pub(super) fn uncordon(
    view: &View,
    draft: &mut Draft<'_>,
    id: HostId,
    actor: &Actor,
) -> Result<Decision, Problem> {
    let mut host = find_host(view, id)?;
    not_in_maintenance(&host)?;
    if host.cordon.take().is_none() {
        return Ok(Decision::new(
            Resource::Host(id),
            None,
            format!("{} is not cordoned", host.name()),
        ));
    }
    let effect = format!("{} takes new VMs again", host.name());
    draft.info(
        "host.uncordoned",
        Subject::host(id, host.name()),
        actor,
        format!("{} uncordoned", host.name()),
    );
    draft.put_host(host);
    Ok(Decision::new(Resource::Host(id), None, effect))
}

/// The plan of an evacuation: everything leaves if it can, whatever its maintenance policy.
fn evacuation(view: &View, host: HostId) -> MaintenancePlan {
    let overrides = view
        .vms_of(host)
        .filter(|vm| vm.maintenance_policy == MaintenancePolicy::Block)
        .map(|vm| (vm.id, MaintenancePolicy::Migrate))
        .collect();
    let mut input = DrainInput::of(view, host, None, &overrides);
    for vm in &mut input.leaving {
        if vm.policy == MaintenancePolicy::StopAndReturn {
            vm.policy = MaintenancePolicy::RestartElsewhere;
        }
    }
    plan_drain(&input)
}

pub(super) fn evacuate(
    view: &View,
    draft: &mut Draft<'_>,
    id: HostId,
    reason: &str,
    actor: &Actor,
) -> Result<Decision, Problem> {
    check_reason(reason)?;
    let mut host = find_host(view, id)?;
    not_in_maintenance(&host)?;
    let under_way = view
        .active_operations()
        .find(|op| matches!(op.work, Work::Evacuate { host, .. } if host == id));
    if let Some(operation) = under_way {
        let detail = format!("{} is being evacuated by {}", host.name(), operation.id);
        return Err(
            Problem::conflict("busy", detail).with_remedy("wait until it ends, or cancel it")
        );
    }
    if view.liveness(id).is_silent() {
        let detail = format!("{} is silent, so nothing can be moved off it", host.name());
        return Err(Problem::conflict("host-silent", detail)
            .with_remedy("wait: its VMs are restarted elsewhere once that is safe"));
    }
    let plan = evacuation(view, id);
    let planned = |vm| plan.moves.iter().find(|planned| planned.vm == vm);
    let moves = view.vms_of(id).map(|vm| MoveTask {
        vm: vm.id,
        vm_name: vm.name.clone(),
        action: planned(vm.id).map_or(MoveAction::Migrate, |planned| planned.action),
        to: planned(vm.id).and_then(|planned| planned.to),
        attempts: 0,
        state: MoveState::Waiting,
    });
    let moves: Vec<MoveTask> = moves.collect();
    let effect = format!(
        "{} is cordoned and {} VMs are moved off it",
        host.name(),
        moves.len()
    );
    host.cordon.get_or_insert_with(|| Cordon {
        reason: reason.into(),
        actor: actor.clone(),
        at: draft.now(),
    });
    let subject = Subject::host(id, host.name());
    draft.warning(
        "host.evacuating",
        subject.clone(),
        actor,
        format!("{} is being evacuated: {reason}", host.name()),
    );
    let operation = fresh(
        Work::Evacuate { host: id, moves },
        subject,
        actor,
        None,
        draft.now(),
    );
    let mut decision = Decision::new(Resource::Host(id), Some(operation.id), effect);
    decision.preview.plan = Some(plan);
    draft.put_operation(operation);
    draft.put_host(host);
    Ok(decision)
}

/// Everything that runs on the host goes on in VMMs of the program that its agent runs now.
pub(super) fn upgrade(
    view: &View,
    draft: &mut Draft<'_>,
    id: HostId,
    actor: &Actor,
) -> Result<Decision, Problem> {
    let host = find_host(view, id)?;
    let under_way = view.active_operations().find(|op| {
        matches!(op.work, Work::Upgrade { host, .. } | Work::Evacuate { host, .. } if host == id)
    });
    if let Some(operation) = under_way {
        let detail = format!(
            "{} is busy with {} ({})",
            host.name(),
            operation.work.kind(),
            operation.id
        );
        return Err(
            Problem::conflict("busy", detail).with_remedy("wait until it ends, or cancel it")
        );
    }
    if view.liveness(id).is_silent() {
        let detail = format!("{} is silent, so its agent cannot be told", host.name());
        return Err(
            Problem::conflict("host-silent", detail).with_remedy("wait until it is heard again")
        );
    }
    let vms = view.vms_of(id).map(|vm| UpgradeTask {
        vm: vm.id,
        vm_name: vm.name.clone(),
        state: UpgradeState::Waiting,
    });
    let vms: Vec<UpgradeTask> = vms.collect();
    let effect = format!(
        "{} VMs of {} go on in VMMs of version {}, those that do not yet",
        vms.len(),
        host.name(),
        host.facts.version
    );
    let subject = Subject::host(id, host.name());
    draft.info("host.upgrading", subject.clone(), actor, &effect);
    let operation = fresh(
        Work::Upgrade { host: id, vms },
        subject,
        actor,
        None,
        draft.now(),
    );
    let decision = Decision::new(Resource::Host(id), Some(operation.id), effect);
    draft.put_operation(operation);
    Ok(decision)
}

/// Refuses a confirmation that a host is off which is not given up: it may still have, or get, a lease.
pub(crate) fn not_given_up(name: &str) -> Problem {
    let detail = format!("{name} is not given up: it was heard a moment ago");
    Problem::conflict("host-not-given-up", detail)
        .with_remedy("switch the host off and wait until it is given up")
}

pub(super) fn confirm_off(
    view: &View,
    draft: &mut Draft<'_>,
    id: HostId,
    actor: &Actor,
) -> Result<Decision, Problem> {
    let host = find_host(view, id)?;
    if view.liveness(id) != Liveness::RestartAllowed {
        return Err(not_given_up(host.name()));
    }
    let work = |vm: &Vm| vm.operation.and_then(|id| view.operations.get(&id));
    // A command that is under way is first found to be lost; the VM can be taken after that.
    let settled = |vm: &Vm| match work(vm).map(|operation| &operation.work) {
        None => vm.migration.is_none(),
        Some(Work::Start { placed, .. }) => placed.is_none(),
        Some(work) => matches!(
            work,
            Work::Stop { .. } | Work::Delete { .. } | Work::Restart { .. }
        ),
    };
    let (taken, busy): (Vec<_>, Vec<_>) = view.vms_of(id).partition(|vm| settled(vm));
    for vm in &taken {
        let mut vm = Vm::clone(vm);
        vm.leave_behind();
        draft.put_vm(vm);
    }
    let mut effect = format!("{} is off: {} VMs are free of it", host.name(), taken.len());
    if !busy.is_empty() {
        effect = format!("{effect}, {} are busy: confirm again for them", busy.len());
    }
    let subject = Subject::host(id, host.name());
    let message = format!("{actor} confirms that {effect}");
    draft.warning("host.confirmed_off", subject, actor, message);
    Ok(Decision::new(Resource::Host(id), None, effect))
}

pub(super) fn remove(
    view: &View,
    draft: &mut Draft<'_>,
    id: HostId,
    actor: &Actor,
) -> Result<Decision, Problem> {
    let host = find_host(view, id)?;
    let vms = view.vms_of(id).count();
    if vms > 0 {
        let detail = format!("{} still has {vms} VMs", host.name());
        return Err(Problem::conflict("not-empty", detail).with_remedy("evacuate the host first"));
    }
    not_in_maintenance(&host)?;
    let part = |m: &crate::model::Migration| m.source == id || m.target == id;
    let migrating = view
        .vms
        .values()
        .filter_map(|vm| view.migrations.get(&vm.migration?))
        .any(|m| part(m));
    let evacuating = view
        .active_operations()
        .any(|op| matches!(op.work, Work::Evacuate { host, .. } if host == id));
    if migrating || evacuating {
        let detail = format!("a migration or an evacuation involves {}", host.name());
        return Err(Problem::conflict("busy", detail).with_remedy("wait until it ends"));
    }
    let effect = format!("{} is no longer part of the pool", host.name());
    draft.info(
        "host.removed",
        Subject::host(id, host.name()),
        actor,
        &effect,
    );
    // It gets no lease any more, and nobody could confirm for it.
    for (vm, _) in view.left_behind(id) {
        if let Some(vm) = view.vms.get(&vm) {
            let mut vm = vm.as_ref().clone();
            vm.left_behind.remove(&id);
            draft.put_vm(vm);
        }
    }
    super::host_limits::forget_links(view, draft, id);
    draft.delete_host(&host);
    Ok(Decision::new(Resource::Host(id), None, effect))
}
