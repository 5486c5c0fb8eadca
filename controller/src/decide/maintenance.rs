//! Intents about maintenances.

use super::Decision;
use super::host::{check_reason, find_host};
use crate::intent::{NewMaintenance, Resource};
use crate::ledger::Draft;
use crate::maintenance::begin_restore;
use crate::model::{
    Actor, Maintenance, MaintenancePlan, MaintenanceState, MoveState, MoveTask, RestoreOnCancel,
    Subject, Work,
};
use crate::operation::fresh;
use crate::plan::maintenance::{DrainInput, plan_drain};
use crate::view::View;
use godwit_wire::id::MaintenanceId;
use godwit_wire::problem::{FieldProblem, Problem};

fn find(view: &View, id: MaintenanceId) -> Result<Maintenance, Problem> {
    view.maintenances
        .get(&id)
        .map(|m| m.as_ref().clone())
        .ok_or_else(|| Problem::not_found("maintenance", id))
}

fn plan(view: &View, record: &Maintenance) -> MaintenancePlan {
    plan_drain(&DrainInput::of(
        view,
        record.host,
        Some(record.id),
        &record.overrides,
    ))
}

fn planned_state(plan: &MaintenancePlan) -> MaintenanceState {
    if plan.blockers.is_empty() {
        MaintenanceState::Ready
    } else {
        MaintenanceState::Blocked
    }
}

fn wrong_state(record: &Maintenance, verb: &str) -> Problem {
    let detail = format!(
        "the maintenance of {} is {}; it cannot be {verb}",
        record.host_name,
        record.state.name()
    );
    Problem::conflict("wrong-state", detail)
}

pub(super) fn create(
    view: &View,
    draft: &mut Draft<'_>,
    new: &NewMaintenance,
    actor: &Actor,
) -> Result<Decision, Problem> {
    check_reason(&new.reason)?;
    let host = find_host(view, new.host)?;
    if let Some(vm) = new.overrides.keys().find(|vm| !view.vms.contains_key(vm)) {
        let field = format!("overrides.{vm}");
        let problem = FieldProblem::new(field, "there is no such VM", "name VMs of the host");
        return Err(Problem::invalid(vec![problem]));
    }
    let other = view
        .maintenances
        .values()
        .find(|m| m.host == new.host && !m.state.is_final());
    if let Some(other) = other {
        let detail = format!(
            "{} has the maintenance {} ({})",
            host.name(),
            other.id,
            other.state.name()
        );
        return Err(Problem::conflict("in-maintenance", detail)
            .with_remedy("use it, finish it or cancel it"));
    }
    let mut record = Maintenance {
        id: MaintenanceId::fresh(),
        host: host.id,
        host_name: host.name().to_owned(),
        reason: new.reason.clone(),
        return_policy: new.return_policy,
        overrides: new.overrides.clone(),
        state: MaintenanceState::Planned,
        detail: None,
        plan: MaintenancePlan::default(),
        moved: Vec::new(),
        operation: None,
        on_cancel: None,
        actor: actor.clone(),
        created_at: draft.now(),
        changed_at: draft.now(),
        ended_at: None,
    };
    record.plan = plan(view, &record);
    record.state = planned_state(&record.plan);
    let message = format!(
        "maintenance of {} planned: {} moves, {} blockers: {}",
        record.host_name,
        record.plan.moves.len(),
        record.plan.blockers.len(),
        record.reason
    );
    draft.info(
        "maintenance.planned",
        Subject::maintenance(record.id, &record.host_name),
        actor,
        &message,
    );
    let mut decision = Decision::new(Resource::Maintenance(record.id), None, message);
    decision.preview.plan = Some(record.plan.clone());
    draft.put_maintenance(record);
    Ok(decision)
}

fn blocked(record: &Maintenance, plan: &MaintenancePlan) -> Problem {
    let named = |name: &Option<String>| name.clone().unwrap_or_else(|| record.host_name.clone());
    let list: Vec<String> = plan
        .blockers
        .iter()
        .map(|b| format!("{}: {}", named(&b.vm_name), b.detail))
        .collect();
    let detail = format!(
        "the maintenance of {} is blocked: {}",
        record.host_name,
        list.join("; ")
    );
    let mut problem = Problem::conflict("maintenance-blocked", detail);
    problem.fields = plan
        .blockers
        .iter()
        .map(|b| {
            FieldProblem::new(
                named(&b.vm_name),
                format!("{}: {}", b.kind.name(), b.detail),
                b.remedy.clone(),
            )
        })
        .collect();
    problem.with_remedy("deal with each blocker as it says, then start again")
}

