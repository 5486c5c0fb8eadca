//! The driver against a fake VMM: the process is a real one (a script that waits), its API is served by the test; the
//! server is served by the test over real TLS.

mod credentials;
mod devices;
pub(crate) mod fake;
mod upgrade;

use super::*;
use crate::record::tests::spec;
use fake::{Host, MIGRATION_PORTS, PATIENCE, Scripted, graceful, kill_now, start};
use godwit_wire::host_api::{CommitReply, Resolution, StopMode};
use godwit_wire::id::{Epoch, Generation, MigrationId, VmId};
use godwit_wire::migration::{MigrationPhase, MigrationPolicy, MigrationRole};
use godwit_wire::vmm_api::{
    IncomingRequest, MigrationBandwidth, PauseReason, StopReason, VmmState,
};
use std::collections::BTreeSet;
use std::time::Duration;

#[tokio::test]
async fn a_vm_starts_once_however_often_it_is_asked() {
    let mut host = Host::new().await;
    let vm = VmId::fresh();
    let report = host.start(vm, 1, 1).await.unwrap();
    assert_eq!(report.state, Some(VmmState::Running));
    let again = host.start(vm, 1, 1).await.unwrap();
    assert_eq!((again.epoch, again.generation), (Epoch(1), Generation(1)));
    assert_eq!(host.fakes.spawned(), 1);
    assert_eq!(host.registry.context().board.reports().len(), 1);
}

#[tokio::test]
async fn an_older_epoch_and_an_older_generation_are_refused() {
    let mut host = Host::new().await;
    let vm = VmId::fresh();
    host.start(vm, 2, 5).await.unwrap();
    assert_eq!(host.start(vm, 1, 9).await.unwrap_err().kind, "stale-epoch");
    assert_eq!(
        host.start(vm, 2, 4).await.unwrap_err().kind,
        "stale-generation"
    );
    let pause = |epoch, generation| VmCommand {
        epoch: Epoch(epoch),
        generation: Generation(generation),
    };
    let stale = host
        .registry
        .ask(vm, |reply| Command::Pause(pause(1, 9), reply))
        .await;
    assert_eq!(stale.unwrap_err().kind, "stale-epoch");
    let ahead = host
        .registry
        .ask(vm, |reply| Command::Pause(pause(3, 9), reply))
        .await;
    assert_eq!(ahead.unwrap_err().kind, "epoch-ahead");
    let paused = host
        .registry
        .ask(vm, |reply| Command::Pause(pause(2, 6), reply))
        .await
        .unwrap();
    assert_eq!(
        paused.state,
        Some(VmmState::Paused {
            reason: PauseReason::Requested
        })
    );
    assert_eq!(paused.generation, Generation(6));
}

#[tokio::test]
async fn a_start_that_arrives_after_the_destruction_is_refused_even_by_the_next_agent() {
    let mut host = Host::new().await;
    let vm = VmId::fresh();
    host.start(vm, 1, 1).await.unwrap();
    host.destroy(vm, 1).await.unwrap();
    assert!(host.registry.context().board.reports().is_empty());
    assert!(!host.registry.context().state.vm(vm).path().exists());
    assert_eq!(host.start(vm, 1, 2).await.unwrap_err().kind, "stale-epoch");
    let mut next = host.restart().await;
    assert_eq!(next.start(vm, 1, 2).await.unwrap_err().kind, "stale-epoch");
    next.start(vm, 2, 3).await.unwrap();
}

#[tokio::test]
async fn an_order_to_destroy_an_older_copy_leaves_a_later_one_alone() {
    let mut host = Host::new().await;
    let vm = VmId::fresh();
    host.start(vm, 3, 1).await.unwrap();
    assert_eq!(host.destroy(vm, 2).await.unwrap_err().kind, "stale-epoch");
    assert_eq!(host.report(vm).unwrap().state, Some(VmmState::Running));
}

#[tokio::test]
async fn a_later_epoch_replaces_what_runs_under_an_older_one() {
    let mut host = Host::new().await;
    let vm = VmId::fresh();
    host.start(vm, 1, 1).await.unwrap();
    let first = host.fakes.process(vm);
    let report = host.start(vm, 2, 1).await.unwrap();
    assert_eq!(report.epoch, Epoch(2));
    first.exited().await;
    assert_eq!(host.fakes.spawned(), 2);
}

