//! Intents about VMs.

use super::devices::{apply, in_request};
use super::storage::hold_origin;
use super::{Decision, idle_vm};
use crate::intent::{NewVm, Placement, Resource, VmChange};
use crate::ledger::Draft;
use crate::model::limits::MAX_VMS;
use crate::model::rejection::{remedies, summary};
use crate::model::{
    Actor, Disk, DisksOnDelete, PowerIntent, ProvisionCause, StartCause, Subject, Vm, VmState,
    Work, name,
};
use crate::operation::fresh;
use crate::plan::picture::{self, Demand};
use crate::plan::placement::{Among, choose};
use crate::view::View;
use godwit_wire::host_api::StopMode;
use godwit_wire::id::{Epoch, Generation, HostId, OperationId, VmId};
use godwit_wire::machine::{MIN_MEMORY, MachineSpec, MachineType};
use godwit_wire::problem::{FieldProblem, Problem};
use godwit_wire::unit::Mib;
use std::collections::BTreeMap;

/// Longest time a guest may be given to stop.
const MAX_STOP_PATIENCE_MS: u64 = 600_000;

pub(super) fn place(
    view: &View,
    demand: &Demand,
    only: Option<HostId>,
) -> Result<Placement, Problem> {
    if let Some(host) = only.filter(|host| !view.hosts.contains_key(host)) {
        return Err(Problem::not_found("host", host));
    }
    let choice = choose(&picture::hosts(view), demand, Among { only, failed: &[] });
    match choice.best {
        Some((host, score)) => Ok(Placement {
            host,
            host_name: view.host_name(host),
            score,
            rejections: choice.rejections,
        }),
        None => {
            let detail = format!(
                "no host takes {}: {}",
                demand.name,
                summary(&choice.rejections)
            );
            Err(Problem::conflict("no-room", detail).with_remedy(remedies(&choice.rejections)))
        }
    }
}

/// Writes an operation that holds the VM from now on.
pub(super) fn begin(draft: &mut Draft<'_>, vm: &mut Vm, work: Work, actor: &Actor) -> OperationId {
    let operation = fresh(work, Subject::vm(vm.id, &vm.name), actor, None, draft.now());
    let id = operation.id;
    vm.operation = Some(id);
    draft.put_operation(operation);
    id
}

fn name_is_free(view: &View, name: &str) -> Result<(), Problem> {
    match view.find_vm(name) {
        None => Ok(()),
        Some(_) => Err(
            Problem::conflict("name-taken", format!("there is a VM {name} already"))
                .with_remedy("choose another name, or delete that VM first"),
        ),
    }
}

fn start_work(vm: VmId, wanted: Option<HostId>) -> Work {
    Work::Start {
        vm,
        wanted,
        cause: StartCause::Asked,
        tried: Vec::new(),
        placed: None,
    }
}

