//! The web console in a real browser.

use godwit_tests::browser::{Browser, available};
use godwit_tests::cluster::{Cluster, OPERATION_PATIENCE};
use godwit_tests::require;
use godwit_tests::skip;
use serde_json::{Value, json};
use std::time::Duration;

const PATIENCE: Duration = Duration::from_secs(30);

/// A browser that shows a page of the console, such as `#/vms/wader`.
async fn console(cluster: &Cluster, page: &str) -> Browser {
    let address = format!("http://{}/{page}", cluster.api_address);
    Browser::open(&cluster.dir, &address)
        .await
        .expect("the console opens")
}

async fn text_of(browser: &mut Browser, selector: &str) -> String {
    let script = format!("document.querySelector({}).innerText", json!(selector));
    let text = browser.evaluate(&script).await.expect("it is shown");
    text.as_str().unwrap_or_default().to_owned()
}

fn assert_content(browser: &Browser) {
    let complaints = browser.complaints();
    assert!(complaints.is_empty(), "{complaints:?}");
}

#[tokio::test]
async fn an_operator_starts_a_maintenance_and_sees_the_host_drain() {
    require!(skip::kvm());
    require!(available());
    let cluster = Cluster::start(2, 512).await.expect("a cluster");
    for name in ["wader", "plover"] {
        cluster
            .create_pilot(name, "host-1", 1, 64)
            .await
            .expect("a VM");
    }
    let mut browser = console(&cluster, "").await;

    browser
        .click("[data-testid='nav-hosts']")
        .await
        .expect("hosts");
    browser
        .click("[data-testid='host-host-1'] [data-testid='maintenance-open']")
        .await
        .expect("open the dialog");
    browser
        .type_into("[data-testid='maintenance-reason']", "new memory")
        .await
        .expect("give a reason");
    browser
        .click("[data-testid='maintenance-plan']")
        .await
        .expect("ask for the plan");
    for name in ["wader", "plover"] {
        browser
            .wait_for(&format!("[data-testid='planned-{name}']"), PATIENCE)
            .await
            .expect("the dry run lists it");
    }
    assert_eq!(
        cluster.vm("wader").await.expect("wader")["host_name"],
        "host-1",
        "a dry run moves nothing"
    );
    browser
        .click("[data-testid='maintenance-start']")
        .await
        .expect("start");

    let drained = "[data-testid='maintenance-state'][data-state='drained'], \
                   [data-testid='maintenance-state'][data-state='working']";
    browser
        .wait_for(drained, OPERATION_PATIENCE)
        .await
        .expect("the console shows that the host is empty");
    for name in ["wader", "plover"] {
        let vm = cluster.vm(name).await.expect("a VM");
        assert_eq!(
            (vm["host_name"].as_str(), vm["state"].as_str()),
            (Some("host-2"), Some("running")),
            "{vm}"
        );
    }
    assert!(
        browser.complaints().is_empty(),
        "{:?}",
        browser.complaints()
    );
}

#[tokio::test]
async fn an_operator_moves_a_vm_after_seeing_the_forecast_and_then_where_the_time_went() {
    require!(skip::kvm());
    require!(available());
    let cluster = Cluster::start(2, 512).await.expect("a cluster");
    cluster
        .create_pilot("wader", "host-1", 1, 64)
        .await
        .expect("a VM");
    let mut browser = console(&cluster, "#/vms/wader").await;

    browser
        .click("[data-testid='action-migrate']")
        .await
        .expect("open the dialog");
    let forecast = "[data-testid='forecast'][data-verdict='converges']";
    browser
        .wait_for(forecast, PATIENCE)
        .await
        .expect("an idle guest is foreseen to converge");
    let told = text_of(&mut browser, forecast).await;
    assert!(
        told.contains("Blackout") && told.contains("The guest was watched just now"),
        "{told}"
    );
    let vm = cluster.vm("wader").await.expect("wader");
    assert_eq!(vm["host_name"], "host-1", "a forecast moves nothing");

    browser
        .click("[data-testid='target-host-2']")
        .await
        .expect("choose the host");
    browser
        .click("[data-testid='migrate-submit']")
        .await
        .expect("migrate");
    browser
        .wait_for(
            "[data-testid='vm-host'][href='#/hosts/host-2']",
            OPERATION_PATIENCE,
        )
        .await
        .expect("the console shows where it runs now");

    let timeline = "[data-testid='timeline-wader']";
    browser
        .wait_for(
            &format!("{timeline} .timeline-part.is-blackout"),
            OPERATION_PATIENCE,
        )
        .await
        .expect("the latest migration is drawn");
    let told = text_of(&mut browser, timeline).await;
    for part in ["Blackout", "Last pages", "Commit", "predicted", "foreseen"] {
        assert!(told.contains(part), "{part} in {told}");
    }
    let widths = "[...document.querySelectorAll(\"[data-testid='timeline-wader'] .timeline-bar > svg\")].map((bar) => \
                  Math.round([...bar.querySelectorAll('rect')].reduce((sum, part) => sum + Number(part.getAttribute('width')), 0)))";
    let widths = browser.evaluate(widths).await.expect("bars");
    assert_eq!(widths, json!([1000, 1000, 1000]), "each bar is filled");
    browser
        .click("[data-testid='timeline-open']")
        .await
        .expect("close it");
    browser
        .wait_for(
            "[data-testid='timeline-open'][aria-expanded='false']",
            PATIENCE,
        )
        .await
        .expect("it is closed");
    let gone = format!("document.querySelector({}) === null", json!(timeline));
    assert_eq!(browser.evaluate(&gone).await.expect("a look"), json!(true));
    assert_content(&browser);
}

