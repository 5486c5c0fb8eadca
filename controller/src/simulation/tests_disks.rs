//! VMs that move with their local disks: whatever fails, one record, one file and one running VM are left.

use super::seeds::{Dice, for_each_seed};
use super::tests_crash::at_every_transaction_and_then;
use super::tests_storage::{GIB, blank, from_image, with_disks};
use super::*;
use crate::intent::{NewDisk, NewImage};
use crate::model::{DisksOnMove, Work};
use godwit_wire::id::{DiskId, ImageId};
use godwit_wire::migration::{MigrationPolicy, PostCopy};
use godwit_wire::storage::{ANOTHER_COPY, DiskOrigin, ImportSource};
use godwit_wire::unit::Bytes;
use godwit_wire::vmm_api::{PauseReason, VmmState};

/// Moves a VM to a host, its local disks into the pool which that host has for itself.
fn along(vm: VmId, target: u128) -> Intent {
    Intent::MigrateVm {
        vm,
        target: Some(Pool::id(target)),
        policy: MigrationPolicy::default(),
        disks: DisksOnMove::Along {
            pool: Some(format!("local-{target}")),
        },
    }
}

fn ahead_along(vm: VmId, target: u128) -> Intent {
    let mut intent = along(vm, target);
    if let Intent::MigrateVm { policy, .. } = &mut intent {
        policy.post_copy = PostCopy::Allowed;
    }
    intent
}

/// A VM on host 1 with a disk that only host 1 sees.
async fn one_vm_with_a_local_disk() -> (Pool, VmId) {
    let pool = Pool::of(2).await;
    let disks = vec![blank(Pool::local(1), GIB)];
    let vm = pool.created(with_disks("a", disks)).await;
    (pool, vm)
}

impl Pool {
    fn home_of(&self, disk: DiskId) -> PoolId {
        self.view().disks[&disk].pool
    }

    fn has_file(&self, host: u128, disk: DiskId) -> bool {
        let pool = self.host(host).pool(Pool::local(host)).unwrap();
        pool.disks().contains(&disk)
    }

    fn erasures(&self) -> usize {
        let view = self.view();
        let is_erasure = |work: &Work| matches!(work, Work::EraseCopy { .. });
        let active = view.active_operations();
        active
            .filter(|operation| is_erasure(&operation.work))
            .count()
    }

    async fn local_image(&self, name: &str) -> ImageId {
        let new = NewImage {
            name: name.into(),
            pool: Some(Pool::local(1)),
            host: None,
            source: ImportSource::Path {
                path: "/image".into(),
            },
            format: None,
            sha256: None,
        };
        let accepted = self.submit(Intent::CreateImage(new)).await.unwrap();
        self.succeeds(accepted).await;
        self.view().find_image(name).unwrap().id
    }
}

#[tokio::test(start_paused = true)]
async fn a_vm_moves_with_its_local_disk_and_back() {
    let (pool, vm) = one_vm_with_a_local_disk().await;
    let disk = pool.disk("a-disk-1");
    for target in [2, 1] {
        pool.succeeds(pool.submit(along(vm, target)).await.unwrap())
            .await;
        assert_eq!(pool.owner(vm), Some(target));
        assert_eq!(pool.home_of(disk), Pool::local(target));
        pool.settled().await;
        assert!(pool.has_file(target, disk) && !pool.has_file(3 - target, disk));
    }
    assert_eq!(pool.events("disk.copy_erased"), 2);
}

#[tokio::test(start_paused = true)]
async fn a_dry_run_tells_where_the_disks_go_and_counts_their_time() {
    let (pool, vm) = one_vm_with_a_local_disk().await;
    let preview = pool.controller.preview(&along(vm, 2)).unwrap();
    let said = preview.effects.join("; ");
    assert!(
        said.contains(
            "its disk disk-1 of 1.0 GiB moves along, from the storage pool local-1 to local-2"
        ),
        "{said}"
    );
    let forecast = preview.forecast.unwrap();
    assert_eq!(forecast.disks, Bytes(GIB));
    assert!(forecast.to_string().contains("1.0 GiB of disks"));
    // A pool that the target does not have.
    let mut elsewhere = along(vm, 2);
    if let Intent::MigrateVm { disks, .. } = &mut elsewhere {
        *disks = DisksOnMove::Along {
            pool: Some("local-1".into()),
        };
    }
    let refused = pool.refusal(elsewhere).await;
    assert!(
        refused.contains("the host has no storage pool local-1 that disks could move to"),
        "{refused}"
    );
}

