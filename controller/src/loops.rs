//! The loops that never end: who is silent, what is to be begun, what is to be forgotten.

use crate::core::Core;
use crate::ledger::Draft;
use crate::model::limits::{
    MAX_DELETED_VMS, MAX_ENDED_MAINTENANCES, MAX_ENDED_MIGRATIONS, MAX_ENDED_OPERATIONS,
};
use crate::model::{
    Actor, Host, Liveness, MaintenanceState, PowerIntent, StartCause, Subject, Trouble, Vm, Work,
};
use crate::operation;
use crate::packet_gaps;
use crate::plan::reconcile::{Action, plan_reconcile};
use crate::view::View;
use godwit_wire::host_api::{LeasePolicy, StopMode};
use godwit_wire::id::{HostId, OperationId, VmId};
use godwit_wire::problem::Problem;
use jiff::Timestamp;
use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;
use tokio::time::Instant;

/// A detector that wakes this much later than it wanted was frozen, and has heard nothing meanwhile.
const FROZEN: Duration = Duration::from_secs(2);
/// How often old records are dropped.
const HOUSEKEEPING: Duration = Duration::from_secs(60);
/// How long a loop waits after the store failed.
pub(crate) const STORE_PAUSE: Duration = Duration::from_secs(1);

/// Starts all loops.
pub(crate) fn spawn(core: &Arc<Core>) {
    let guarded = |core: Arc<Core>, body: std::pin::Pin<Box<dyn Future<Output = ()> + Send>>| async move {
        tokio::select! {
            () = core.stopping.cancelled() => {}
            () = body => {}
        }
    };
    let bodies: [std::pin::Pin<Box<dyn Future<Output = ()> + Send>>; 4] = [
        Box::pin(detect(core.clone())),
        Box::pin(reconcile(core.clone())),
        Box::pin(keep_house(core.clone())),
        Box::pin(packet_gaps::write_down_for_ever(core.clone())),
    ];
    for body in bodies {
        core.tasks.spawn(guarded(core.clone(), body));
    }
}

