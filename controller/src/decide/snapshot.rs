//! Intents about snapshots.
//!
//! A snapshot has no disks. A guest that is let go on from it while its disks have moved on would destroy what is on
//! them, so a VM with writable disks is saved only to be stopped in the same breath, and its host refuses to let it go
//! on once anybody has claimed one of the disks since.

use super::storage::choose_pool;
use super::vm::{begin, place, running_vm};
use super::{Decision, find_vm, idle_vm, refuse_if_busy};
use crate::intent::{NewSnapshot, Resource};
use crate::ledger::Draft;
use crate::model::limits::MAX_SNAPSHOTS_PER_VM;
use crate::model::{
    Actor, AfterSnapshot, PowerIntent, Snapshot, SnapshotState, StartCause, Subject, Vm, VmState,
    Work, name, writable_disk,
};
use crate::operation::fresh;
use crate::plan::picture;
use crate::view::{View, attachments};
use godwit_wire::id::{HostId, PoolId, SnapshotId};
use godwit_wire::problem::{FieldProblem, Problem};
use godwit_wire::unit::Bytes;

pub(super) fn create(
    view: &View,
    draft: &mut Draft<'_>,
    new: &NewSnapshot,
    actor: &Actor,
) -> Result<Decision, Problem> {
    if let Some(problem) = name::problem("name", &new.name) {
        return Err(Problem::invalid(vec![problem]));
    }
    let (mut vm, owner) = running_vm(view, new.vm)?;
    let state = view.vm_status(&vm).state;
    if !matches!(state, VmState::Running | VmState::Paused) {
        let detail = format!("{} is {state:?}, so it cannot be saved", vm.name).to_lowercase();
        return Err(Problem::conflict("not-running", detail));
    }
    if let (Some(disk), AfterSnapshot::GoOn) = (writable_disk(&vm.spec), new.then) {
        let detail = format!(
            "a snapshot does not hold disks, and {} writes its disk {disk} while it runs on",
            vm.name
        );
        return Err(Problem::conflict("writable-disks", detail).with_remedy(
            "let it stop with the snapshot (`--stop`): its disks then stay as they are until it goes on",
        ));
    }
    if view.find_snapshot(vm.id, &new.name).is_some() {
        let detail = format!("{} has a snapshot {} already", vm.name, new.name);
        return Err(Problem::conflict("name-taken", detail)
            .with_remedy("choose another name, or delete that snapshot first"));
    }
    if view.snapshots_of(vm.id).count() >= MAX_SNAPSHOTS_PER_VM {
        let detail = format!("{} has {MAX_SNAPSHOTS_PER_VM} snapshots", vm.name);
        return Err(
            Problem::conflict("too-many-snapshots", detail).with_remedy("delete one of them first")
        );
    }
    let pool =
        pool_of(view, &vm, owner, new.pool).map_err(|problem| Problem::invalid(vec![problem]))?;
    let snapshot = Snapshot {
        id: SnapshotId::fresh(),
        name: new.name.clone(),
        vm: vm.id,
        pool,
        spec: vm.spec.clone(),
        epoch: vm.epoch,
        booted_on: vm.booted_on.clone(),
        bytes: Bytes(0),
        pause_us: 0,
        state: SnapshotState::Creating,
        operation: None,
        created_at: draft.now(),
        changed_at: draft.now(),
    };
    let work = Work::CreateSnapshot {
        snapshot: snapshot.id,
        vm: vm.id,
        then: new.then,
        sent: None,
    };
    let operation = begin(draft, &mut vm, work, actor);
    let then = match new.then {
        AfterSnapshot::GoOn => "goes on",
        AfterSnapshot::Stop => "is stopped",
    };
    let effect = format!(
        "{} is saved to {} as {} and {then}",
        vm.name,
        view.pool_name(pool),
        snapshot.name
    );
    let id = snapshot.id;
    draft.put_snapshot(Snapshot {
        operation: Some(operation),
        ..snapshot
    });
    draft.put_vm(vm);
    Ok(Decision::new(
        Resource::Snapshot(id),
        Some(operation),
        effect,
    ))
}

