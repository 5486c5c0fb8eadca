//! A guest that runs at the target before all of its memory is there.

use super::{boot_pilot, verify_guest};
use godwit_tests::linux::LinuxGuest;
use godwit_tests::migration::{Flight, status_after, wait_for_phase};
use godwit_tests::relay::Relay;
use godwit_tests::test_dir::TestDir;
use godwit_tests::vmm::{self, BOOT_PATIENCE, Vmm, new_vm};
use godwit_tests::{require, skip};
use godwit_wire::migration::{
    Compression, MigrationPhase, MigrationPolicy, MigrationStatus, PostCopy,
};
use godwit_wire::unit::{Bytes, Mib};
use godwit_wire::vmm_api::{CreateRequest, PauseReason, StopReason, VmmState};
use std::time::Duration;

/// A wrong decision shows within this time.
const A_WHILE: Duration = Duration::from_millis(1_500);
const PATIENCE: Duration = Duration::from_secs(30);
const HANDED_OVER: VmmState = VmmState::Paused {
    reason: PauseReason::HandOver,
};

/// A VMM with a guest that changes most of its memory faster than [`slow`] carries it, and one that waits for it.
struct Pair {
    source: Vmm,
    target: Vmm,
    request: CreateRequest,
    _dir: TestDir,
}

impl Pair {
    async fn start() -> Self {
        let dir = TestDir::new();
        let (source, request) = boot_pilot(&dir, "source", 2, Mib(128)).await;
        let mut shell = source.shell().await.expect("shell");
        shell.command("fill 64").await.expect("fill");
        shell.command("dirty 90 48").await.expect("dirty");
        let target = Vmm::start(&dir, "target").await.expect("a target");
        Self {
            source,
            target,
            request,
            _dir: dir,
        }
    }

    /// A flight over a relay that can be cut.
    async fn take_off(&self) -> (Flight<'_>, Relay) {
        let mut flight = Flight::prepare_encrypted(&self.source, &self.target, &self.request)
            .await
            .expect("a waiting target");
        let relay = Relay::to(flight.address).await.expect("a relay");
        flight.address = relay.address;
        flight.send(slow()).await.expect("take-off");
        (flight, relay)
    }
}

/// A link that leaves some of the memory for later, and time to look at that.
fn slow() -> MigrationPolicy {
    MigrationPolicy {
        lanes: 3,
        downtime_limit_ms: 100,
        max_bandwidth_bytes_per_s: Some(24 << 20),
        compression: Compression::Off,
        post_copy: PostCopy::Allowed,
        ..MigrationPolicy::default()
    }
}

async fn go_ahead(flight: &Flight<'_>) {
    flight
        .target_reaches(MigrationPhase::AwaitingCommit)
        .await
        .expect("all but memory arrived");
    let committed = flight.commit().await.expect("commit");
    assert_eq!(committed.phase, MigrationPhase::PostCopy, "{committed:?}");
    flight
        .source_reaches(MigrationPhase::PostCopy)
        .await
        .expect("the source serves memory");
}

/// Everything has followed, as both ends say, and is what it was.
async fn expect_whole(source: &Vmm, target: &Vmm) -> MigrationStatus {
    let landed = wait_for_phase(source, MigrationPhase::Completed)
        .await
        .expect("the source has given everything");
    wait_for_phase(target, MigrationPhase::Completed)
        .await
        .expect("the target has everything");
    verify_guest(target).await;
    let memory = landed.progress.post_copy.expect("memory followed");
    assert!(memory.owed_bytes > Bytes(0), "{memory:?}");
    assert_eq!(memory.missing_bytes, Bytes(0), "{memory:?}");
    landed
}

