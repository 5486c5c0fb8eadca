//! Saving VMs and letting them go on.

use super::*;
use crate::intent::{NewDevices, NewDiskSource, NewSnapshot, NewVmDisk, Resource};
use crate::model::{AfterSnapshot, DisksOnDelete, SnapshotState};
use godwit_wire::devices::DiskAccess;
use godwit_wire::host_api::StopMode;
use godwit_wire::id::SnapshotId;
use godwit_wire::storage::DiskOrigin;
use godwit_wire::unit::Bytes;

fn save(vm: VmId, name: &str, then: AfterSnapshot) -> Intent {
    Intent::CreateSnapshot(NewSnapshot {
        vm,
        name: name.into(),
        pool: Some(SHARED),
        then,
    })
}

fn with_a_disk(name: &str) -> NewVm {
    let disk = NewVmDisk {
        name: None,
        source: NewDiskSource::New {
            pool: Some(SHARED),
            bytes: Some(Bytes(1 << 30)),
            format: None,
            from: DiskOrigin::Blank,
        },
        access: DiskAccess::ReadWrite,
        limits: Default::default(),
        on_error: Default::default(),
    };
    NewVm {
        devices: NewDevices {
            disks: Some(vec![disk]),
            ..NewDevices::default()
        },
        ..new_vm(name)
    }
}

impl Pool {
    async fn with_a_disk(&self, name: &str) -> VmId {
        let accepted = self.submit(Intent::CreateVm(with_a_disk(name))).await;
        self.succeeds(accepted.unwrap()).await;
        let vm = self.view().find_vm(name).unwrap().id;
        self.running(vm).await;
        vm
    }

    async fn saved(&self, vm: VmId, name: &str, then: AfterSnapshot) -> SnapshotId {
        let accepted = self.submit(save(vm, name, then)).await.unwrap();
        let Resource::Snapshot(id) = accepted.resource else {
            panic!("{accepted:?}");
        };
        self.succeeds(accepted).await;
        id
    }

    async fn kind_of_refusal(&self, intent: Intent) -> String {
        self.submit(intent).await.expect_err("it is refused").kind
    }

    async fn stop(&self, vm: VmId) {
        let mode = StopMode::Kill;
        let accepted = self.submit(Intent::StopVm { vm, mode }).await.unwrap();
        self.succeeds(accepted).await;
    }

