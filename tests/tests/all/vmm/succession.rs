//! Another process takes a guest over with its very memory; whichever process dies on the way, at most one runs it.

use super::{boot_dirtying_pilot, boot_pilot, verify, verify_guest};
use godwit_tests::lease::LeasePage;
use godwit_tests::linux::LinuxGuest;
use godwit_tests::require;
use godwit_tests::skip;
use godwit_tests::succession::{Succession, guest_memory_file};
use godwit_tests::test_dir::TestDir;
use godwit_tests::vmm::{self, BOOT_PATIENCE, Vmm, new_vm};
use godwit_wire::lease::STOP_TIME;
use godwit_wire::succession::{SuccessionPhase, SuccessionStatus};
use godwit_wire::unit::Mib;
use godwit_wire::vmm_api::{CreateRequest, PauseReason, StopReason, VmmState};
use std::sync::Arc;
use std::time::Duration;

const HANDING_OVER: VmmState = VmmState::Paused {
    reason: PauseReason::HandOver,
};
const PAUSED: VmmState = VmmState::Paused {
    reason: PauseReason::Requested,
};
const VOID: VmmState = VmmState::Stopped {
    reason: StopReason::IncomingAborted,
};
/// Long enough for a wrong decision to show.
const A_WHILE: Duration = Duration::from_millis(700);
/// What was called off is known at both ends within this time.
const SOON: Duration = Duration::from_secs(10);

async fn state(vmm: &Vmm) -> VmmState {
    vmm.info().await.expect("info").state
}

async fn exits(vmm: &Vmm) -> u64 {
    vmm.info().await.expect("info").counters.exits
}

/// The guest in `here` goes on in a fresh process; the one it leaves is killed, as an agent does.
async fn change(dir: &TestDir, mut here: Vmm, name: &str, request: &CreateRequest) -> Vmm {
    let there = Vmm::start(dir, name).await.expect("a successor");
    let memory = guest_memory_file(here.process.pid()).expect("its memory");
    let before = here.info().await.expect("info");
    let status = Succession::of(dir, &here, &there, request)
        .complete()
        .await
        .unwrap_or_else(|error| panic!("{name}: {error:#}"));
    here.process.kill();
    assert_took_over(&status);
    assert_eq!(
        guest_memory_file(there.process.pid()).expect("its memory"),
        memory,
        "it is the same memory, not a copy"
    );
    let after = there.info().await.expect("info");
    assert_eq!(
        (after.state, after.vm, after.epoch),
        (VmmState::Running, Some(request.vm), request.epoch)
    );
    assert_eq!(after.spec.as_ref(), Some(&request.spec));
    assert_ne!(after.pid, before.pid);
    let (before, after) = (before.counters, after.counters);
    assert!(
        after.exits >= before.exits && after.serial_tx_bytes >= before.serial_tx_bytes,
        "counters go on where they were: {before:?}, {after:?}"
    );
    there
}

fn assert_took_over(status: &SuccessionStatus) {
    assert_eq!(status.phase, SuccessionPhase::Completed, "{status:?}");
    let blackout = status.blackout.expect("it is measured");
    println!("{blackout:?}");
    let parts = blackout.pause_us + blackout.save_us + blackout.restore_us + blackout.commit_us;
    assert!(
        blackout.total_us > 0 && parts <= blackout.total_us + 10,
        "{blackout:?}"
    );
}

#[tokio::test]
async fn a_busy_pilot_goes_on_in_one_process_after_the_other() {
    require!(skip::kvm());
    let dir = TestDir::new();
    let (mut here, request) = boot_dirtying_pilot(&dir, "vmm-0", 2).await;
    for number in 1..=4 {
        here = change(&dir, here, &format!("vmm-{number}"), &request).await;
        verify_guest(&here).await;
    }
    // What the guest said in its first process is still there for who attaches to its last.
    here.serial()
        .await
        .expect("console")
        .wait_for("pilot ", BOOT_PATIENCE)
        .await
        .expect("the ring came along");
}

