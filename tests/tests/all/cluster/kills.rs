//! Every process of a migration is killed at every step: afterwards exactly one copy runs, and its memory is whole.

use super::{HOST_MIB, create_busy_pilot, text, verify, wait_until_one_copy_runs};
use godwit_tests::cluster::Cluster;
use godwit_tests::http::Client;
use godwit_tests::require;
use godwit_tests::skip;
use godwit_wire::migration::{MigrationPhase, MigrationStatus};
use rustix::process::{Pid, Signal, kill_process};
use std::path::Path;
use std::time::{Duration, Instant};

/// A VM that was lost comes back within a fail-over and a boot.
const PATIENCE: Duration = Duration::from_secs(60);
const SOURCE: &str = "host-1";
const TARGET: &str = "host-2";

/// Who is killed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Victim {
    SourceVmm,
    TargetVmm,
    SourceAgent,
    TargetAgent,
    Server,
}

/// When.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    /// Memory is being copied.
    PreCopy,
    /// The target holds everything; its agent has not asked for the commit yet.
    HandedOver,
    /// The commit has been asked for; the server has not answered yet.
    Deciding,
    /// The target runs.
    Committed,
}

/// Kills `victim` at `step` of a migration, brings back whatever an init system would bring back, and looks.
async fn one_copy_is_left(victim: Victim, step: Step) {
    require!(skip::kvm());
    let mut cluster = Cluster::start(2, HOST_MIB).await.expect("a cluster");
    let vm = create_busy_pilot(&cluster, "wader", SOURCE).await;
    let id = text(&vm, "id").to_owned();
    cluster
        .migrate("wader", TARGET)
        .await
        .expect("the migration is accepted");

    let (source, target) = (cluster.vm_dir(SOURCE, &id), cluster.vm_dir(TARGET, &id));
    wait_for_phase(&source, MigrationPhase::PreCopy).await;
    match step {
        Step::PreCopy => {}
        // Whoever would end the step is frozen; the leases outlast it.
        Step::HandedOver => {
            cluster.agent(TARGET).freeze();
            wait_for_phase(&target, MigrationPhase::AwaitingCommit).await;
        }
        Step::Deciding => {
            cluster.server.as_ref().expect("the server runs").freeze();
            wait_for_phase(&target, MigrationPhase::AwaitingCommit).await;
        }
        Step::Committed => wait_for_phase(&target, MigrationPhase::Completed).await,
    }
    match victim {
        Victim::SourceVmm => kill_vmm(&cluster, SOURCE, &id).await,
        Victim::TargetVmm => kill_vmm(&cluster, TARGET, &id).await,
        Victim::SourceAgent => cluster.kill_agent(SOURCE),
        Victim::TargetAgent => cluster.kill_agent(TARGET),
        Victim::Server => cluster.kill_server(),
    }
    if let Some(server) = &cluster.server {
        server.thaw();
    }
    if victim != Victim::TargetAgent {
        cluster.agent(TARGET).thaw();
    }
    match victim {
        Victim::SourceAgent => cluster
            .revive_agent(SOURCE)
            .expect("the agent starts again"),
        Victim::TargetAgent => cluster
            .revive_agent(TARGET)
            .expect("the agent starts again"),
        Victim::Server => cluster
            .revive_server()
            .await
            .expect("the server starts again"),
        Victim::SourceVmm | Victim::TargetVmm => {}
    }

    wait_until_one_copy_runs(&cluster, "wader", PATIENCE).await;
    let verified_mib = verify(&cluster, "wader").await;
    match whole_copy_died(victim, step) {
        // It was started anew, with nothing in its memory.
        true => assert_eq!(verified_mib, 0),
        false => assert!(
            verified_mib >= 256,
            "the memory is gone: only {verified_mib} MiB are left"
        ),
    }
    let another = if cluster.vm("wader").await.expect("the VM")["host_name"] == SOURCE {
        TARGET
    } else {
        SOURCE
    };
    // Nothing is stuck: the VM can still move.
    cluster
        .migrate("wader", another)
        .await
        .expect("another migration is accepted");
    let arrived = |vm: &serde_json::Value| vm["host_name"] == another && vm["state"] == "running";
    cluster
        .wait_for_vm("wader", PATIENCE, arrived)
        .await
        .expect("it moves again");
    verify(&cluster, "wader").await;
}

