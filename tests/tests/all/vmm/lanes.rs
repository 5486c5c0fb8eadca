//! A migration over several connections, encrypted, limited and with the guest slowed down.

use super::{boot_dirtying_pilot, boot_pilot, verify_guest, verifying};
use godwit_channel::pki::Authority;
use godwit_tests::migration::Flight;
use godwit_tests::test_dir::TestDir;
use godwit_tests::vmm::Vmm;
use godwit_tests::{require, skip};
use godwit_wire::id::MigrationId;
use godwit_wire::migration::{
    Compression, MigrationPhase, MigrationPolicy, MigrationRole, MigrationStatus,
};
use godwit_wire::unit::Mib;
use godwit_wire::vmm_api::{MigrationBandwidth, VmmState};
use std::time::{Duration, Instant};

#[tokio::test]
async fn a_busy_guest_moves_whole_over_many_encrypted_lanes() {
    require!(skip::kvm());
    let dir = TestDir::new();
    let (source, request) = boot_dirtying_pilot(&dir, "source", 2).await;
    let target = Vmm::start(&dir, "target").await.expect("a target");
    let flight = Flight::prepare_encrypted(&source, &target, &request)
        .await
        .expect("a waiting target");
    let policy = MigrationPolicy {
        lanes: 16,
        ..verifying()
    };
    flight.send(policy).await.expect("take-off");
    let landed = flight.land().await.expect("the guest lands");
    assert_eq!(landed.progress.lanes, 16);
    assert_eq!(landed.progress.opened_lanes, 16);
    let blackout = landed.progress.blackout.expect("its parts are known");
    let downtime_us = landed.progress.downtime_us.expect("the downtime is known");
    let parts = blackout.pause_us
        + blackout.save_us
        + blackout.pages_us
        + blackout.restore_us
        + blackout.commit_us;
    assert!(parts <= downtime_us, "{blackout:?} in {downtime_us} us");
    verify_guest(&target).await;
}

#[tokio::test]
async fn a_busy_guest_moves_whole_over_as_many_lanes_as_the_source_chooses() {
    require!(skip::kvm());
    let dir = TestDir::new();
    let (source, request) = boot_dirtying_pilot(&dir, "source", 2).await;
    let target = Vmm::start(&dir, "target").await.expect("a target");
    // Rounds that are long enough to look at, and in which some lanes rest.
    let policy = MigrationPolicy {
        lanes: 0,
        max_bandwidth_bytes_per_s: Some(96 << 20),
        compression: Compression::Off,
        ..verifying()
    };
    let landed = fly(&source, &target, &request, policy).await.progress;
    assert!(landed.lanes >= 1, "{landed:?}");
    assert!(landed.lanes <= landed.opened_lanes, "{landed:?}");
    verify_guest(&target).await;
}

/// The source that another migration's certificate speaks for does not get in, nor does one without any.
#[tokio::test]
async fn an_encrypted_target_takes_only_the_source_of_its_own_migration() {
    require!(skip::kvm());
    let dir = TestDir::new();
    let (source, request) = boot_dirtying_pilot(&dir, "source", 1).await;
    let (authority, stranger) = (
        Authority::create().expect("a CA"),
        Authority::create().expect("another CA"),
    );
    let issue = |authority: &Authority, migration, role| {
        authority
            .issue_migration(migration, role)
            .expect("an identity")
    };
    for number in 0..4 {
        let migration = MigrationId::fresh();
        let right = (
            issue(&authority, migration, MigrationRole::Source),
            issue(&authority, migration, MigrationRole::Target),
        );
        let wrong = match number {
            0 => Some(issue(
                &authority,
                MigrationId::fresh(),
                MigrationRole::Source,
            )),
            1 => Some(right.1.clone()),
            2 => Some(issue(&stranger, migration, MigrationRole::Source)),
            _ => None,
        };
        let target = Vmm::start(&dir, &format!("target-{number}"))
            .await
            .expect("a target");
        let mut flight = Flight::prepare_with(&source, &target, &request, migration, Some(right))
            .await
            .expect("a waiting target");
        flight.identity = wrong;
        // It cannot even begin, or it ends; the guest stays either way.
        if flight.send(verifying()).await.is_ok() {
            flight
                .source_reaches(MigrationPhase::Failed)
                .await
                .expect("it fails");
        }
        assert_eq!(source.info().await.expect("info").state, VmmState::Running);
        assert_eq!(target.info().await.expect("info").state, VmmState::Incoming);
    }
    verify_guest(&source).await;
}

