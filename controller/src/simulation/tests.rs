//! The everyday life of VMs.

use super::*;
use crate::intent::VmChange;
use crate::model::{StepState, Trouble};
use godwit_wire::host_api::{CommitReply, CommitRequest, Resolution, ResolveRequest, StopMode};
use godwit_wire::migration::{MigrationPolicy, MigrationRole};

fn migrate(vm: VmId, target: u128) -> Intent {
    Intent::MigrateVm {
        vm,
        target: Some(Pool::id(target)),
        policy: MigrationPolicy::default(),
        disks: Default::default(),
    }
}

#[tokio::test(start_paused = true)]
async fn a_vm_lives_through_create_pause_resume_reboot_stop_start_and_delete() {
    let pool = Pool::of(2).await;
    let vm = pool.vm("a", 1).await;
    let state = |pool: &Pool| pool.view().vm_status(&pool.view().vms[&vm]).state;

    pool.succeeds(pool.submit(Intent::PauseVm { vm }).await.unwrap())
        .await;
    pool.wait("it is paused", |view| {
        view.vm_status(&view.vms[&vm]).state == VmState::Paused
    })
    .await;
    assert!(pool.runs_on(vm).is_empty());
    pool.succeeds(pool.submit(Intent::ResumeVm { vm }).await.unwrap())
        .await;
    pool.running(vm).await;

    let epoch = pool.view().vms[&vm].epoch;
    let mode = StopMode::Graceful { timeout_ms: 1_000 };
    let reboot = pool.submit(Intent::RebootVm { vm, mode }).await.unwrap();
    pool.succeeds(reboot).await;
    pool.running(vm).await;
    assert_eq!(
        pool.view().operations[&reboot.operation.unwrap()]
            .work
            .kind(),
        "reboot"
    );
    assert!(pool.view().vms[&vm].epoch > epoch);
    assert_eq!(pool.runs_on(vm), [1]);

    pool.succeeds(
        pool.submit(Intent::StopVm {
            vm,
            mode: StopMode::Kill,
        })
        .await
        .unwrap(),
    )
    .await;
    assert_eq!((state(&pool), pool.owner(vm)), (VmState::Stopped, None));
    pool.succeeds(
        pool.submit(Intent::StartVm { vm, host: None })
            .await
            .unwrap(),
    )
    .await;
    pool.running(vm).await;
    pool.succeeds(
        pool.submit(Intent::DeleteVm {
            vm,
            disks: Default::default(),
        })
        .await
        .unwrap(),
    )
    .await;
    assert!(pool.view().vms.is_empty() && pool.view().find_vm("a").is_none());
    assert!(pool.hosts.values().all(|host| !host.has(vm)));
    pool.check();
}

#[tokio::test(start_paused = true)]
async fn a_live_migration_moves_owner_epoch_and_home() {
    let pool = Pool::of(2).await;
    let vm = pool.vm("a", 1).await;
    let epoch = pool.view().vms[&vm].epoch;
    pool.succeeds(pool.submit(migrate(vm, 2)).await.unwrap())
        .await;
    pool.running(vm).await;
    let view = pool.view();
    assert_eq!(
        (pool.owner(vm), view.vms[&vm].epoch),
        (Some(2), epoch.next())
    );
    assert_eq!(view.vms[&vm].home, Some(Pool::id(2)));
    assert_eq!(pool.runs_on(vm), [2]);
    assert!(!pool.host(1).has(vm));
    let migration = view.migrations.values().next().unwrap();
    assert_eq!(
        migration.progress.as_ref().unwrap().downtime_us,
        Some(40_000)
    );
    assert_eq!(pool.events("vm.migrated"), 1);
}

