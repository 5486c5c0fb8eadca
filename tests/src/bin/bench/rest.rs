//! A pool of 2,000 VMs paged through over REST.

use crate::report::{Op, Report};
use anyhow::ensure;
use godwit_tests::cluster::Cluster;
use serde_json::{Value, json};
use std::time::Instant;

const VMS: usize = 2_000;
const WARM_UP: usize = 2;
const RUNS: usize = 15;

pub(crate) async fn measure(report: &mut Report) -> anyhow::Result<()> {
    let cluster = Cluster::start_server().await?;
    for number in 0..VMS {
        let vm = json!({
            "name": format!("vm-{number:04}"),
            "spec": { "vcpus": 1, "memory_mib": 64, "boot": { "kind": "pilot" } },
            "start": false,
        });
        let _: Value = cluster.api.post("/v1/vms", &vm).await?;
    }
    let mut times = Vec::new();
    for run in 0..WARM_UP + RUNS {
        let start = Instant::now();
        let listed = page_through(&cluster).await?;
        let elapsed_ms = start.elapsed().as_secs_f64() * 1000.0;
        ensure!(listed == VMS, "{listed} VMs listed instead of {VMS}");
        if run >= WARM_UP {
            times.push(elapsed_ms);
        }
    }
    let median = report.raw("rest_page_through_2000_vms_ms", "ms", &times);
    report.figure(
        "rest_page_through_2000_vms_ms",
        median,
        "ms",
        Op::AtMost,
        200.0,
    );
    Ok(())
}

/// Follows `next` with the default page size; returns how many VMs were listed.
async fn page_through(cluster: &Cluster) -> anyhow::Result<usize> {
    let mut listed = 0;
    let mut path = "/v1/vms".to_owned();
    loop {
        let page: Value = cluster.api.get(&path).await?;
        listed += page["items"].as_array().map_or(0, Vec::len);
        match page["next"].as_str() {
            Some(cursor) => path = format!("/v1/vms?cursor={cursor}"),
            None => return Ok(listed),
        }
    }
}