#[tokio::test(start_paused = true)]
async fn without_a_pool_that_is_named_the_disks_go_to_one_of_the_target() {
    let (pool, vm) = one_vm_with_a_local_disk().await;
    let mut intent = along(vm, 2);
    if let Intent::MigrateVm { disks, .. } = &mut intent {
        *disks = DisksOnMove::Along { pool: None };
    }
    pool.succeeds(pool.submit(intent).await.unwrap()).await;
    let home = pool.home_of(pool.disk("a-disk-1"));
    assert_eq!(home, SHARED, "of two with the same room, the smaller id");
    pool.settled().await;
}

#[tokio::test(start_paused = true)]
async fn a_thin_copy_is_whole_by_itself_after_the_move_and_its_image_can_go() {
    let pool = Pool::of(2).await;
    let image = pool.local_image("debian").await;
    let vm = pool.created(with_disks("a", vec![from_image(image)])).await;
    let disk = pool.disk("a-root");
    assert_eq!(pool.view().disks[&disk].base(), Some(image));
    pool.succeeds(pool.submit(along(vm, 2)).await.unwrap())
        .await;
    assert_eq!(pool.view().disks[&disk].base(), None);
    pool.settled().await;
    pool.succeeds(pool.submit(Intent::DeleteImage { image }).await.unwrap())
        .await;
    pool.settled().await;
}

#[tokio::test(start_paused = true)]
async fn an_image_stays_as_long_as_the_source_has_a_thin_copy_of_it() {
    let pool = Pool::of(2).await;
    let image = pool.local_image("debian").await;
    let vm = pool.created(with_disks("a", vec![from_image(image)])).await;
    let moved = pool.submit(along(vm, 2)).await.unwrap();
    pool.wait("it is handed over", |view| {
        view.vms[&vm].owner == Some(Pool::id(2))
    })
    .await;
    pool.host(1).cut();
    pool.succeeds(moved).await;
    let refused = pool.refusal(Intent::DeleteImage { image }).await;
    assert!(refused.contains("has left of a thin copy"), "{refused}");
    pool.host(1).mend();
    pool.settled().await;
    pool.succeeds(pool.submit(Intent::DeleteImage { image }).await.unwrap())
        .await;
}

#[tokio::test(start_paused = true)]
async fn a_disk_on_its_way_is_not_changed() {
    let (pool, vm) = one_vm_with_a_local_disk().await;
    let disk = pool.disk("a-disk-1");
    let moved = pool.submit(along(vm, 2)).await.unwrap();
    pool.wait("the disk is held", |view| {
        view.disks[&disk].operation.is_some()
    })
    .await;
    let clone = NewDisk {
        name: "copy".into(),
        pool: None,
        bytes: None,
        format: None,
        from: DiskOrigin::Disk { disk },
    };
    let bytes = Bytes(2 * GIB);
    for intent in [
        Intent::GrowDisk { disk, bytes },
        Intent::DeleteDisk { disk },
        Intent::CreateDisk(clone),
    ] {
        let refused = pool.refusal(intent).await;
        assert!(refused.contains("busy"), "{refused}");
    }
    pool.succeeds(moved).await;
    let grow = Intent::GrowDisk { disk, bytes };
    pool.succeeds(pool.submit(grow).await.unwrap()).await;
    pool.settled().await;
}