#[tokio::test(start_paused = true)]
async fn a_packet_gap_that_is_known_after_the_end_of_a_migration_is_written_down_once() {
    let pool = Pool::of(2).await;
    let vm = pool.vm("a", 1).await;
    pool.succeeds(pool.submit(migrate(vm, 2)).await.unwrap())
        .await;
    pool.running(vm).await;
    let record = |view: &View| view.migrations.values().next().unwrap().clone();
    let ended = record(&pool.view());
    let gap_us = |view: &View| record(view).progress.as_ref().unwrap().packet_gap_us;
    assert_eq!(gap_us(&pool.view()), None);
    pool.host(2).first_frame(vm, ended.id, 45_000);
    pool.wait("the gap is written down", |view| gap_us(view).is_some())
        .await;
    pool.host(2).first_frame(vm, ended.id, 46_000);
    tokio::time::sleep(Duration::from_secs(10)).await;
    assert_eq!(gap_us(&pool.view()), Some(45_000));
    let mut as_before = record(&pool.view()).as_ref().clone();
    as_before.progress.as_mut().unwrap().packet_gap_us = None;
    assert_eq!(as_before, *ended);
}

#[tokio::test(start_paused = true)]
async fn a_cancelled_migration_leaves_the_source_running() {
    let pool = Pool::of(2).await;
    let vm = pool.vm("a", 1).await;
    let operation = pool
        .submit(migrate(vm, 2))
        .await
        .unwrap()
        .operation
        .unwrap();
    tokio::time::sleep(Duration::from_millis(700)).await;
    pool.submit(Intent::CancelOperation { operation })
        .await
        .unwrap();
    assert_eq!(pool.ended(operation).await, OperationState::Cancelled);
    pool.running(vm).await;
    assert_eq!((pool.owner(vm), pool.runs_on(vm)), (Some(1), vec![1]));
    assert!(!pool.host(2).has(vm));
    assert_eq!(pool.view().vms[&vm].migration, None);
}

#[tokio::test(start_paused = true)]
async fn a_migration_whose_connection_breaks_leaves_the_source_running() {
    let pool = Pool::of(2).await;
    let vm = pool.vm("a", 1).await;
    let operation = pool
        .submit(migrate(vm, 2))
        .await
        .unwrap()
        .operation
        .unwrap();
    tokio::time::sleep(Duration::from_millis(700)).await;
    pool.host(2).cut();
    assert_eq!(pool.ended(operation).await, OperationState::Failed);
    pool.running(vm).await;
    assert_eq!(pool.runs_on(vm), [1]);
    pool.host(2).mend();
    let host = pool.host(2).clone();
    pool.wait("the target is clean", |_| !host.has(vm)).await;
}

#[tokio::test(start_paused = true)]
async fn one_host_takes_part_in_two_migrations_at_most() {
    let pool = Pool::of(3).await;
    let mut operations = Vec::new();
    for n in 0..5 {
        pool.vm(&format!("vm-{n}"), 1).await;
    }
    for vm in pool.view().vms.keys().copied().collect::<Vec<_>>() {
        operations.push(pool.submit(migrate(vm, 2)).await.unwrap());
    }
    let mut most = 0;
    pool.wait("all have moved", |view| {
        most = most.max(view.open_migrations().count());
        view.vms
            .values()
            .all(|vm| vm.owner == Some(Pool::id(2)) && vm.operation.is_none())
    })
    .await;
    assert_eq!(most, 2);
    for operation in operations {
        pool.succeeds(operation).await;
    }
}

#[tokio::test(start_paused = true)]
async fn of_two_vms_with_one_name_exactly_one_is_created() {
    let pool = Pool::of(1).await;
    let (first, second) = tokio::join!(
        pool.submit(Intent::CreateVm(new_vm("a"))),
        pool.submit(Intent::CreateVm(new_vm("a")))
    );
    assert_eq!(u8::from(first.is_ok()) + u8::from(second.is_ok()), 1);
    let problem = first.err().or(second.err()).unwrap();
    assert_eq!((problem.kind.as_str(), problem.status), ("name-taken", 409));
}