pub(super) fn start(
    view: &View,
    draft: &mut Draft<'_>,
    id: MaintenanceId,
    actor: &Actor,
) -> Result<Decision, Problem> {
    let mut record = find(view, id)?;
    if !record.state.is_only_a_plan() && record.state != MaintenanceState::Failed {
        return Err(wrong_state(&record, "started"));
    }
    let plan = plan(view, &record);
    if !plan.blockers.is_empty() {
        return Err(blocked(&record, &plan));
    }
    let mut host = find_host(view, record.host)?;
    if let Some(other) = host.maintenance.filter(|other| *other != id) {
        return Err(Problem::conflict(
            "in-maintenance",
            format!("{} is in maintenance {other}", host.name()),
        ));
    }
    host.maintenance = Some(id);
    let moves = plan.moves.iter().map(|planned| MoveTask {
        vm: planned.vm,
        vm_name: planned.vm_name.clone(),
        action: planned.action,
        to: planned.to,
        attempts: 0,
        state: MoveState::Waiting,
    });
    let work = Work::Drain {
        maintenance: id,
        host: record.host,
        moves: moves.collect(),
    };
    let subject = Subject::maintenance(id, &record.host_name);
    let operation = fresh(work, subject.clone(), actor, None, draft.now());
    let effect = format!(
        "{} is cordoned and {} VMs leave it",
        record.host_name,
        plan.moves.len()
    );
    draft.info(
        "maintenance.started",
        subject,
        actor,
        format!("{effect}: {}", record.reason),
    );
    record.state = MaintenanceState::Cordoned;
    record.detail = None;
    record.plan = plan.clone();
    record.operation = Some(operation.id);
    let mut decision = Decision::new(Resource::Maintenance(id), Some(operation.id), effect);
    decision.preview.plan = Some(plan);
    draft.put_operation(operation);
    draft.put_maintenance(record);
    draft.put_host(host);
    Ok(decision)
}

pub(super) fn cancel(
    view: &View,
    draft: &mut Draft<'_>,
    id: MaintenanceId,
    restore: RestoreOnCancel,
    actor: &Actor,
) -> Result<Decision, Problem> {
    let mut record = find(view, id)?;
    let subject = Subject::maintenance(id, &record.host_name);
    let name = record.host_name.clone();
    if record.state.is_only_a_plan() {
        record.state = MaintenanceState::Cancelled;
        record.ended_at = Some(draft.now());
        let effect = format!("the planned maintenance of {name} is dropped");
        draft.info("maintenance.cancelled", subject, actor, &effect);
        draft.put_maintenance(record);
        return Ok(Decision::new(Resource::Maintenance(id), None, effect));
    }
    let draining = view
        .active_operations()
        .find(|op| Some(op.id) == record.operation && matches!(op.work, Work::Drain { .. }))
        .map(|op| op.as_ref().clone());
    let cancellable = matches!(
        record.state,
        MaintenanceState::Cordoned
            | MaintenanceState::Draining
            | MaintenanceState::Drained
            | MaintenanceState::Working
            | MaintenanceState::Failed
    );
    if !cancellable {
        return Err(wrong_state(&record, "cancelled"));
    }
    record.on_cancel = Some(restore);
    let effect = match restore {
        RestoreOnCancel::Restore => format!("{name} takes VMs again and those that left come back"),
        RestoreOnCancel::Stay => {
            format!("{name} takes VMs again and those that left stay where they are")
        }
    };
    let operation = match draining {
        Some(mut drain) => {
            record.state = MaintenanceState::Cancelling;
            drain.cancel.get_or_insert_with(|| actor.clone());
            let drain_id = drain.id;
            draft.put_operation(drain);
            drain_id
        }
        None => {
            let operation = begin_restore(view, &mut record, actor, draft.now());
            let restore_id = operation.id;
            draft.put_operation(operation);
            restore_id
        }
    };
    draft.info(
        "maintenance.cancelling",
        subject,
        actor,
        format!("the maintenance of {name} is called off: {effect}"),
    );
    draft.put_maintenance(record);
    Ok(Decision::new(
        Resource::Maintenance(id),
        Some(operation),
        effect,
    ))
}

pub(super) fn finish(
    view: &View,
    draft: &mut Draft<'_>,
    id: MaintenanceId,
    actor: &Actor,
) -> Result<Decision, Problem> {
    let mut record = find(view, id)?;
    if !matches!(
        record.state,
        MaintenanceState::Drained | MaintenanceState::Working
    ) {
        return Err(
            wrong_state(&record, "finished").with_remedy(match record.state {
                state if state.is_only_a_plan() => "start it, or cancel it",
                MaintenanceState::Failed => "start it again, or cancel it",
                _ => "wait until the host is drained",
            }),
        );
    }
    let operation = begin_restore(view, &mut record, actor, draft.now());
    let effect = format!(
        "{} is checked, takes VMs again, and VMs return: {:?}",
        record.host_name, record.return_policy
    )
    .to_lowercase();
    draft.info(
        "maintenance.finishing",
        Subject::maintenance(id, &record.host_name),
        actor,
        &effect,
    );
    let decision = Decision::new(Resource::Maintenance(id), Some(operation.id), effect);
    draft.put_operation(operation);
    draft.put_maintenance(record);
    Ok(decision)
}
