//! A machine is built, boots, pauses, goes on and ends.

use super::{boot_dirtying_pilot, boot_pilot};
use godwit_tests::require;
use godwit_tests::skip;
use godwit_tests::test_dir::TestDir;
use godwit_tests::vmm::{self, BOOT_PATIENCE, Vmm, new_vm};
use godwit_wire::id::Epoch;
use godwit_wire::problem::Problem;
use godwit_wire::unit::Mib;
use godwit_wire::vmm_api::{
    Command, CreateRequest, DirtyRate, DirtyRateRequest, PauseReason, StopReason, VmmState,
};
use std::time::Duration;

const PATIENCE: Duration = Duration::from_secs(20);

#[tokio::test]
async fn a_machine_is_created_before_it_runs() {
    require!(skip::kvm());
    let dir = TestDir::new();
    let vmm = Vmm::start(&dir, "vmm").await.expect("an empty VMM");
    assert_eq!(vmm.info().await.expect("info").state, VmmState::Empty);
    let request = new_vm(vmm::pilot(2, Mib(64)));
    let created = vmm.create(&request).await.expect("create");
    assert_eq!(created.state, VmmState::Created);
    assert_eq!(
        (created.vm, created.epoch, created.spec),
        (Some(request.vm), request.epoch, Some(request.spec))
    );
    assert_eq!(created.vcpus.len(), 2);
}

#[tokio::test]
async fn a_paused_guest_stands_still_and_goes_on() {
    require!(skip::kvm());
    let dir = TestDir::new();
    let (vmm, request) = boot_pilot(&dir, "vmm", 1, Mib(64)).await;
    let mut shell = vmm.shell().await.expect("shell");
    let before = shell.command("ticks").await.expect("ticks").number("ticks");

    let paused = vmm.command("pause", request.epoch).await.expect("pause");
    assert_eq!(
        paused.state,
        VmmState::Paused {
            reason: PauseReason::Requested
        }
    );
    let exits = vmm.info().await.expect("info").counters.exits;
    tokio::time::sleep(Duration::from_millis(200)).await;
    assert_eq!(
        vmm.info().await.expect("info").counters.exits,
        exits,
        "a paused guest does nothing"
    );

    let resumed = vmm.command("resume", request.epoch).await.expect("resume");
    assert_eq!(resumed.state, VmmState::Running);
    assert!(shell.command("ticks").await.expect("ticks").number("ticks") > before);
}

#[tokio::test]
async fn a_graceful_stop_lets_the_guest_power_off() {
    require!(skip::kvm());
    let dir = TestDir::new();
    let (vmm, request) = boot_pilot(&dir, "vmm", 1, Mib(64)).await;
    vmm.command("stop", request.epoch).await.expect("stop");
    vmm.wait_until_halted(PATIENCE)
        .await
        .expect("the guest powers off");
}

#[tokio::test]
async fn a_killed_guest_is_gone_at_once() {
    require!(skip::kvm());
    let dir = TestDir::new();
    let (vmm, request) = boot_pilot(&dir, "vmm", 4, Mib(64)).await;
    let killed = vmm.command("kill", request.epoch).await.expect("kill");
    assert_eq!(
        killed.state,
        VmmState::Stopped {
            reason: StopReason::Killed
        }
    );
}

#[tokio::test]
async fn a_guest_that_resets_boots_again() {
    require!(skip::kvm());
    let dir = TestDir::new();
    let (vmm, _) = boot_pilot(&dir, "vmm", 2, Mib(64)).await;
    let mut shell = vmm.shell().await.expect("shell");
    shell.command("reset").await.expect("reset");
    shell
        .wait_for("pilot ", BOOT_PATIENCE)
        .await
        .expect("the pilot says hello again");
    let info = vmm.info().await.expect("info");
    assert_eq!((info.state, info.counters.resets), (VmmState::Running, 1));
    shell
        .command("fill 8")
        .await
        .expect("the guest works after its reset");
    shell.command("verify").await.expect("verify");
}

#[tokio::test]
async fn commands_of_another_epoch_are_refused() {
    require!(skip::kvm());
    let dir = TestDir::new();
    let request = CreateRequest {
        epoch: Epoch(5),
        ..new_vm(vmm::pilot(1, Mib(64)))
    };
    let vmm = Vmm::boot(&dir, "vmm", &request).await.expect("boot");
    for verb in ["pause", "resume", "stop", "kill"] {
        let path = format!("/v1/{verb}");
        let answer = vmm
            .api
            .send(
                hyper::Method::POST,
                &path,
                Some(&Command { epoch: Epoch(4) }),
            )
            .await;
        let problem = answer.expect("an answer").problem().expect("a problem");
        assert_eq!(
            (problem.status, problem.kind.as_str()),
            (409, "stale-epoch"),
            "{verb}"
        );
    }
    assert_eq!(vmm.info().await.expect("info").state, VmmState::Running);
}

#[tokio::test]
async fn a_second_machine_is_refused() {
    require!(skip::kvm());
    let dir = TestDir::new();
    let (vmm, _) = boot_pilot(&dir, "vmm", 1, Mib(64)).await;
    let error = vmm
        .create(&new_vm(vmm::pilot(1, Mib(64))))
        .await
        .expect_err("one VMM holds one machine");
    assert_eq!(
        error
            .downcast_ref::<Problem>()
            .map(|problem| problem.status),
        Some(409),
        "{error:#}"
    );
}

#[tokio::test]
async fn the_dirty_rate_of_a_guest_can_be_asked() {
    require!(skip::kvm());
    let dir = TestDir::new();
    let (vmm, _) = boot_dirtying_pilot(&dir, "vmm", 1).await;
    let rate: DirtyRate = vmm
        .api
        .post(
            "/v1/dirty-rate",
            &DirtyRateRequest {
                window_ms: 500,
                readings: 1,
            },
        )
        .await
        .expect("a rate");
    // 20 MiB/s over a working set of 16 MiB; a busy machine may not give the guest all its time.
    let mib_per_s = rate.bytes_per_s >> 20;
    assert!((2..=40).contains(&mib_per_s), "{mib_per_s} MiB/s");
}