pub(super) fn create(
    view: &View,
    draft: &mut Draft<'_>,
    new: &NewVm,
    actor: &Actor,
) -> Result<Decision, Problem> {
    let mut problems = new.spec.problems("spec");
    problems.extend(name::problem("name", &new.name));
    if new.intent == PowerIntent::Paused {
        let remedy = "create it running or stopped, then pause it";
        problems.push(FieldProblem::new(
            "start",
            "a VM cannot be created paused",
            remedy,
        ));
    }
    if !problems.is_empty() {
        return Err(Problem::invalid(problems));
    }
    name_is_free(view, &new.name)?;
    if view.vms.len() >= MAX_VMS {
        return Err(Problem::conflict(
            "pool-full",
            format!("a pool has at most {MAX_VMS} VMs"),
        ));
    }
    let mut vm = Vm {
        id: VmId::fresh(),
        name: new.name.clone(),
        spec: new.spec.clone(),
        lease: new.lease,
        maintenance_policy: new.maintenance_policy,
        post_copy: new.post_copy,
        intent: new.intent,
        owner: None,
        epoch: Epoch(0),
        generation: Generation(0),
        home: None,
        operation: None,
        held_by: None,
        migration: None,
        trouble: None,
        booted_on: None,
        left_behind: BTreeMap::new(),
        created_at: draft.now(),
        changed_at: draft.now(),
    };
    let new_disks = apply(view, draft, &mut vm, &new.devices)?;
    check_machine(&vm)?;
    let subject = Subject::vm(vm.id, &vm.name);
    let placement = match new.intent {
        PowerIntent::Running => Some(place(view, &picture::booting(view, &vm), new.host)?),
        _ => None,
    };
    let work = match (new_disks.is_empty(), new.intent) {
        (false, _) => Some(provision(
            &vm,
            &new_disks,
            ProvisionCause::Create { wanted: new.host },
        )),
        (true, PowerIntent::Running) => Some(start_work(vm.id, new.host)),
        (true, _) => None,
    };
    let operation = work.map(|work| begin(draft, &mut vm, work, actor));
    touch_attached(view, draft, &vm);
    let made = put_new_disks(view, draft, new_disks, operation);
    let effect = match &placement {
        Some(placement) => format!(
            "{} is created and started on {}",
            vm.name, placement.host_name
        ),
        None => format!("{} is created; it stays off", vm.name),
    };
    draft.info("vm.created", subject, actor, format!("{} created", vm.name));
    let mut decision = Decision::new(Resource::Vm(vm.id), operation, effect);
    decision.preview.effects.splice(0..0, made);
    decision.preview.effects.extend(addresses(view, &vm));
    decision.preview.placement = placement;
    draft.put_vm(vm);
    Ok(decision)
}

fn check_machine(vm: &Vm) -> Result<(), Problem> {
    let problems = vm.spec.problems("spec");
    if problems.is_empty() {
        return Ok(());
    }
    Err(Problem::invalid(
        problems.into_iter().map(in_request).collect(),
    ))
}

fn provision(vm: &Vm, new_disks: &[Disk], cause: ProvisionCause) -> Work {
    Work::Provision {
        vm: vm.id,
        disks: new_disks.iter().map(|disk| disk.id).collect(),
        cause,
    }
}

/// Writes disks that `operation` is to make, and touches those that exist, so that none of them can be deleted at
/// another server at the same time. Says what is made.
fn put_new_disks(
    view: &View,
    draft: &mut Draft<'_>,
    new_disks: Vec<Disk>,
    operation: Option<OperationId>,
) -> Vec<String> {
    let mut made = Vec::new();
    for mut disk in new_disks {
        disk.operation = operation;
        if let Some(operation) = operation {
            hold_origin(view, draft, &disk.origin, operation);
        }
        made.push(format!(
            "the disk {} is made in {}",
            disk.name,
            view.pool_name(disk.pool)
        ));
        draft.put_disk(disk);
    }
    made
}

fn addresses(view: &View, vm: &Vm) -> Vec<String> {
    crate::view::leases(&vm.spec)
        .filter_map(|(network, address)| {
            let network = view.networks.get(&network)?;
            Some(format!("{} gets {address} on {}", vm.name, network.name()))
        })
        .collect()
}

/// Disks that a VM has and had not before: written, so that a deletion at another server notices.
fn touch_attached(view: &View, draft: &mut Draft<'_>, vm: &Vm) {
    for attached in crate::view::attachments(&vm.spec) {
        let had = view
            .users_of(attached.disk)
            .iter()
            .any(|(user, _)| *user == vm.id);
        if let Some(disk) = view.disks.get(&attached.disk).filter(|_| !had) {
            draft.put_disk(disk.as_ref().clone());
        }
    }
}

