//! A guest that comes home to a host that has kept its memory: only what has changed is sent, and nothing that was kept
//! is believed.

use super::{boot_pilot, endless, verify_guest, verifying};
use godwit_tests::kept::HeldMemory;
use godwit_tests::migration::{Flight, migrate, wait_for_phase};
use godwit_tests::test_dir::TestDir;
use godwit_tests::vmm::{BOOT_PATIENCE, Vmm};
use godwit_tests::{require, skip};
use godwit_wire::migration::{
    Compression, MigrationPhase, MigrationPolicy, MigrationStatus, PostCopy,
};
use godwit_wire::unit::Mib;
use godwit_wire::vmm_api::{CreateRequest, KeptMemory, StopReason, VmmState};

const MEMORY: Mib = Mib(256);
const MIB: u64 = 1 << 20;
const PAGES_PER_MIB: u64 = 256;
/// Of all memory; a return may not cost more.
const GOAL_SHARE: f64 = 0.08;

/// A guest that has moved away from where its memory is kept.
struct Away {
    away: Vmm,
    request: CreateRequest,
    memory: HeldMemory,
    dir: TestDir,
}

impl Away {
    /// Fills so much of the guest's memory before it leaves.
    async fn start(fill: Mib) -> Self {
        let dir = TestDir::new();
        let (mut first, mut request) = boot_pilot(&dir, "first", 1, MEMORY).await;
        let mut shell = first.shell().await.expect("shell");
        shell
            .command(&format!("fill {}", fill.0))
            .await
            .expect("fill");
        drop(shell);
        let memory = HeldMemory::of(&first).expect("the guest's memory");
        let away = Vmm::start(&dir, "away").await.expect("a target");
        migrate(&first, &away, &mut request, verifying())
            .await
            .expect("it moves away");
        let gone = VmmState::Stopped {
            reason: StopReason::MigratedAway,
        };
        first
            .wait_for_state(BOOT_PATIENCE, |state| *state == gone)
            .await
            .expect("no machine is left");
        first.process.kill();
        Self {
            away,
            request,
            memory,
            dir,
        }
    }

    async fn change(&self, mib: u64) {
        let mut shell = self.away.shell().await.expect("shell");
        shell.command(&format!("fill {mib}")).await.expect("fill");
    }

    /// Brings the guest home to what was kept.
    async fn come_home(
        &mut self,
        kept: KeptMemory,
        policy: MigrationPolicy,
    ) -> (Vmm, MigrationStatus) {
        let home = Vmm::start(&self.dir, "home").await.expect("a VMM at home");
        let flight = Flight::prepare_home(&self.away, &home, &self.request, kept)
            .await
            .expect("a waiting target");
        flight.send(policy).await.expect("take-off");
        let status = flight.land().await.expect("it comes home");
        self.request.epoch = self.request.epoch.next();
        (home, status)
    }
}

/// Every byte is what it was at the source, and none is saved by compression.
fn plain() -> MigrationPolicy {
    MigrationPolicy {
        compression: Compression::Off,
        ..verifying()
    }
}

#[tokio::test]
async fn a_guest_that_comes_home_is_sent_only_what_has_changed() {
    require!(skip::kvm());
    let mut guest = Away::start(Mib(200)).await;
    // 5 % of all memory.
    guest.change(MEMORY.0 / 20).await;
    let kept = guest.memory.place().expect("a place");
    let (home, status) = guest.come_home(kept, plain()).await;
    let progress = &status.progress;
    let share = progress.transferred_bytes.0 as f64 / progress.memory_bytes.0 as f64;
    assert!(share <= GOAL_SHARE, "{share}: {progress:?}");
    assert!(
        progress.content_pages >= MEMORY.0 / 20 * PAGES_PER_MIB,
        "{progress:?}"
    );
    let pages = MEMORY.0 * PAGES_PER_MIB;
    assert!(progress.kept_pages >= pages * 9 / 10, "{progress:?}");
    verify_guest(&home).await;
}

