//! The web console in a real browser.

use godwit_tests::browser::{Browser, available};
use godwit_tests::cluster::{Cluster, OPERATION_PATIENCE};
use godwit_tests::require;
use godwit_tests::skip;
use std::time::Duration;

const PATIENCE: Duration = Duration::from_secs(30);

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
    let console = format!("http://{}/", cluster.api_address);
    let mut browser = Browser::open(&cluster.dir, &console)
        .await
        .expect("the console opens");

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
