//! A host falls silent: its VMs start elsewhere in time, and never while the old copy may still run.

use super::{HOST_MIB, text, verify, wait_until_one_copy_runs};
use godwit_tests::cluster::{Cluster, OPERATION_PATIENCE};
use godwit_tests::network::{self, Island};
use godwit_tests::require;
use godwit_tests::skip;
use godwit_tests::test_dir::TestDir;
use godwit_wire::vmm_api::{PauseReason, VmmState};
use std::time::{Duration, Instant};

/// From silence to the VM running elsewhere.
const FAIL_OVER: Duration = Duration::from_secs(15);

/// Watches every copy of the VM until one runs on `host-2`; at no time do two of them run.
async fn watch_the_fail_over(cluster: &Cluster, id: &str) -> Duration {
    let silence = Instant::now();
    loop {
        let copies = cluster.running_on(id).await;
        assert!(copies.len() <= 1, "two copies run: {copies:?}");
        if copies == ["host-2"] {
            let old = cluster.vmm("host-1", id).await.map(|vmm| vmm.state);
            let stopped = VmmState::Paused {
                reason: PauseReason::LeaseExpired,
            };
            assert_eq!(old, Some(stopped), "the old copy has stopped itself");
            return silence.elapsed();
        }
        assert!(
            silence.elapsed() < FAIL_OVER * 2,
            "the VM does not come back"
        );
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test]
async fn a_frozen_agent_loses_its_vms_and_never_runs_them_twice() {
    require!(skip::kvm());
    let cluster = Cluster::start(2, HOST_MIB).await.expect("a cluster");
    let vm = cluster
        .create_pilot("wader", "host-1", 1, 64)
        .await
        .expect("a VM");

    cluster.agent("host-1").freeze();

    let took = watch_the_fail_over(&cluster, text(&vm, "id")).await;
    assert!(took <= FAIL_OVER, "{took:?}");
    cluster
        .wait_for_host("host-1", "unreachable")
        .await
        .expect("the host is known to be silent");
    cluster.agent("host-1").thaw();
    cluster
        .wait_for_host("host-1", "up")
        .await
        .expect("the host is back");
    assert_eq!(
        wait_until_one_copy_runs(&cluster, "wader", OPERATION_PATIENCE).await,
        "host-2"
    );
    assert!(
        cluster.vmm("host-1", text(&vm, "id")).await.is_none(),
        "the old copy was destroyed"
    );
}

#[tokio::test]
async fn a_host_cut_off_loses_its_vms_and_never_runs_them_twice() {
    require!(skip::kvm());
    require!(network::available());
    let dir = TestDir::new();
    let island = Island::new(&dir).expect("a network of its own");
    let wrapper = island.wrapper();
    let wrapper: Vec<&str> = wrapper.iter().map(String::as_str).collect();
    let mut cluster = Cluster::start_server_in(dir, island.mainland_ip)
        .await
        .expect("a server");
    cluster
        .join_host_in("host-1", HOST_MIB, island.island_ip, &wrapper)
        .await
        .expect("the island joins");
    cluster
        .join_host_in("host-2", HOST_MIB, island.mainland_ip, &[])
        .await
        .expect("the mainland joins");
    let vm = cluster
        .create_pilot("wader", "host-1", 1, 64)
        .await
        .expect("a VM");

    island.cut().expect("the cable is pulled");

    let took = watch_the_fail_over(&cluster, text(&vm, "id")).await;
    assert!(took <= FAIL_OVER, "{took:?}");
    island.mend().expect("the cable is plugged in");
    cluster
        .wait_for_host("host-1", "up")
        .await
        .expect("the host is back");
    assert_eq!(
        wait_until_one_copy_runs(&cluster, "wader", OPERATION_PATIENCE).await,
        "host-2"
    );
    assert!(
        cluster.vmm("host-1", text(&vm, "id")).await.is_none(),
        "the old copy was destroyed"
    );
}

#[tokio::test]
async fn a_short_silence_costs_nothing() {
    require!(skip::kvm());
    let cluster = Cluster::start(2, HOST_MIB).await.expect("a cluster");
    let vm = cluster
        .create_pilot("wader", "host-1", 1, 64)
        .await
        .expect("a VM");
    cluster
        .shell("wader")
        .await
        .expect("console")
        .command("fill 16")
        .await
        .expect("fill");
    cluster.agent("host-1").freeze();
    tokio::time::sleep(Duration::from_secs(3)).await;
    cluster.agent("host-1").thaw();
    tokio::time::sleep(Duration::from_secs(3)).await;
    let after = cluster.vm("wader").await.expect("the VM");
    assert_eq!(
        (&after["host_name"], &after["epoch"]),
        (&vm["host_name"], &vm["epoch"]),
        "it stayed where it was"
    );
    verify(&cluster, "wader").await;
}

#[tokio::test]
async fn a_vm_that_stopped_itself_goes_on_when_its_host_comes_back_first() {
    require!(skip::kvm());
    // One host: there is nowhere else to start the VM.
    let cluster = Cluster::start(1, HOST_MIB).await.expect("a cluster");
    let vm = cluster
        .create_pilot("wader", "host-1", 1, 64)
        .await
        .expect("a VM");
    cluster
        .shell("wader")
        .await
        .expect("console")
        .command("fill 16")
        .await
        .expect("fill");
    cluster.agent("host-1").freeze();
    let deadline = Instant::now() + FAIL_OVER;
    while !cluster.running_on(text(&vm, "id")).await.is_empty() {
        assert!(Instant::now() < deadline, "the VM does not stop itself");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    cluster.agent("host-1").thaw();
    assert_eq!(
        wait_until_one_copy_runs(&cluster, "wader", OPERATION_PATIENCE).await,
        "host-1"
    );
    verify(&cluster, "wader").await;
}