#[tokio::test]
async fn a_linux_guest_goes_on_in_one_process_after_the_other() {
    let guest = require!(LinuxGuest::prepare());
    let dir = TestDir::new();
    let request = new_vm(vmm::linux(&guest, 2, Mib(256)));
    let mut here = Vmm::boot(&dir, "vmm-0", &request).await.expect("boot");
    here.serial()
        .await
        .expect("console")
        .wait_for(vmm::greeting(&request.spec), BOOT_PATIENCE)
        .await
        .expect("the guest is up");
    let mut shell = here.shell().await.expect("shell");
    shell.command("fill 64").await.expect("fill");
    shell.command("dirty 20 8").await.expect("dirty");
    for number in 1..=4 {
        here = change(&dir, here, &format!("vmm-{number}"), &request).await;
        verify(&mut here.shell().await.expect("shell")).await;
    }
}

#[tokio::test]
async fn a_paused_machine_stays_paused() {
    require!(skip::kvm());
    let dir = TestDir::new();
    let (mut here, request) = boot_dirtying_pilot(&dir, "old", 1).await;
    here.command("pause", request.epoch).await.expect("pause");
    let there = Vmm::start(&dir, "new").await.expect("a successor");
    let status = Succession::of(&dir, &here, &there, &request)
        .complete()
        .await
        .expect("it is taken over");
    assert_eq!(status.phase, SuccessionPhase::Completed);
    here.process.kill();
    assert_eq!(state(&there).await, PAUSED);
    there
        .command("resume", request.epoch)
        .await
        .expect("resume");
    verify_guest(&there).await;
}

#[tokio::test]
async fn without_the_agents_word_both_processes_stand_still() {
    require!(skip::kvm());
    let dir = TestDir::new();
    let (here, request) = boot_dirtying_pilot(&dir, "old", 2).await;
    let there = Vmm::start(&dir, "new").await.expect("a successor");
    let succession = Succession::of(&dir, &here, &there, &request);
    succession.prepare().await.expect("prepare");
    assert_eq!(
        (state(&here).await, state(&there).await),
        (VmmState::Running, VmmState::Incoming),
        "the guest runs while the machine is built"
    );
    verify_guest(&here).await;
    succession
        .commit()
        .await
        .expect_err("a machine that is not whole does not run");
    succession.take().await.expect("take");
    assert_eq!(
        (state(&here).await, state(&there).await),
        (HANDING_OVER, HANDING_OVER)
    );
    let before = (exits(&here).await, exits(&there).await);
    for vmm in [&here, &there] {
        vmm.command("resume", request.epoch)
            .await
            .expect_err("only the agent's record decides");
    }
    tokio::time::sleep(A_WHILE).await;
    assert_eq!((exits(&here).await, exits(&there).await), before);
    // However often it is said, it is said once.
    succession.take().await.expect("again");
    succession.commit().await.expect("commit");
    succession.commit().await.expect("again");
    assert_eq!(state(&here).await, HANDING_OVER);
    assert_eq!(state(&there).await, VmmState::Running);
    verify_guest(&there).await;
}

#[tokio::test]
async fn a_successor_that_dies_before_the_commit_leaves_the_guest_to_its_predecessor() {
    require!(skip::kvm());
    let dir = TestDir::new();
    let (here, request) = boot_dirtying_pilot(&dir, "old", 2).await;
    let mut there = Vmm::start(&dir, "first").await.expect("a successor");
    let succession = Succession::of(&dir, &here, &there, &request);
    succession.prepare().await.expect("prepare");
    succession.take().await.expect("take");
    let id = succession.succession;
    there.process.kill();
    tokio::time::sleep(A_WHILE).await;
    assert_eq!(
        state(&here).await,
        HANDING_OVER,
        "it never goes on by itself"
    );
    let again = Succession::of(&dir, &here, &there, &request).found(id);
    again.abort().await.expect("abort");
    assert_eq!(state(&here).await, VmmState::Running);
    verify_guest(&here).await;
    // And the next one may take it over.
    let next = change(&dir, here, "second", &request).await;
    verify_guest(&next).await;
}

