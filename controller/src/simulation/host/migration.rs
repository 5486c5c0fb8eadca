//! Both ends of a simulated migration.

use super::SimHost;
use godwit_wire::host_api::{CommitReply, CommitRequest, Resolution, ResolveRequest};
use godwit_wire::id::{Epoch, MigrationId, VmId};
use godwit_wire::migration::{Blackout, MigrationPhase, MigrationRole, PostCopy};
use godwit_wire::unit::Bytes;
use godwit_wire::vmm_api::{PauseReason, StopReason, VmmState};
use std::sync::Arc;
use std::time::Duration;

/// How long copying takes.
const COPY_TIME: Duration = Duration::from_millis(1_500);
/// How long the blackout takes before the commit.
const BLACKOUT_TIME: Duration = Duration::from_millis(30);
/// What it consists of, the commit included, as the source tells it.
const BLACKOUT: Blackout = Blackout {
    predicted_us: 36_000,
    pause_us: 2_000,
    save_us: 8_000,
    pages_us: 5_000,
    rest_bytes: 0,
    rest_bytes_per_s: 0,
    restore_us: 15_000,
    commit_us: 10_000,
};
/// How long a source waits for word of the target before it asks the store.
const RESOLVE_AFTER: Duration = Duration::from_secs(2);
/// How long memory takes to follow a guest that went ahead.
const FOLLOW_TIME: Duration = Duration::from_millis(1_800);
const RETRY: Duration = Duration::from_millis(200);

/// Whether both ends reach each other.
fn connected(source: &SimHost, target: &SimHost) -> bool {
    source.sends_to(target) && target.sends_to(source)
}

/// A frozen process neither sends nor takes; what was sent to it waits.
async fn both_awake(source: &SimHost, target: &SimHost) {
    while !(source.vmms_are_awake() && target.vmms_are_awake()) {
        source.vmms_answering().await;
        target.vmms_answering().await;
    }
}

/// The VMMs' side of a migration: it goes on while agents are frozen.
pub(super) async fn send(
    source: Arc<SimHost>,
    target: Arc<SimHost>,
    vm: VmId,
    migration: MigrationId,
    (epoch, post_copy): (Epoch, PostCopy),
) {
    let steps = 6;
    for step in 1..=steps {
        tokio::time::sleep(COPY_TIME / steps).await;
        both_awake(&source, &target).await;
        if source.phase(vm, migration) != Some(MigrationPhase::PreCopy) {
            return;
        }
        if !connected(&source, &target) || target.phase(vm, migration).is_none() {
            source.with_migration(vm, migration, |vm, _| {
                vm.enter(MigrationPhase::Failed);
                vm.migration.as_mut().unwrap().reason = Some("the connection broke".into());
            });
            return;
        }
        source.with_migration(vm, migration, |vm, _| {
            let progress = &mut vm.migration.as_mut().unwrap().progress;
            progress.transferred_bytes = Bytes((512 << 20) / u64::from(steps) * u64::from(step));
        });
        target.enter(vm, migration, MigrationPhase::PreCopy);
    }
    let paused = source.with_migration(vm, migration, |vm, _| {
        if vm.state != Some(VmmState::Running) {
            vm.enter(MigrationPhase::Failed);
            return false;
        }
        vm.state = Some(VmmState::Paused {
            reason: PauseReason::HandOver,
        });
        vm.enter(MigrationPhase::Blackout);
        true
    });
    if paused != Some(true) {
        return;
    }
    tokio::time::sleep(BLACKOUT_TIME).await;
    both_awake(&source, &target).await;
    if source.phase(vm, migration) != Some(MigrationPhase::Blackout) {
        return;
    }
    source.enter(vm, migration, MigrationPhase::AwaitingCommit);
    if source.sends_to(&target) {
        target.enter(vm, migration, MigrationPhase::AwaitingCommit);
        target.write_disks(vm);
        tokio::spawn(receive(
            source.clone(),
            target,
            vm,
            migration,
            (epoch, post_copy),
        ));
    }
    tokio::time::sleep(RESOLVE_AFTER).await;
    resolve(source, vm, migration, (epoch, post_copy)).await;
}