/// Judges every host whenever its judgement may change.
async fn detect(core: Arc<Core>) {
    let mut changed = core.ledger.changed();
    let mut expected: Option<Instant> = None;
    loop {
        changed.mark_unchanged();
        let now = Instant::now();
        if let Some(late) = expected.and_then(|expected| now.checked_duration_since(expected))
            && late > FROZEN
        {
            tracing::warn!(
                late_ms = late.as_millis() as u64,
                "this server was frozen; every host gets a full wait"
            );
            core.pulses.begin_anew(now);
        }
        let view = core.view();
        let mut next: Option<Instant> = None;
        for host in view.hosts.values() {
            let verdict = core.pulses.judge(host.id, now);
            if verdict.liveness != view.liveness(host.id) || !view.observed.contains_key(&host.id) {
                judged(&core, host, verdict.liveness).await;
            }
            next = [next, verdict.next].into_iter().flatten().min();
        }
        expected = next;
        let timer = async {
            match next {
                Some(next) => tokio::time::sleep_until(next).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            () = timer => {}
            _ = changed.changed() => {}
        }
    }
}

/// A host's judgement has changed. Silence is told to the operator; a return is told by the heartbeat.
async fn judged(core: &Arc<Core>, host: &Host, liveness: Liveness) {
    let set = |liveness: Liveness| {
        core.ledger.observe(host.id, |observed| {
            let new = observed.liveness != liveness || observed.heard_at.is_none();
            observed.liveness = liveness;
            new
        });
    };
    if !liveness.is_silent() {
        return set(liveness);
    }
    let mut turn = core.ledger.turn().await;
    // The turn may have taken a while, and a heartbeat may have come.
    let liveness = core.pulses.judge(host.id, Instant::now()).liveness;
    if liveness == Liveness::RestartAllowed && !core.pulses.give_up(&turn, host.id, Instant::now())
    {
        return;
    }
    let before = core.view().liveness(host.id);
    set(liveness);
    let told = turn.change(|view, draft| {
        silence(view, draft, host.id, before, liveness);
        Ok(())
    });
    if let Err(problem) = told.await {
        tracing::error!(host = host.name(), %problem, "a host is silent and the event could not be written");
    }
}

fn silence(view: &View, draft: &mut Draft<'_>, id: HostId, before: Liveness, now: Liveness) {
    let Some(host) = view
        .hosts
        .get(&id)
        .filter(|host| host.first_heard_at.is_some())
    else {
        return;
    };
    let (subject, actor) = (Subject::host(id, host.name()), Actor::controller());
    let name = host.name();
    let vms = view.vms_of(id).count();
    let maintenance = host.maintenance.and_then(|id| view.maintenances.get(&id));
    if !before.is_silent() && now.is_silent() {
        if let Some(maintenance) = maintenance.filter(|m| m.state == MaintenanceState::Drained) {
            let mut record = maintenance.as_ref().clone();
            record.state = MaintenanceState::Working;
            draft.put_maintenance(record);
            draft.info(
                "maintenance.working",
                subject.clone(),
                &actor,
                format!("{name} went silent: work has begun"),
            );
        } else {
            let message =
                format!("{name} is unreachable: no heartbeat for a whole lease; it has {vms} VMs");
            draft.error("host.unreachable", subject.clone(), &actor, message);
        }
    }
    if now == Liveness::RestartAllowed && vms > 0 {
        let unwatched = view
            .vms_of(id)
            .filter(|vm| vm.lease == LeasePolicy::Unwatched)
            .count();
        let message = format!(
            "{name} is given up: {} VMs start elsewhere",
            vms - unwatched
        );
        draft.error("host.given_up", subject.clone(), &actor, message);
        if unwatched > 0 {
            let message =
                format!("{unwatched} unwatched VMs of {name} await proof that the host is off");
            draft.error("vm.awaiting_fence", subject, &actor, message);
        }
    }
}

/// Begins what has to be begun, and gives every operation an executor.
async fn reconcile(core: Arc<Core>) {
    let mut changed = core.ledger.changed();
    loop {
        changed.mark_unchanged();
        let view = core.view();
        let now = Instant::now();
        let due = |vm: VmId| core.restart_due(vm, now);
        let actions = plan_reconcile(&view, |vm| due(vm).is_none());
        let mut failed = false;
        for action in actions {
            if let Err(problem) = begin(&core, action).await {
                tracing::error!(%problem, "the reconciler could not write what it decided");
                failed = true;
            }
        }
        operation::spawn_all(&core);
        if failed {
            // Whatever changes meanwhile, the store is not asked again at once.
            tokio::time::sleep(STORE_PAUSE).await;
            continue;
        }
        let timer = async {
            let waiting = view.vms.values().filter(|vm| {
                vm.operation.is_none() && (vm.intent.wants_vmm() || vm.owner.is_some())
            });
            match waiting.filter_map(|vm| due(vm.id)).min() {
                Some(due) => tokio::time::sleep_until(due).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            () = timer => {}
            _ = changed.changed() => {}
        }
    }
}

async fn begin(core: &Arc<Core>, action: Action) -> Result<(), Problem> {
    let actor = Actor::controller();
    let decide = |view: &View, draft: &mut Draft<'_>| {
        let id = match &action {
            Action::Start { vm, .. }
            | Action::NoRoom { vm, .. }
            | Action::Halted { vm }
            | Action::Stop { vm }
            | Action::Pause { vm }
            | Action::Resume { vm } => *vm,
        };
        // Somebody else may have begun something since the plan was made.
        let Some(vm) = view.vms.get(&id).filter(|vm| vm.operation.is_none()) else {
            return Ok(());
        };
        let mut vm: Vm = vm.as_ref().clone();
        let subject = Subject::vm(vm.id, &vm.name);
        let work = match &action {
            Action::NoRoom { reason, .. } => {
                let message = format!("{} shall run and no host takes it: {reason}", vm.name);
                draft.error("vm.no_room", subject, &actor, message);
                vm.trouble = Some(Trouble::NoRoom {
                    reason: reason.clone(),
                });
                draft.put_vm(vm);
                return Ok(());
            }
            Action::Halted { .. } => {
                draft.info(
                    "vm.halted",
                    subject.clone(),
                    &actor,
                    format!("the guest of {} powered off", vm.name),
                );
                vm.intent = PowerIntent::Stopped;
                vm.trouble = Some(Trouble::Halted);
                Work::Stop {
                    vm: id,
                    mode: StopMode::Kill,
                    sent: None,
                }
            }
            Action::Stop { .. } => Work::Stop {
                vm: id,
                mode: StopMode::Kill,
                sent: None,
            },
            Action::Pause { .. } => Work::Pause { vm: id, sent: None },
            Action::Resume { .. } => Work::Resume { vm: id, sent: None },
            Action::Start { wanted, cause, .. } => {
                if matches!(cause, StartCause::Crashed { .. }) {
                    core.count_restart(id, Instant::now());
                }
                Work::Start {
                    vm: id,
                    wanted: *wanted,
                    cause: cause.clone(),
                    tried: Vec::new(),
                    placed: None,
                }
            }
        };
        let operation = operation::fresh(work, subject, &actor, None, draft.now());
        vm.operation = Some(operation.id);
        draft.put_operation(operation);
        draft.put_vm(vm);
        Ok(())
    };
    core.ledger.change(decide).await
}

/// Drops what is older than the limits allow.
async fn keep_house(core: Arc<Core>) {
    loop {
        let dropped = core.ledger.change(|view, draft| {
            drop_old(view, draft, &core);
            Ok(())
        });
        if let Err(problem) = dropped.await {
            tracing::error!(%problem, "old records could not be dropped");
        }
        tokio::time::sleep(HOUSEKEEPING).await;
    }
}

/// Most records dropped at once: the next round takes the rest.
const MAX_DROPPED: usize = 500;

fn drop_old(view: &View, draft: &mut Draft<'_>, core: &Core) {
    let surplus = |ended: usize, limit: usize| ended.saturating_sub(limit).min(MAX_DROPPED);
    // Ids sort by creation. A parent outlives its children, so that its record keeps making sense.
    let active: BTreeSet<OperationId> = view
        .active_operations()
        .map(|operation| operation.id)
        .collect();
    let ended: Vec<OperationId> = view
        .operations
        .values()
        .filter(|op| {
            op.state.is_final() && op.parent.is_none_or(|parent| !active.contains(&parent))
        })
        .map(|op| op.id)
        .collect();
    for id in ended
        .iter()
        .take(surplus(ended.len(), MAX_ENDED_OPERATIONS))
    {
        draft.delete_operation(*id);
    }
    let held: BTreeSet<_> = view.vms.values().filter_map(|vm| vm.migration).collect();
    let ended: Vec<_> = view
        .migrations
        .values()
        .filter(|m| !m.is_open() && !held.contains(&m.id))
        .map(|m| m.id)
        .collect();
    for id in ended
        .iter()
        .take(surplus(ended.len(), MAX_ENDED_MIGRATIONS))
    {
        draft.delete_migration(*id);
    }
    let ended: Vec<_> = view
        .maintenances
        .values()
        .filter(|m| m.state.is_final())
        .map(|m| m.id)
        .collect();
    for id in ended
        .iter()
        .take(surplus(ended.len(), MAX_ENDED_MAINTENANCES))
    {
        draft.delete_maintenance(*id);
    }
    let deleted = core.ledger.forgettable_vms(&view.hosts);
    for id in deleted.iter().take(surplus(deleted.len(), MAX_DELETED_VMS)) {
        draft.forget_deleted(*id);
    }
    let now = Timestamp::now();
    let expired: Vec<String> = draft
        .tokens()
        .iter()
        .filter(|(_, token)| token.expires_at < now)
        .map(|(digest, _)| digest.clone())
        .collect();
    for digest in expired.into_iter().take(MAX_DROPPED) {
        draft.delete_token(digest);
    }
}