#[tokio::test]
async fn an_operator_upgrades_the_vms_of_a_host() {
    require!(skip::kvm());
    require!(available());
    let mut cluster = Cluster::start(1, 512).await.expect("a cluster");
    let vm = cluster
        .create_pilot("wader", "host-1", 1, 64)
        .await
        .expect("a VM");
    let id = vm["id"].as_str().expect("an id").to_owned();
    let old = cluster.vmm("host-1", &id).await.expect("a VMM").pid;
    cluster
        .upgrade_agent("host-1", "godwit-next")
        .expect("the agent starts again");
    let mut browser = console(&cluster, "#/hosts/host-1").await;

    browser
        .click("[data-testid='upgrade-open']")
        .await
        .expect("open the dialog");
    browser
        .wait_for("[data-testid='upgrade-changes']", PATIENCE)
        .await
        .expect("it says what would happen");
    let told = text_of(&mut browser, "[data-testid='upgrade-changes']").await;
    assert!(told.contains("1 VMs of host-1"), "{told}");
    browser
        .click("[data-testid='upgrade-start']")
        .await
        .expect("upgrade");

    let upgraded = |operations: &Value| {
        let mut all = operations["items"].as_array().into_iter().flatten();
        all.any(|operation| operation["kind"] == "upgrade" && operation["state"] == "succeeded")
    };
    cluster
        .wait_for("/v1/operations", OPERATION_PATIENCE, upgraded)
        .await
        .expect("the operation succeeds");
    let new = cluster.vmm("host-1", &id).await.expect("a VMM").pid;
    assert_ne!(new, old, "the VM runs in a new process");
    assert_content(&browser);
}

#[tokio::test]
async fn an_operator_forbids_post_copy_and_no_move_offers_it_any_more() {
    require!(skip::kvm());
    require!(available());
    let cluster = Cluster::start(2, 512).await.expect("a cluster");
    cluster
        .create_pilot("wader", "host-1", 1, 64)
        .await
        .expect("a VM");
    let mut browser = console(&cluster, "#/vms/wader").await;

    browser
        .click("[data-testid='actions-wader']")
        .await
        .expect("open the menu");
    browser
        .click(".menu:popover-open[style*='top'] [data-testid='action-forbid-post-copy']")
        .await
        .expect("forbid it");
    cluster
        .wait_for_vm("wader", PATIENCE, |vm| vm["post_copy"] == "forbidden")
        .await
        .expect("the VM says so");
    browser
        .wait_for("[data-testid='action-allow-post-copy']", PATIENCE)
        .await
        .expect("the page says so, too");
    browser
        .click("[data-testid='action-migrate']")
        .await
        .expect("open the dialog");
    browser
        .click("[data-testid='migrate'] .advanced summary")
        .await
        .expect("open the limits");
    browser
        .wait_for("[data-testid='migrate-post-copy']:disabled", PATIENCE)
        .await
        .expect("it cannot be asked for");
    let asked = json!({ "target": "host-2", "policy": { "allow_postcopy": true } });
    let refused = cluster
        .api
        .post::<Value>("/v1/vms/wader/migrate", &asked)
        .await
        .expect_err("nor past the console");
    assert!(
        format!("{refused:#}").contains("policy.allow_postcopy"),
        "{refused:#}"
    );
    assert_content(&browser);
}