#[tokio::test]
async fn a_guest_that_outruns_its_link_goes_ahead_of_its_memory() {
    require!(skip::kvm());
    let pair = Pair::start().await;
    let Pair { source, target, .. } = &pair;
    let (flight, _relay) = pair.take_off().await;
    go_ahead(&flight).await;
    // It runs there, and no more here, while memory is still missing.
    assert_eq!(target.info().await.expect("info").state, VmmState::Running);
    assert_eq!(source.info().await.expect("info").state, HANDED_OVER);
    let landed = expect_whole(source, target).await;
    let downtime_us = landed.progress.downtime_us.expect("the downtime is known");
    let followed_ms = landed.progress.post_copy.expect("memory followed").took_ms;
    assert!(
        followed_ms * 1000 > downtime_us,
        "the guest stood still for {downtime_us} us and its memory came in {followed_ms} ms"
    );
    let arrived = status_after(target, 0).await.expect("status").progress;
    let waited = arrived.post_copy.expect("the target counts too");
    assert!(waited.wanted_pages > 0, "{waited:?}");
    let stopped = VmmState::Stopped {
        reason: StopReason::MigratedAway,
    };
    assert_eq!(source.info().await.expect("info").state, stopped);
}

#[tokio::test]
async fn where_post_copy_is_not_allowed_no_guest_goes_ahead() {
    require!(skip::kvm());
    let pair = Pair::start().await;
    let Pair { source, target, .. } = &pair;
    let policy = MigrationPolicy {
        post_copy: PostCopy::Forbidden,
        max_throttle_percent: 0,
        max_rounds: 3,
        ..slow()
    };
    let flight = Flight::start(source, target, &pair.request, policy)
        .await
        .expect("take-off");
    let ended = flight
        .source_reaches(MigrationPhase::Failed)
        .await
        .expect("it gives up");
    assert_eq!(ended.progress.post_copy, None);
    verify_guest(source).await;
}

#[tokio::test]
async fn a_broken_link_stops_the_guest_until_its_memory_can_follow_again() {
    require!(skip::kvm());
    let pair = Pair::start().await;
    let Pair { source, target, .. } = &pair;
    let (flight, relay) = pair.take_off().await;
    go_ahead(&flight).await;

    for _ in 0..2 {
        relay.cut();
        target
            .wait_for_state(PATIENCE, VmmState::waits_for_memory)
            .await
            .expect("the guest waits");
        assert_eq!(source.info().await.expect("info").state, HANDED_OVER);
        relay.mend();
        target
            .wait_for_state(PATIENCE, |state| *state == VmmState::Running)
            .await
            .expect("the guest goes on");
    }
    let landed = expect_whole(source, target).await;
    let interruptions = landed.progress.post_copy.expect("figures").interruptions;
    assert!(interruptions >= 2, "{interruptions} interruptions");
}

/// The link breaks when everything but memory has arrived, and the store voids the migration: the guest runs on where
/// its memory is.
#[tokio::test]
async fn a_guest_that_was_not_granted_runs_on_where_its_memory_is() {
    require!(skip::kvm());
    let pair = Pair::start().await;
    let Pair { source, target, .. } = &pair;
    let (flight, relay) = pair.take_off().await;
    flight
        .target_reaches(MigrationPhase::AwaitingCommit)
        .await
        .expect("all but memory arrived");
    relay.cut();
    flight.abort_source().await.expect("the store voids it");
    source
        .wait_for_state(PATIENCE, |state| *state == VmmState::Running)
        .await
        .expect("the source runs");
    flight
        .tell(target, "abort", flight.epoch)
        .await
        .expect("the target hears it too");
    flight.commit().await.expect_err("it is void");
    verify_guest(source).await;
}

