//! What is said of a migration before it begins, and what is kept of that.

use super::{HOST_MIB, text};
use godwit_tests::cluster::{Cluster, OPERATION_PATIENCE};
use godwit_tests::require;
use godwit_tests::skip;
use serde_json::{Value, json};

async fn foresee(cluster: &Cluster, target: &str, policy: Value) -> Value {
    let answer: Value = cluster
        .api
        .post(
            "/v1/vms/knot/migrate?dry_run=true",
            &json!({ "target": target, "policy": policy }),
        )
        .await
        .expect("a dry run");
    assert_eq!(answer["dry_run"], true, "{answer}");
    let forecast = answer["forecast"].clone();
    assert_eq!(forecast["measured"]["dirty_from"], "sampled", "{answer}");
    let told = answer["changes"].as_array().expect("sentences");
    assert!(
        told.iter()
            .filter_map(Value::as_str)
            .any(|change| change.ends_with(text(&forecast, "summary"))),
        "{answer}"
    );
    forecast
}

#[tokio::test]
async fn a_dry_run_says_whether_a_migration_converges_and_if_not_why_and_what_would_help() {
    require!(skip::kvm());
    let cluster = Cluster::start(2, HOST_MIB).await.expect("a cluster");
    cluster
        .create_pilot("knot", "host-1", 1, 320)
        .await
        .expect("a VM");
    cluster
        .wait_for_vm("knot", OPERATION_PATIENCE, |vm| vm["operation"].is_null())
        .await
        .expect("its start is over");

    let idle = foresee(&cluster, "host-2", json!({})).await;

    assert_eq!(idle["verdict"], "converges", "{idle}");
    assert_eq!(idle["throttle_percent"], 0, "{idle}");
    assert!(idle["blackout_ms"].as_u64().is_some_and(|ms| ms <= 300));
    assert_eq!(idle["options"], json!([]));
    let vm = cluster.vm("knot").await.expect("the VM");
    assert_eq!(
        (&vm["host_name"], &vm["migration"], &vm["operation"]),
        (&json!("host-1"), &Value::Null, &Value::Null),
        "a dry run changes nothing"
    );

    cluster.migrate("knot", "host-2").await.expect("accepted");
    cluster
        .wait_for_vm("knot", OPERATION_PATIENCE, |vm| {
            vm["host_name"] == "host-2" && vm["state"] == "running" && vm["operation"].is_null()
        })
        .await
        .expect("it moves");
    let migrations: Value = cluster.api.get("/v1/migrations").await.expect("a list");
    let foreseen = &migrations["items"][0]["foreseen"];
    assert_eq!(foreseen["verdict"], "converges", "{migrations}");

    let mut shell = cluster.shell("knot").await.expect("its console");
    shell.command("fill 256").await.expect("fill");
    shell.command("dirty 50 64").await.expect("dirty");
    // However busy this machine is, the guest outruns this link.
    let narrow = json!({ "max_bandwidth_bytes_per_s": 2 << 20, "max_throttle_percent": 0 });

    let busy = foresee(&cluster, "host-1", narrow).await;

    assert_eq!(busy["verdict"], "will_not_converge", "{busy}");
    assert_eq!(busy["because"]["kind"], "dirties_too_fast", "{busy}");
    let options = busy["options"].as_array().expect("options");
    assert!(
        options
            .iter()
            .any(|option| option["kind"] == "allow_post_copy"),
        "{busy}"
    );
    assert!(
        busy["measured"]["dirty_bytes_per_s"]
            .as_u64()
            .is_some_and(|rate| rate > 2 << 20),
        "{busy}"
    );
}