#[tokio::test(start_paused = true)]
async fn a_move_that_is_called_off_leaves_nothing_at_the_target() {
    for after_ms in [0, 300, 800, 1_200, 1_800] {
        let (pool, vm) = one_vm_with_a_local_disk().await;
        let disk = pool.disk("a-disk-1");
        let moved = pool.submit(along(vm, 2)).await.unwrap();
        let operation = moved.operation.unwrap();
        tokio::time::sleep(Duration::from_millis(after_ms)).await;
        pool.submit(Intent::CancelOperation { operation })
            .await
            .unwrap();
        assert_eq!(pool.ended(operation).await, OperationState::Cancelled);
        pool.settled().await;
        assert_eq!(pool.home_of(disk), Pool::local(1));
        assert_eq!(pool.runs_on(vm), [1]);
    }
}

/// The host that has the old file is away; the file is erased when it comes back, and before the disk comes back to it.
#[tokio::test(start_paused = true)]
async fn what_the_source_has_left_is_erased_however_late_and_before_the_disk_comes_home() {
    let (pool, vm) = one_vm_with_a_local_disk().await;
    let disk = pool.disk("a-disk-1");
    let moved = pool.submit(along(vm, 2)).await.unwrap();
    pool.wait("it is handed over", |view| {
        view.vms[&vm].owner == Some(Pool::id(2))
    })
    .await;
    pool.host(1).cut();
    pool.succeeds(moved).await;
    tokio::time::sleep(Duration::from_secs(600)).await;
    assert_eq!(pool.erasures(), 1);
    assert!(pool.has_file(1, disk) && pool.has_file(2, disk));

    pool.host(1).mend();
    pool.wait("host 1 is back", |view| {
        view.host_state(&view.hosts[&Pool::id(1)]) == HostState::Up
    })
    .await;
    pool.succeeds(pool.submit(along(vm, 1)).await.unwrap())
        .await;
    assert_eq!(pool.home_of(disk), Pool::local(1));
    pool.settled().await;
    assert!(pool.has_file(1, disk) && !pool.has_file(2, disk));
}

/// Only what a disk was made for tells it from the one that the command means.
#[tokio::test(start_paused = true)]
async fn an_erasure_that_is_carried_out_again_spares_a_disk_that_has_come_back() {
    let (pool, vm) = one_vm_with_a_local_disk().await;
    let disk = pool.disk("a-disk-1");
    assert_eq!(pool.view().disks[&disk].made_for, None);
    for target in [2, 1] {
        pool.succeeds(pool.submit(along(vm, target)).await.unwrap())
            .await;
        pool.settled().await;
    }
    let late = pool.host(1).erase_copy(Pool::local(1), disk, None);
    assert_eq!(late.unwrap_err().kind, ANOTHER_COPY);
    assert!(pool.has_file(1, disk));
    let here = pool.host(1).pool(Pool::local(1)).unwrap();
    let made_for = pool.view().disks[&disk].made_for;
    assert!(made_for.is_some());
    assert_eq!(here.disk(disk).unwrap().made_for, made_for);
}

#[tokio::test(start_paused = true)]
async fn the_source_keeps_its_copy_until_the_vm_works_with_the_one_that_arrived() {
    let (pool, vm) = one_vm_with_a_local_disk().await;
    let disk = pool.disk("a-disk-1");
    let moved = pool.submit(along(vm, 2)).await.unwrap();
    pool.wait("it is handed over", |view| {
        view.vms[&vm].owner == Some(Pool::id(2))
    })
    .await;
    pool.host(1).cut();
    pool.succeeds(moved).await;
    tokio::time::sleep(Duration::from_secs(600)).await;
    let reason = PauseReason::Storage {
        disk: "disk-1".into(),
        detail: "it cannot be opened".into(),
    };
    pool.host(2).stall(vm, VmmState::Paused { reason });
    pool.wait("it is paused", |view| {
        view.vm_status(&view.vms[&vm]).state == VmState::Paused
    })
    .await;
    pool.host(1).mend();
    pool.wait("host 1 is back", |view| {
        view.host_state(&view.hosts[&Pool::id(1)]) == HostState::Up
    })
    .await;
    tokio::time::sleep(Duration::from_secs(600)).await;
    assert_eq!(pool.erasures(), 1);
    assert!(pool.has_file(1, disk) && pool.has_file(2, disk));

    pool.host(2).stall(vm, VmmState::Running);
    pool.settled().await;
    assert!(!pool.has_file(1, disk) && pool.has_file(2, disk));
}

