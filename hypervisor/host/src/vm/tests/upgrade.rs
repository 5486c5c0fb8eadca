//! A VM changes its VMM, and whatever breaks on the way, one of the two runs it, and one only.

use super::fake::{Host, Scripted};
use super::*;
use crate::record::{Seat, VmRecord};
use godwit_wire::host_api::{UpgradeOutcome, UpgradeVm, UpgradedVm};
use godwit_wire::id::SuccessionId;

fn ask() -> UpgradeVm {
    UpgradeVm {
        epoch: Epoch(1),
        succession: SuccessionId::fresh(),
    }
}

async fn started() -> (Host, VmId) {
    let mut host = Host::new().await;
    let vm = VmId::fresh();
    host.start(vm, 1, 1).await.unwrap();
    (host, vm)
}

fn record(host: &Host, vm: VmId) -> VmRecord {
    let directory = host.registry.context().state.vm(vm);
    directory.read_record().unwrap().unwrap()
}

async fn upgrade(host: &Host, vm: VmId, ask: UpgradeVm) -> Result<UpgradedVm, Problem> {
    host.registry
        .ask(vm, |reply| Command::Upgrade(ask, reply))
        .await
}

/// Begins an upgrade and does not wait for its answer.
fn begin(host: &Host, vm: VmId) {
    let registry = host.registry.clone();
    tokio::spawn(async move {
        registry
            .ask(vm, |reply| Command::Upgrade(ask(), reply))
            .await
    });
}

