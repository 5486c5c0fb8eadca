//! VMs come home to hosts that have kept their memory.

use super::{HOST_MIB, text, verify, wait_until_one_copy_runs};
use godwit_tests::cluster::{Cluster, OPERATION_PATIENCE};
use godwit_tests::{require, skip};
use serde_json::{Value, json};

const HOME: &str = "host-1";
const AWAY: &str = "host-2";
const MEMORY_MIB: u64 = 320;
const FILL_MIB: u64 = 256;
/// Of all memory; a return after which 5 % have changed may not cost more.
const GOAL_SHARE: f64 = 0.08;

/// A pilot whose memory holds data that nobody changes.
async fn create_idle_pilot(cluster: &Cluster, name: &str) {
    cluster
        .create_pilot(name, HOME, 1, MEMORY_MIB)
        .await
        .expect("a VM");
    fill(cluster, name, FILL_MIB).await;
}

async fn fill(cluster: &Cluster, name: &str, mib: u64) {
    let mut shell = cluster.shell(name).await.expect("its console");
    shell.command(&format!("fill {mib}")).await.expect("fill");
}

/// Moves the VM and waits until its operation has ended well.
async fn migrate(cluster: &Cluster, name: &str, target: &str) {
    let operation = cluster.migrate(name, target).await.expect("accepted");
    let over = |operation: &Value| !matches!(text(operation, "state"), "pending" | "running");
    let ended = cluster
        .wait_for(
            &format!("/v1/operations/{operation}"),
            OPERATION_PATIENCE,
            over,
        )
        .await
        .expect("it ends");
    assert_eq!(ended["state"], "succeeded", "{ended:#}");
}

/// Figures of the VM's latest migration.
async fn latest_flight(cluster: &Cluster, name: &str) -> Value {
    let listed: Value = cluster.api.get("/v1/migrations").await.expect("migrations");
    let flights = listed["items"].as_array().expect("a list").iter();
    let mut flights = flights.filter(|flight| flight["vm_name"] == name);
    flights.next_back().expect("it has flown")["progress"].clone()
}

fn number(figures: &Value, field: &str) -> u64 {
    figures[field]
        .as_u64()
        .unwrap_or_else(|| panic!("no {field} in {figures}"))
}

async fn wait_until_kept(cluster: &Cluster, accept: impl Fn(u64) -> bool) {
    cluster
        .wait_for(&format!("/v1/hosts/{HOME}"), OPERATION_PATIENCE, |host| {
            accept(number(&host["usage"], "kept_memory_bytes"))
        })
        .await
        .expect("the host tells what it keeps");
}

#[tokio::test]
async fn a_vm_that_comes_home_is_sent_only_what_has_changed() {
    require!(skip::kvm());
    let cluster = Cluster::start(2, HOST_MIB).await.expect("a cluster");
    create_idle_pilot(&cluster, "wader").await;
    migrate(&cluster, "wader", AWAY).await;
    assert_eq!(
        number(&latest_flight(&cluster, "wader").await, "kept_pages"),
        0
    );
    wait_until_kept(&cluster, |bytes| bytes >= FILL_MIB << 20).await;
    fill(&cluster, "wader", MEMORY_MIB / 20).await;

    migrate(&cluster, "wader", HOME).await;

    let figures = latest_flight(&cluster, "wader").await;
    let share =
        number(&figures, "transferred_bytes") as f64 / number(&figures, "memory_bytes") as f64;
    assert!(share <= GOAL_SHARE, "{share}: {figures:#}");
    assert!(number(&figures, "kept_pages") > 0, "{figures:#}");
    wait_until_kept(&cluster, |bytes| bytes == 0).await;
    assert_eq!(
        wait_until_one_copy_runs(&cluster, "wader", OPERATION_PATIENCE).await,
        HOME
    );
    assert_eq!(verify(&cluster, "wader").await, FILL_MIB);
}

#[tokio::test]
async fn the_end_of_a_maintenance_brings_vms_home_to_their_memory() {
    require!(skip::kvm());
    let cluster = Cluster::start(2, HOST_MIB).await.expect("a cluster");
    create_idle_pilot(&cluster, "wader").await;
    let request = json!({ "host": HOME, "reason": "new fans", "return": "exact" });
    let accepted: Value = cluster
        .api
        .post("/v1/maintenances", &request)
        .await
        .expect("a maintenance");
    let path = format!("/v1/maintenances/{}", text(&accepted["maintenance"], "id"));
    for (verb, states) in [
        ("start", &["drained", "working"][..]),
        ("finish", &["done"][..]),
    ] {
        let _: Value = cluster
            .api
            .post(&format!("{path}/{verb}"), &json!({}))
            .await
            .unwrap_or_else(|error| panic!("{verb}: {error:#}"));
        cluster
            .wait_for(&path, OPERATION_PATIENCE, |maintenance| {
                states.contains(&text(maintenance, "state"))
            })
            .await
            .unwrap_or_else(|error| panic!("{verb}: {error:#}"));
    }
    assert_eq!(
        wait_until_one_copy_runs(&cluster, "wader", OPERATION_PATIENCE).await,
        HOME
    );
    let figures = latest_flight(&cluster, "wader").await;
    assert!(
        number(&figures, "kept_pages") >= FILL_MIB * 256 / 2,
        "{figures:#}"
    );
    assert_eq!(verify(&cluster, "wader").await, FILL_MIB);
}

#[tokio::test]
async fn kept_memory_makes_way_for_a_vm_that_needs_it() {
    require!(skip::kvm());
    let room_mib = MEMORY_MIB + FILL_MIB / 2;
    let cluster = Cluster::start(2, room_mib).await.expect("a cluster");
    create_idle_pilot(&cluster, "wader").await;
    migrate(&cluster, "wader", AWAY).await;
    wait_until_kept(&cluster, |bytes| bytes >= FILL_MIB << 20).await;
    cluster
        .create_pilot("plover", HOME, 1, MEMORY_MIB)
        .await
        .expect("there is room");
    wait_until_kept(&cluster, |bytes| bytes == 0).await;
}

#[tokio::test]
async fn an_agent_that_dies_gives_up_what_it_kept_and_the_vm_comes_home_all_the_same() {
    require!(skip::kvm());
    let mut cluster = Cluster::start(2, HOST_MIB).await.expect("a cluster");
    create_idle_pilot(&cluster, "wader").await;
    migrate(&cluster, "wader", AWAY).await;
    wait_until_kept(&cluster, |bytes| bytes > 0).await;
    cluster.kill_agent(HOME);
    cluster.revive_agent(HOME).expect("the agent starts again");
    wait_until_kept(&cluster, |bytes| bytes == 0).await;
    migrate(&cluster, "wader", HOME).await;
    let figures = latest_flight(&cluster, "wader").await;
    assert_eq!(number(&figures, "kept_pages"), 0, "{figures:#}");
    assert_eq!(
        wait_until_one_copy_runs(&cluster, "wader", OPERATION_PATIENCE).await,
        HOME
    );
    assert_eq!(verify(&cluster, "wader").await, FILL_MIB);
}
