//! A new version of the program gets under running VMs: the agent is restarted, then its VMs change their VMMs.

use super::{HOST_MIB, create_busy_pilot, text, verify, wait_until_one_copy_runs};
use godwit_tests::cluster::{Cluster, OPERATION_PATIENCE, VMM_SOCKETS};
use godwit_tests::require;
use godwit_tests::skip;
use serde_json::{Value, json};
use std::path::PathBuf;
use std::time::{Duration, Instant};

/// A second VMM appears within this time.
const BEGIN_PATIENCE: Duration = Duration::from_secs(60);

/// Asks for an upgrade of `host-1`; returns its operation's path.
async fn upgrade(cluster: &Cluster) -> String {
    let accepted: Value = cluster
        .api
        .post("/v1/hosts/host-1/upgrade", &json!({}))
        .await
        .expect("it is accepted");
    format!("/v1/operations/{}", text(&accepted["operation"], "id"))
}

async fn ended(cluster: &Cluster, path: &str) -> Value {
    let over = |operation: &Value| {
        let state = operation["state"].as_str();
        matches!(state, Some("succeeded" | "failed" | "cancelled"))
    };
    cluster
        .wait_for(path, OPERATION_PATIENCE, over)
        .await
        .expect("it ends")
}

async fn pid(cluster: &Cluster, id: &str) -> u32 {
    cluster.vmm("host-1", id).await.expect("a VMM").pid
}

fn program_of(pid: u32) -> PathBuf {
    std::fs::read_link(format!("/proc/{pid}/exe")).expect("a program")
}

#[tokio::test]
async fn an_upgrade_hands_every_vm_of_a_host_to_the_agents_own_program() {
    require!(skip::kvm());
    let mut cluster = Cluster::start(1, HOST_MIB).await.expect("a cluster");
    let mut vms = Vec::new();
    for name in ["wader", "plover"] {
        let vm = create_busy_pilot(&cluster, name, "host-1").await;
        let id = text(&vm, "id").to_owned();
        let pid = pid(&cluster, &id).await;
        vms.push((name, id, pid, vm["epoch"].clone()));
    }
    let program = cluster
        .upgrade_agent("host-1", "godwit-next")
        .expect("the agent starts again");
    for (name, id, old, _) in &vms {
        wait_until_one_copy_runs(&cluster, name, OPERATION_PATIENCE).await;
        assert_eq!(pid(&cluster, id).await, *old, "a restart changes no VMM");
    }

    let dry: Value = cluster
        .api
        .post("/v1/hosts/host-1/upgrade?dry_run=true", &json!({}))
        .await
        .expect("a dry run");
    assert!(dry.to_string().contains("2 VMs of host-1"), "{dry}");
    let path = upgrade(&cluster).await;
    let operation = ended(&cluster, &path).await;
    assert_eq!(operation["state"], "succeeded", "{operation:#}");
    assert_eq!(operation["kind"], "upgrade");
    for (name, id, old, epoch) in &vms {
        wait_until_one_copy_runs(&cluster, name, OPERATION_PATIENCE).await;
        let new = pid(&cluster, id).await;
        assert_ne!(new, *old, "{name} runs in a new process");
        assert_eq!(program_of(new), program);
        assert_eq!(cluster.vmms("host-1", id).await.len(), 1);
        let vm = cluster.vm(name).await.expect("the VM");
        assert_eq!(vm["epoch"], *epoch, "it is this host's as before");
        verify(&cluster, name).await;
    }
    let events: Value = cluster
        .api
        .get("/v1/events?limit=100")
        .await
        .expect("events");
    let upgraded = events["items"].as_array().expect("a list");
    let upgraded = upgraded
        .iter()
        .filter(|event| event["kind"] == "vm.upgraded");
    assert_eq!(upgraded.count(), 2, "{events:#}");

    // There is nothing left to do.
    let before = pid(&cluster, &vms[0].1).await;
    let path = upgrade(&cluster).await;
    let operation = ended(&cluster, &path).await;
    assert_eq!(operation["state"], "succeeded", "{operation:#}");
    assert_eq!(pid(&cluster, &vms[0].1).await, before);
}

#[tokio::test]
async fn an_agent_killed_in_the_middle_of_an_upgrade_leaves_exactly_one_copy() {
    require!(skip::kvm());
    let mut cluster = Cluster::start(1, HOST_MIB).await.expect("a cluster");
    let vm = create_busy_pilot(&cluster, "wader", "host-1").await;
    let id = text(&vm, "id").to_owned();
    let directory = cluster.vm_dir("host-1", &id);
    for (round, delay_ms) in [0, 40, 150].into_iter().enumerate() {
        let old = pid(&cluster, &id).await;
        let program = cluster
            .upgrade_agent("host-1", &format!("godwit-{round}"))
            .expect("the agent starts again");
        wait_until_one_copy_runs(&cluster, "wader", OPERATION_PATIENCE).await;
        let path = upgrade(&cluster).await;
        let deadline = Instant::now() + BEGIN_PATIENCE;
        // A socket's file appears when its VMM listens; there is nothing else to wait for.
        while !VMM_SOCKETS.iter().all(|name| directory.join(name).exists()) {
            assert!(Instant::now() < deadline, "no second VMM appears");
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        tokio::time::sleep(Duration::from_millis(delay_ms)).await;
        cluster.kill_agent("host-1");
        assert!(cluster.running_on(&id).await.len() <= 1, "round {round}");
        cluster
            .revive_agent("host-1")
            .expect("the agent starts again");
        let operation = ended(&cluster, &path).await;
        assert_eq!(operation["state"], "succeeded", "{operation:#}");
        wait_until_one_copy_runs(&cluster, "wader", OPERATION_PATIENCE).await;
        assert_ne!(pid(&cluster, &id).await, old, "round {round}");
        assert_eq!(cluster.vmms("host-1", &id).await.len(), 1);
        verify(&cluster, "wader").await;
        // A program that runs can be removed; copies would fill the disk.
        std::fs::remove_file(program).expect("a file");
    }
}