#[tokio::test]
async fn memory_that_was_kept_is_not_believed() {
    require!(skip::kvm());
    let mut guest = Away::start(Mib(64)).await;
    // Where the guest has its data, and where it never had anything.
    let garbage = vec![0xaa; 2 * MIB as usize];
    guest
        .memory
        .overwrite(32 * MIB, &garbage)
        .expect("overwrite");
    let never_touched = vec![0xbb; 8 * MIB as usize];
    guest
        .memory
        .overwrite(200 * MIB, &never_touched)
        .expect("overwrite");
    let kept = guest.memory.place().expect("a place");
    // Both ends hash all memory: it lands only if nothing of that is left.
    let (home, status) = guest.come_home(kept, plain()).await;
    let progress = &status.progress;
    assert!(progress.zero_pages >= 8 * PAGES_PER_MIB, "{progress:?}");
    assert!(progress.content_pages >= 2 * PAGES_PER_MIB, "{progress:?}");
    assert!(progress.kept_pages > 0, "{progress:?}");
    verify_guest(&home).await;
}

#[tokio::test]
async fn what_is_not_the_guests_memory_makes_way_for_fresh_memory() {
    require!(skip::kvm());
    let mut guest = Away::start(Mib(64)).await;
    let mut kept = guest.memory.place().expect("a place");
    kept.inode += 1;
    let (home, status) = guest.come_home(kept, plain()).await;
    let progress = &status.progress;
    assert_eq!(progress.kept_pages, 0, "{progress:?}");
    assert!(progress.content_pages >= 64 * PAGES_PER_MIB, "{progress:?}");
    verify_guest(&home).await;
}

#[tokio::test]
async fn a_return_that_is_called_off_leaves_the_guest_where_it_is() {
    require!(skip::kvm());
    let mut guest = Away::start(Mib(200)).await;
    let mut shell = guest.away.shell().await.expect("shell");
    shell.command("dirty 20 16").await.expect("dirty");
    drop(shell);
    let kept = guest.memory.place().expect("a place");
    let called_off = Vmm::start(&guest.dir, "called-off").await.expect("a VMM");
    let flight = Flight::prepare_home(&guest.away, &called_off, &guest.request, kept)
        .await
        .expect("a waiting target");
    flight.send(endless()).await.expect("take-off");
    flight
        .source_reaches(MigrationPhase::PreCopy)
        .await
        .expect("pre-copy");
    flight.cancel().await.expect("cancel");
    flight
        .source_reaches(MigrationPhase::Cancelled)
        .await
        .expect("cancelled");
    verify_guest(&guest.away).await;
    let aborted = VmmState::Stopped {
        reason: StopReason::IncomingAborted,
    };
    let mut called_off = called_off;
    called_off
        .wait_for_state(BOOT_PATIENCE, |state| *state == aborted)
        .await
        .expect("nothing is left of it");
    called_off.process.kill();
    // What it left in the memory is compared anew.
    let kept = guest.memory.place().expect("a place");
    let (home, status) = guest.come_home(kept, verifying()).await;
    assert!(status.progress.kept_pages > 0, "{:?}", status.progress);
    verify_guest(&home).await;
}

#[tokio::test]
async fn a_guest_may_come_home_ahead_of_its_memory() {
    require!(skip::kvm());
    let mut guest = Away::start(Mib(200)).await;
    let mut shell = guest.away.shell().await.expect("shell");
    shell.command("dirty 90 48").await.expect("dirty");
    drop(shell);
    let policy = MigrationPolicy {
        downtime_limit_ms: 100,
        max_bandwidth_bytes_per_s: Some(24 << 20),
        compression: Compression::Off,
        post_copy: PostCopy::Allowed,
        ..MigrationPolicy::default()
    };
    let kept = guest.memory.place().expect("a place");
    let (home, status) = guest.come_home(kept, policy).await;
    wait_for_phase(&home, MigrationPhase::Completed)
        .await
        .expect("the target has everything");
    assert!(status.progress.kept_pages > 0, "{:?}", status.progress);
    verify_guest(&home).await;
}