/// Whether the kill takes the only copy that may run. A commit that is on its way gives the VM to the target, dead
/// or not: the store cannot know.
fn whole_copy_died(victim: Victim, step: Step) -> bool {
    match victim {
        Victim::SourceVmm => step == Step::PreCopy,
        Victim::TargetVmm => matches!(step, Step::Deciding | Step::Committed),
        Victim::SourceAgent | Victim::TargetAgent | Victim::Server => false,
    }
}

/// Waits until the VMM in `dir` is in `phase`; one that is past it came too fast for this test to be worth anything.
async fn wait_for_phase(dir: &Path, phase: MigrationPhase) {
    let deadline = Instant::now() + PATIENCE;
    let api = Client::unix(&dir.join("vmm.sock"));
    loop {
        let status = api
            .get::<MigrationStatus>("/v1/migration?after=0&wait_ms=0")
            .await;
        match status {
            Ok(status) if status.phase == phase => return,
            Ok(status) if rank(status.phase) > rank(phase) => {
                panic!("{phase:?} was missed: {status:?}")
            }
            _ => assert!(
                Instant::now() < deadline,
                "no {phase:?} at {}: {status:?}",
                dir.display()
            ),
        }
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

fn rank(phase: MigrationPhase) -> u32 {
    match phase {
        MigrationPhase::Connecting => 0,
        MigrationPhase::PreCopy => 1,
        MigrationPhase::Blackout => 2,
        MigrationPhase::AwaitingCommit => 3,
        MigrationPhase::PostCopy => 4,
        MigrationPhase::Completed | MigrationPhase::Failed | MigrationPhase::Cancelled => 5,
    }
}

/// A VMM that has ended by itself meanwhile needs no killing.
async fn kill_vmm(cluster: &Cluster, host: &str, id: &str) {
    if let Some(vmm) = cluster.vmm(host, id).await {
        let pid = Pid::from_raw(vmm.pid as i32).expect("a process id");
        let _ = kill_process(pid, Signal::KILL);
    }
}

macro_rules! kills {
    ($($name:ident: $victim:ident at $step:ident;)*) => {
        $(#[tokio::test]
        async fn $name() {
            one_copy_is_left(Victim::$victim, Step::$step).await;
        })*
    };
}

kills! {
    the_source_vmm_dies_during_pre_copy: SourceVmm at PreCopy;
    the_source_vmm_dies_before_the_commit_is_asked_for: SourceVmm at HandedOver;
    the_source_vmm_dies_while_the_commit_is_decided: SourceVmm at Deciding;
    the_source_vmm_dies_after_the_commit: SourceVmm at Committed;
    the_target_vmm_dies_during_pre_copy: TargetVmm at PreCopy;
    the_target_vmm_dies_before_the_commit_is_asked_for: TargetVmm at HandedOver;
    the_target_vmm_dies_while_the_commit_is_decided: TargetVmm at Deciding;
    the_target_vmm_dies_after_the_commit: TargetVmm at Committed;
    the_source_agent_dies_during_pre_copy: SourceAgent at PreCopy;
    the_source_agent_dies_before_the_commit_is_asked_for: SourceAgent at HandedOver;
    the_source_agent_dies_while_the_commit_is_decided: SourceAgent at Deciding;
    the_source_agent_dies_after_the_commit: SourceAgent at Committed;
    the_target_agent_dies_during_pre_copy: TargetAgent at PreCopy;
    the_target_agent_dies_before_the_commit_is_asked_for: TargetAgent at HandedOver;
    the_target_agent_dies_while_the_commit_is_decided: TargetAgent at Deciding;
    the_target_agent_dies_after_the_commit: TargetAgent at Committed;
    the_server_dies_during_pre_copy: Server at PreCopy;
    the_server_dies_before_the_commit_is_asked_for: Server at HandedOver;
    the_server_dies_while_the_commit_is_decided: Server at Deciding;
    the_server_dies_after_the_commit: Server at Committed;
}
