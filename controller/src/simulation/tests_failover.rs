//! Silence, and what becomes of VMs in it. Never twice is checked all the time.

use super::*;
use crate::model::Liveness;
use godwit_wire::host_api::{Heartbeat, HostReport, StopMode};
use godwit_wire::usage::HostUsage;

/// Waits until the VM's vCPUs run on another host; returns how long that took.
async fn restarted(pool: &Pool, vm: VmId, from: u128) -> Duration {
    let begun = Instant::now();
    while !pool.runs_on(vm).iter().any(|host| *host != from) {
        assert!(begun.elapsed() < PATIENCE, "never restarted");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    pool.check();
    begun.elapsed()
}

#[tokio::test(start_paused = true)]
async fn vms_of_a_host_that_falls_silent_run_elsewhere_after_9_to_15_seconds() {
    let pool = Pool::of(3).await;
    let vm = pool.vm("a", 1).await;
    // The worst case for the wait is a cut right after a heartbeat, the best right before one.
    pool.host(1).cut();
    let took = restarted(&pool, vm, 1).await;
    assert!(
        took >= Duration::from_secs(8) && took <= Duration::from_secs(15),
        "{took:?}"
    );
    assert_eq!(pool.events("host.unreachable"), 1);
    assert_eq!(pool.events("vm.restarted"), 1);
    let kept = pool.owner(vm).unwrap();

    pool.host(1).mend();
    let old = pool.host(1).clone();
    pool.wait("the old copy is gone", |_| !old.has(vm)).await;
    pool.wait("the host is back", |view| {
        view.liveness(Pool::id(1)) == Liveness::Up
    })
    .await;
    assert_eq!((pool.owner(vm), pool.runs_on(vm)), (Some(kept), vec![kept]));
    assert_eq!(pool.events("host.returned"), 1);
}

#[tokio::test(start_paused = true)]
async fn the_wait_is_never_shorter_than_the_lease_the_stop_time_and_the_margin() {
    let pool = Pool::of(2).await;
    let vm = pool.vm("a", 1).await;
    let id = Pool::id(1);
    let heard = || pool.view().observed[&id].heard_at;
    let before = heard();
    let mut last = Instant::now();
    pool.wait("a heartbeat comes", |_| {
        last = Instant::now();
        heard() != before
    })
    .await;
    pool.host(1).cut();
    let cut = Instant::now();
    restarted(&pool, vm, 1).await;
    assert!(
        last.elapsed() >= Duration::from_secs(9) - Duration::from_millis(10),
        "{:?}",
        cut.elapsed()
    );
}

#[tokio::test(start_paused = true)]
async fn a_frozen_agent_never_leads_to_two_running_copies() {
    let pool = Pool::of(2).await;
    let vm = pool.vm("a", 1).await;
    pool.host(1).freeze();
    restarted(&pool, vm, 1).await;
    tokio::time::sleep(Duration::from_secs(20)).await;
    pool.host(1).thaw();
    tokio::time::sleep(Duration::from_secs(5)).await;
    pool.check();
    assert_eq!(pool.runs_on(vm), [2]);
    assert!(!pool.host(1).has(vm));
}

#[tokio::test(start_paused = true)]
async fn a_short_silence_ends_with_the_same_vm_on_the_same_host() {
    let pool = Pool::of(2).await;
    let vm = pool.vm("a", 1).await;
    let epoch = pool.view().vms[&vm].epoch;
    let id = Pool::id(1);
    let before = pool.view().observed[&id].heard_at;
    pool.wait("a heartbeat comes", |view| {
        view.observed[&id].heard_at != before
    })
    .await;
    tokio::time::sleep(Duration::from_millis(100)).await;
    pool.host(1).cut();
    tokio::time::sleep(Duration::from_millis(8_200)).await;
    assert!(pool.runs_on(vm).is_empty(), "it has stopped itself");
    pool.host(1).mend();
    pool.running(vm).await;
    assert_eq!(
        (pool.owner(vm), pool.view().vms[&vm].epoch),
        (Some(1), epoch)
    );
    assert_eq!(pool.runs_on(vm), [1]);
}

#[tokio::test(start_paused = true)]
async fn an_unwatched_vm_runs_on_and_awaits_a_fence() {
    let pool = Pool::of(2).await;
    let vm = pool
        .vm_with("a", 1, |new| new.lease = LeasePolicy::Unwatched)
        .await;
    pool.host(1).cut();
    pool.wait("it awaits a fence", |view| {
        view.vm_status(&view.vms[&vm]).state == VmState::AwaitingFence
    })
    .await;
    tokio::time::sleep(Duration::from_secs(60)).await;
    assert_eq!((pool.owner(vm), pool.runs_on(vm)), (Some(1), vec![1]));
    pool.host(1).mend();
    pool.running(vm).await;
    assert_eq!(pool.runs_on(vm), [1]);
}

#[tokio::test(start_paused = true)]
async fn a_reboot_is_proof_that_everything_from_before_is_gone() {
    let pool = Pool::of(2).await;
    let watched = pool.vm("a", 1).await;
    let unwatched = pool
        .vm_with("b", 1, |new| new.lease = LeasePolicy::Unwatched)
        .await;
    pool.host(1).cut();
    tokio::time::sleep(Duration::from_secs(3)).await;
    pool.host(1).reboot();
    pool.host(1).mend();
    tokio::time::sleep(Duration::from_secs(4)).await;
    assert_eq!(
        pool.events("host.rebooted"),
        0,
        "as if another machine had its identity, it waits"
    );
    for vm in [watched, unwatched] {
        pool.wait("it was started again", |view| view.vms[&vm].epoch.0 == 2)
            .await;
        pool.running(vm).await;
        assert_eq!(pool.runs_on(vm).len(), 1);
    }
    assert_eq!(pool.events("host.rebooted"), 1);
}

#[tokio::test(start_paused = true)]
async fn after_a_server_start_every_host_has_a_full_wait() {
    let mut pool = Pool::of(2).await;
    let vm = pool.vm("a", 1).await;
    let epoch = pool.view().vms[&vm].epoch;
    pool.restart_server(Duration::from_secs(60), None).await;
    pool.running(vm).await;
    assert_eq!(
        (pool.owner(vm), pool.view().vms[&vm].epoch),
        (Some(1), epoch),
        "it was resumed, not restarted"
    );

    // A host that is silent when the server starts is given up only after a wait from then on.
    pool.host(1).cut();
    pool.restart_server(Duration::from_secs(60), None).await;
    let took = restarted(&pool, vm, 1).await;
    assert!(
        took >= Duration::from_secs(9) && took <= Duration::from_secs(15),
        "{took:?}"
    );
}

#[tokio::test(start_paused = true)]
async fn a_vm_that_its_host_does_not_know_any_more_is_started_only_there() {
    let pool = Pool::of(2).await;
    let vm = pool.vm("a", 1).await;
    pool.host(1).hide_vms();
    pool.wait("it was started again", |view| view.vms[&vm].epoch.0 == 2)
        .await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!(pool.owner(vm), Some(1), "absence from a report is no proof");
    pool.check();
}

#[tokio::test(start_paused = true)]
async fn vms_that_find_no_room_stay_with_the_silent_host_until_it_is_back() {
    let pool = Pool::of(2).await;
    let vm = pool
        .vm_with("big", 1, |new| new.spec.memory_mib = Mib(3000))
        .await;
    pool.vm_with("other", 2, |new| new.spec.memory_mib = Mib(3000))
        .await;
    pool.host(1).cut();
    pool.wait("the operator is told", |view| {
        view.vms[&vm].trouble.is_some()
    })
    .await;
    tokio::time::sleep(Duration::from_secs(60)).await;
    assert_eq!(pool.owner(vm), Some(1));
    assert_eq!(pool.events("vm.no_room"), 1, "once, not with every look");
    pool.host(1).mend();
    pool.running(vm).await;
    assert_eq!(pool.runs_on(vm), [1]);
}

#[tokio::test(start_paused = true)]
async fn a_crash_loop_slows_down_and_does_not_go_on_for_ever() {
    let pool = Pool::of(1).await;
    let vm = pool.vm("a", 1).await;
    let begun = Instant::now();
    for round in 0..4 {
        let epoch = pool.view().vms[&vm].epoch;
        pool.host(1).kill_vmm(vm);
        pool.wait("it was started again", |view| view.vms[&vm].epoch > epoch)
            .await;
        pool.running(vm).await;
        assert!(
            begun.elapsed() >= Duration::from_secs((1 << round) - 1),
            "round {round}: {:?}",
            begun.elapsed()
        );
    }
}

#[tokio::test(start_paused = true)]
async fn a_source_that_falls_silent_during_a_migration_loses_no_vm() {
    for after_ms in [100, 700, 1_400, 1_510, 1_530, 1_545, 1_600] {
        for cut in [1, 2] {
            let pool = Pool::of(3).await;
            let vm = pool.vm("a", 1).await;
            let policy = godwit_wire::migration::MigrationPolicy::default();
            let intent = Intent::MigrateVm {
                vm,
                target: Some(Pool::id(2)),
                policy,
                disks: Default::default(),
            };
            let operation = pool.submit(intent).await.unwrap().operation.unwrap();
            tokio::time::sleep(Duration::from_millis(after_ms)).await;
            pool.host(cut).cut();
            pool.ended(operation).await;
            tokio::time::sleep(Duration::from_secs(30)).await;
            pool.running(vm).await;
            assert_eq!(
                pool.runs_on(vm),
                [pool.owner(vm).unwrap()],
                "cut {cut} after {after_ms} ms"
            );
            pool.host(cut).mend();
            tokio::time::sleep(Duration::from_secs(10)).await;
            pool.check();
            assert_eq!(
                pool.runs_on(vm),
                [pool.owner(vm).unwrap()],
                "cut {cut} after {after_ms} ms, mended"
            );
            let copies = pool.hosts.values().filter(|host| host.has(vm)).count();
            assert_eq!(copies, 1, "cut {cut} after {after_ms} ms");
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_second_machine_with_the_identity_of_a_host_that_is_heard_proves_nothing() {
    let pool = Pool::of(2).await;
    let vm = pool
        .vm_with("a", 1, |new| new.lease = LeasePolicy::Unwatched)
        .await;
    let mut facts = pool.host(1).facts();
    facts.boot_id = Uuid::from_u128(7);
    for sequence in 1..60 {
        let beat = Heartbeat {
            host: Pool::id(1),
            incarnation: Uuid::from_u128(8),
            sequence,
            obeyed: 0,
            report: HostReport {
                pools: Vec::new(),
                facts: facts.clone(),
                usage: HostUsage::default(),
                vms: Vec::new(),
            },
        };
        let refused = pool.server_now().0.heartbeat(Pool::id(1), beat).await;
        assert_eq!(refused.unwrap_err().kind, "duplicate-identity");
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
    assert_eq!((pool.owner(vm), pool.runs_on(vm)), (Some(1), vec![1]));
    assert_eq!(pool.view().vms[&vm].epoch.0, 1);
    pool.check();
}

/// A pool whose first host was given up with the start of a VM on its way; the VM runs on the second.
async fn with_a_start_on_its_way() -> (Pool, VmId) {
    let pool = Pool::of(2).await;
    pool.host(1).hold_starts_up();
    let reason = "so that the VM is placed on the other".to_owned();
    let host = Pool::id(2);
    pool.submit(Intent::CordonHost { host, reason })
        .await
        .unwrap();
    pool.submit(Intent::CreateVm(new_vm("a"))).await.unwrap();
    let vm = pool.view().find_vm("a").unwrap().id;
    pool.wait("it is placed", |view| view.vms[&vm].owner.is_some())
        .await;
    pool.submit(Intent::UncordonHost { host }).await.unwrap();
    pool.host(1).cut();
    restarted(&pool, vm, 1).await;
    assert_eq!(pool.owner(vm), Some(2));
    (pool, vm)
}

#[tokio::test(start_paused = true)]
async fn a_start_that_reaches_a_given_up_host_after_its_return_is_refused() {
    let (pool, vm) = with_a_start_on_its_way().await;
    assert!(pool.view().vms[&vm].left_behind.contains_key(&Pool::id(1)));
    pool.host(1).mend();
    pool.wait("the host has confirmed", |view| {
        view.vms[&vm].left_behind.is_empty()
    })
    .await;
    let late = pool.host(1).let_starts_through();
    assert_eq!(late.len(), 1);
    assert_eq!(late[0].as_ref().unwrap_err().kind, "stale-epoch");
    tokio::time::sleep(Duration::from_secs(20)).await;
    pool.check();
    assert_eq!(pool.runs_on(vm), [2]);
}

#[tokio::test(start_paused = true)]
async fn a_start_that_is_late_by_any_time_never_runs_beside_the_other_copy() {
    for late_ms in [0, 1, 3, 5, 10, 100, 990, 1_000, 1_010, 2_000, 8_000] {
        let (pool, vm) = with_a_start_on_its_way().await;
        pool.host(1).mend();
        tokio::time::sleep(Duration::from_millis(late_ms)).await;
        let _ = pool.host(1).let_starts_through();
        tokio::time::sleep(Duration::from_secs(20)).await;
        pool.check();
        assert_eq!(pool.runs_on(vm), [2], "late by {late_ms} ms");
    }
}

#[tokio::test(start_paused = true)]
async fn a_start_that_was_asked_for_at_a_host_that_falls_silent_ends() {
    let pool = Pool::of(2).await;
    let vm = pool.vm("a", 1).await;
    let mode = StopMode::Kill;
    pool.succeeds(pool.submit(Intent::StopVm { vm, mode }).await.unwrap())
        .await;
    pool.host(1).hold_starts_up();
    let host = Some(Pool::id(1));
    let accepted = pool.submit(Intent::StartVm { vm, host }).await.unwrap();
    pool.wait("it is placed", |view| view.vms[&vm].owner.is_some())
        .await;
    pool.host(1).cut();
    let start = accepted.operation.unwrap();
    assert_eq!(pool.ended(start).await, OperationState::Failed);
    let error = pool.view().operations[&start].error.clone().unwrap();
    assert_eq!(error.kind, "no-room", "{error}");
    // It was wanted there; that it runs is wanted still.
    restarted(&pool, vm, 1).await;
    assert_eq!(pool.owner(vm), Some(2));
}

#[tokio::test(start_paused = true)]
async fn what_a_host_must_destroy_outlives_the_server_and_the_vm() {
    let (mut pool, vm) = with_a_start_on_its_way().await;
    let accepted = pool
        .submit(Intent::DeleteVm {
            vm,
            disks: Default::default(),
        })
        .await
        .unwrap();
    pool.succeeds(accepted).await;
    pool.restart_server(Duration::from_secs(1), None).await;
    pool.host(1).mend();
    tokio::time::sleep(Duration::from_secs(5)).await;
    let late = pool.host(1).let_starts_through();
    assert_eq!(late[0].as_ref().unwrap_err().kind, "stale-epoch");
    assert!(pool.runs_on(vm).is_empty());
}

#[tokio::test(start_paused = true)]
async fn the_operator_can_free_an_unwatched_vm_from_a_host_that_is_off() {
    let pool = Pool::of(2).await;
    let vm = pool
        .vm_with("a", 1, |new| new.lease = LeasePolicy::Unwatched)
        .await;
    let stopped = pool
        .vm_with("b", 1, |new| new.lease = LeasePolicy::Unwatched)
        .await;
    let off = Intent::ConfirmHostOff { host: Pool::id(1) };
    let early = pool.submit(off.clone()).await.unwrap_err();
    assert_eq!(early.kind, "host-not-given-up");
    pool.host(1).cut();
    pool.host(1).reboot();
    pool.wait("it awaits a fence", |view| {
        view.vm_status(&view.vms[&vm]).state == VmState::AwaitingFence
    })
    .await;
    let mode = godwit_wire::host_api::StopMode::Kill;
    let stop = Intent::StopVm { vm: stopped, mode };
    let stop = pool.submit(stop).await.unwrap();
    tokio::time::sleep(Duration::from_secs(30)).await;
    assert_eq!((pool.owner(vm), pool.owner(stopped)), (Some(1), Some(1)));

    pool.submit(off).await.unwrap();
    pool.succeeds(stop).await;
    pool.running(vm).await;
    assert_eq!((pool.owner(vm), pool.owner(stopped)), (Some(2), None));
    assert_eq!(pool.events("host.confirmed_off"), 1);
}
