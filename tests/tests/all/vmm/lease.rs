//! The VMM stops its guest by itself when the host's lease is over, whatever happened to everyone else.

use super::verify_guest;
use godwit_tests::lease::LeasePage;
use godwit_tests::require;
use godwit_tests::skip;
use godwit_tests::test_dir::TestDir;
use godwit_tests::vmm::{self, BOOT_PATIENCE, Vmm, new_vm};
use godwit_wire::lease::STOP_TIME;
use godwit_wire::unit::Mib;
use godwit_wire::vmm_api::{CreateRequest, PauseReason, VmmState};
use std::time::{Duration, Instant};

const LEASE_EXPIRED: VmmState = VmmState::Paused {
    reason: PauseReason::LeaseExpired,
};
const SHORT: Duration = Duration::from_millis(1_500);
const LONG: Duration = Duration::from_secs(3600);

/// A pilot that has said hello, under a lease of this length that began when it booted.
async fn boot_leased_pilot(dir: &TestDir, length: Duration) -> (Vmm, CreateRequest, LeasePage) {
    let lease = LeasePage::create(&dir.join("lease")).expect("a lease page");
    lease.grant(length).expect("grant");
    let request = CreateRequest {
        lease: Some(lease.path().to_owned()),
        ..new_vm(vmm::pilot(2, Mib(64)))
    };
    let vmm = Vmm::boot(dir, "vmm", &request)
        .await
        .expect("the pilot boots");
    vmm.serial()
        .await
        .expect("console")
        .wait_for("pilot ", BOOT_PATIENCE)
        .await
        .expect("hello");
    (vmm, request, lease)
}

#[tokio::test]
async fn an_expired_lease_stops_the_guest_and_a_new_one_lets_it_go_on() {
    require!(skip::kvm());
    let dir = TestDir::new();
    let (vmm, request, lease) = boot_leased_pilot(&dir, SHORT).await;
    vmm.shell()
        .await
        .expect("shell")
        .command("fill 8")
        .await
        .expect("fill");

    // A deadline is only ever moved ahead, so it is not the renewal that ends the lease but its absence.
    vmm.wait_for_state(SHORT + STOP_TIME, |state| *state == LEASE_EXPIRED)
        .await
        .expect("it stops itself in time");
    let exits = vmm.info().await.expect("info").counters.exits;
    vmm.command("resume", request.epoch)
        .await
        .expect_err("no lease, no guest");
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert_eq!(
        vmm.info().await.expect("info").counters.exits,
        exits,
        "the guest stands still"
    );

    lease.grant(LONG).expect("grant");
    vmm.command("resume", request.epoch).await.expect("resume");
    verify_guest(&vmm).await;
}

#[tokio::test]
async fn a_lease_that_is_renewed_in_time_never_stops_the_guest() {
    require!(skip::kvm());
    let dir = TestDir::new();
    let (vmm, _, lease) = boot_leased_pilot(&dir, SHORT).await;
    for _ in 0..20 {
        lease.grant(Duration::from_millis(600)).expect("grant");
        tokio::time::sleep(Duration::from_millis(100)).await;
        assert_eq!(vmm.info().await.expect("info").state, VmmState::Running);
    }
}

#[tokio::test]
async fn a_guest_does_not_start_without_a_lease() {
    require!(skip::kvm());
    let dir = TestDir::new();
    let lease = LeasePage::create(&dir.join("lease")).expect("a lease page");
    let request = CreateRequest {
        lease: Some(lease.path().to_owned()),
        ..new_vm(vmm::pilot(1, Mib(64)))
    };
    let vmm = Vmm::start(&dir, "vmm").await.expect("an empty VMM");
    vmm.create(&request)
        .await
        .expect("a machine may be built without a lease");
    // Refused, or stopped before the first instruction: either way nothing runs.
    let _ = vmm.command("boot", request.epoch).await;
    tokio::time::sleep(Duration::from_millis(300)).await;
    let info = vmm.info().await.expect("info");
    assert_ne!(info.state, VmmState::Running);
    assert_eq!(info.counters.serial_tx_bytes, 0, "the guest said something");
}

#[tokio::test]
async fn a_file_that_is_no_lease_page_is_refused() {
    require!(skip::kvm());
    let dir = TestDir::new();
    let path = dir.join("not-a-lease");
    std::fs::write(&path, [0xff; 4096]).expect("a file");
    let request = CreateRequest {
        lease: Some(path),
        ..new_vm(vmm::pilot(1, Mib(64)))
    };
    let vmm = Vmm::start(&dir, "vmm").await.expect("an empty VMM");
    vmm.create(&request)
        .await
        .expect_err("a page of something else");
    assert_eq!(vmm.info().await.expect("info").state, VmmState::Empty);
}

#[tokio::test]
async fn a_vmm_frozen_past_its_lease_runs_no_guest_code_when_it_wakes() {
    require!(skip::kvm());
    const VCPUS: u64 = 2;
    let dir = TestDir::new();
    let (vmm, request, lease) = boot_leased_pilot(&dir, SHORT).await;
    let mut shell = vmm.shell().await.expect("shell");
    let asked = Instant::now();
    let before = shell.command("ticks").await.expect("ticks");

    vmm.process.freeze();
    let mut ran = asked.elapsed();
    tokio::time::sleep(SHORT + Duration::from_millis(100)).await;
    vmm.process.thaw();

    vmm.wait_for_state(STOP_TIME, |state| *state == LEASE_EXPIRED)
        .await
        .expect("it stops before it runs");
    tokio::time::sleep(Duration::from_millis(500)).await;
    lease.grant(LONG).expect("grant");
    let resumed = Instant::now();
    vmm.command("resume", request.epoch).await.expect("resume");
    let after = shell.command("ticks").await.expect("ticks");
    ran += resumed.elapsed();
    // Each vCPU counts one tick per period while it runs, and one may have been pending at each stop.
    let periods = ran.as_micros() as u64 / before.number("period_us");
    let possible = VCPUS * (periods + 2);
    let ticked = after.number("ticks") - before.number("ticks");
    assert!(
        ticked <= possible,
        "{ticked} ticks in {ran:?} of running, at most {possible} are possible"
    );
}