/// Waits until the record says that no change of VMMs is open.
async fn until_settled(host: &Host, vm: VmId) {
    let settles = async {
        while record(host, vm).succession.is_some() {
            // A file announces nothing.
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(20), settles)
        .await
        .expect("it settles");
}

#[tokio::test]
async fn a_vm_goes_on_in_a_new_vmm_and_the_old_one_ends() {
    let (host, vm) = started().await;
    let old = host.fakes.process(vm);
    let ask = ask();
    let upgraded = upgrade(&host, vm, ask).await.unwrap();
    let new = host.fakes.process(vm);
    assert_eq!(upgraded.outcome, UpgradeOutcome::Upgraded);
    assert_eq!(i32::try_from(upgraded.pid), Ok(new.id().pid));
    assert_eq!(upgraded.blackout.unwrap().total_us, 4_321);
    assert_ne!(new.id(), old.id());
    old.exited().await;
    let written = record(&host, vm);
    assert_eq!(
        (written.process, written.seat, written.succession),
        (Some(new.id()), Seat::Second, None)
    );
    assert_eq!(host.report(vm).unwrap().state, Some(VmmState::Running));
    // The same command again: the same answer, and no third VMM.
    assert_eq!(upgrade(&host, vm, ask).await.unwrap(), upgraded);
    assert_eq!(host.fakes.spawned(), 2);
}

#[tokio::test]
async fn seats_are_taken_in_turns() {
    let (host, vm) = started().await;
    for seat in [Seat::Second, Seat::First, Seat::Second] {
        upgrade(&host, vm, ask()).await.unwrap();
        assert_eq!(record(&host, vm).seat, seat);
    }
    assert_eq!(host.fakes.spawned(), 4);
    // Commands find the VMM where it is.
    let pause = VmCommand {
        epoch: Epoch(1),
        generation: Generation(2),
    };
    let paused = host
        .registry
        .ask(vm, |reply| Command::Pause(pause, reply))
        .await
        .unwrap();
    assert_eq!(
        paused.state,
        Some(VmmState::Paused {
            reason: PauseReason::Requested
        })
    );
}

#[tokio::test]
async fn whatever_fails_before_the_commit_leaves_the_vm_in_its_vmm() {
    for path in ["succession/prepare", "succession/take"] {
        let (host, vm) = started().await;
        let old = host.fakes.process(vm);
        host.fakes.script(path, Scripted::Refused);
        let refused = upgrade(&host, vm, ask()).await.unwrap_err();
        assert_eq!(refused.kind, "scripted", "{path}");
        host.fakes.process(vm).exited().await;
        let (process, state, calls) = host.fakes.predecessor(vm);
        assert_eq!((process.id(), state), (old.id(), VmmState::Running));
        assert!(calls.iter().any(|call| call == "/v1/succession/abort"));
        let written = record(&host, vm);
        assert_eq!(
            (written.process, written.seat, written.succession),
            (Some(old.id()), Seat::First, None)
        );
        // And it can be tried again.
        upgrade(&host, vm, ask()).await.unwrap();
        old.exited().await;
    }
}

#[tokio::test]
async fn a_vmm_that_knows_no_successions_is_too_old() {
    let (host, vm) = started().await;
    host.fakes.script("succession/offer", Scripted::Unknown);
    host.fakes.script("succession/abort", Scripted::Unknown);
    let refused = upgrade(&host, vm, ask()).await.unwrap_err();
    assert_eq!(refused.kind, "vmm-too-old");
    host.fakes.process(vm).exited().await;
    assert_eq!(record(&host, vm).succession, None);
    assert_eq!(host.report(vm).unwrap().state, Some(VmmState::Running));
}

#[tokio::test]
async fn an_agent_that_dies_before_the_commit_leaves_the_vm_to_its_old_vmm() {
    for path in ["succession/prepare", "succession/take"] {
        let (host, vm) = started().await;
        let old = host.fakes.process(vm);
        host.fakes.script(path, Scripted::Hangs);
        begin(&host, vm);
        host.fakes.until_called(path).await;
        let new = host.fakes.process(vm);
        let host = host.restart().await;
        new.exited().await;
        until_settled(&host, vm).await;
        let (process, state, _) = host.fakes.predecessor(vm);
        assert_eq!((process.id(), state), (old.id(), VmmState::Running));
        host.until(vm, |report| report.state == Some(VmmState::Running))
            .await;
        assert_eq!(record(&host, vm).process, Some(old.id()));
    }
}

#[tokio::test]
async fn an_agent_that_dies_after_the_commit_leaves_the_vm_to_its_new_vmm() {
    let (host, vm) = started().await;
    let old = host.fakes.process(vm);
    host.fakes.script("succession/commit", Scripted::Hangs);
    begin(&host, vm);
    host.fakes.until_called("succession/commit").await;
    let new = host.fakes.process(vm);
    let host = host.restart().await;
    old.exited().await;
    host.until(vm, |report| report.state == Some(VmmState::Running))
        .await;
    until_settled(&host, vm).await;
    assert_eq!(record(&host, vm).process, Some(new.id()));
    assert_eq!(host.fakes.calls(vm, "/v1/succession/commit"), 2);
}

#[tokio::test]
async fn a_successor_that_dies_after_the_commit_is_a_lost_vm_and_its_predecessor_never_runs_it() {
    let (host, vm) = started().await;
    let old = host.fakes.process(vm);
    host.fakes.script("succession/commit", Scripted::Hangs);
    begin(&host, vm);
    host.fakes.until_called("succession/commit").await;
    host.registry.abort_drivers().await;
    host.fakes.process(vm).kill().await.unwrap();
    let host = host.restart().await;
    old.exited().await;
    host.until(vm, |report| report.state.is_none()).await;
    let (_, state, calls) = host.fakes.predecessor(vm);
    assert_ne!(state, VmmState::Running);
    assert!(calls.iter().all(|call| call != "/v1/succession/abort"));
}

#[tokio::test]
async fn an_order_to_destroy_the_vm_ends_both_vmms() {
    let (mut host, vm) = started().await;
    let old = host.fakes.process(vm);
    host.fakes.script("succession/take", Scripted::Hangs);
    begin(&host, vm);
    host.fakes.until_called("succession/take").await;
    let new = host.fakes.process(vm);
    host.destroy(vm, 1).await.unwrap();
    old.exited().await;
    new.exited().await;
    assert!(host.report(vm).is_none());
}

#[tokio::test]
async fn a_vm_that_moves_or_has_another_epoch_does_not_change_its_vmm() {
    let (host, vm) = started().await;
    let later = UpgradeVm {
        epoch: Epoch(2),
        ..ask()
    };
    assert_eq!(
        upgrade(&host, vm, later).await.unwrap_err().kind,
        "epoch-ahead"
    );
    assert_eq!(host.fakes.spawned(), 1);
}