#[tokio::test]
async fn a_successor_that_dies_before_it_asks_does_not_stop_the_guest() {
    require!(skip::kvm());
    let dir = TestDir::new();
    let (here, request) = boot_dirtying_pilot(&dir, "old", 1).await;
    let mut there = Vmm::start(&dir, "first").await.expect("a successor");
    let succession = Succession::of(&dir, &here, &there, &request);
    succession.prepare().await.expect("prepare");
    there.process.kill();
    let failed = async {
        loop {
            let status = here.info().await.expect("info").succession;
            if status.expect("a status").phase == SuccessionPhase::Failed {
                return;
            }
        }
    };
    tokio::time::timeout(SOON, failed)
        .await
        .expect("it is noticed");
    assert_eq!(state(&here).await, VmmState::Running);
    let next = change(&dir, here, "second", &request).await;
    verify_guest(&next).await;
}

#[tokio::test]
async fn a_predecessor_that_dies_once_everything_is_handed_over_is_not_needed() {
    require!(skip::kvm());
    let dir = TestDir::new();
    let (mut here, request) = boot_dirtying_pilot(&dir, "old", 2).await;
    let there = Vmm::start(&dir, "new").await.expect("a successor");
    let succession = Succession::of(&dir, &here, &there, &request);
    succession.prepare().await.expect("prepare");
    succession.take().await.expect("take");
    let id = succession.succession;
    here.process.kill();
    let rest = Succession::of(&dir, &here, &there, &request).found(id);
    rest.commit().await.expect("commit");
    verify_guest(&there).await;
}

#[tokio::test]
async fn a_predecessor_that_dies_before_the_hand_over_takes_the_guest_along() {
    require!(skip::kvm());
    let dir = TestDir::new();
    let (mut here, request) = boot_dirtying_pilot(&dir, "old", 1).await;
    let there = Vmm::start(&dir, "new").await.expect("a successor");
    let succession = Succession::of(&dir, &here, &there, &request);
    succession.prepare().await.expect("prepare");
    let id = succession.succession;
    here.process.kill();
    there
        .wait_for_state(SOON, |state| *state == VOID)
        .await
        .expect("half a machine is no machine");
    let rest = Succession::of(&dir, &here, &there, &request).found(id);
    rest.take().await.expect_err("nobody is there");
    rest.commit().await.expect_err("nothing is there");
    assert_eq!(state(&there).await, VOID);
}

#[tokio::test]
async fn a_guest_that_powers_off_meanwhile_is_not_taken_over() {
    require!(skip::kvm());
    let dir = TestDir::new();
    let (here, request) = boot_pilot(&dir, "old", 1, Mib(64)).await;
    let there = Vmm::start(&dir, "new").await.expect("a successor");
    let succession = Succession::of(&dir, &here, &there, &request);
    succession.prepare().await.expect("prepare");
    here.command("stop", request.epoch).await.expect("stop");
    here.wait_until_halted(BOOT_PATIENCE)
        .await
        .expect("it powers off");
    there
        .wait_for_state(SOON, |state| *state == VOID)
        .await
        .expect("its successor hears of it");
}

#[tokio::test]
async fn the_lease_is_watched_by_whoever_has_the_guest() {
    require!(skip::kvm());
    const SHORT: Duration = Duration::from_secs(3);
    let dir = TestDir::new();
    let lease = Arc::new(LeasePage::create(&dir.join("lease")).expect("a lease page"));
    lease.grant(SHORT).expect("grant");
    let renewed = lease.clone();
    let agent = tokio::spawn(async move {
        loop {
            renewed.grant(SHORT).expect("grant");
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    });
    let request = CreateRequest {
        lease: Some(lease.path().to_owned()),
        ..new_vm(vmm::pilot(2, Mib(64)))
    };
    let here = Vmm::boot(&dir, "old", &request).await.expect("boot");
    here.serial()
        .await
        .expect("console")
        .wait_for("pilot ", BOOT_PATIENCE)
        .await
        .expect("hello");
    let mut shell = here.shell().await.expect("shell");
    shell.command("fill 16").await.expect("fill");
    let there = change(&dir, here, "new", &request).await;
    // A deadline is only ever moved ahead: it is the absence of a renewal that ends a lease.
    agent.abort();
    let expired = VmmState::Paused {
        reason: PauseReason::LeaseExpired,
    };
    there
        .wait_for_state(SHORT + STOP_TIME, |state| *state == expired)
        .await
        .expect("it stops itself in time");
    lease.grant(Duration::from_secs(3_600)).expect("grant");
    there
        .command("resume", request.epoch)
        .await
        .expect("resume");
    verify_guest(&there).await;
}