#[tokio::test(start_paused = true)]
async fn a_vm_that_fits_nowhere_is_refused_with_every_hosts_reason() {
    let pool = Pool::of(2).await;
    pool.submit(Intent::CordonHost {
        host: Pool::id(1),
        reason: "test".into(),
    })
    .await
    .unwrap();
    let mut new = new_vm("big");
    new.spec.memory_mib = Mib(100_000);
    let problem = pool
        .submit(Intent::CreateVm(new.clone()))
        .await
        .unwrap_err();
    assert_eq!(problem.kind, "no-room");
    assert!(
        problem.detail.contains("host-1: the host is cordoned"),
        "{problem}"
    );
    assert!(
        problem.detail.contains("host-2: 100008 MiB needed"),
        "{problem}"
    );
    assert_eq!(
        pool.controller
            .preview(&Intent::CreateVm(new))
            .unwrap_err()
            .kind,
        "no-room"
    );
}

#[tokio::test(start_paused = true)]
async fn a_dry_run_tells_the_placement_and_changes_nothing() {
    let pool = Pool::of(2).await;
    let before = pool.view();
    let preview = pool
        .controller
        .preview(&Intent::CreateVm(new_vm("a")))
        .unwrap();
    assert!(preview.placement.is_some());
    assert!(preview.effects[0].contains("started on host-"));
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert_eq!(pool.view().revision, before.revision);
    assert_eq!(pool.view().event_revision, before.event_revision);
}

#[tokio::test(start_paused = true)]
async fn a_vm_that_one_host_cannot_start_is_tried_on_another_and_then_left_failed() {
    let pool = Pool::of(2).await;
    pool.host(1).refuse_starts();
    let accepted = pool.submit(Intent::CreateVm(new_vm("a"))).await.unwrap();
    pool.succeeds(accepted).await;
    let vm = pool.view().find_vm("a").unwrap().id;
    assert_eq!(pool.owner(vm), Some(2));

    pool.host(2).refuse_starts();
    let accepted = pool.submit(Intent::CreateVm(new_vm("b"))).await.unwrap();
    assert_eq!(
        pool.ended(accepted.operation.unwrap()).await,
        OperationState::Failed
    );
    let view = pool.view();
    let vm = view.find_vm("b").unwrap();
    assert_eq!(
        (view.vm_status(vm).state, vm.owner),
        (VmState::Failed, None)
    );
    assert!(matches!(vm.trouble, Some(Trouble::StartFailed { .. })));
    let operation = &view.operations[&accepted.operation.unwrap()];
    assert!(
        operation
            .steps
            .iter()
            .any(|step| step.state == StepState::Failed)
    );
}

#[tokio::test(start_paused = true)]
async fn a_busy_vm_is_not_changed_by_a_second_operation() {
    let pool = Pool::of(2).await;
    let vm = pool.vm("a", 1).await;
    let first = pool.submit(migrate(vm, 2)).await.unwrap();
    let problem = pool
        .submit(Intent::StopVm {
            vm,
            mode: StopMode::Kill,
        })
        .await
        .unwrap_err();
    assert_eq!(problem.kind, "busy");
    pool.succeeds(first).await;
}

#[tokio::test(start_paused = true)]
async fn a_machine_is_changed_only_while_it_is_off_and_a_name_at_any_time() {
    let pool = Pool::of(1).await;
    let vm = pool.vm("a", 1).await;
    let change = |change| Intent::ChangeVm { vm, change };
    let spec = VmChange {
        spec: Some(new_vm("x").spec),
        ..VmChange::default()
    };
    assert_eq!(
        pool.submit(change(spec)).await.unwrap_err().kind,
        "not-stopped"
    );
    let rename = VmChange {
        name: Some("b".into()),
        ..VmChange::default()
    };
    pool.submit(change(rename)).await.unwrap();
    assert!(pool.view().find_vm("a").is_none() && pool.view().find_vm("b").is_some());
    let mut again = new_vm("a");
    again.intent = PowerIntent::Stopped;
    pool.submit(Intent::CreateVm(again))
        .await
        .expect("the old name is free");
}

