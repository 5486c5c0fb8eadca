//! Live migration between two VMM processes.

use super::{boot_dirtying_pilot, boot_pilot, endless, verify_guest, verifying};
use godwit_tests::migration::{Flight, migrate};
use godwit_tests::require;
use godwit_tests::skip;
use godwit_tests::test_dir::TestDir;
use godwit_tests::vmm::{BOOT_PATIENCE, Vmm};
use godwit_wire::migration::MigrationPhase;
use godwit_wire::unit::Mib;
use godwit_wire::vmm_api::{PauseReason, StopReason, VmmState};

/// Moves a dirtying pilot once and looks at everything afterwards.
async fn a_dirtying_pilot_arrives_whole(vcpus: u8) {
    require!(skip::kvm());
    let dir = TestDir::new();
    let (source, mut request) = boot_dirtying_pilot(&dir, "source", vcpus).await;
    let before = source
        .shell()
        .await
        .expect("shell")
        .command("ticks")
        .await
        .expect("ticks")
        .number("ticks");
    let counted = source.info().await.expect("info").counters;
    let target = Vmm::start(&dir, "target").await.expect("a target");

    let status = migrate(&source, &target, &mut request, verifying())
        .await
        .expect("the migration lands");

    assert!(
        status
            .progress
            .downtime_us
            .is_some_and(|downtime_us| downtime_us > 0),
        "{status:?}"
    );
    assert!(status.progress.content_pages >= 64 * 256, "{status:?}");
    // The migration's end is known a moment before the machine is taken down.
    let gone = VmmState::Stopped {
        reason: StopReason::MigratedAway,
    };
    source
        .wait_for_state(BOOT_PATIENCE, |state| *state == gone)
        .await
        .expect("nothing is left at the source");
    let arrived = target.info().await.expect("info");
    assert_eq!(
        (arrived.state, arrived.vm, arrived.epoch),
        (VmmState::Running, Some(request.vm), request.epoch)
    );
    // Counters went on from where they were.
    assert!(counted.serial_rx_bytes > 0 && counted.serial_tx_bytes > 0);
    for (there, before) in [
        (arrived.counters.exits, counted.exits),
        (arrived.counters.io_exits, counted.io_exits),
        (arrived.counters.mmio_exits, counted.mmio_exits),
        (arrived.counters.serial_rx_bytes, counted.serial_rx_bytes),
        (arrived.counters.serial_tx_bytes, counted.serial_tx_bytes),
    ] {
        assert!(there >= before, "{:?} after {counted:?}", arrived.counters);
    }
    let mut shell = target.shell().await.expect("shell");
    assert!(
        shell.command("ticks").await.expect("ticks").number("ticks") > before,
        "time went on"
    );
    drop(shell);
    verify_guest(&target).await;
    // The guest still works, its interrupts and memory included.
    target
        .shell()
        .await
        .expect("shell")
        .command("fill 32")
        .await
        .expect("fill");
    verify_guest(&target).await;
}

#[tokio::test]
async fn a_dirtying_pilot_with_1_vcpu_arrives_whole() {
    a_dirtying_pilot_arrives_whole(1).await;
}

#[tokio::test]
async fn a_dirtying_pilot_with_2_vcpus_arrives_whole() {
    a_dirtying_pilot_arrives_whole(2).await;
}

#[tokio::test]
async fn a_dirtying_pilot_with_4_vcpus_arrives_whole() {
    a_dirtying_pilot_arrives_whole(4).await;
}

#[tokio::test]
async fn fifty_migrations_back_and_forth_lose_nothing() {
    require!(skip::kvm());
    let dir = TestDir::new();
    let (mut here, mut request) = boot_dirtying_pilot(&dir, "vmm-0", 2).await;
    for flight in 1..=50 {
        let there = Vmm::start(&dir, &format!("vmm-{flight}"))
            .await
            .expect("a target");
        migrate(&here, &there, &mut request, verifying())
            .await
            .unwrap_or_else(|error| panic!("{flight}: {error:#}"));
        here = there;
    }
    assert_eq!(here.info().await.expect("info").epoch, request.epoch);
    verify_guest(&here).await;
}

#[tokio::test]
async fn an_untouched_guest_is_sent_as_zeros() {
    require!(skip::kvm());
    let dir = TestDir::new();
    let (source, mut request) = boot_pilot(&dir, "source", 1, Mib(256)).await;
    let target = Vmm::start(&dir, "target").await.expect("a target");
    let status = migrate(&source, &target, &mut request, verifying())
        .await
        .expect("the migration lands");
    assert!(status.progress.transferred_bytes.0 < 16 << 20, "{status:?}");
    assert!(status.progress.zero_pages > 200 * 256, "{status:?}");
}