#[tokio::test]
async fn a_start_that_the_vmm_refuses_leaves_nothing_and_is_answered_the_same_again() {
    let mut host = Host::new().await;
    host.fakes.refuse_next_machine();
    let vm = VmId::fresh();
    let refused = host.start(vm, 1, 1).await.unwrap_err();
    assert_eq!(refused.kind, "no-kernel");
    assert!(!host.registry.context().state.vm(vm).path().exists());
    assert!(host.registry.context().board.reports().is_empty());
    assert_eq!(host.start(vm, 1, 1).await.unwrap_err(), refused);
    host.start(vm, 1, 2).await.unwrap();
}

#[tokio::test]
async fn a_vm_whose_process_dies_is_reported_as_gone_until_it_is_started_anew() {
    let mut host = Host::new().await;
    let vm = VmId::fresh();
    host.start(vm, 1, 1).await.unwrap();
    host.fakes.process(vm).kill().await.unwrap();
    host.until(vm, |report| report.state.is_none()).await;
    let mut next = host.restart().await;
    assert_eq!(next.report(vm).unwrap().state, None);
    assert_eq!(
        next.start(vm, 1, 2).await.unwrap().state,
        Some(VmmState::Running)
    );
}

#[tokio::test]
async fn a_guest_that_halts_is_reported_as_halted_until_the_server_says_otherwise() {
    let mut host = Host::new().await;
    let vm = VmId::fresh();
    host.start(vm, 1, 1).await.unwrap();
    let halted = VmmState::Stopped {
        reason: StopReason::GuestHalted,
    };
    host.fakes.set_state(vm, halted.clone());
    host.until(vm, |report| report.state == Some(halted.clone()))
        .await;
    // Even if its process goes, and over a restart of the agent.
    host.fakes.process(vm).kill().await.unwrap();
    let directory = host.registry.context().state.vm(vm);
    while directory.read_record().unwrap().unwrap().end.is_none() {
        tokio::task::yield_now().await;
    }
    assert_eq!(host.report(vm).unwrap().state, Some(halted.clone()));
    let next = host.restart().await;
    assert_eq!(next.report(vm).unwrap().state, Some(halted));
}

#[tokio::test]
async fn a_graceful_stop_waits_for_the_guest_and_everyone_who_asks_hears_of_it() {
    let mut host = Host::new().await;
    let vm = VmId::fresh();
    host.start(vm, 1, 1).await.unwrap();
    let (first, second) = tokio::join!(
        host.registry
            .ask(vm, |reply| Command::Stop(graceful(1, 2, 60_000), reply)),
        host.registry
            .ask(vm, |reply| Command::Stop(graceful(1, 2, 60_000), reply)),
    );
    let halted = Some(VmmState::Stopped {
        reason: StopReason::GuestHalted,
    });
    assert_eq!(first.unwrap().state, halted);
    assert_eq!(second.unwrap().state, halted);
    host.fakes.process(vm).exited().await;
    assert_eq!(
        host.start(vm, 1, 3).await.unwrap().state,
        Some(VmmState::Running)
    );
}

#[tokio::test]
async fn a_guest_that_does_not_stop_in_time_is_killed() {
    let mut host = Host::new().await;
    let vm = VmId::fresh();
    host.start(vm, 1, 1).await.unwrap();
    host.fakes.ignore_stop(vm);
    let stopped = host
        .registry
        .ask(vm, |reply| Command::Stop(graceful(1, 2, 150), reply))
        .await
        .unwrap();
    assert_eq!(
        stopped.state,
        Some(VmmState::Stopped {
            reason: StopReason::Killed
        })
    );
    host.fakes.process(vm).exited().await;
}

#[tokio::test]
async fn a_restarted_agent_takes_its_vms_over_as_they_are() {
    let mut host = Host::new().await;
    let (running, killed) = (VmId::fresh(), VmId::fresh());
    host.start(running, 1, 1).await.unwrap();
    host.start(killed, 1, 1).await.unwrap();
    host.registry
        .ask(killed, |reply| Command::Stop(kill_now(1, 2), reply))
        .await
        .unwrap();
    let process = host.fakes.process(running).id();
    let next = host.restart().await;
    assert_eq!(next.report(running).unwrap().state, Some(VmmState::Running));
    let stopped = Some(VmmState::Stopped {
        reason: StopReason::Killed,
    });
    assert_eq!(next.report(killed).unwrap().state, stopped);
    assert_eq!(next.fakes.process(running).id(), process);
    assert_eq!(next.fakes.spawned(), 2);
}

