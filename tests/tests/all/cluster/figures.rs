//! What devices count reaches `/metrics`, and the balloon does what the operator asks.

use super::{HOST_MIB, create_linux};
use godwit_tests::cluster::{Cluster, OPERATION_PATIENCE};
use godwit_tests::linux::LinuxGuest;
use godwit_tests::require;
use hyper::Method;
use serde_json::json;
use std::time::Instant;

/// The value of a metric with these labels.
async fn metric(cluster: &Cluster, name: &str, device: &str) -> Option<u64> {
    let answer = cluster
        .api
        .send(Method::GET, "/metrics", None::<&()>)
        .await
        .expect("metrics");
    let text = String::from_utf8(answer.body.to_vec()).expect("text");
    let line = format!("godwit_vm_{name}{{vm=\"thrush\",device=\"{device}\"}} ");
    let value = text.lines().find_map(|known| known.strip_prefix(&line))?;
    value.parse().ok()
}

/// Waits until the metric is as wanted; hosts tell figures every few seconds.
async fn wait_for(cluster: &Cluster, name: &str, device: &str, wanted: impl Fn(u64) -> bool) {
    let deadline = Instant::now() + OPERATION_PATIENCE;
    loop {
        let now = metric(cluster, name, device).await;
        if now.is_some_and(&wanted) {
            return;
        }
        assert!(Instant::now() < deadline, "{name} of {device}: {now:?}");
        tokio::time::sleep(std::time::Duration::from_millis(200)).await;
    }
}

#[tokio::test]
async fn device_counters_reach_the_metrics_and_the_balloon_obeys() {
    let guest = require!(LinuxGuest::prepare());
    let cluster = Cluster::start(1, HOST_MIB).await.expect("a cluster");
    cluster.wait_for_pool().await.expect("a pool");
    let mut shell = create_linux(&cluster, &guest, "thrush", 32).await;
    shell
        .command("disk write /dev/vda 5 16")
        .await
        .expect("write");
    wait_for(&cluster, "block_write_bytes_total", "data", |bytes| {
        bytes >= 16 << 20
    })
    .await;
    wait_for(&cluster, "balloon_actual_bytes", "balloon", |bytes| {
        bytes == 0
    })
    .await;

    let change = |keep: u64| json!({ "keep_memory_mib": keep });
    let path = "/v1/vms/thrush";
    let patch = |keep| {
        let body = change(keep);
        let api = &cluster.api;
        async move {
            api.send(Method::PATCH, path, Some(&body))
                .await
                .expect("answered")
        }
    };
    let refused = patch(500).await;
    assert_eq!(refused.status.as_u16(), 422, "more than it has");
    let accepted = patch(128).await;
    assert_eq!(accepted.status.as_u16(), 202);
    wait_for(&cluster, "balloon_actual_bytes", "balloon", |bytes| {
        bytes == 64 << 20
    })
    .await;
}
