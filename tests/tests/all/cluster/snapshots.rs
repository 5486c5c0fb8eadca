//! VMs are saved to a pool and go on from there, and never over disks that have moved on.

use super::{HOST_MIB, text};
use godwit_tests::cluster::{Cluster, OPERATION_PATIENCE};
use godwit_tests::require;
use godwit_tests::skip;
use serde_json::{Value, json};

/// Waits until the operation that was accepted has ended.
async fn ended(cluster: &Cluster, accepted: &Value) -> Value {
    let id = text(&accepted["operation"], "id");
    cluster
        .wait_for(
            &format!("/v1/operations/{id}"),
            OPERATION_PATIENCE,
            |operation| !["pending", "running"].contains(&text(operation, "state")),
        )
        .await
        .expect("it ends")
}

async fn succeeds(cluster: &Cluster, path: &str, body: Value) -> Value {
    let accepted: Value = cluster.api.post(path, &body).await.expect("accepted");
    let operation = ended(cluster, &accepted).await;
    assert_eq!(operation["state"], "succeeded", "{operation:#}");
    operation
}

async fn stop(cluster: &Cluster, vm: &str) {
    let path = format!("/v1/vms/{vm}/stop");
    succeeds(cluster, &path, json!({ "mode": "kill" })).await;
}

async fn filled_mib(cluster: &Cluster, vm: &str) -> u64 {
    super::verify(cluster, vm).await
}

#[tokio::test]
async fn a_vm_without_disks_is_saved_while_it_runs_and_goes_on_from_there() {
    require!(skip::kvm());
    let mut cluster = Cluster::start(1, HOST_MIB).await.expect("a cluster");
    cluster
        .create_pilot("crane", "host-1", 1, 128)
        .await
        .expect("a VM");
    let mut shell = cluster.shell("crane").await.expect("its console");
    shell.command("fill 48").await.expect("fill");
    let snapshots = "/v1/vms/crane/snapshots";
    succeeds(&cluster, snapshots, json!({ "name": "warm" })).await;
    let vm = cluster.vm("crane").await.expect("the VM");
    assert_eq!(vm["state"], "running", "it runs on");
    let path = format!("{snapshots}/warm");
    let taken: Value = cluster.api.get(&path).await.expect("the snapshot");
    assert_eq!(
        (&taken["state"], &taken["needs_disks"]),
        (&json!("ready"), &json!(false))
    );
    assert!(taken["bytes"].as_u64() > Some(48 << 20), "{taken:#}");
    let restore = format!("{snapshots}/warm/restore");
    let refused = cluster.api.post::<Value>(&restore, &json!({})).await;
    let refused = format!("{:#}", refused.expect_err("it runs"));
    assert!(refused.contains("not off"), "{refused}");

    stop(&cluster, "crane").await;
    // Everything is on record: a server that was killed knows its snapshots.
    cluster.kill_server();
    cluster.revive_server().await.expect("the server is back");
    cluster.wait_for_pool().await.expect("its host is heard");
    for _ in 0..2 {
        succeeds(&cluster, &restore, json!({})).await;
        cluster
            .wait_for_vm("crane", OPERATION_PATIENCE, |vm| vm["state"] == "running")
            .await
            .expect("it runs");
        assert_eq!(filled_mib(&cluster, "crane").await, 48);
        stop(&cluster, "crane").await;
    }

    let delete_vm = cluster.api.delete::<Value>("/v1/vms/crane").await;
    let refused = format!("{:#}", delete_vm.expect_err("it has a snapshot"));
    assert!(refused.contains("warm"), "{refused}");
    let accepted: Value = cluster.api.delete(&path).await.expect("accepted");
    assert_eq!(ended(&cluster, &accepted).await["state"], "succeeded");
    let left: Value = cluster.api.get(snapshots).await.expect("a list");
    assert_eq!(left["items"], json!([]));
    let pool = cluster.dir.join("host-1").join("pool/snapshots");
    let kept = std::fs::read_dir(&pool)
        .expect("the pool's snapshots")
        .count();
    assert_eq!(kept, 0, "nothing is left in {}", pool.display());
}

#[tokio::test]
async fn a_vm_with_a_disk_stops_with_its_snapshot_and_goes_on_only_while_the_disk_is_as_it_was() {
    require!(skip::kvm());
    let cluster = Cluster::start(1, HOST_MIB).await.expect("a cluster");
    cluster.wait_for_pool().await.expect("a pool");
    let vm = json!({
        "name": "stork",
        "spec": { "vcpus": 1, "memory_mib": 64, "boot": { "kind": "pilot" } },
        "disks": [{ "name": "data", "bytes": 8 << 20, "format": "raw" }],
        "host": "host-1",
    });
    let _: Value = cluster.api.post("/v1/vms", &vm).await.expect("accepted");
    let running = |vm: &Value| vm["state"] == "running";
    cluster
        .wait_for_vm("stork", OPERATION_PATIENCE, running)
        .await
        .expect("it runs");
    let mut shell = cluster.shell("stork").await.expect("its console");
    shell.command("fill 16").await.expect("fill");
    let snapshots = "/v1/vms/stork/snapshots";
    let live = json!({ "name": "live" });
    let refused = cluster.api.post::<Value>(snapshots, &live).await;
    let refused = format!("{:#}", refused.expect_err("its disk moves on"));
    assert!(refused.contains("does not hold disks"), "{refused}");

    let body = json!({ "name": "asleep", "stop": true });
    succeeds(&cluster, snapshots, body).await;
    let vm = cluster.vm("stork").await.expect("the VM");
    assert_eq!(
        (&vm["state"], &vm["host"]),
        (&json!("stopped"), &Value::Null)
    );

    let restore = format!("{snapshots}/asleep/restore");
    succeeds(&cluster, &restore, json!({})).await;
    cluster
        .wait_for_vm("stork", OPERATION_PATIENCE, running)
        .await
        .expect("it goes on");
    assert_eq!(filled_mib(&cluster, "stork").await, 16);

    // It has had its disk again since: what the snapshot remembers of it is not true any more.
    stop(&cluster, "stork").await;
    let accepted: Value = cluster
        .api
        .post(&restore, &json!({}))
        .await
        .expect("accepted");
    let operation = ended(&cluster, &accepted).await;
    assert_eq!(
        (&operation["state"], &operation["error"]["type"]),
        (&json!("failed"), &json!("disks-moved-on")),
        "{operation:#}"
    );
    let vm = cluster.vm("stork").await.expect("the VM");
    assert_eq!(vm["intent"], "stopped", "it does not boot instead: {vm:#}");
    succeeds(&cluster, "/v1/vms/stork/start", json!({})).await;
}