fn is_where_its_disk_is(pool: &Pool, vm: VmId) {
    let owner = pool.owner(vm).unwrap();
    assert_eq!(pool.home_of(pool.disk("a-disk-1")), Pool::local(owner));
    assert_eq!(pool.runs_on(vm), [owner]);
}

#[tokio::test(start_paused = true)]
async fn a_server_killed_at_any_step_of_a_move_with_a_disk_ends_with_one_file() {
    let look = |pool: &Pool, vm, died: bool| {
        is_where_its_disk_is(pool, vm);
        assert!(died || pool.runs_on(vm) == [2]);
    };
    let moves = |vm| along(vm, 2);
    let killed = at_every_transaction_and_then(one_vm_with_a_local_disk, moves, look).await;
    assert!(killed >= 8, "killed {killed} times");
    let moves = |vm| ahead_along(vm, 2);
    at_every_transaction_and_then(one_vm_with_a_local_disk, moves, look).await;
}

/// What happens to a host while a VM moves with its disk.
#[derive(Clone, Copy, Debug)]
enum Blow {
    Cut,
    Freeze,
    Reboot,
    KillVmm,
}

#[tokio::test(start_paused = true)]
async fn a_host_that_fails_at_any_time_of_a_move_with_a_disk_leaves_one_file() {
    for blow in [Blow::Cut, Blow::Freeze, Blow::Reboot, Blow::KillVmm] {
        for host in [1, 2] {
            for after_ms in (0..3_600).step_by(400) {
                let (pool, vm) = one_vm_with_a_local_disk().await;
                let _ = pool.submit(along(vm, 2)).await.unwrap();
                tokio::time::sleep(Duration::from_millis(after_ms)).await;
                match blow {
                    Blow::Cut => pool.host(host).cut(),
                    Blow::Freeze => pool.host(host).freeze(),
                    Blow::Reboot => pool.host(host).reboot(),
                    Blow::KillVmm => pool.host(host).kill_vmm(vm),
                }
                tokio::time::sleep(Duration::from_secs(40)).await;
                pool.check();
                pool.host(host).mend();
                pool.host(host).thaw();
                tokio::time::sleep(godwit_wire::lease::LEASE_DURATION * 2).await;
                pool.settled().await;
                is_where_its_disk_is(&pool, vm);
            }
        }
    }
}

#[test]
fn whatever_fails_at_random_a_disk_on_its_way_has_one_file_in_the_end() {
    for_each_seed("anything fails around disks", 12, fail_at_random);
}

async fn fail_at_random(seed: u64) {
    let mut dice = Dice::new(seed);
    let mut pool = Pool::of(3).await;
    for number in 0..3 {
        let disks = vec![blank(Pool::local(number + 1), GIB)];
        pool.created(with_disks(&format!("vm-{number}"), disks))
            .await;
    }
    for _ in 0..40 {
        let host = 1 + u128::from(dice.roll(3));
        match dice.roll(10) {
            0 => pool.host(host).cut(),
            1 => pool.host(host).freeze(),
            2 => pool.host(host).reboot(),
            3 => {
                let away = Duration::from_millis(dice.roll(12_000));
                pool.restart_server(away, None).await;
            }
            4 | 5 => {
                pool.host(host).mend();
                pool.host(host).thaw();
            }
            6 => pool.life.dies_after(1 + dice.roll(8)),
            _ => {
                let ids: Vec<VmId> = pool.view().vms.keys().copied().collect();
                let vm = ids[dice.roll(ids.len() as u64) as usize];
                let _ = pool.submit(along(vm, host)).await;
            }
        }
        tokio::time::sleep(Duration::from_millis(dice.roll(4_000))).await;
        pool.check();
        if pool.life.is_over() {
            pool.restart_server(Duration::from_millis(200), None).await;
        }
    }
    for host in pool.hosts.values() {
        host.mend();
        host.thaw();
    }
    pool.life.dies_after(u64::MAX);
    tokio::time::sleep(godwit_wire::lease::LEASE_DURATION * 2).await;
    pool.settled().await;
}
