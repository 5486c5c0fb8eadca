//! A guest moves with its local disk between hosts that share no storage, and back.

use super::{HOST_MIB, create_linux, text, wait_until_one_copy_runs};
use godwit_tests::cluster::{Cluster, OPERATION_PATIENCE};
use godwit_tests::linux::LinuxGuest;
use godwit_tests::{require, skip};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};

const HOME: &str = "host-1";
const AWAY: &str = "host-2";
const VM: &str = "plover";
const DISK_MIB: u64 = 64;
const WRITTEN_MIB: u64 = 24;

/// Moves the VM with its disks and waits until its operation has ended well.
async fn migrate_with_disks(cluster: &Cluster, target: &str) {
    let accepted: Value = cluster
        .api
        .post(
            &format!("/v1/vms/{VM}/migrate"),
            &json!({ "target": target, "disks": "along" }),
        )
        .await
        .expect("accepted");
    let operation = text(&accepted["operation"], "id");
    let ended = cluster
        .wait_for(
            &format!("/v1/operations/{operation}"),
            OPERATION_PATIENCE,
            |operation| !matches!(text(operation, "state"), "pending" | "running"),
        )
        .await
        .expect("it ends");
    assert_eq!(ended["state"], "succeeded", "{ended:#}");
}

/// The pool that only `host` sees.
async fn pool_of(cluster: &Cluster, host: &str) -> String {
    let sees = |pool: &Value| {
        let mut hosts = pool["hosts"].as_array().into_iter().flatten();
        hosts.any(|seen| seen["host_name"] == host)
    };
    let pools = cluster
        .wait_for("/v1/pools", OPERATION_PATIENCE, |pools| {
            pools["items"]
                .as_array()
                .is_some_and(|all| all.iter().any(sees))
        })
        .await
        .expect("the host tells of its pool");
    let pools = pools["items"].as_array().expect("a list");
    let pool = pools.iter().find(|pool| sees(pool)).expect("it is there");
    text(pool, "id").to_owned()
}

/// The only disk there is, as REST shows it.
async fn disk(cluster: &Cluster) -> Value {
    let disks: Value = cluster.api.get("/v1/disks").await.expect("disks");
    let disks = disks["items"].as_array().expect("a list");
    assert_eq!(disks.len(), 1, "{disks:#?}");
    disks[0].clone()
}

/// Files of the disk under the state directory of a host.
fn files(cluster: &Cluster, host: &str, disk: &str) -> Vec<PathBuf> {
    fn look(directory: &Path, disk: &str, found: &mut Vec<PathBuf>) {
        for entry in std::fs::read_dir(directory).into_iter().flatten().flatten() {
            let path = entry.path();
            if path.is_dir() {
                look(&path, disk, found);
            } else if entry.file_name().to_string_lossy().starts_with(disk) {
                found.push(path);
            }
        }
    }
    let mut found = Vec::new();
    look(&cluster.dir.join(host), disk, &mut found);
    found
}

/// The disk is where it shall be, and nothing of it where it was.
async fn has_moved(cluster: &Cluster, from: &str, to: &str) {
    let pool = pool_of(cluster, to).await;
    let moved = disk(cluster).await;
    assert_eq!(moved["pool"], pool.as_str(), "{moved:#}");
    let id = text(&moved, "id");
    assert!(!files(cluster, to, id).is_empty());
    cluster
        .wait_for("/v1/operations", OPERATION_PATIENCE, |operations| {
            let all = operations["items"].as_array();
            let mut erasures = all
                .into_iter()
                .flatten()
                .filter(|operation| operation["kind"] == "erase_copy");
            erasures.all(|operation| operation["state"] == "succeeded")
        })
        .await
        .expect("what was left is erased");
    let left = files(cluster, from, id);
    assert!(left.is_empty(), "{left:?}");
}

#[tokio::test]
async fn a_guest_moves_with_its_local_disk_and_back() {
    require!(skip::kvm());
    let guest = require!(LinuxGuest::prepare());
    let mut cluster = Cluster::start(1, HOST_MIB).await.expect("a cluster");
    cluster.wait_for_pool().await.expect("a pool");
    let mut shell = create_linux(&cluster, &guest, VM, DISK_MIB).await;
    shell
        .command(&format!("disk write /dev/vda 77 {WRITTEN_MIB}"))
        .await
        .expect("it is written");
    cluster
        .join_host(AWAY, HOST_MIB)
        .await
        .expect("another host");
    let away = pool_of(&cluster, AWAY).await;
    assert_ne!(away, pool_of(&cluster, HOME).await, "they share nothing");

    let refused: anyhow::Result<String> = cluster.migrate(VM, AWAY).await;
    let refused = format!("{:#}", refused.expect_err("nobody asked for its disk"));
    assert!(refused.contains("--with-disks"), "{refused}");

    for (from, to) in [(HOME, AWAY), (AWAY, HOME)] {
        migrate_with_disks(&cluster, to).await;
        let runs_on = wait_until_one_copy_runs(&cluster, VM, OPERATION_PATIENCE).await;
        assert_eq!(runs_on, to);
        has_moved(&cluster, from, to).await;
        let mut shell = cluster.shell(VM).await.expect("its shell");
        shell
            .command(&format!("disk verify /dev/vda 77 {WRITTEN_MIB}"))
            .await
            .expect("every block is as it was written");
    }
    let flights: Value = cluster.api.get("/v1/migrations").await.expect("migrations");
    for flight in flights["items"].as_array().expect("a list") {
        assert_eq!(flight["disks"][0]["name"], "data", "{flight:#}");
        let sent = flight["progress"]["disk_transferred_bytes"].as_u64();
        assert!(sent > Some(0), "{flight:#}");
    }
}
