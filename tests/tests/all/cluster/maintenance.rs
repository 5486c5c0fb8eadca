//! The main job: a host is emptied while its guests run, and they come home.

use super::{HOST_MIB, create_busy_pilot, text, verify, wait_until_one_copy_runs};
use godwit_tests::cluster::{Cluster, OPERATION_PATIENCE};
use godwit_tests::require;
use godwit_tests::skip;
use serde_json::{Value, json};

#[tokio::test]
async fn a_maintenance_drains_a_host_and_brings_its_vms_home() {
    require!(skip::kvm());
    let cluster = Cluster::start(3, HOST_MIB).await.expect("a cluster");
    let names = ["wader", "plover"];
    for name in names {
        create_busy_pilot(&cluster, name, "host-1").await;
    }
    let request = json!({ "host": "host-1", "reason": "new memory", "return": "exact" });
    let planned: Value = cluster
        .api
        .post("/v1/maintenances?dry_run=true", &request)
        .await
        .expect("a dry run");
    assert_eq!(
        planned["plan"]["moves"].as_array().map(Vec::len),
        Some(2),
        "{planned:#}"
    );
    let listed: Value = cluster
        .api
        .get("/v1/maintenances")
        .await
        .expect("maintenances");
    assert_eq!(listed["items"], json!([]), "a dry run changes nothing");

    let maintenance = plan(&cluster, &request).await;
    let path = format!("/v1/maintenances/{}", text(&maintenance, "id"));
    let _: Value = cluster
        .api
        .post(&format!("{path}/start"), &json!({}))
        .await
        .expect("start");
    let drained =
        |maintenance: &Value| matches!(maintenance["state"].as_str(), Some("drained" | "working"));
    cluster
        .wait_for(&path, OPERATION_PATIENCE, drained)
        .await
        .expect("the host is empty");
    for name in names {
        assert_ne!(cluster.vm(name).await.expect("a VM")["host_name"], "host-1");
        verify(&cluster, name).await;
    }
    let refused = json!({ "name": "late", "template": "pilot", "host": "host-1" });
    let answer = cluster
        .api
        .send(hyper::Method::POST, "/v1/vms", Some(&refused))
        .await
        .expect("an answer");
    assert!(
        answer.status.is_client_error(),
        "nothing starts on a host in maintenance: {}",
        answer.text()
    );

    let _: Value = cluster
        .api
        .post(&format!("{path}/finish"), &json!({}))
        .await
        .expect("finish");
    cluster
        .wait_for(&path, OPERATION_PATIENCE, |maintenance| {
            maintenance["state"] == "done"
        })
        .await
        .expect("done");
    for name in names {
        assert_eq!(
            wait_until_one_copy_runs(&cluster, name, OPERATION_PATIENCE).await,
            "host-1"
        );
        verify(&cluster, name).await;
    }
    cluster
        .wait_for_host("host-1", "up")
        .await
        .expect("the host is in use again");
}

#[tokio::test]
async fn a_vm_that_may_not_move_blocks_a_maintenance_with_a_remedy() {
    require!(skip::kvm());
    let cluster = Cluster::start(2, HOST_MIB).await.expect("a cluster");
    let vm = json!({ "name": "sitter", "template": "pilot", "host": "host-1", "maintenance_policy": "block" });
    let _: Value = cluster.api.post("/v1/vms", &vm).await.expect("a VM");
    cluster
        .wait_for_vm("sitter", OPERATION_PATIENCE, |vm| vm["state"] == "running")
        .await
        .expect("it runs");
    let request = json!({ "host": "host-1", "reason": "try" });
    let maintenance = plan(&cluster, &request).await;
    assert_eq!(maintenance["state"], "blocked", "{maintenance:#}");
    let blocker = &maintenance["plan"]["blockers"][0];
    assert_eq!(blocker["vm_name"], "sitter");
    assert!(!text(blocker, "remedy").is_empty(), "{blocker}");
}

#[tokio::test]
async fn a_cancelled_maintenance_leaves_the_host_in_use() {
    require!(skip::kvm());
    let cluster = Cluster::start(2, HOST_MIB).await.expect("a cluster");
    create_busy_pilot(&cluster, "wader", "host-1").await;
    let request = json!({ "host": "host-1", "reason": "changed my mind" });
    let maintenance = plan(&cluster, &request).await;
    let path = format!("/v1/maintenances/{}", text(&maintenance, "id"));
    let _: Value = cluster
        .api
        .post(&format!("{path}/start"), &json!({}))
        .await
        .expect("start");
    let _: Value = cluster
        .api
        .post(&format!("{path}/cancel"), &json!({ "restore": true }))
        .await
        .expect("cancel");
    let over = |maintenance: &Value| maintenance["state"] == "cancelled";
    cluster
        .wait_for(&path, OPERATION_PATIENCE, over)
        .await
        .expect("cancelled");
    cluster
        .wait_for_host("host-1", "up")
        .await
        .expect("the host is in use again");
    assert_eq!(
        wait_until_one_copy_runs(&cluster, "wader", OPERATION_PATIENCE).await,
        "host-1"
    );
    verify(&cluster, "wader").await;
}

/// Stores a maintenance.
async fn plan(cluster: &Cluster, request: &Value) -> Value {
    let accepted: Value = cluster
        .api
        .post("/v1/maintenances", request)
        .await
        .expect("a maintenance");
    accepted["maintenance"].clone()
}
