//! Agents and the server come and go; VMs run on.

use super::{HOST_MIB, create_busy_pilot, text, verify, wait_until_one_copy_runs};
use godwit_tests::cluster::{Cluster, OPERATION_PATIENCE};
use godwit_tests::require;
use godwit_tests::skip;

#[tokio::test]
async fn vms_run_on_while_their_agent_is_down_and_are_adopted_again() {
    require!(skip::kvm());
    let mut cluster = Cluster::start(1, HOST_MIB).await.expect("a cluster");
    let vm = create_busy_pilot(&cluster, "wader", "host-1").await;
    let id = text(&vm, "id").to_owned();
    let pid = cluster.vmm("host-1", &id).await.expect("a VMM").pid;

    cluster.kill_agent("host-1");
    assert_eq!(cluster.running_on(&id).await, ["host-1"], "the VM runs on");
    cluster
        .revive_agent("host-1")
        .expect("the agent starts again");

    wait_until_one_copy_runs(&cluster, "wader", OPERATION_PATIENCE).await;
    assert_eq!(
        cluster.vmm("host-1", &id).await.expect("a VMM").pid,
        pid,
        "it is the same process"
    );
    verify(&cluster, "wader").await;
}

#[tokio::test]
async fn the_server_remembers_everything_across_a_kill() {
    require!(skip::kvm());
    let mut cluster = Cluster::start(2, HOST_MIB).await.expect("a cluster");
    let before = create_busy_pilot(&cluster, "wader", "host-2").await;
    cluster.kill_server();
    cluster
        .revive_server()
        .await
        .expect("the server starts again");
    let after = cluster.vm("wader").await.expect("the VM is known");
    for field in [
        "id",
        "name",
        "spec",
        "intent",
        "host_name",
        "epoch",
        "created_at",
    ] {
        assert_eq!(after[field], before[field], "{field}");
    }
    cluster
        .wait_for_host("host-1", "up")
        .await
        .expect("the host is known");
    assert_eq!(
        wait_until_one_copy_runs(&cluster, "wader", OPERATION_PATIENCE).await,
        "host-2"
    );
    verify(&cluster, "wader").await;
}