#[tokio::test]
async fn the_bandwidth_limit_holds_for_all_lanes_together() {
    require!(skip::kvm());
    const BYTES_PER_S: u64 = 64 << 20;
    let dir = TestDir::new();
    let (source, request) = boot_pilot(&dir, "source", 1, Mib(96)).await;
    let filled = source
        .shell()
        .await
        .expect("shell")
        .command("fill 64")
        .await;
    filled.expect("memory that is not zero");
    let target = Vmm::start(&dir, "target").await.expect("a target");
    let began = Instant::now();
    let policy = MigrationPolicy {
        lanes: 4,
        max_bandwidth_bytes_per_s: Some(BYTES_PER_S),
        compression: Compression::Off,
        ..verifying()
    };
    let landed = fly(&source, &target, &request, policy).await;
    let fastest = Duration::from_secs_f64(
        landed.progress.transferred_bytes.0 as f64 / BYTES_PER_S as f64 * 0.9,
    );
    assert!(began.elapsed() >= fastest, "{:?}", landed.progress);
    verify_guest(&target).await;
}

#[tokio::test]
async fn a_limit_can_be_lifted_while_a_migration_runs() {
    const BYTES_PER_S: u64 = 1 << 20;
    require!(skip::kvm());
    let dir = TestDir::new();
    let (source, request) = boot_pilot(&dir, "source", 1, Mib(96)).await;
    let filled = source
        .shell()
        .await
        .expect("shell")
        .command("fill 64")
        .await;
    filled.expect("memory that is not zero");
    let target = Vmm::start(&dir, "target").await.expect("a target");
    let policy = MigrationPolicy {
        lanes: 2,
        max_bandwidth_bytes_per_s: Some(BYTES_PER_S),
        compression: Compression::Off,
        ..verifying()
    };
    let began = Instant::now();
    let flight = Flight::start(&source, &target, &request, policy)
        .await
        .expect("take-off");
    flight
        .source_reaches(MigrationPhase::PreCopy)
        .await
        .expect("it copies");
    let lifted = MigrationBandwidth {
        migration: flight.migration,
        epoch: flight.epoch,
        max_bytes_per_s: None,
    };
    let path = "/v1/migration/bandwidth";
    let refused = target.api.post::<MigrationStatus>(path, &lifted).await;
    let refused = refused.expect_err("a target sends nothing");
    assert!(format!("{refused:#}").contains("source"), "{refused:#}");
    let _: MigrationStatus = source.api.post(path, &lifted).await.expect("lifted");
    let landed = flight.land().await.expect("the guest lands");
    let limited =
        Duration::from_secs_f64(landed.progress.content_pages as f64 * 4096.0 / BYTES_PER_S as f64);
    assert!(began.elapsed() < limited / 2, "{:?}", landed.progress);
    verify_guest(&target).await;
}

#[tokio::test]
async fn a_guest_that_outruns_a_slow_link_is_slowed_down_and_lands() {
    require!(skip::kvm());
    let dir = TestDir::new();
    let (source, request) = boot_pilot(&dir, "source", 2, Mib(128)).await;
    let mut shell = source.shell().await.expect("shell");
    shell.command("fill 64").await.expect("fill");
    shell.command("dirty 64 48").await.expect("dirty");
    drop(shell);
    let target = Vmm::start(&dir, "target").await.expect("a target");
    let policy = MigrationPolicy {
        lanes: 2,
        downtime_limit_ms: 100,
        max_bandwidth_bytes_per_s: Some(32 << 20),
        max_throttle_percent: 99,
        ..verifying()
    };
    let landed = fly(&source, &target, &request, policy).await;
    assert!(
        landed.progress.throttle_percent > 0,
        "{:?}",
        landed.progress
    );
    verify_guest(&target).await;
}

async fn fly(
    source: &Vmm,
    target: &Vmm,
    request: &godwit_wire::vmm_api::CreateRequest,
    policy: MigrationPolicy,
) -> MigrationStatus {
    let flight = Flight::start(source, target, request, policy)
        .await
        .expect("take-off");
    flight.land().await.expect("the guest lands")
}
