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
    /// The target holds everything; nobody has decided yet.
    AwaitingCommit,
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
        // A frozen server holds the step open; the leases outlast it.
        Step::AwaitingCommit => {
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
    verify(&cluster, "wader").await;
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

/// Waits until the VMM in `dir` has reached `phase`, or one behind it.
async fn wait_for_phase(dir: &Path, phase: MigrationPhase) {
    let deadline = Instant::now() + PATIENCE;
    let api = Client::unix(&dir.join("vmm.sock"));
    loop {
        let status = api
            .get::<MigrationStatus>("/v1/migration?after=0&wait_ms=0")
            .await;
        match status {
            Ok(status) if rank(status.phase) >= rank(phase) => return,
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
        MigrationPhase::Completed | MigrationPhase::Failed | MigrationPhase::Cancelled => 4,
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
    the_source_vmm_dies_before_the_commit: SourceVmm at AwaitingCommit;
    the_source_vmm_dies_after_the_commit: SourceVmm at Committed;
    the_target_vmm_dies_during_pre_copy: TargetVmm at PreCopy;
    the_target_vmm_dies_before_the_commit: TargetVmm at AwaitingCommit;
    the_target_vmm_dies_after_the_commit: TargetVmm at Committed;
    the_source_agent_dies_during_pre_copy: SourceAgent at PreCopy;
    the_source_agent_dies_before_the_commit: SourceAgent at AwaitingCommit;
    the_source_agent_dies_after_the_commit: SourceAgent at Committed;
    the_target_agent_dies_during_pre_copy: TargetAgent at PreCopy;
    the_target_agent_dies_before_the_commit: TargetAgent at AwaitingCommit;
    the_target_agent_dies_after_the_commit: TargetAgent at Committed;
    the_server_dies_during_pre_copy: Server at PreCopy;
    the_server_dies_before_the_commit: Server at AwaitingCommit;
    the_server_dies_after_the_commit: Server at Committed;
}