/// The store's word reaches the source by its agent while the link is down: it must not give its memory away for that.
#[tokio::test]
async fn a_released_source_keeps_what_the_target_lacks() {
    require!(skip::kvm());
    let pair = Pair::start().await;
    let Pair { source, target, .. } = &pair;
    let (flight, relay) = pair.take_off().await;
    flight
        .target_reaches(MigrationPhase::AwaitingCommit)
        .await
        .expect("all but memory arrived");
    relay.cut();
    flight.commit().await.expect("commit");
    let told = flight.tell(source, "release", flight.epoch).await;
    assert_eq!(told.expect("release").phase, MigrationPhase::PostCopy);
    let refused = flight.abort_source().await.expect_err("it is decided");
    assert!(format!("{refused:#}").contains("target"), "{refused:#}");
    relay.mend();
    expect_whole(source, target).await;
}

#[tokio::test]
async fn a_target_that_dies_early_leaves_the_source_standing() {
    require!(skip::kvm());
    let mut pair = Pair::start().await;
    let (flight, _relay) = pair.take_off().await;
    go_ahead(&flight).await;
    pair.target.process.kill();
    tokio::time::sleep(A_WHILE).await;
    assert_eq!(
        pair.source.info().await.expect("info").state,
        HANDED_OVER,
        "the guest has run elsewhere: it must not go back in time"
    );
    let status = status_after(&pair.source, 0).await.expect("status");
    assert_eq!(status.phase, MigrationPhase::PostCopy);
}

#[tokio::test]
async fn a_guest_that_is_killed_early_needs_no_memory_any_more() {
    require!(skip::kvm());
    let mut pair = Pair::start().await;
    let (flight, _relay) = pair.take_off().await;
    go_ahead(&flight).await;
    // It may be waiting for memory at this moment; that must not keep it.
    let killed = pair.target.command("kill", flight.epoch.next()).await;
    killed.expect("kill");
    pair.target
        .process
        .wait_for_end(PATIENCE)
        .await
        .expect("the VMM ends");
}

#[tokio::test]
async fn a_linux_guest_goes_ahead_of_its_memory() {
    require!(skip::kvm());
    let linux = require!(LinuxGuest::prepare());
    let dir = TestDir::new();
    let request = new_vm(vmm::linux(&linux, 2, Mib(256)));
    let source = Vmm::boot(&dir, "source", &request).await.expect("it boots");
    let mut serial = source.serial().await.expect("the console is there");
    serial
        .wait_for(vmm::greeting(&request.spec), BOOT_PATIENCE)
        .await
        .expect("it says hello");
    drop(serial);
    let mut shell = source.shell().await.expect("shell");
    shell.command("fill 128").await.expect("fill");
    shell.command("dirty 90 96").await.expect("dirty");
    drop(shell);
    let target = Vmm::start(&dir, "target").await.expect("a target");
    let flight = Flight::prepare_encrypted(&source, &target, &request)
        .await
        .expect("a waiting target");
    let policy = MigrationPolicy {
        max_bandwidth_bytes_per_s: Some(64 << 20),
        ..slow()
    };
    flight.send(policy).await.expect("take-off");
    go_ahead(&flight).await;
    expect_whole(&source, &target).await;
}

/// The guest restarts itself while it still lacks memory: it boots when nothing of the old one can do harm any more.
#[tokio::test]
async fn a_guest_that_restarts_early_boots_once_its_memory_is_here() {
    require!(skip::kvm());
    let pair = Pair::start().await;
    let Pair { source, target, .. } = &pair;
    let (flight, _relay) = pair.take_off().await;
    go_ahead(&flight).await;
    let mut serial = target.serial().await.expect("the console is there");
    serial.send_line("reset").await.expect("the guest hears it");
    drop(serial);
    wait_for_phase(target, MigrationPhase::Completed)
        .await
        .expect("its memory is here");
    wait_for_phase(source, MigrationPhase::Completed)
        .await
        .expect("the source is free");
    let rebooted = target
        .wait_for_state(PATIENCE, |state| *state == VmmState::Running)
        .await
        .expect("it runs again");
    assert_eq!(rebooted.counters.resets, 1);
    let ticks = target.shell().await.expect("shell").command("ticks").await;
    ticks.expect("the pilot has booted");
}