pub(super) fn change(
    view: &View,
    draft: &mut Draft<'_>,
    id: VmId,
    change: &VmChange,
    actor: &Actor,
) -> Result<Decision, Problem> {
    let mut vm = idle_vm(view, id)?;
    let mut problems: Vec<FieldProblem> = change
        .spec
        .iter()
        .flat_map(|spec| spec.problems("spec"))
        .collect();
    problems.extend(
        change
            .name
            .as_deref()
            .and_then(|new| name::problem("name", new)),
    );
    if !problems.is_empty() {
        return Err(Problem::invalid(problems));
    }
    let machine = change.spec.is_some() || !change.devices.is_empty();
    if vm.owner.is_some() && (machine || change.lease.is_some()) {
        let detail = format!(
            "{} is not off; its machine and its lease policy cannot change now",
            vm.name
        );
        return Err(Problem::conflict("not-stopped", detail).with_remedy("stop the VM first"));
    }
    let mut changed = Vec::new();
    if let Some(new) = change.name.as_ref().filter(|new| **new != vm.name) {
        name_is_free(view, new)?;
        changed.push(format!("name from {} to {new}", vm.name));
        vm.name.clone_from(new);
    }
    let before = vm.spec.clone();
    if let Some(spec) = &change.spec {
        let devices = std::mem::take(&mut vm.spec.devices);
        vm.spec = MachineSpec {
            devices,
            ..spec.clone()
        };
    }
    let new_disks = apply(view, draft, &mut vm, &change.devices)?;
    if vm.spec != before {
        check_machine(&vm)?;
        changed.push("machine".into());
    }
    if let Some(lease) = change.lease.filter(|lease| *lease != vm.lease) {
        changed.push(format!("lease to {lease:?}").to_lowercase());
        vm.lease = lease;
    }
    if let Some(policy) = change
        .maintenance_policy
        .filter(|policy| *policy != vm.maintenance_policy)
    {
        changed.push(format!("maintenance policy to {policy:?}").to_lowercase());
        vm.maintenance_policy = policy;
    }
    if let Some(permission) = change
        .post_copy
        .filter(|permission| *permission != vm.post_copy)
    {
        changed.push(format!("post-copy to {permission:?}").to_lowercase());
        vm.post_copy = permission;
    }
    if let Some(keep) = change.keep_memory {
        changed.push(keep_memory(view, &vm, keep)?);
    }
    if changed.is_empty() {
        return Ok(Decision::new(Resource::Vm(id), None, "nothing changes"));
    }
    let effect = format!("{}: {} changed", vm.name, changed.join(", "));
    draft.info("vm.changed", Subject::vm(id, &vm.name), actor, &effect);
    let operation = (!new_disks.is_empty()).then(|| {
        let work = provision(&vm, &new_disks, ProvisionCause::Change);
        begin(draft, &mut vm, work, actor)
    });
    // New disks are for VMs that are off and the balloon for those that are not.
    let operation = operation.or_else(|| {
        let keep = change.keep_memory?;
        let work = Work::Balloon {
            vm: id,
            keep,
            sent: None,
        };
        Some(begin(draft, &mut vm, work, actor))
    });
    touch_attached(view, draft, &vm);
    let made = put_new_disks(view, draft, new_disks, operation);
    let mut decision = Decision::new(Resource::Vm(id), operation, effect);
    decision.preview.effects.splice(0..0, made);
    draft.put_vm(vm);
    Ok(decision)
}

/// What the guest is asked to live with, in words.
fn keep_memory(view: &View, vm: &Vm, keep: Mib) -> Result<String, Problem> {
    running_vm(view, vm.id)?;
    if vm.spec.machine_type == MachineType::Godwit1 {
        let detail = format!("{} is of type godwit-1, which has no balloon", vm.name);
        return Err(Problem::conflict("no-balloon", detail).with_remedy("use godwit-2"));
    }
    if keep < MIN_MEMORY || keep > vm.spec.memory_mib {
        return Err(Problem::invalid(vec![FieldProblem::new(
            "keep_memory_mib",
            format!("{keep} is outside {MIN_MEMORY} to {}", vm.spec.memory_mib),
            "choose an amount within the VM's memory",
        )]));
    }
    Ok(format!("memory the guest lives with to {keep}"))
}

