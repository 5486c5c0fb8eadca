//! Between the source's last byte and the store's word, neither end may decide alone.

use super::{boot_dirtying_pilot, verify_guest, verifying};
use godwit_tests::migration::{Flight, status_after};
use godwit_tests::require;
use godwit_tests::skip;
use godwit_tests::test_dir::TestDir;
use godwit_tests::vmm::Vmm;
use godwit_wire::id::Epoch;
use godwit_wire::migration::MigrationPhase;
use godwit_wire::problem::Problem;
use godwit_wire::vmm_api::{PauseReason, VmmState};
use std::time::Duration;

const HANDING_OVER: VmmState = VmmState::Paused {
    reason: PauseReason::HandOver,
};
/// Long enough for a wrong decision to show.
const A_WHILE: Duration = Duration::from_millis(1_500);

#[tokio::test]
async fn without_the_commit_both_ends_stand_still() {
    require!(skip::kvm());
    let dir = TestDir::new();
    let (source, request) = boot_dirtying_pilot(&dir, "source", 2).await;
    let target = Vmm::start(&dir, "target").await.expect("a target");
    let flight = Flight::start(&source, &target, &request, verifying())
        .await
        .expect("take-off");
    flight
        .target_reaches(MigrationPhase::AwaitingCommit)
        .await
        .expect("everything arrived");
    flight
        .source_reaches(MigrationPhase::AwaitingCommit)
        .await
        .expect("everything was sent");
    let exits_before = exits(&source, &target).await;
    tokio::time::sleep(A_WHILE).await;
    assert_eq!(exits(&source, &target).await, exits_before, "nobody runs");
    assert_eq!(source.info().await.expect("info").state, HANDING_OVER);

    flight.commit().await.expect("commit");
    flight
        .source_reaches(MigrationPhase::Completed)
        .await
        .expect("the source knows");
    verify_guest(&target).await;
}

#[tokio::test]
async fn a_target_killed_after_the_hand_over_keeps_the_source_paused_until_the_store_says_so() {
    require!(skip::kvm());
    let dir = TestDir::new();
    let (source, request) = boot_dirtying_pilot(&dir, "source", 1).await;
    let mut target = Vmm::start(&dir, "target").await.expect("a target");
    let flight = Flight::start(&source, &target, &request, verifying())
        .await
        .expect("take-off");
    flight
        .target_reaches(MigrationPhase::AwaitingCommit)
        .await
        .expect("everything arrived");

    target.process.kill();

    tokio::time::sleep(A_WHILE).await;
    let status = status_after(&source, 0).await.expect("status");
    assert_eq!(
        (status.phase, status.connected),
        (MigrationPhase::AwaitingCommit, false),
        "{status:?}"
    );
    assert_eq!(
        source.info().await.expect("info").state,
        HANDING_OVER,
        "the target may have run"
    );
    // The store voids the migration.
    let command = godwit_wire::vmm_api::MigrationCommand {
        migration: status.migration,
        epoch: request.epoch,
    };
    let _: godwit_wire::migration::MigrationStatus = source
        .api
        .post("/v1/migration/abort", &command)
        .await
        .expect("abort");
    source
        .wait_for_state(A_WHILE, |state| *state == VmmState::Running)
        .await
        .expect("it runs again");
    verify_guest(&source).await;
}

#[tokio::test]
async fn a_source_killed_after_the_hand_over_does_not_hold_up_the_target() {
    require!(skip::kvm());
    let dir = TestDir::new();
    let (mut source, request) = boot_dirtying_pilot(&dir, "source", 2).await;
    let target = Vmm::start(&dir, "target").await.expect("a target");
    let flight = Flight::start(&source, &target, &request, verifying())
        .await
        .expect("take-off");
    flight
        .target_reaches(MigrationPhase::AwaitingCommit)
        .await
        .expect("everything arrived");
    let migration = flight.migration;

    source.process.kill();

    tokio::time::sleep(A_WHILE).await;
    assert_ne!(
        target.info().await.expect("info").state,
        VmmState::Running,
        "nobody gave it the VM"
    );
    let command = godwit_wire::vmm_api::MigrationCommand {
        migration,
        epoch: request.epoch.next(),
    };
    let _: godwit_wire::migration::MigrationStatus = target
        .api
        .post("/v1/migration/commit", &command)
        .await
        .expect("commit");
    target
        .wait_for_state(A_WHILE, |state| *state == VmmState::Running)
        .await
        .expect("it runs");
    verify_guest(&target).await;
}

#[tokio::test]
async fn a_release_ends_the_source_for_good() {
    require!(skip::kvm());
    let dir = TestDir::new();
    let (mut source, request) = boot_dirtying_pilot(&dir, "source", 1).await;
    let target = Vmm::start(&dir, "target").await.expect("a target");
    let flight = Flight::start(&source, &target, &request, verifying())
        .await
        .expect("take-off");
    flight
        .target_reaches(MigrationPhase::AwaitingCommit)
        .await
        .expect("everything arrived");
    flight
        .source_reaches(MigrationPhase::AwaitingCommit)
        .await
        .expect("everything was sent");

    flight
        .tell(&source, "release", request.epoch)
        .await
        .expect("release");

    // Nothing is left that could run: the process ends.
    source
        .process
        .wait_for_end(A_WHILE)
        .await
        .expect("the source ends");
}

#[tokio::test]
async fn a_commit_that_comes_early_or_late_is_refused() {
    require!(skip::kvm());
    let dir = TestDir::new();
    let (source, request) = boot_dirtying_pilot(&dir, "source", 1).await;
    let target = Vmm::start(&dir, "target").await.expect("a target");
    let flight = Flight::prepare(&source, &target, &request)
        .await
        .expect("a waiting target");
    let early = flight.commit().await.expect_err("nothing has arrived");
    assert_eq!(
        early
            .downcast_ref::<Problem>()
            .map(|problem| problem.status),
        Some(409),
        "{early:#}"
    );

    flight.send(verifying()).await.expect("take-off");
    flight
        .target_reaches(MigrationPhase::AwaitingCommit)
        .await
        .expect("everything arrived");
    let stale = flight
        .tell(&target, "commit", Epoch(0))
        .await
        .expect_err("an epoch that is over");
    assert_eq!(
        stale
            .downcast_ref::<Problem>()
            .map(|problem| problem.kind.as_str()),
        Some("stale-epoch")
    );
    let late = flight.cancel().await.expect_err("the store decides now");
    assert_eq!(
        late.downcast_ref::<Problem>()
            .map(|problem| problem.kind.as_str()),
        Some("too-late")
    );
    flight.land().await.expect("the right commit lands");
    verify_guest(&target).await;
}

async fn exits(source: &Vmm, target: &Vmm) -> (u64, u64) {
    let (source, target) = (
        source.info().await.expect("info"),
        target.info().await.expect("info"),
    );
    (source.counters.exits, target.counters.exits)
}