/// The target's agent asks for the commit until it is answered.
async fn receive(
    source: Arc<SimHost>,
    target: Arc<SimHost>,
    vm: VmId,
    migration: MigrationId,
    (epoch, post_copy): (Epoch, PostCopy),
) {
    let mut asked = false;
    loop {
        target.answering().await;
        match target.is_dead(vm, migration) {
            // Nobody can have given it the VM.
            true if !asked => {
                let _ = target.destroy(vm, epoch);
                return;
            }
            // Only the answer decides whose VM it was.
            true => {}
            false if target.phase(vm, migration) == Some(MigrationPhase::AwaitingCommit) => {}
            false => return,
        }
        asked = true;
        let host = target.id;
        let request = CommitRequest { vm, host, epoch };
        let answer = target
            .ask_server(|agents| async move { agents.commit(host, migration, request).await })
            .await;
        target.answering().await;
        match answer {
            Some(CommitReply::Granted { epoch }) => {
                target.own(vm, migration, epoch);
                target.vmms_answering().await;
                let ahead = post_copy == PostCopy::Allowed;
                let phase = match ahead {
                    true => MigrationPhase::PostCopy,
                    false => MigrationPhase::Completed,
                };
                let ran = target.with_migration(vm, migration, |known, held| {
                    known.enter(phase);
                    known.run(held).is_ok()
                });
                if ahead && ran.is_some() {
                    tokio::spawn(follow(source.clone(), target.clone(), vm, migration));
                } else if let Some(true) = ran
                    && target.sends_to(&source)
                {
                    source.vmms_answering().await;
                    source.with_migration(vm, migration, |known, _| {
                        known.enter(MigrationPhase::Completed);
                        let progress = &mut known.migration.as_mut().unwrap().progress;
                        progress.downtime_us = Some(40_000);
                        progress.blackout = Some(BLACKOUT);
                        known.state = Some(VmmState::Stopped {
                            reason: StopReason::MigratedAway,
                        });
                    });
                }
                target.write_disks(vm);
                return;
            }
            Some(CommitReply::Refused { .. }) => {
                let _ = target.destroy(vm, epoch);
                return;
            }
            None => tokio::time::sleep(RETRY).await,
        }
    }
}

/// Memory that a guest went ahead of arrives, as long as both VMMs reach each other and the source has it.
async fn follow(source: Arc<SimHost>, target: Arc<SimHost>, vm: VmId, migration: MigrationId) {
    let waits = VmmState::Paused {
        reason: PauseReason::Memory {
            detail: "the link is broken".into(),
        },
    };
    let mut steps = 6;
    while steps > 0 {
        tokio::time::sleep(FOLLOW_TIME / 6).await;
        both_awake(&source, &target).await;
        if target.phase(vm, migration) != Some(MigrationPhase::PostCopy) {
            return;
        }
        if !connected(&source, &target) {
            target.with_migration(vm, migration, |known, _| {
                if known.state == Some(VmmState::Running) {
                    known.state = Some(waits.clone());
                }
            });
        } else if source.phase(vm, migration).is_none() {
            target.with_migration(vm, migration, |known, _| known.state = None);
            target.state().memory_lost += 1;
            return;
        } else {
            source.enter(vm, migration, MigrationPhase::PostCopy);
            target.with_migration(vm, migration, |known, held| {
                if known.state.as_ref() == Some(&waits) {
                    let _ = known.run(held);
                }
            });
            steps -= 1;
        }
    }
    target.enter(vm, migration, MigrationPhase::Completed);
    source.with_migration(vm, migration, |known, _| {
        known.enter(MigrationPhase::Completed);
        known.migration.as_mut().unwrap().progress.downtime_us = Some(40_000);
        known.state = Some(VmmState::Stopped {
            reason: StopReason::MigratedAway,
        });
    });
}

/// The source's agent asks what became of a migration whose target is silent.
async fn resolve(
    source: Arc<SimHost>,
    vm: VmId,
    migration: MigrationId,
    (epoch, post_copy): (Epoch, PostCopy),
) {
    loop {
        source.answering().await;
        if source.phase(vm, migration) != Some(MigrationPhase::AwaitingCommit) {
            return;
        }
        let request = ResolveRequest {
            vm,
            host: source.id,
            role: MigrationRole::Source,
            epoch,
        };
        let id = source.id;
        let answer = source
            .ask_server(|agents| async move { agents.resolve(id, migration, request).await })
            .await;
        source.answering().await;
        match answer {
            Some(Resolution::RunHere { .. }) => {
                source.vmms_answering().await;
                source.with_migration(vm, migration, |known, held| {
                    known.enter(MigrationPhase::Failed);
                    let _ = known.run(held);
                });
                return;
            }
            Some(Resolution::End) if post_copy == PostCopy::Allowed => {
                // Released, and still needed.
                source.enter(vm, migration, MigrationPhase::PostCopy);
                return;
            }
            Some(Resolution::End) => {
                let _ = source.destroy(vm, epoch);
                return;
            }
            Some(Resolution::Open) | None => tokio::time::sleep(RETRY).await,
        }
    }
}
