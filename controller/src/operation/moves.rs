//! Drains, evacuations and restores: many VMs, each moved by an operation of its own.
//!
//! ```text
//! task: waiting ──its operation is written in the same transaction──▶ running ──▶ done
//!          ▲                                                            │ failed, attempts left
//!          └────────────────────────────────────────────────────────────┘ else: failed
//! ```
//! A cancel lets what runs finish and skips what waits.

mod outcome;

use super::Ended;
use super::context::{Conclusion, Context};
use crate::ledger::Draft;
use crate::model::limits::MAX_MOVE_ATTEMPTS;
use crate::model::{
    Actor, DisksOnMove, Maintenance, MaintenanceState, MigrateCause, MoveAction, MoveState,
    MoveTask, MovedState, MovedVm, Operation, OperationState, PowerIntent, RestoreOnCancel,
    ReturnPolicy, StartCause, Subject, Vm, Work,
};
use crate::operation::fresh;
use crate::plan::admission::{Crowd, Use, another, receives, sends};
use crate::plan::restore::plan_restore;
use crate::view::View;
use godwit_wire::host_api::StopMode;
use godwit_wire::id::{HostId, MaintenanceId, VmId};
use godwit_wire::migration::MigrationPolicy;
use godwit_wire::problem::Problem;
use std::collections::BTreeMap;
use std::time::Duration;
use tokio::time::Instant;

/// How long a guest is given to stop before it is killed.
const STOP_PATIENCE: StopMode = StopMode::Graceful { timeout_ms: 30_000 };
/// Pause before a failed move is tried again; doubles with every attempt.
const RETRY_PAUSE: Duration = Duration::from_secs(1);
/// How long a host that shall take VMs again may keep silent.
const VERIFY_TIME: Duration = Duration::from_secs(60);

pub(super) async fn run(context: &Context<'_>) -> Ended {
    match moves(context).await {
        Ok(()) => Ended::Concluded,
        Err(ended) => ended,
    }
}

enum Round {
    Wait,
    Ended,
}