#[tokio::test]
async fn a_vm_that_stopped_itself_runs_again_only_by_order_and_under_its_epoch() {
    let mut host = Host::new().await;
    let vm = VmId::fresh();
    host.start(vm, 2, 1).await.unwrap();
    let expired = VmmState::Paused {
        reason: PauseReason::LeaseExpired,
    };
    host.fakes.set_state(vm, expired.clone());
    host.until(vm, |report| report.state == Some(expired.clone()))
        .await;
    host.registry
        .tell(vm, Command::ResumeAfterLease(Epoch(1)))
        .unwrap();
    host.registry
        .tell(vm, Command::ResumeAfterLease(Epoch(2)))
        .unwrap();
    host.until(vm, |report| report.state == Some(VmmState::Running))
        .await;
    assert_eq!(host.fakes.calls(vm, "/v1/resume"), 1);
}

#[tokio::test]
async fn a_vm_that_hangs_in_its_start_can_be_destroyed_at_once() {
    let mut host = Host::new().await;
    host.fakes.hang_next_machine();
    let vm = VmId::fresh();
    let registry = host.registry.clone();
    let starting = tokio::spawn(async move {
        registry
            .ask(vm, |reply| Command::Start(start(1, 1), reply))
            .await
    });
    host.fakes.until_asked_for_a_machine().await;
    host.destroy(vm, 1).await.unwrap();
    assert_eq!(starting.await.unwrap().unwrap_err().kind, "destroyed");
}

fn prepare(migration: MigrationId, epoch: u64, generation: u64) -> PrepareIncoming {
    PrepareIncoming {
        networks: Vec::new(),
        name: "guest".into(),
        epoch: Epoch(epoch),
        generation: Generation(generation),
        spec: spec(),
        lease: Default::default(),
        migration,
        arriving_disks: BTreeSet::new(),
        identity: Some(credentials::identity()),
    }
}

async fn receiving(host: &mut Host, vm: VmId) -> MigrationId {
    let migration = MigrationId::fresh();
    let ask = prepare(migration, 4, 7);
    let ready = host
        .registry
        .ask(vm, |reply| Command::Prepare(ask.clone(), reply))
        .await
        .unwrap();
    let again = host
        .registry
        .ask(vm, |reply| Command::Prepare(ask, reply))
        .await
        .unwrap();
    assert_eq!(ready, again);
    migration
}

#[tokio::test]
async fn a_target_runs_the_vm_when_the_store_has_given_it() {
    let mut host = Host::new().await;
    let vm = VmId::fresh();
    let migration = receiving(&mut host, vm).await;
    host.fakes.set_phase(vm, MigrationPhase::PreCopy);
    host.server.set_resolution(Resolution::Open);
    host.fakes.set_phase(vm, MigrationPhase::AwaitingCommit);
    host.server
        .set_commit(CommitReply::Granted { epoch: Epoch(5) });
    host.until(vm, |report| {
        report.epoch == Epoch(5) && report.state == Some(VmmState::Running)
    })
    .await;
    let record = host
        .registry
        .context()
        .state
        .vm(vm)
        .read_record()
        .unwrap()
        .unwrap();
    assert_eq!(
        (record.epoch, record.purpose),
        (Epoch(5), crate::record::Purpose::Owned)
    );
    // From here on only the new epoch counts.
    let stale = host
        .registry
        .ask(vm, |reply| Command::Stop(kill_now(4, 99), reply))
        .await;
    assert_eq!(stale.unwrap_err().kind, "stale-epoch");
    assert_eq!(host.fakes.committed(vm), Some((migration, Epoch(5))));
}

