//! The decision about a migration: one transaction, standing for ever, safe to ask for again.

use crate::agents::not_the_caller;
use crate::core::Core;
use crate::ledger::Draft;
use crate::model::{
    Actor, BlankDisk, Disk, MigrateCause, Migration, MigrationState, Subject, Vm, Work,
};
use crate::view::View;
use godwit_wire::host_api::{CommitReply, CommitRequest, Resolution, ResolveRequest};
use godwit_wire::id::{HostId, MigrationId};
use godwit_wire::migration::MigrationRole;
use godwit_wire::problem::Problem;
use godwit_wire::storage::DiskOrigin;

/// The target holds everything: it gets the VM if the migration is open and the VM still the source's.
pub(super) async fn commit(
    core: &Core,
    host: HostId,
    id: MigrationId,
    request: CommitRequest,
) -> Result<CommitReply, Problem> {
    if request.host != host {
        return Err(not_the_caller(request.host, host));
    }
    core.ledger
        .change(|view, draft| decide(core, view, draft, id, request))
        .await
}

fn decide(
    core: &Core,
    view: &View,
    draft: &mut Draft<'_>,
    id: MigrationId,
    request: CommitRequest,
) -> Result<CommitReply, Problem> {
    let refused = |reason: &str| {
        Ok(CommitReply::Refused {
            reason: reason.to_owned(),
        })
    };
    let Some(migration) = view.migrations.get(&id) else {
        return refused("there is no such migration");
    };
    if migration.target != request.host || migration.vm != request.vm {
        return Err(Problem::conflict(
            "wrong-migration",
            "the migration is of another VM or to another host",
        ));
    }
    match &migration.state {
        MigrationState::Committed { epoch } => return Ok(CommitReply::Granted { epoch: *epoch }),
        MigrationState::Void { reason } => return refused(reason),
        MigrationState::Open => {}
    }
    let mut migration = migration.as_ref().clone();
    let vm = view.vms.get(&migration.vm);
    let as_begun = vm.filter(|vm| {
        vm.owner == Some(migration.source)
            && vm.epoch == migration.epoch
            && vm.epoch == request.epoch
    });
    let Some(vm) = as_begun else {
        let reason = "the VM is not the source's any more";
        void(draft, migration, reason);
        return refused(reason);
    };
    if core.pulses.is_given_up(migration.target) {
        let reason = "the target has been silent for too long";
        void(draft, migration, reason);
        return refused(reason);
    }
    let mut vm = vm.as_ref().clone();
    if !hand_over_disks(draft, &migration, &mut vm) {
        let reason = "the VM's disks are not as they were when it began";
        void(draft, migration, reason);
        return refused(reason);
    }
    vm.give_to(migration.target);
    let operation = view.operations.get(&migration.operation);
    if matches!(
        operation.map(|op| &op.work),
        Some(Work::Migrate {
            cause: MigrateCause::ByHand,
            ..
        })
    ) {
        vm.home = Some(migration.target);
    }
    let epoch = vm.epoch;
    migration.state = MigrationState::Committed { epoch };
    migration.ended_at = Some(draft.now());
    tracing::info!(
        migration = %id, vm = vm.name, source = migration.source_name, target = migration.target_name, %epoch,
        "committed"
    );
    draft.put_migration(migration);
    draft.put_vm(vm);
    Ok(CommitReply::Granted { epoch })
}

/// With the VM go its disks, in the same transaction: the record of each names the pool at the target, where it is whole
/// by itself, and the machine finds it there. Whether they are as the migration found them; nothing is written otherwise.
fn hand_over_disks(draft: &mut Draft<'_>, migration: &Migration, vm: &mut Vm) -> bool {
    let mut disks = Vec::with_capacity(migration.disks.len());
    for moving in &migration.disks {
        let held =
            |disk: &Disk| disk.pool == moving.from && disk.operation == Some(migration.operation);
        match draft.disk(moving.disk).filter(held) {
            Some(disk) if moving.blank == BlankDisk::Made => disks.push(Disk {
                pool: moving.to,
                origin: DiskOrigin::Blank,
                made_for: Some(migration.id),
                ..disk
            }),
            _ => return false,
        }
    }
    for disk in disks {
        draft.put_disk(disk);
    }
    vm.spec = migration.spec_at_target(&vm.spec);
    true
}

/// One end asks what became of a migration. A source that asks has lost its target: open becomes void.
pub(super) async fn resolve(
    core: &Core,
    host: HostId,
    id: MigrationId,
    request: ResolveRequest,
) -> Result<Resolution, Problem> {
    if request.host != host {
        return Err(not_the_caller(request.host, host));
    }
    core.ledger
        .change(|view, draft| {
            let owned = view.vms.get(&request.vm).is_some_and(|vm| {
                vm.owner == Some(host)
                    && (request.role == MigrationRole::Target || vm.epoch == request.epoch)
            });
            let migration = view.migrations.get(&id);
            Ok(match (request.role, migration.map(|m| &m.state)) {
                (MigrationRole::Source, Some(MigrationState::Open)) if owned => {
                    if let Some(migration) =
                        migration.filter(|m| m.source == host && m.vm == request.vm)
                    {
                        void(
                            draft,
                            migration.as_ref().clone(),
                            "the source lost the target before the commit",
                        );
                        Resolution::RunHere {
                            epoch: request.epoch,
                        }
                    } else {
                        Resolution::End
                    }
                }
                // Void, or so long ago that it is forgotten: the owner runs.
                (MigrationRole::Source, Some(MigrationState::Void { .. }) | None) if owned => {
                    Resolution::RunHere {
                        epoch: request.epoch,
                    }
                }
                (MigrationRole::Source, _) => Resolution::End,
                (MigrationRole::Target, Some(MigrationState::Open)) => Resolution::Open,
                // It asks for the commit again and is told the epoch.
                (MigrationRole::Target, Some(MigrationState::Committed { .. })) if owned => {
                    Resolution::Open
                }
                (MigrationRole::Target, _) => Resolution::End,
            })
        })
        .await
}

fn void(draft: &mut Draft<'_>, mut migration: Migration, reason: &str) {
    let subject = Subject::vm(migration.vm, &migration.vm_name);
    let message = format!(
        "the migration of {} from {} to {} is void: {reason}",
        migration.vm_name, migration.source_name, migration.target_name
    );
    draft.warning("migration.failed", subject, &Actor::controller(), message);
    migration.state = MigrationState::Void {
        reason: reason.to_owned(),
    };
    migration.ended_at = Some(draft.now());
    draft.put_migration(migration);
}