#[tokio::test]
async fn a_paused_guest_arrives_paused() {
    require!(skip::kvm());
    let dir = TestDir::new();
    let (source, mut request) = boot_dirtying_pilot(&dir, "source", 1).await;
    source.command("pause", request.epoch).await.expect("pause");
    let target = Vmm::start(&dir, "target").await.expect("a target");
    migrate(&source, &target, &mut request, verifying())
        .await
        .expect("the migration lands");
    let paused = VmmState::Paused {
        reason: PauseReason::Requested,
    };
    assert_eq!(
        target.info().await.expect("info").state,
        paused,
        "whoever paused it did not resume it"
    );
    target
        .command("resume", request.epoch)
        .await
        .expect("resume");
    verify_guest(&target).await;
}

#[tokio::test]
async fn a_cancelled_migration_leaves_the_source_running() {
    require!(skip::kvm());
    let dir = TestDir::new();
    let (source, mut request) = boot_dirtying_pilot(&dir, "source", 2).await;
    let target = Vmm::start(&dir, "target").await.expect("a target");
    let flight = Flight::start(&source, &target, &request, endless())
        .await
        .expect("take-off");
    flight
        .source_reaches(MigrationPhase::PreCopy)
        .await
        .expect("pre-copy");

    flight.cancel().await.expect("cancel");

    let status = flight
        .source_reaches(MigrationPhase::Cancelled)
        .await
        .expect("cancelled");
    assert!(status.reason.is_some(), "{status:?}");
    assert_eq!(source.info().await.expect("info").state, VmmState::Running);
    verify_guest(&source).await;
    // No dirty bit was lost: a second attempt moves the guest whole.
    let second = Vmm::start(&dir, "second").await.expect("a target");
    migrate(&source, &second, &mut request, verifying())
        .await
        .expect("the second attempt lands");
    verify_guest(&second).await;
}

#[tokio::test]
async fn a_target_killed_during_pre_copy_leaves_the_source_running() {
    require!(skip::kvm());
    let dir = TestDir::new();
    let (source, mut request) = boot_dirtying_pilot(&dir, "source", 1).await;
    let mut target = Vmm::start(&dir, "target").await.expect("a target");
    let flight = Flight::start(&source, &target, &request, endless())
        .await
        .expect("take-off");
    flight
        .source_reaches(MigrationPhase::PreCopy)
        .await
        .expect("pre-copy");

    target.process.kill();

    godwit_tests::migration::wait_for_phase(&source, MigrationPhase::Failed)
        .await
        .expect("the source notices");
    assert_eq!(source.info().await.expect("info").state, VmmState::Running);
    verify_guest(&source).await;
    let second = Vmm::start(&dir, "second").await.expect("a target");
    migrate(&source, &second, &mut request, verifying())
        .await
        .expect("the second attempt lands");
    verify_guest(&second).await;
}

#[tokio::test]
async fn a_source_killed_during_pre_copy_leaves_nothing_running_at_the_target() {
    require!(skip::kvm());
    let dir = TestDir::new();
    let (mut source, request) = boot_dirtying_pilot(&dir, "source", 1).await;
    let target = Vmm::start(&dir, "target").await.expect("a target");
    let flight = Flight::start(&source, &target, &request, endless())
        .await
        .expect("take-off");
    flight
        .target_reaches(MigrationPhase::PreCopy)
        .await
        .expect("pre-copy");

    source.process.kill();

    godwit_tests::migration::wait_for_phase(&target, MigrationPhase::Failed)
        .await
        .expect("the target notices");
    let aborted = |state: &VmmState| {
        *state
            == VmmState::Stopped {
                reason: StopReason::IncomingAborted,
            }
    };
    target
        .wait_for_state(BOOT_PATIENCE, aborted)
        .await
        .expect("half a machine is no machine");
}

#[tokio::test]
async fn a_guest_that_never_converges_stays_where_it_is() {
    require!(skip::kvm());
    let dir = TestDir::new();
    let (source, request) = boot_dirtying_pilot(&dir, "source", 1).await;
    let target = Vmm::start(&dir, "target").await.expect("a target");
    let policy = godwit_wire::migration::MigrationPolicy {
        max_rounds: 3,
        ..endless()
    };
    let flight = Flight::start(&source, &target, &request, policy)
        .await
        .expect("take-off");
    let status = flight
        .source_reaches(MigrationPhase::Failed)
        .await
        .expect("the migration gives up");
    assert!(
        status.reason.is_some_and(|reason| reason.contains("round")),
        "the reason says why"
    );
    assert_eq!(source.info().await.expect("info").state, VmmState::Running);
    verify_guest(&source).await;
}
