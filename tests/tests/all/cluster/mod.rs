//! A server, host agents and VMMs as real processes, driven through REST.

mod console;
mod disks_along;
mod fail_over;
mod faults;
mod figures;
mod forecast;
mod full_pool;
mod kills;
mod maintenance;
mod restarts;
mod returning;
mod snapshots;
mod upgrade;

use godwit_tests::cluster::{Cluster, OPERATION_PATIENCE};
use godwit_tests::linux::{AGENT_CMDLINE, AGENT_GREETING, LinuxGuest};
use godwit_tests::serial::Serial;
use godwit_tests::vmm::BOOT_PATIENCE;
use serde_json::{Value, json};
use std::time::{Duration, Instant};

/// Room for a few pilots on each host.
const HOST_MIB: u64 = 1024;

/// A pilot VM whose memory holds data and changes.
async fn create_busy_pilot(cluster: &Cluster, name: &str, host: &str) -> Value {
    let vm = cluster
        .create_pilot(name, host, 1, 320)
        .await
        .expect("a VM");
    let mut shell = cluster.shell(name).await.expect("its console");
    shell.command("fill 256").await.expect("fill");
    shell.command("dirty 10 8").await.expect("dirty");
    vm
}

/// A Linux VM on `host-1` with a disk named `data`; gives its shell.
async fn create_linux(cluster: &Cluster, guest: &LinuxGuest, name: &str, disk_mib: u64) -> Serial {
    let boot = json!({
        "kind": "linux",
        "kernel": guest.kernel,
        "initrd": guest.initrd,
        "cmdline": AGENT_CMDLINE,
    });
    let vm = json!({
        "name": name,
        "spec": { "vcpus": 1, "memory_mib": 192, "boot": boot, "cpu": "host" },
        "disks": [{ "name": "data", "bytes": disk_mib << 20, "format": "raw" }],
        "host": "host-1",
    });
    let _: Value = cluster.api.post("/v1/vms", &vm).await.expect("accepted");
    let vm = cluster
        .wait_for_vm(name, OPERATION_PATIENCE, |vm| vm["state"] == "running")
        .await
        .expect("it runs");
    let socket = cluster
        .vm_dir("host-1", text(&vm, "id"))
        .join("serial.sock");
    let mut console = Serial::attach(&socket).await.expect("its console");
    console
        .wait_for(AGENT_GREETING, BOOT_PATIENCE)
        .await
        .expect("init is up");
    cluster.shell(name).await.expect("its shell")
}

/// The text of a field that is always there.
fn text<'a>(resource: &'a Value, field: &str) -> &'a str {
    resource[field]
        .as_str()
        .unwrap_or_else(|| panic!("no {field} in {resource}"))
}

/// The VM's memory is whole; returns how much of it is filled.
async fn verify(cluster: &Cluster, name: &str) -> u64 {
    const PAGES_PER_MIB: u64 = 256;
    let mut shell: Serial = cluster.shell(name).await.expect("the console");
    let verified = shell
        .command("verify")
        .await
        .expect("no page was lost, torn or stale");
    verified.number("verified_pages") / PAGES_PER_MIB
}

/// Watches until the VM has settled: one copy runs, on the host the store names, and stays the only one.
async fn wait_until_one_copy_runs(cluster: &Cluster, name: &str, patience: Duration) -> String {
    const SETTLED: Duration = Duration::from_secs(2);
    let deadline = Instant::now() + patience;
    let mut since: Option<(Instant, String)> = None;
    loop {
        let seen = cluster.vm(name).await.ok();
        let owner = match &seen {
            Some(vm) if vm["state"] == "running" && vm["migration"].is_null() => {
                let running = cluster.running_on(text(vm, "id")).await;
                assert!(running.len() <= 1, "{name} runs on {running:?}");
                running
                    .into_iter()
                    .next()
                    .filter(|host| vm["host_name"] == host.as_str())
            }
            _ => None,
        };
        match (owner, since.take()) {
            (Some(owner), Some((start, host))) if owner == host => {
                if start.elapsed() > SETTLED {
                    return owner;
                }
                since = Some((start, host));
            }
            (Some(owner), _) => since = Some((Instant::now(), owner)),
            (None, _) => {}
        }
        assert!(
            Instant::now() < deadline,
            "{name} does not settle: {seen:#?}"
        );
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}
