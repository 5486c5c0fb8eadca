//! A guest writes more than its pool has room for: it stands still, says why, and goes on when there is room.

use super::{HOST_MIB, create_linux, text};
use godwit_tests::cluster::{Cluster, OPERATION_PATIENCE};
use godwit_tests::linux::LinuxGuest;
use godwit_tests::require;
use godwit_tests::skip;
use serde_json::Value;
use std::net::IpAddr;
use std::path::PathBuf;

const POOL_MIB: u64 = 48;
const DISK_MIB: u64 = 64;
/// What the operator removes to make room.
const BALLAST_MIB: u64 = 24;
/// What the guest writes: more than there is beside the ballast, less than there is without it.
const WRITTEN_MIB: u64 = 32;

/// A host whose only pool is a small file system of its own, in a mount namespace of its own. Gives the pool's
/// directory as this process reaches it.
async fn join_host_with_small_pool(cluster: &mut Cluster) -> PathBuf {
    let pool = cluster.dir.join("small");
    let mount = format!(
        "mkdir -p {pool} && mount -t tmpfs -o size={POOL_MIB}m small {pool} && exec \"$@\" --storage small={pool}",
        pool = pool.display()
    );
    let wrapper = ["unshare", "--mount", "sh", "-c", &mount, "sh"];
    cluster
        .join_host_in("host-1", HOST_MIB, IpAddr::from([127, 0, 0, 1]), &wrapper)
        .await
        .expect("a host");
    cluster.wait_for_pool().await.expect("a pool");
    let root = format!("/proc/{}/root", cluster.agent("host-1").pid());
    PathBuf::from(root).join(pool.strip_prefix("/").expect("a full path"))
}

#[tokio::test]
async fn a_guest_that_fills_its_pool_waits_for_room_and_loses_nothing() {
    require!(skip::root());
    let guest = require!(LinuxGuest::prepare());
    let mut cluster = Cluster::start_server().await.expect("a server");
    let pool = join_host_with_small_pool(&mut cluster).await;
    let mut shell = create_linux(&cluster, &guest, "writer", DISK_MIB).await;
    let ballast = pool.join("ballast");
    std::fs::write(&ballast, vec![1; (BALLAST_MIB << 20) as usize]).expect("ballast fits");

    let writing = tokio::spawn(async move {
        let command = format!("disk write /dev/vda 77 {WRITTEN_MIB}");
        shell.command(&command).await.map(|_| shell)
    });
    let stalled = cluster
        .wait_for_vm("writer", OPERATION_PATIENCE, |vm| vm["state"] == "paused")
        .await
        .expect("it stands still");
    let reason = text(&stalled, "reason");
    assert!(reason.contains("No space left"), "{reason}");
    let told = |events: &Value| {
        let mut events = events["items"].as_array().into_iter().flatten();
        events
            .find(|event| event["kind"] == "vm.storage_full")
            .cloned()
    };
    let events = cluster
        .wait_for("/v1/events", OPERATION_PATIENCE, |events| {
            told(events).is_some()
        })
        .await
        .expect("an event tells of it");
    let told = told(&events).expect("it was waited for");
    let message = text(&told, "message");
    assert!(
        message.contains("data") && message.contains("No space left"),
        "the event names disk and reason: {message}"
    );
    assert!(!writing.is_finished());

    std::fs::remove_file(&ballast).expect("room is made");
    let mut shell = writing
        .await
        .expect("the console stays")
        .expect("the guest has written all");
    shell
        .command(&format!("disk verify /dev/vda 77 {WRITTEN_MIB}"))
        .await
        .expect("every block is as it was written");
    cluster
        .wait_for_vm("writer", OPERATION_PATIENCE, |vm| vm["state"] == "running")
        .await
        .expect("and it is known to run");
}