/// The pool asked for, that of the VM's first disk, or the only choice; its host must have it.
fn pool_of(
    view: &View,
    vm: &Vm,
    owner: HostId,
    wanted: Option<PoolId>,
) -> Result<PoolId, FieldProblem> {
    let first = attachments(&vm.spec).next().map(|attached| attached.pool);
    let pool = choose_pool(view, wanted.or(first))?;
    let has = view
        .pool(pool)
        .is_some_and(|pool| pool.able_hosts().any(|host| host == owner));
    if has {
        return Ok(pool);
    }
    Err(FieldProblem::new(
        "pool",
        format!(
            "{}, where {} runs, cannot use the storage pool {}",
            view.host_name(owner),
            vm.name,
            view.pool_name(pool)
        ),
        "choose a pool that this host has; `godwit pool list` shows them",
    ))
}

fn find(view: &View, id: SnapshotId) -> Result<Snapshot, Problem> {
    let found = view.snapshots.get(&id);
    found
        .map(|snapshot| snapshot.as_ref().clone())
        .ok_or_else(|| Problem::not_found("snapshot", id))
}

fn idle(view: &View, id: SnapshotId) -> Result<Snapshot, Problem> {
    let snapshot = find(view, id)?;
    let operation = snapshot.operation.and_then(|id| view.operations.get(&id));
    let busy = operation.filter(|operation| !operation.state.is_final());
    refuse_if_busy(&snapshot.name, busy.map(AsRef::as_ref))?;
    Ok(snapshot)
}

pub(super) fn restore(
    view: &View,
    draft: &mut Draft<'_>,
    id: SnapshotId,
    host: Option<HostId>,
    actor: &Actor,
) -> Result<Decision, Problem> {
    let snapshot = idle(view, id)?;
    if snapshot.state != SnapshotState::Ready {
        let detail = format!("the snapshot {} is not ready", snapshot.name);
        return Err(Problem::conflict("not-ready", detail).with_remedy("take it again"));
    }
    let mut vm = idle_vm(view, snapshot.vm)?;
    if vm.owner.is_some() {
        let detail = format!("{} is not off", vm.name);
        return Err(Problem::conflict("not-stopped", detail)
            .with_remedy("stop it first: what it has not saved is lost then"));
    }
    if vm.spec != snapshot.spec {
        let detail = format!(
            "{} has another machine now than when {} was taken",
            vm.name, snapshot.name
        );
        return Err(Problem::conflict("machine-changed", detail)
            .with_remedy("give it back the machine it had, or start it"));
    }
    let demand = picture::restoring(view, &vm, &snapshot);
    let placement = place(view, &demand, host)?;
    vm.intent = PowerIntent::Running;
    vm.trouble = None;
    vm.held_by = None;
    let work = Work::Start {
        vm: vm.id,
        wanted: host,
        cause: StartCause::Restored { snapshot: id },
        tried: Vec::new(),
        placed: None,
    };
    let operation = begin(draft, &mut vm, work, actor);
    let effect = format!(
        "{} goes on from {} on {}",
        vm.name, snapshot.name, placement.host_name
    );
    let mut decision = Decision::new(Resource::Vm(vm.id), Some(operation), effect);
    decision.preview.placement = Some(placement);
    draft.put_vm(vm);
    Ok(decision)
}

pub(super) fn delete(
    view: &View,
    draft: &mut Draft<'_>,
    id: SnapshotId,
    actor: &Actor,
) -> Result<Decision, Problem> {
    let mut snapshot = idle(view, id)?;
    let vm = find_vm(view, snapshot.vm)?;
    let going_on = vm.operation.and_then(|id| view.operations.get(&id));
    let reading = going_on.filter(|operation| {
        matches!(
            operation.work,
            Work::Start { cause: StartCause::Restored { snapshot }, .. } if snapshot == id
        ) && !operation.state.is_final()
    });
    refuse_if_busy(&snapshot.name, reading.map(AsRef::as_ref))?;
    let work = Work::DeleteSnapshot { snapshot: id };
    let subject = Subject::snapshot(id, &snapshot.name);
    let operation = fresh(work, subject, actor, None, draft.now());
    let operation_id = operation.id;
    let effect = format!("the snapshot {} of {} is deleted", snapshot.name, vm.name);
    snapshot.operation = Some(operation_id);
    draft.put_operation(operation);
    draft.put_snapshot(snapshot);
    Ok(Decision::new(
        Resource::Snapshot(id),
        Some(operation_id),
        effect,
    ))
}