#[tokio::test]
async fn a_packet_gap_that_ends_after_the_migration_is_reported() {
    let mut host = Host::new().await;
    let vm = VmId::fresh();
    let migration = receiving(&mut host, vm).await;
    host.server
        .set_commit(CommitReply::Granted { epoch: Epoch(5) });
    host.fakes.set_phase(vm, MigrationPhase::AwaitingCommit);
    let gap_us = |report: &VmReport| {
        let status = report.migration.as_ref()?;
        assert_eq!(status.migration, migration);
        status.progress.packet_gap_us
    };
    host.until(vm, |report| {
        report.epoch == Epoch(5) && report.state == Some(VmmState::Running)
    })
    .await;
    assert_eq!(host.report(vm).as_ref().and_then(gap_us), None);
    host.fakes.first_frame(vm, 45_000);
    // It goes along with whatever heartbeat is next, so nothing announces it.
    let told = async {
        while host.report(vm).as_ref().and_then(gap_us) != Some(45_000) {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(PATIENCE, told).await.unwrap();
}

#[tokio::test]
async fn a_target_whose_commit_is_refused_is_destroyed_and_says_so_once() {
    let mut host = Host::new().await;
    let vm = VmId::fresh();
    receiving(&mut host, vm).await;
    let process = host.fakes.process(vm);
    host.server.set_commit(CommitReply::Refused {
        reason: "void".into(),
    });
    host.fakes.set_phase(vm, MigrationPhase::AwaitingCommit);
    let aborted = VmmState::Stopped {
        reason: StopReason::IncomingAborted,
    };
    host.until(vm, |report| report.state == Some(aborted.clone()))
        .await;
    process.exited().await;
    assert_eq!(host.fakes.committed(vm), None);
    let board = &host.registry.context().board;
    board.heard(&board.reports());
    assert!(board.reports().is_empty());
    // The source still has it under epoch 4; another attempt is welcome.
    let ask = prepare(MigrationId::fresh(), 4, 8);
    host.registry
        .ask(vm, |reply| Command::Prepare(ask, reply))
        .await
        .unwrap();
}

#[tokio::test]
async fn a_target_whose_agent_restarts_before_the_commit_goes_on() {
    let mut host = Host::new().await;
    let vm = VmId::fresh();
    receiving(&mut host, vm).await;
    host.fakes.set_phase(vm, MigrationPhase::AwaitingCommit);
    host.server.until_asked("commit").await;
    let next = host.restart().await;
    next.server
        .set_commit(CommitReply::Granted { epoch: Epoch(5) });
    next.until(vm, |report| {
        report.epoch == Epoch(5) && report.state == Some(VmmState::Running)
    })
    .await;
}

#[tokio::test]
async fn a_vm_arrives_on_the_ports_that_the_agent_was_given() {
    let mut host = Host::new().await;
    let vm = VmId::fresh();
    receiving(&mut host, vm).await;
    let told: IncomingRequest = serde_json::from_value(host.fakes.handover(vm)).unwrap();
    let first = ([127, 0, 0, 1], MIGRATION_PORTS.first).into();
    assert_eq!(told.listen, first);
    assert_eq!(told.last_port, Some(MIGRATION_PORTS.last));
}

#[tokio::test]
async fn an_incoming_migration_is_called_off_until_the_store_has_been_asked() {
    let mut host = Host::new().await;
    let vm = VmId::fresh();
    let migration = receiving(&mut host, vm).await;
    let cancel = CancelMigration {
        migration,
        epoch: Epoch(4),
    };
    host.fakes.set_phase(vm, MigrationPhase::AwaitingCommit);
    host.server.until_asked("commit").await;
    let late = host
        .registry
        .ask(vm, |reply| Command::Cancel(cancel, reply))
        .await;
    assert_eq!(late.unwrap_err().kind, "too-late");

    let other = VmId::fresh();
    let migration = receiving(&mut host, other).await;
    let cancel = CancelMigration {
        migration,
        epoch: Epoch(4),
    };
    let report = host
        .registry
        .ask(other, |reply| Command::Cancel(cancel, reply))
        .await
        .unwrap();
    assert_eq!(
        report.state,
        Some(VmmState::Stopped {
            reason: StopReason::IncomingAborted
        })
    );
}

async fn sending(host: &mut Host, vm: VmId) -> MigrationId {
    host.start(vm, 3, 1).await.unwrap();
    let migration = MigrationId::fresh();
    let ask = StartOutgoing {
        epoch: Epoch(3),
        generation: Generation(2),
        migration,
        target: ([127, 0, 0, 1], 9).into(),
        token: credentials::token(),
        policy: MigrationPolicy::default(),
        fixed_cost_us: Some(12_000),
        leaving_disks: BTreeSet::new(),
        identity: Some(credentials::identity()),
    };
    let report = host
        .registry
        .ask(vm, |reply| Command::Send(ask, reply))
        .await
        .unwrap();
    let status = report.migration.unwrap();
    assert_eq!(
        (status.migration, status.role),
        (migration, MigrationRole::Source)
    );
    migration
}

#[tokio::test]
async fn a_source_whose_vm_runs_elsewhere_ends_and_tells_the_downtime() {
    let mut host = Host::new().await;
    let vm = VmId::fresh();
    sending(&mut host, vm).await;
    let process = host.fakes.process(vm);
    host.fakes.set_phase(vm, MigrationPhase::Completed);
    let away = VmmState::Stopped {
        reason: StopReason::MigratedAway,
    };
    host.until(vm, |report| report.state == Some(away.clone()))
        .await;
    process.exited().await;
    assert_eq!(
        host.report(vm)
            .unwrap()
            .migration
            .unwrap()
            .progress
            .downtime_us,
        Some(1234)
    );
    assert_eq!(host.start(vm, 3, 9).await.unwrap_err().kind, "stale-epoch");
}

#[tokio::test]
async fn a_source_that_lost_its_target_runs_again_when_the_store_says_void() {
    let mut host = Host::new().await;
    let vm = VmId::fresh();
    sending(&mut host, vm).await;
    host.server
        .set_resolution(Resolution::RunHere { epoch: Epoch(3) });
    host.fakes.cut_connection(vm);
    host.fakes.set_phase(vm, MigrationPhase::AwaitingCommit);
    host.until(vm, |report| {
        let phase = report.migration.as_ref().map(|status| status.phase);
        phase == Some(MigrationPhase::Failed) && report.state == Some(VmmState::Running)
    })
    .await;
    assert_eq!(host.fakes.calls(vm, "/v1/migration/abort"), 1);
    // And it obeys again.
    let stop = kill_now(3, 3);
    host.registry
        .ask(vm, |reply| Command::Stop(stop, reply))
        .await
        .unwrap();
}

#[tokio::test]
async fn a_source_that_lost_its_target_ends_when_the_store_says_committed() {
    let mut host = Host::new().await;
    let vm = VmId::fresh();
    sending(&mut host, vm).await;
    host.fakes.cut_connection(vm);
    host.fakes.set_phase(vm, MigrationPhase::AwaitingCommit);
    host.server.until_asked("resolve").await;
    // The store does not answer: the source stays as it is.
    assert_eq!(host.fakes.calls(vm, "/v1/migration/abort"), 0);
    host.server.set_resolution(Resolution::End);
    let away = VmmState::Stopped {
        reason: StopReason::MigratedAway,
    };
    host.until(vm, |report| report.state == Some(away.clone()))
        .await;
    assert_eq!(host.fakes.calls(vm, "/v1/migration/abort"), 0);
}

#[tokio::test]
async fn a_source_that_does_not_answer_its_release_is_not_killed_while_the_vm_may_need_its_memory()
{
    let mut host = Host::new().await;
    let vm = VmId::fresh();
    sending(&mut host, vm).await;
    let process = host.fakes.process(vm);
    host.server.set_resolution(Resolution::End);
    host.fakes.script("migration/release", Scripted::Hangs);
    host.fakes.cut_connection(vm);
    host.fakes.set_phase(vm, MigrationPhase::AwaitingCommit);
    host.fakes.until_called("migration/release").await;
    // When it is asked again, it tells that the guest went ahead of its memory.
    host.fakes.set_phase(vm, MigrationPhase::PostCopy);
    host.until(vm, |report| {
        let phase = report.migration.as_ref().map(|status| status.phase);
        phase == Some(MigrationPhase::PostCopy)
    })
    .await;
    assert!(process.is_itself());
    // Once all of it has followed, it ends.
    host.fakes.set_phase(vm, MigrationPhase::Completed);
    process.exited().await;
}

#[tokio::test]
async fn a_source_that_is_done_ends_even_if_it_does_not_answer_its_release() {
    let mut host = Host::new().await;
    let vm = VmId::fresh();
    sending(&mut host, vm).await;
    let process = host.fakes.process(vm);
    host.fakes.script("migration/release", Scripted::Hangs);
    host.fakes.set_phase(vm, MigrationPhase::Completed);
    let away = VmmState::Stopped {
        reason: StopReason::MigratedAway,
    };
    host.until(vm, |report| report.state == Some(away.clone()))
        .await;
    process.exited().await;
}

#[tokio::test]
async fn a_source_whose_agent_restarts_learns_the_outcome_from_the_store() {
    let mut host = Host::new().await;
    let vm = VmId::fresh();
    sending(&mut host, vm).await;
    host.fakes.set_phase(vm, MigrationPhase::AwaitingCommit);
    let next = host.restart().await;
    next.server.set_resolution(Resolution::End);
    let away = VmmState::Stopped {
        reason: StopReason::MigratedAway,
    };
    next.until(vm, |report| report.state == Some(away.clone()))
        .await;
}

#[tokio::test]
async fn a_migration_under_way_is_told_another_pace_and_one_that_is_not_known_is_not() {
    let mut host = Host::new().await;
    let vm = VmId::fresh();
    let migration = sending(&mut host, vm).await;
    let pace = |migration, epoch| MigrationBandwidth {
        migration,
        epoch: Epoch(epoch),
        max_bytes_per_s: Some(1 << 20),
    };
    let ask = async |ask| {
        host.registry
            .ask(vm, |reply| Command::Bandwidth(ask, reply))
            .await
    };
    let stranger = ask(pace(MigrationId::fresh(), 3)).await;
    assert_eq!(stranger.unwrap_err().kind, "not-found");
    let stale = ask(pace(migration, 2)).await;
    assert_eq!(stale.unwrap_err().kind, "stale-epoch");
    assert_eq!(host.fakes.paced(vm), None);
    ask(pace(migration, 3)).await.unwrap();
    assert_eq!(host.fakes.paced(vm), Some((1 << 20).into()));
}

#[tokio::test]
async fn while_a_migration_is_under_way_nobody_stops_or_pauses_the_vm() {
    let mut host = Host::new().await;
    let vm = VmId::fresh();
    let migration = sending(&mut host, vm).await;
    let refused = host
        .registry
        .ask(vm, |reply| Command::Stop(kill_now(3, 3), reply))
        .await;
    assert_eq!(refused.unwrap_err().kind, "migration-under-way");
    let cancel = CancelMigration {
        migration,
        epoch: Epoch(3),
    };
    host.registry
        .ask(vm, |reply| Command::Cancel(cancel, reply))
        .await
        .unwrap();
    let mode = StopMode::Kill;
    let stop = StopVm {
        epoch: Epoch(3),
        generation: Generation(4),
        mode,
    };
    let stopped = tokio::time::timeout(
        Duration::from_secs(10),
        host.registry.ask(vm, |reply| Command::Stop(stop, reply)),
    );
    stopped.await.unwrap().unwrap();
}

/// A VMM that is no more.
async fn former(host: &mut Host) -> crate::process::VmmProcess {
    let vm = VmId::fresh();
    host.start(vm, 1, 1).await.unwrap();
    let process = host.fakes.process(vm);
    host.destroy(vm, 1).await.unwrap();
    process.exited().await;
    process
}

#[tokio::test]
async fn a_vm_that_comes_home_is_handed_the_memory_that_was_kept_of_it() {
    let mut host = Host::new().await;
    let former = former(&mut host).await;
    let (home, elsewhere) = (VmId::fresh(), VmId::fresh());
    let kept = crate::kept::tests::kept(2, 3, former);
    let place = kept.place().unwrap();
    host.registry.context().kept.keep(home, kept);
    receiving(&mut host, elsewhere).await;
    assert_eq!(
        host.fakes.handover(elsewhere)["kept"],
        serde_json::Value::Null
    );
    receiving(&mut host, home).await;
    let handed = host.fakes.handover(home)["kept"].clone();
    assert_eq!(handed, serde_json::to_value(place).unwrap());
    // It is the new VMM's alone now.
    assert_eq!(host.registry.context().kept.bytes().0, 0);
}

#[tokio::test]
async fn a_vm_that_starts_afresh_or_is_destroyed_leaves_nothing_kept() {
    let mut host = Host::new().await;
    let former = former(&mut host).await;
    let kept = |epoch| crate::kept::tests::kept(1, epoch, former.clone());
    let vm = VmId::fresh();
    host.registry.context().kept.keep(vm, kept(1));
    host.start(vm, 2, 1).await.unwrap();
    assert_eq!(host.registry.context().kept.bytes().0, 0);
    host.registry.context().kept.keep(vm, kept(1));
    host.destroy(vm, 2).await.unwrap();
    assert_eq!(host.registry.context().kept.bytes().0, 0);
}
