//! What a finished drain, evacuation or restore leaves in the records.

use crate::ledger::Draft;
use crate::model::{
    Maintenance, MaintenanceState, MoveState, MovedState, Operation, Subject, Work,
};
use crate::operation::context::{Conclusion, Context};
use crate::view::View;
use godwit_wire::problem::Problem;

/// All tasks are final: says so in the operation and in its maintenance.
pub(super) fn ended(
    view: &View,
    draft: &mut Draft<'_>,
    operation: &mut Operation,
    maintenance: Option<Maintenance>,
) {
    let failures: Vec<String> = operation
        .work
        .moves()
        .iter()
        .filter_map(|task| match &task.state {
            MoveState::Failed { reason } => Some(format!("{}: {reason}", task.vm_name)),
            _ => None,
        })
        .collect();
    let done = operation
        .work
        .moves()
        .iter()
        .filter(|task| task.state == MoveState::Done)
        .count();
    let actor = operation.actor.clone();
    let conclusion = match (&operation.cancel, failures.is_empty()) {
        (Some(actor), _) => {
            Conclusion::Cancelled(format!("called off by {actor} after {done} moves"))
        }
        (None, true) => Conclusion::Succeeded(format!("{done} VMs moved")),
        (None, false) => Conclusion::Failed(
            Problem::conflict("moves-failed", failures.join("; "))
                .with_remedy("mend what the moves failed on, then try again"),
        ),
    };
    match operation.work.clone() {
        Work::Evacuate { host, .. } => {
            let name = view.host_name(host);
            let subject = Subject::host(host, &name);
            match &conclusion {
                Conclusion::Succeeded(_) => {
                    draft.info(
                        "host.evacuated",
                        subject,
                        &actor,
                        format!("{name} is empty: {done} VMs moved off"),
                    );
                }
                Conclusion::Failed(problem) => {
                    let message = format!("{name} could not be emptied: {}", problem.detail);
                    draft.error("host.evacuation_failed", subject, &actor, message);
                }
                Conclusion::Cancelled(detail) => {
                    draft.info(
                        "host.evacuation_cancelled",
                        subject,
                        &actor,
                        format!("{name}: {detail}"),
                    );
                }
            }
        }
        Work::Drain { .. } => {
            if let Some(record) = maintenance {
                drained(view, draft, record, operation, &conclusion);
            }
        }
        Work::Restore { .. } => {
            if let Some(record) = maintenance {
                restored(draft, record, operation);
            }
        }
        _ => {}
    }
    Context::conclude(draft, operation, None, conclusion);
}

fn drained(
    view: &View,
    draft: &mut Draft<'_>,
    mut record: Maintenance,
    operation: &Operation,
    conclusion: &Conclusion,
) {
    let subject = Subject::maintenance(record.id, &record.host_name);
    let name = record.host_name.clone();
    let actor = &operation.actor;
    match conclusion {
        Conclusion::Succeeded(_) => {
            record.state = MaintenanceState::Drained;
            let message = format!("{name} is empty and ready to be worked on");
            draft.info("maintenance.drained", subject, actor, message);
        }
        Conclusion::Failed(problem) => {
            record.state = MaintenanceState::Failed;
            record.detail = Some(problem.detail.clone());
            let message = format!("{name} could not be emptied: {}", problem.detail);
            draft.error("maintenance.failed", subject, actor, message);
        }
        Conclusion::Cancelled(_) => {
            let restore = crate::maintenance::begin_restore(view, &mut record, actor, draft.now());
            draft.put_operation(restore);
        }
    }
    draft.put_maintenance(record);
}

fn restored(draft: &mut Draft<'_>, mut record: Maintenance, operation: &Operation) {
    for task in operation.work.moves() {
        let reason = match &task.state {
            MoveState::Failed { reason } | MoveState::Skipped { reason } => reason.clone(),
            _ => continue,
        };
        if let Some(moved) = record.moved.iter_mut().find(|moved| moved.vm == task.vm) {
            moved.state = MovedState::Stayed { reason };
        }
    }
    let back = record
        .moved
        .iter()
        .filter(|moved| moved.state == MovedState::Returned)
        .count();
    let stayed = record.moved.len() - back;
    record.ended_at = Some(draft.now());
    let subject = Subject::maintenance(record.id, &record.host_name);
    let message = format!(
        "{} takes VMs again; {back} came back, {stayed} stay elsewhere",
        record.host_name
    );
    if record.on_cancel.is_some() {
        record.state = MaintenanceState::Cancelled;
        draft.info("maintenance.cancelled", subject, &operation.actor, message);
    } else {
        record.state = MaintenanceState::Done;
        draft.info("maintenance.done", subject, &operation.actor, message);
    }
    draft.put_maintenance(record);
}