pub(super) fn delete(
    view: &View,
    draft: &mut Draft<'_>,
    id: VmId,
    disks: DisksOnDelete,
    actor: &Actor,
) -> Result<Decision, Problem> {
    let mut vm = idle_vm(view, id)?;
    if let Some(snapshot) = view.snapshots_of(id).next() {
        let detail = format!("{} has the snapshot {}", vm.name, snapshot.name);
        return Err(
            Problem::conflict("has-snapshots", detail).with_remedy("delete its snapshots first")
        );
    }
    let effect = match vm.owner {
        Some(owner) => format!(
            "{} is killed on {} and deleted",
            vm.name,
            view.host_name(owner)
        ),
        None => format!("{} is deleted", vm.name),
    };
    vm.intent = PowerIntent::Stopped;
    let work = Work::Delete {
        vm: id,
        disks,
        sent: None,
    };
    let operation = begin(draft, &mut vm, work, actor);
    let mut decision = Decision::new(Resource::Vm(id), Some(operation), effect);
    let doomed = view.disks_that_go_with(&vm, disks);
    decision.preview.effects.extend(
        doomed
            .iter()
            .map(|disk| format!("the disk {} is deleted, with all that is on it", disk.name)),
    );
    draft.put_vm(vm);
    Ok(decision)
}

pub(super) fn start(
    view: &View,
    draft: &mut Draft<'_>,
    id: VmId,
    host: Option<HostId>,
    actor: &Actor,
) -> Result<Decision, Problem> {
    let mut vm = idle_vm(view, id)?;
    if vm.owner.is_some() {
        let state = view.vm_status(&vm).state;
        return match state {
            VmState::Running | VmState::Starting => Ok(Decision::new(
                Resource::Vm(id),
                None,
                format!("{} runs already", vm.name),
            )),
            VmState::Paused => Err(
                Problem::conflict("paused", format!("{} is paused", vm.name))
                    .with_remedy("resume it"),
            ),
            _ => Err(Problem::conflict(
                "not-stopped",
                format!("{} is not off: it is {state:?}", vm.name).to_lowercase(),
            )
            .with_remedy("stop it first")),
        };
    }
    if let Some(disk) = view.busy_disk(&vm) {
        let detail = format!("the disk {} of {} is busy", disk.name, vm.name);
        return Err(
            Problem::conflict("busy", detail).with_remedy("wait until the disk's operation ends")
        );
    }
    let placement = place(view, &picture::booting(view, &vm), host)?;
    vm.intent = PowerIntent::Running;
    vm.trouble = None;
    vm.held_by = None;
    let operation = begin(draft, &mut vm, start_work(id, host), actor);
    let effect = format!("{} is started on {}", vm.name, placement.host_name);
    draft.put_vm(vm);
    let mut decision = Decision::new(Resource::Vm(id), Some(operation), effect);
    decision.preview.placement = Some(placement);
    Ok(decision)
}

fn check_mode(mode: StopMode) -> Result<(), Problem> {
    match mode {
        StopMode::Graceful { timeout_ms } if timeout_ms > MAX_STOP_PATIENCE_MS => {
            let problem = format!("{timeout_ms} ms is more than {MAX_STOP_PATIENCE_MS}");
            Err(Problem::invalid(vec![FieldProblem::new(
                "timeout_ms",
                problem,
                "give it less time, then kill it",
            )]))
        }
        _ => Ok(()),
    }
}

fn manner(mode: StopMode) -> String {
    match mode {
        StopMode::Graceful { timeout_ms } => format!("asked to stop, killed after {timeout_ms} ms"),
        StopMode::Kill => "killed".into(),
    }
}