    /// What is in the pool is on record, and what is on record can be used.
    fn check_snapshots(&self) {
        let view = self.view();
        let recorded: std::collections::BTreeSet<_> = view.snapshots.keys().copied().collect();
        assert_eq!(self.host(1).pool(SHARED).unwrap().snapshots(), recorded);
        for snapshot in view.snapshots.values() {
            assert_eq!(snapshot.state, SnapshotState::Ready, "{}", snapshot.name);
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_vm_that_is_saved_runs_on_and_later_goes_on_from_there() {
    let pool = Pool::of(2).await;
    let vm = pool.vm("a", 1).await;
    let snapshot = pool.saved(vm, "warm", AfterSnapshot::GoOn).await;
    pool.running(vm).await;
    pool.check_snapshots();
    let restore = Intent::RestoreSnapshot {
        snapshot,
        host: None,
    };
    assert_eq!(pool.kind_of_refusal(restore.clone()).await, "not-stopped");
    let again = save(vm, "warm", AfterSnapshot::GoOn);
    assert_eq!(pool.kind_of_refusal(again).await, "name-taken");
    pool.stop(vm).await;
    let epoch = pool.view().vms[&vm].epoch;
    pool.succeeds(pool.submit(restore).await.unwrap()).await;
    pool.running(vm).await;
    assert!(pool.view().vms[&vm].epoch > epoch, "a restore is a start");
    let disks = DisksOnDelete::Delete;
    let delete_vm = Intent::DeleteVm { vm, disks };
    assert_eq!(pool.kind_of_refusal(delete_vm).await, "has-snapshots");
    let delete = Intent::DeleteSnapshot { snapshot };
    pool.succeeds(pool.submit(delete).await.unwrap()).await;
    pool.settled().await;
    pool.check_snapshots();
    assert!(pool.view().snapshots.is_empty());
}

#[tokio::test(start_paused = true)]
async fn a_vm_that_writes_disks_is_saved_only_to_be_stopped() {
    let pool = Pool::of(2).await;
    let vm = pool.with_a_disk("a").await;
    let live = save(vm, "live", AfterSnapshot::GoOn);
    assert_eq!(pool.kind_of_refusal(live).await, "writable-disks");
    pool.saved(vm, "asleep", AfterSnapshot::Stop).await;
    pool.settled().await;
    let view = pool.view();
    assert_eq!(view.vms[&vm].intent, PowerIntent::Stopped);
    assert_eq!(view.vms[&vm].owner, None);
    pool.check_snapshots();
}

#[tokio::test(start_paused = true)]
async fn a_vm_that_has_become_another_machine_does_not_go_on() {
    let pool = Pool::of(2).await;
    let vm = pool.vm("a", 1).await;
    let snapshot = pool.saved(vm, "warm", AfterSnapshot::GoOn).await;
    pool.stop(vm).await;
    let spec = godwit_wire::machine::MachineSpec {
        vcpus: 2,
        ..pool.view().vms[&vm].spec.clone()
    };
    let change = crate::intent::VmChange {
        spec: Some(spec),
        ..Default::default()
    };
    pool.submit(Intent::ChangeVm { vm, change }).await.unwrap();
    let restore = Intent::RestoreSnapshot {
        snapshot,
        host: None,
    };
    assert_eq!(pool.kind_of_refusal(restore).await, "machine-changed");
}

/// Whatever the server had done when it died, the VM is off with a snapshot, or runs, with or without one.
#[tokio::test(start_paused = true)]
async fn a_server_killed_at_any_step_of_a_snapshot_resumes() {
    for then in [AfterSnapshot::GoOn, AfterSnapshot::Stop] {
        let mut transactions = 1;
        loop {
            let mut pool = Pool::of(2).await;
            let vm = match then {
                AfterSnapshot::GoOn => pool.vm("a", 1).await,
                AfterSnapshot::Stop => pool.with_a_disk("a").await,
            };
            let died = pool.dies_during(save(vm, "s", then), transactions).await;
            pool.settled().await;
            pool.check_snapshots();
            let view = pool.view();
            if then == AfterSnapshot::Stop {
                let off = view.vms[&vm].intent == PowerIntent::Stopped;
                assert_eq!(
                    off,
                    !view.snapshots.is_empty(),
                    "saved and stopped, or neither"
                );
            }
            if !died {
                assert_eq!(view.snapshots.len(), 1);
                break;
            }
            transactions += 1;
            assert!(transactions < 50, "the operation never ends");
        }
        assert!(transactions > 3, "killed {transactions} times");
    }
}

#[tokio::test(start_paused = true)]
async fn a_host_that_dies_while_it_saves_a_vm_leaves_no_snapshot_and_the_vm_runs_elsewhere() {
    let pool = Pool::of(2).await;
    let vm = pool.vm("a", 1).await;
    let accepted = pool
        .submit(save(vm, "s", AfterSnapshot::GoOn))
        .await
        .unwrap();
    pool.host(1).cut();
    let id = accepted.operation.unwrap();
    pool.wait("the operation has ended", |view| {
        view.operations[&id].state.is_final()
    })
    .await;
    pool.wait("the VM runs elsewhere", |view| {
        view.vms[&vm].owner == Some(Pool::id(2))
    })
    .await;
    pool.running(vm).await;
    assert!(pool.view().snapshots.is_empty());
    pool.host(1).mend();
    pool.settled().await;
}