async fn moves(context: &Context<'_>) -> Result<(), Ended> {
    if let Work::Restore {
        maintenance, host, ..
    } = context.operation()?.work
        && !verify(context, maintenance, host).await?
    {
        return Ok(());
    }
    let mut not_before = BTreeMap::new();
    loop {
        let mut changed = context.core.ledger.changed();
        changed.mark_unchanged();
        let crowd = Crowd::new(context.core.settings.migrations_per_host);
        let now = Instant::now();
        let round = context
            .change(|view, draft, operation| {
                round(view, draft, operation, crowd, &mut not_before, now)
            })
            .await?;
        if matches!(round, Round::Ended) {
            return Ok(());
        }
        super::spawn_all(context.core);
        let due = not_before.values().copied().filter(|due| *due > now).min();
        let retry = async {
            match due {
                Some(due) => tokio::time::sleep_until(due).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            _ = changed.changed() => {}
            () = retry => {}
        }
    }
}

/// Before VMs come back the host must answer; when none come back it need not. Then, in one transaction, it takes VMs again and the moves are
/// planned. False when the operation has ended.
async fn verify(
    context: &Context<'_>,
    maintenance: MaintenanceId,
    host: HostId,
) -> Result<bool, Ended> {
    let view = context.view();
    let record = view.maintenances.get(&maintenance);
    let state = record.map(|record| record.state);
    if !matches!(
        state,
        Some(MaintenanceState::Verifying | MaintenanceState::Cancelling)
    ) {
        return Ok(true);
    }
    let answers = context.core.until(|view| {
        let observed = view.observed.get(&host)?;
        (observed.heard_at.is_some() && !observed.liveness.is_silent()).then_some(())
    });
    // Nothing comes back to a host that is only to be released: a dead one can be released too.
    let stay = record.is_some_and(|record| record.on_cancel == Some(RestoreOnCancel::Stay));
    let heard = stay || tokio::time::timeout(VERIFY_TIME, answers).await.is_ok();
    context
        .change(|view, draft, operation| {
            let Some(record) = view.maintenances.get(&maintenance) else {
                return false;
            };
            let mut record = record.as_ref().clone();
            if !heard {
                let detail = format!("{} does not answer", record.host_name);
                record.state = MaintenanceState::Working;
                record.detail = Some(detail.clone());
                record.on_cancel = None;
                let subject = Subject::maintenance(record.id, &record.host_name);
                draft.error(
                    "maintenance.not_verified",
                    subject,
                    &operation.actor,
                    &detail,
                );
                draft.put_maintenance(record);
                let remedy = "bring the host back, then finish the maintenance again";
                let problem = Problem::conflict("host-silent", detail).with_remedy(remedy);
                Context::conclude(draft, operation, None, Conclusion::Failed(problem));
                return false;
            }
            let policy = match record.on_cancel {
                Some(RestoreOnCancel::Restore) => ReturnPolicy::Exact,
                Some(RestoreOnCancel::Stay) => ReturnPolicy::None,
                None => record.return_policy,
            };
            let plan = plan_restore(view, &record, policy);
            record.state = MaintenanceState::Restoring;
            record.detail = None;
            for moved in &mut record.moved {
                if let Some(reason) = plan.stays.get(&moved.vm) {
                    moved.state = MovedState::Stayed {
                        reason: reason.clone(),
                    };
                }
            }
            if let Some(host) = view.hosts.get(&host) {
                let mut host = host.as_ref().clone();
                host.maintenance = None;
                draft.put_host(host);
            }
            let detail = format!(
                "{} takes VMs again, {} come back",
                record.host_name,
                plan.tasks.len()
            );
            operation.begin_step("restore", detail, draft.now());
            operation.work = Work::Restore {
                maintenance,
                host,
                moves: plan.tasks,
            };
            draft.put_maintenance(record);
            true
        })
        .await
}

fn round(
    view: &View,
    draft: &mut Draft<'_>,
    operation: &mut Operation,
    crowd: Crowd,
    not_before: &mut BTreeMap<VmId, Instant>,
    now: Instant,
) -> Round {
    let mut maintenance = maintenance_of(view, &operation.work).cloned();
    if let Some(record) = maintenance
        .as_mut()
        .filter(|record| record.state == MaintenanceState::Cordoned)
    {
        record.state = MaintenanceState::Draining;
    }
    let leaving = match operation.work {
        Work::Evacuate { host, .. } | Work::Drain { host, .. } => Some(host),
        _ => None,
    };
    let ways = match operation.work {
        Work::Restore { host, .. } => Ways::To(host),
        Work::Evacuate { host, .. } | Work::Drain { host, .. } => Ways::From(host),
        _ => return Round::Ended,
    };
    let (id, actor, cancelled) = (
        operation.id,
        operation.actor.clone(),
        operation.cancel.is_some(),
    );
    let stop_held_by = match operation.work {
        Work::Drain { maintenance, .. } => Some(maintenance),
        _ => None,
    };
    let Some(tasks) = operation.work.moves_mut() else {
        return Round::Ended;
    };
    if let Some(host) = leaving.filter(|_| !cancelled) {
        add_newcomers(view, host, tasks);
    }
    for task in tasks.iter_mut() {
        settle(view, task, leaving, maintenance.as_mut(), not_before, now);
    }
    let mut running = tasks
        .iter()
        .filter(|task| matches!(task.state, MoveState::Running { .. }))
        .count();
    // It takes a look at all migrations, and the view is the same for all tasks.
    let mut here = None;
    for task in tasks
        .iter_mut()
        .filter(|task| task.state == MoveState::Waiting)
    {
        if cancelled {
            task.state = MoveState::Skipped {
                reason: "called off".into(),
            };
            continue;
        }
        let due = not_before.get(&task.vm).is_none_or(|due| *due <= now);
        if !due
            || running >= crowd.unmeasured
                && !another(here.get_or_insert_with(|| ways.used(view)), running, crowd)
        {
            continue;
        }
        let Some(vm) = Context::vm(view, task.vm) else {
            task.state = MoveState::Skipped {
                reason: "it was deleted".into(),
            };
            continue;
        };
        if vm.operation.is_some()
            || vm
                .owner
                .is_some_and(|owner| view.liveness(owner).is_silent())
        {
            continue;
        }
        if let Some(work) = child_work(task, &vm, leaving) {
            begin_child(draft, task, vm, work, id, &actor, stop_held_by);
            running += 1;
        }
    }
    if let Some(record) = maintenance.take()
        && maintenance_of(view, &operation.work) != Some(&record)
    {
        draft.put_maintenance(record.clone());
        maintenance = Some(record);
    }
    let all_final = operation
        .work
        .moves()
        .iter()
        .all(|task| task.state.is_final());
    if !all_final {
        return Round::Wait;
    }
    let maintenance = maintenance.or_else(|| maintenance_of(view, &operation.work).cloned());
    outcome::ended(view, draft, operation, maintenance);
    Round::Ended
}

/// What all moves of an operation have in common.
#[derive(Clone, Copy, Debug)]
enum Ways {
    From(HostId),
    To(HostId),
}

impl Ways {
    /// How the host's link is used.
    fn used(self, view: &View) -> Use {
        match self {
            Self::From(host) => sends(view, host),
            Self::To(host) => receives(view, host),
        }
    }
}

fn maintenance_of<'v>(view: &'v View, work: &Work) -> Option<&'v Maintenance> {
    match work {
        Work::Drain { maintenance, .. } | Work::Restore { maintenance, .. } => {
            view.maintenances.get(maintenance).map(AsRef::as_ref)
        }
        _ => None,
    }
}

/// VMs that came to a leaving host after its moves were planned (a crashed one that was restarted in place).
fn add_newcomers(view: &View, host: HostId, tasks: &mut Vec<MoveTask>) {
    for vm in view.vms_of(host) {
        let known = tasks
            .iter()
            .any(|task| task.vm == vm.id && task.state != MoveState::Done);
        if !known {
            tasks.retain(|task| task.vm != vm.id);
            tasks.push(MoveTask {
                vm: vm.id,
                vm_name: vm.name.clone(),
                action: MoveAction::Migrate,
                to: None,
                attempts: 0,
                state: MoveState::Waiting,
            });
        }
    }
}