pub(super) fn stop(
    view: &View,
    draft: &mut Draft<'_>,
    id: VmId,
    mode: StopMode,
    actor: &Actor,
) -> Result<Decision, Problem> {
    check_mode(mode)?;
    let mut vm = idle_vm(view, id)?;
    let (was_off, was) = (vm.owner.is_none(), vm.intent);
    vm.intent = PowerIntent::Stopped;
    vm.trouble = None;
    vm.held_by = None;
    if was_off {
        let effect = format!("{} stays off", vm.name);
        if was != PowerIntent::Stopped {
            draft.info(
                "vm.stopped",
                Subject::vm(id, &vm.name),
                actor,
                format!("{} is not wanted any more", vm.name),
            );
        }
        draft.put_vm(vm);
        return Ok(Decision::new(Resource::Vm(id), None, effect));
    }
    let operation = begin(
        draft,
        &mut vm,
        Work::Stop {
            vm: id,
            mode,
            sent: None,
        },
        actor,
    );
    let effect = format!("{} is {}", vm.name, manner(mode));
    draft.put_vm(vm);
    Ok(Decision::new(Resource::Vm(id), Some(operation), effect))
}

/// A VM with a VMM, whose host answers.
pub(super) fn running_vm(view: &View, id: VmId) -> Result<(Vm, HostId), Problem> {
    let vm = idle_vm(view, id)?;
    let Some(owner) = vm.owner else {
        return Err(
            Problem::conflict("not-running", format!("{} is off", vm.name)).with_remedy("start it"),
        );
    };
    if view.liveness(owner).is_silent() {
        let detail = format!("{} of {} is silent", view.host_name(owner), vm.name);
        return Err(Problem::conflict("host-silent", detail)
            .with_remedy("wait: the VM is restarted elsewhere, or the host comes back"));
    }
    Ok((vm, owner))
}

pub(super) fn reboot(
    view: &View,
    draft: &mut Draft<'_>,
    id: VmId,
    mode: StopMode,
    actor: &Actor,
) -> Result<Decision, Problem> {
    check_mode(mode)?;
    let (mut vm, target) = running_vm(view, id)?;
    vm.intent = PowerIntent::Running;
    let operation = begin(
        draft,
        &mut vm,
        Work::Restart {
            vm: id,
            mode,
            target,
            sent: None,
        },
        actor,
    );
    let effect = format!(
        "{} is {}, then started on {}",
        vm.name,
        manner(mode),
        view.host_name(target)
    );
    draft.put_vm(vm);
    Ok(Decision::new(Resource::Vm(id), Some(operation), effect))
}

pub(super) fn pause(
    view: &View,
    draft: &mut Draft<'_>,
    id: VmId,
    actor: &Actor,
) -> Result<Decision, Problem> {
    let (mut vm, _) = running_vm(view, id)?;
    if vm.intent == PowerIntent::Paused && view.vm_status(&vm).state == VmState::Paused {
        return Ok(Decision::new(
            Resource::Vm(id),
            None,
            format!("{} is paused already", vm.name),
        ));
    }
    vm.intent = PowerIntent::Paused;
    let operation = begin(draft, &mut vm, Work::Pause { vm: id, sent: None }, actor);
    let effect = format!("{} is paused", vm.name);
    draft.put_vm(vm);
    Ok(Decision::new(Resource::Vm(id), Some(operation), effect))
}

pub(super) fn resume(
    view: &View,
    draft: &mut Draft<'_>,
    id: VmId,
    actor: &Actor,
) -> Result<Decision, Problem> {
    let (mut vm, _) = running_vm(view, id)?;
    if vm.intent == PowerIntent::Running && view.vm_status(&vm).state == VmState::Running {
        return Ok(Decision::new(
            Resource::Vm(id),
            None,
            format!("{} runs already", vm.name),
        ));
    }
    vm.intent = PowerIntent::Running;
    let operation = begin(draft, &mut vm, Work::Resume { vm: id, sent: None }, actor);
    let effect = format!("{} is resumed", vm.name);
    draft.put_vm(vm);
    Ok(Decision::new(Resource::Vm(id), Some(operation), effect))
}
