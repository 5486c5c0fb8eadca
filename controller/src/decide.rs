//! Intents, decided: checks against the latest view, writes into a draft, and a word about what will happen.
//!
//! A dry run is the same decision with the draft thrown away.

mod devices;

pub(crate) mod host;

mod host_limits;

mod maintenance;

mod migrate;

mod network;

mod snapshot;

mod storage;

mod vm;

use crate::intent::{Accepted, Intent, Preview, Resource};
use crate::ledger::Draft;
use crate::model::{Actor, Operation, OperationState, Vm, Work};
use crate::view::View;
use godwit_wire::id::{OperationId, VmId};
use godwit_wire::problem::Problem;

/// An accepted intent.
#[derive(Clone, Debug)]
pub(crate) struct Decision {
    pub(crate) accepted: Accepted,
    pub(crate) preview: Preview,
}

impl Decision {
    fn new(resource: Resource, operation: Option<OperationId>, effect: impl Into<String>) -> Self {
        let preview = Preview {
            effects: vec![effect.into()],
            ..Preview::default()
        };
        Self {
            accepted: Accepted {
                resource,
                operation,
            },
            preview,
        }
    }
}

/// Decides an intent.
pub(crate) fn decide(
    view: &View,
    draft: &mut Draft<'_>,
    intent: &Intent,
    actor: &Actor,
) -> Result<Decision, Problem> {
    match intent {
        Intent::CreateVm(new) => vm::create(view, draft, new, actor),
        Intent::ChangeVm { vm, change } => vm::change(view, draft, *vm, change, actor),
        Intent::DeleteVm { vm, disks } => vm::delete(view, draft, *vm, *disks, actor),
        Intent::StartVm { vm, host } => vm::start(view, draft, *vm, *host, actor),
        Intent::StopVm { vm, mode } => vm::stop(view, draft, *vm, *mode, actor),
        Intent::RebootVm { vm, mode } => vm::reboot(view, draft, *vm, *mode, actor),
        Intent::PauseVm { vm } => vm::pause(view, draft, *vm, actor),
        Intent::ResumeVm { vm } => vm::resume(view, draft, *vm, actor),
        Intent::MigrateVm {
            vm,
            target,
            policy,
            disks,
        } => {
            let way = migrate::Way {
                target: *target,
                policy,
                disks,
            };
            migrate::migrate(view, draft, *vm, &way, actor)
        }
        Intent::CancelOperation { operation } => cancel_operation(view, draft, *operation, actor),
        Intent::CordonHost { host, reason } => host::cordon(view, draft, *host, reason, actor),
        Intent::UncordonHost { host } => host::uncordon(view, draft, *host, actor),
        Intent::EvacuateHost { host, reason } => host::evacuate(view, draft, *host, reason, actor),
        Intent::UpgradeHost { host } => host::upgrade(view, draft, *host, actor),
        Intent::ChangeHost { host, change } => {
            host_limits::change(view, draft, *host, change, actor)
        }
        Intent::RemoveHost { host } => host::remove(view, draft, *host, actor),
        Intent::ConfirmHostOff { host } => host::confirm_off(view, draft, *host, actor),
        Intent::CreateImage(new) => storage::create_image(view, draft, new, actor),
        Intent::DeleteImage { image } => storage::delete_image(view, draft, *image, actor),
        Intent::CreateDisk(new) => storage::create_disk(view, draft, new, actor),
        Intent::GrowDisk { disk, bytes } => storage::grow_disk(view, draft, *disk, *bytes, actor),
        Intent::DeleteDisk { disk } => storage::delete_disk(view, draft, *disk, actor),
        Intent::CreateSnapshot(new) => snapshot::create(view, draft, new, actor),
        Intent::RestoreSnapshot { snapshot, host } => {
            snapshot::restore(view, draft, *snapshot, *host, actor)
        }
        Intent::DeleteSnapshot { snapshot } => snapshot::delete(view, draft, *snapshot, actor),
        Intent::CreateNetwork(new) => network::create(view, draft, new, actor),
        Intent::DeleteNetwork { network } => network::delete(view, draft, *network, actor),
        Intent::CreateMaintenance(new) => maintenance::create(view, draft, new, actor),
        Intent::StartMaintenance { maintenance } => {
            maintenance::start(view, draft, *maintenance, actor)
        }
        Intent::CancelMaintenance {
            maintenance,
            restore,
        } => maintenance::cancel(view, draft, *maintenance, *restore, actor),
        Intent::FinishMaintenance { maintenance } => {
            maintenance::finish(view, draft, *maintenance, actor)
        }
    }
}

fn find_vm(view: &View, id: VmId) -> Result<Vm, Problem> {
    view.vms
        .get(&id)
        .map(|vm| vm.as_ref().clone())
        .ok_or_else(|| Problem::not_found("VM", id))
}

/// A VM that nothing else is changing.
fn idle_vm(view: &View, id: VmId) -> Result<Vm, Problem> {
    let vm = find_vm(view, id)?;
    let busy = vm
        .operation
        .and_then(|id| view.operations.get(&id))
        .filter(|op| !op.state.is_final());
    refuse_if_busy(&vm.name, busy.map(AsRef::as_ref))?;
    Ok(vm)
}

/// Refuses to change something that an operation is changing.
fn refuse_if_busy(name: &str, with: Option<&Operation>) -> Result<(), Problem> {
    let Some(operation) = with else {
        return Ok(());
    };
    let detail = format!(
        "{name} is busy with {} ({})",
        operation.work.kind(),
        operation.id
    );
    Err(Problem::conflict("busy", detail)
        .with_remedy("wait until that operation ends, or cancel it"))
}

fn cancel_operation(
    view: &View,
    draft: &mut Draft<'_>,
    id: OperationId,
    actor: &Actor,
) -> Result<Decision, Problem> {
    let operation = view
        .operations
        .get(&id)
        .ok_or_else(|| Problem::not_found("operation", id))?;
    if operation.state.is_final() {
        let state = match operation.state {
            OperationState::Succeeded => "succeeded",
            OperationState::Failed => "failed",
            _ => "been cancelled",
        };
        return Err(Problem::conflict(
            "already-ended",
            format!("the operation has {state} already"),
        ));
    }
    let kind = operation.work.kind();
    let remedy = match &operation.work {
        Work::Start { .. }
        | Work::Migrate { .. }
        | Work::Upgrade { .. }
        | Work::Evacuate { .. }
        | Work::Provision { .. }
        | Work::CreateImage { .. }
        | Work::CreateSnapshot { .. }
        | Work::CreateDisk { .. } => None,
        Work::Drain { .. } => Some("cancel the maintenance"),
        Work::Restore { .. } => Some("cordon the host to keep further VMs off it"),
        _ => Some("wait until it ends"),
    };
    if let Some(remedy) = remedy {
        let detail = format!("{kind} cannot be called off by itself");
        return Err(Problem::conflict("not-cancellable", detail).with_remedy(remedy));
    }
    let mut operation = operation.as_ref().clone();
    operation.cancel.get_or_insert_with(|| actor.clone());
    let effect = format!(
        "{kind} of {} is called off; what cannot be undone is finished",
        operation.subject
    );
    draft.info(
        "operation.cancelling",
        operation.subject.clone(),
        actor,
        &effect,
    );
    draft.put_operation(operation);
    Ok(Decision::new(Resource::Operation(id), Some(id), effect))
}