#[tokio::test(start_paused = true)]
async fn the_decision_about_a_migration_stands_for_ever() {
    let pool = Pool::of(2).await;
    let vm = pool.vm("a", 1).await;
    let (agents, _) = pool.server_now();
    for (void_first, kind) in [(true, "void"), (false, "committed")] {
        let from = pool.owner(vm).unwrap();
        let to = 3 - from;
        let operation = pool
            .submit(migrate(vm, to))
            .await
            .unwrap()
            .operation
            .unwrap();
        pool.wait("it is open", |view| view.vms[&vm].migration.is_some())
            .await;
        let view = pool.view();
        let (id, epoch) = (view.vms[&vm].migration.unwrap(), view.vms[&vm].epoch);
        let commit = CommitRequest {
            vm,
            host: Pool::id(to),
            epoch,
        };
        let resolve = ResolveRequest {
            vm,
            host: Pool::id(from),
            role: MigrationRole::Source,
            epoch,
        };
        if void_first {
            // Too early on purpose: whoever asks first decides.
            assert_eq!(
                agents.resolve(Pool::id(from), id, resolve).await,
                Ok(Resolution::RunHere { epoch })
            );
            for _ in 0..2 {
                let reply = agents.commit(Pool::id(to), id, commit).await.unwrap();
                assert!(matches!(reply, CommitReply::Refused { .. }));
            }
            assert_eq!(
                agents.resolve(Pool::id(from), id, resolve).await,
                Ok(Resolution::RunHere { epoch })
            );
        } else {
            pool.ended(operation).await;
            for _ in 0..2 {
                let reply = agents.commit(Pool::id(to), id, commit).await.unwrap();
                assert_eq!(
                    reply,
                    CommitReply::Granted {
                        epoch: epoch.next()
                    }
                );
            }
            assert_eq!(
                agents.resolve(Pool::id(from), id, resolve).await,
                Ok(Resolution::End)
            );
        }
        pool.ended(operation).await;
        assert_eq!(pool.view().migrations[&id].state.name(), kind);
        pool.running(vm).await;
        assert_eq!(pool.runs_on(vm), [pool.owner(vm).unwrap()]);
    }
    assert_eq!(pool.owner(vm), Some(2));
}

#[tokio::test(start_paused = true)]
async fn another_host_cannot_ask_for_a_commit() {
    let pool = Pool::of(3).await;
    let vm = pool.vm("a", 1).await;
    let operation = pool.submit(migrate(vm, 2)).await.unwrap();
    pool.wait("it is open", |view| view.vms[&vm].migration.is_some())
        .await;
    let (agents, _) = pool.server_now();
    let view = pool.view();
    let (id, epoch) = (view.vms[&vm].migration.unwrap(), view.vms[&vm].epoch);
    let posing = CommitRequest {
        vm,
        host: Pool::id(2),
        epoch,
    };
    assert_eq!(
        agents
            .commit(Pool::id(3), id, posing)
            .await
            .unwrap_err()
            .status,
        403
    );
    let own = CommitRequest {
        vm,
        host: Pool::id(3),
        epoch,
    };
    assert_eq!(
        agents.commit(Pool::id(3), id, own).await.unwrap_err().kind,
        "wrong-migration"
    );
    pool.succeeds(operation).await;
}