/// Notes what became of a task's operation, and of VMs that left by other ways.
fn settle(
    view: &View,
    task: &mut MoveTask,
    leaving: Option<HostId>,
    maintenance: Option<&mut Maintenance>,
    not_before: &mut BTreeMap<VmId, Instant>,
    now: Instant,
) {
    let vm = view.vms.get(&task.vm);
    match &task.state {
        MoveState::Waiting => {
            let left = vm.is_none_or(|vm| {
                leaving.is_some() && vm.owner != leaving && vm.operation.is_none()
            });
            if left {
                task.state = MoveState::Skipped {
                    reason: "it is not there any more".into(),
                };
            }
        }
        MoveState::Running { operation } => {
            let Some(child) = view
                .operations
                .get(operation)
                .filter(|child| child.state.is_final())
            else {
                return;
            };
            match child.state {
                OperationState::Succeeded => {
                    task.state = MoveState::Done;
                    if let Some(maintenance) = maintenance {
                        note_move(maintenance, task, vm.and_then(|vm| vm.owner));
                    }
                }
                OperationState::Cancelled => {
                    task.state = MoveState::Failed {
                        reason: "its operation was called off".into(),
                    };
                }
                _ => {
                    let reason = child
                        .error
                        .as_ref()
                        .map_or("it failed".to_owned(), |error| error.detail.clone());
                    if task.attempts >= MAX_MOVE_ATTEMPTS {
                        task.state = MoveState::Failed { reason };
                    } else {
                        not_before
                            .insert(task.vm, now + RETRY_PAUSE * 2u32.pow(task.attempts.min(8)));
                        // Placement looks for another target with fresh eyes, unless home is the point.
                        task.to = if leaving.is_some() { None } else { task.to };
                        task.state = MoveState::Waiting;
                    }
                }
            }
        }
        MoveState::Done | MoveState::Skipped { .. } | MoveState::Failed { .. } => {}
    }
}

fn note_move(maintenance: &mut Maintenance, task: &MoveTask, to: Option<HostId>) {
    let host = maintenance.host;
    let known = maintenance
        .moved
        .iter_mut()
        .find(|moved| moved.vm == task.vm);
    match (known, maintenance.state) {
        (Some(moved), MaintenanceState::Restoring) => moved.state = MovedState::Returned,
        // A rebalance brings VMs that never were here.
        (None, MaintenanceState::Restoring) => {}
        (Some(moved), _) => {
            (moved.to, moved.action, moved.state) = (to, task.action, MovedState::Away)
        }
        (None, _) => maintenance.moved.push(MovedVm {
            vm: task.vm,
            vm_name: task.vm_name.clone(),
            from: host,
            to,
            action: task.action,
            state: MovedState::Away,
        }),
    }
}

/// What to do with a VM now; `None` when there is nothing to do yet.
fn child_work(task: &MoveTask, vm: &Vm, leaving: Option<HostId>) -> Option<Work> {
    let id = vm.id;
    let migrate = |wanted| Work::Migrate {
        vm: id,
        wanted,
        policy: MigrationPolicy::default(),
        // Nobody is surprised by terabytes on the wire.
        disks: DisksOnMove::SharedOnly,
        cause: MigrateCause::ByPlan,
        migration: None,
    };
    Some(match (task.action, leaving) {
        (MoveAction::Migrate, _) => migrate(task.to),
        (MoveAction::RestartElsewhere, _) => match task.to {
            Some(target) => Work::Restart {
                vm: id,
                mode: STOP_PATIENCE,
                target,
                sent: None,
            },
            None => migrate(None),
        },
        (MoveAction::StopAndReturn, Some(_)) => Work::Stop {
            vm: id,
            mode: STOP_PATIENCE,
            sent: None,
        },
        (MoveAction::StopAndReturn, None) => Work::Start {
            vm: id,
            // Home first; any host rather than none.
            wanted: task.to.filter(|_| task.attempts == 0),
            cause: StartCause::Wanted,
            tried: Vec::new(),
            placed: None,
        },
    })
}

fn begin_child(
    draft: &mut Draft<'_>,
    task: &mut MoveTask,
    mut vm: Vm,
    work: Work,
    parent: godwit_wire::id::OperationId,
    actor: &Actor,
    stop_held_by: Option<MaintenanceId>,
) {
    match &work {
        Work::Stop { .. } => {
            vm.held_by = stop_held_by.filter(|_| vm.intent != PowerIntent::Stopped)
        }
        Work::Start { .. } => vm.held_by = None,
        _ => {}
    }
    let child = fresh(
        work,
        Subject::vm(vm.id, &vm.name),
        actor,
        Some(parent),
        draft.now(),
    );
    task.attempts += 1;
    task.state = MoveState::Running {
        operation: child.id,
    };
    vm.operation = Some(child.id);
    draft.put_operation(child);
    draft.put_vm(vm);
}