#[tokio::test(start_paused = true)]
async fn a_guest_that_powers_off_stays_off_and_a_vmm_that_dies_is_started_again() {
    let pool = Pool::of(2).await;
    let (halts, dies) = (pool.vm("halts", 1).await, pool.vm("dies", 1).await);
    pool.host(1).halt_guest(halts);
    pool.wait("it is off", |view| {
        view.vms[&halts].owner.is_none() && view.vms[&halts].operation.is_none()
    })
    .await;
    assert_eq!(pool.view().vms[&halts].intent, PowerIntent::Stopped);
    assert_eq!(pool.events("vm.halted"), 1);

    pool.host(1).kill_vmm(dies);
    pool.wait("it was restarted", |view| view.vms[&dies].epoch.0 == 2)
        .await;
    pool.running(dies).await;
    assert_eq!(
        pool.owner(dies),
        Some(1),
        "its own host is the first choice"
    );
    assert_eq!(pool.events("vm.restarted"), 1);
}

#[tokio::test(start_paused = true)]
async fn a_removed_host_is_turned_away() {
    let pool = Pool::of(2).await;
    let vm = pool.vm("a", 1).await;
    assert_eq!(
        pool.submit(Intent::RemoveHost { host: Pool::id(1) })
            .await
            .unwrap_err()
            .kind,
        "not-empty"
    );
    pool.submit(Intent::RemoveHost { host: Pool::id(2) })
        .await
        .unwrap();
    tokio::time::sleep(Duration::from_secs(3)).await;
    assert_eq!(pool.view().hosts.len(), 1);
    assert!(!pool.view().observed.contains_key(&Pool::id(2)));
    assert_eq!(pool.runs_on(vm), [1]);
}

#[tokio::test(start_paused = true)]
async fn events_are_numbered_without_gaps_and_the_log_is_bounded() {
    let pool = Pool::of(1).await;
    for n in 0..30 {
        let reason = format!("{n}");
        pool.submit(Intent::CordonHost {
            host: Pool::id(1),
            reason,
        })
        .await
        .unwrap();
        pool.submit(Intent::UncordonHost { host: Pool::id(1) })
            .await
            .unwrap();
    }
    let all = pool.controller.events_after(0, usize::MAX).unwrap();
    assert!(
        all.iter()
            .enumerate()
            .all(|(n, event)| event.revision == n as u64 + 1)
    );
    assert_eq!(
        pool.controller
            .events_after(all.len() as u64 - 2, 10)
            .unwrap()
            .len(),
        2
    );
    assert_eq!(pool.view().event_revision, all.len() as u64);
}

#[tokio::test(start_paused = true)]
async fn a_destruction_that_fails_for_now_is_tried_until_it_succeeds() {
    let pool = Pool::of(1).await;
    let vm = pool.vm("a", 1).await;
    let failing = Problem::new(503, "unavailable", "Not now", "not now");
    pool.host(1).refuse_destructions(Some(failing));
    let mode = godwit_wire::host_api::StopMode::Kill;
    let stop = pool.submit(Intent::StopVm { vm, mode }).await.unwrap();
    tokio::time::sleep(Duration::from_secs(20)).await;
    let refused = pool.host(1).destructions_refused();
    assert!((5..=15).contains(&refused), "{refused} in 20 s");
    pool.host(1).refuse_destructions(None);
    pool.succeeds(stop).await;
    assert!(!pool.host(1).has(vm));
}

#[tokio::test(start_paused = true)]
async fn a_stop_that_is_refused_is_begun_again_only_after_a_pause() {
    let pool = Pool::of(1).await;
    let vm = pool.vm("a", 1).await;
    pool.host(1)
        .refuse_destructions(Some(Problem::conflict("stale-epoch", "stale")));
    let mode = godwit_wire::host_api::StopMode::Kill;
    let stop = pool.submit(Intent::StopVm { vm, mode }).await.unwrap();
    assert_eq!(
        pool.ended(stop.operation.unwrap()).await,
        OperationState::Failed
    );
    tokio::time::sleep(Duration::from_secs(20)).await;
    let refused = pool.host(1).destructions_refused();
    assert!((2..=8).contains(&refused), "{refused} in 20 s");
    pool.host(1).refuse_destructions(None);
    pool.wait("it is off", |view| view.vms[&vm].owner.is_none())
        .await;
}
