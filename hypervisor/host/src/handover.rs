//! What an agent does about a migration, seen from its end. Pure: status and answers in, next step out.
//!
//! ```text
//! target:  receiving ──VMM holds everything──▶ asking the store ──granted──▶ telling the VMM ──▶ owned
//!              │ failed, cancelled                  │ refused                    │ VMM gone
//!              ▼                                    ▼                            ▼
//!          destroyed                            destroyed                lost (reported: state None)
//!
//! source:  sending ──all sent──▶ awaiting ──target runs──▶ released
//!              │ failed,            │ connection lost, or patience over
//!              │ cancelled          ▼
//!              ▼                asking the store ──void──▶ telling the VMM to run again ──▶ running
//!          running                  └──committed──▶ released
//! ```
//!
//! After a hand-over ahead of memory (post-copy) the target owns the VM at once, and the source's VMM is left alone
//! until it says that nothing is missing any more.
//!
//! A server that cannot be reached leaves both ends where they are: paused, asking again.

use godwit_wire::host_api::{CommitReply, Resolution};
use godwit_wire::id::Epoch;
use godwit_wire::migration::{MigrationPhase, MigrationStatus};
use std::time::Duration;

/// How long a source that has sent everything waits for the target's word before it asks the store,
const SOURCE_PATIENCE: Duration = Duration::from_secs(2);
/// how many times as long as itself it lets the target take to hash the same memory,
const HASHING_ALLOWANCE: u32 = 4;
/// and how long at most: the guest stands still all the while.
const HASHING_LIMIT: Duration = Duration::from_secs(300);

/// Whether the store was asked for the commit; from then on only its answer counts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// Never asked.
    NotAsked,
    /// Asked, no answer yet.
    Asked,
    /// Its answer, which stands for ever.
    Given(CommitReply),
}

/// Next step of the agent at the target.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum TargetStep {
    /// Nothing.
    Wait,
    /// Ask the store for the commit (again, if there was no answer).
    AskStore,
    /// The store has granted it: the VMM runs the VM under this epoch.
    TellVmm {
        /// The new epoch.
        epoch: Epoch,
    },
    /// The VM runs here.
    Own {
        /// The new epoch.
        epoch: Epoch,
    },
    /// Nothing came of it: end the VMM and forget the VM.
    Destroy {
        /// For the log.
        reason: String,
    },
    /// The VM is this host's, and its machine is gone.
    Lose {
        /// The new epoch.
        epoch: Epoch,
    },
}

/// `status` is the VMM's latest word, `None` when its process is gone.
pub(crate) fn target_step(status: Option<&MigrationStatus>, verdict: &Verdict) -> TargetStep {
    let phase = status.map(|status| status.phase);
    match (verdict, phase) {
        (
            Verdict::Given(CommitReply::Granted { epoch }),
            Some(MigrationPhase::Completed | MigrationPhase::PostCopy),
        ) => TargetStep::Own { epoch: *epoch },
        (
            Verdict::Given(CommitReply::Granted { epoch }),
            None | Some(MigrationPhase::Failed | MigrationPhase::Cancelled),
        ) => TargetStep::Lose { epoch: *epoch },
        (Verdict::Given(CommitReply::Granted { epoch }), Some(_)) => {
            TargetStep::TellVmm { epoch: *epoch }
        }
        (Verdict::Given(CommitReply::Refused { reason }), _) => TargetStep::Destroy {
            reason: reason.clone(),
        },
        // The store may have granted what it was asked: its answer decides even over a dead VMM.
        (Verdict::Asked, _) => TargetStep::AskStore,
        (Verdict::NotAsked, Some(MigrationPhase::AwaitingCommit)) => TargetStep::AskStore,
        (Verdict::NotAsked, None) => TargetStep::Destroy {
            reason: "the VMM process ended".to_owned(),
        },
        (Verdict::NotAsked, Some(MigrationPhase::Failed | MigrationPhase::Cancelled)) => {
            let reason = status.and_then(|status| status.reason.clone());
            TargetStep::Destroy {
                reason: reason.unwrap_or_else(|| "it was called off".to_owned()),
            }
        }
        // A VMM completes only when told to, and it is told only what was granted.
        (Verdict::NotAsked, Some(MigrationPhase::Completed | MigrationPhase::PostCopy)) => {
            TargetStep::Destroy {
                reason: "the VMM ran the VM without the store's word".to_owned(),
            }
        }
        (
            Verdict::NotAsked,
            Some(MigrationPhase::Connecting | MigrationPhase::PreCopy | MigrationPhase::Blackout),
        ) => TargetStep::Wait,
    }
}

/// Next step of the agent at the source.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum SourceStep {
    /// Nothing, until the VMM has news.
    Wait,
    /// Nothing for now; look again after this long.
    LookAgainIn(Duration),
    /// Ask the store what became of the migration.
    AskStore,
    /// The migration is void: the VMM runs the VM again.
    TellVmmToRun {
        /// Epoch it has.
        epoch: Epoch,
    },
    /// The VM runs elsewhere: end the VMM and forget the VM.
    Release,
    /// It ended and the VM runs here as before.
    Keep,
}

/// `awaiting` tells how long the VMM has been waiting for the commit; `resolution` is the store's answer.
pub(crate) fn source_step(
    status: &MigrationStatus,
    awaiting: Duration,
    resolution: Option<Resolution>,
) -> SourceStep {
    match (status.phase, resolution) {
        // The VM is the target's, which still needs this one's memory.
        (MigrationPhase::PostCopy, _) => SourceStep::Wait,
        (MigrationPhase::Completed, _) | (_, Some(Resolution::End)) => SourceStep::Release,
        (MigrationPhase::Failed | MigrationPhase::Cancelled, _) => SourceStep::Keep,
        (MigrationPhase::Connecting | MigrationPhase::PreCopy | MigrationPhase::Blackout, _) => {
            SourceStep::Wait
        }
        (MigrationPhase::AwaitingCommit, Some(Resolution::RunHere { epoch })) => {
            SourceStep::TellVmmToRun { epoch }
        }
        (MigrationPhase::AwaitingCommit, None | Some(Resolution::Open)) => {
            let patience = source_patience(status);
            if status.connected && awaiting < patience {
                SourceStep::LookAgainIn(patience - awaiting)
            } else {
                SourceStep::AskStore
            }
        }
    }
}

/// How long a source with this `status` waits for the target's word.
pub(crate) fn source_patience(status: &MigrationStatus) -> Duration {
    let hashing = Duration::from_micros(status.progress.hashing_us.unwrap_or_default());
    SOURCE_PATIENCE + HASHING_LIMIT.min(hashing.saturating_mul(HASHING_ALLOWANCE))
}

#[cfg(test)]
mod tests {
    use super::*;
    use godwit_wire::id::MigrationId;
    use godwit_wire::migration::{MigrationProgress, MigrationRole};
    use proptest::prelude::*;

    const PHASES: [MigrationPhase; 8] = [
        MigrationPhase::PostCopy,
        MigrationPhase::Connecting,
        MigrationPhase::PreCopy,
        MigrationPhase::Blackout,
        MigrationPhase::AwaitingCommit,
        MigrationPhase::Completed,
        MigrationPhase::Failed,
        MigrationPhase::Cancelled,
    ];

    fn status(role: MigrationRole, phase: MigrationPhase, connected: bool) -> MigrationStatus {
        MigrationStatus {
            migration: MigrationId::fresh(),
            sequence: 1,
            role,
            phase,
            progress: MigrationProgress::default(),
            connected,
            reason: None,
        }
    }

    fn target(phase: MigrationPhase) -> MigrationStatus {
        status(MigrationRole::Target, phase, true)
    }

    fn source(phase: MigrationPhase, connected: bool) -> MigrationStatus {
        status(MigrationRole::Source, phase, connected)
    }

    const GRANTED: Verdict = Verdict::Given(CommitReply::Granted { epoch: Epoch(4) });

    #[test]
    fn a_target_that_holds_everything_asks_and_runs_only_what_was_granted() {
        let awaiting = target(MigrationPhase::AwaitingCommit);
        assert_eq!(
            target_step(Some(&awaiting), &Verdict::NotAsked),
            TargetStep::AskStore
        );
        assert_eq!(
            target_step(Some(&awaiting), &GRANTED),
            TargetStep::TellVmm { epoch: Epoch(4) }
        );
        let completed = target(MigrationPhase::Completed);
        assert_eq!(
            target_step(Some(&completed), &GRANTED),
            TargetStep::Own { epoch: Epoch(4) }
        );
    }

    #[test]
    fn a_target_whose_vmm_died_after_asking_still_waits_for_the_answer() {
        assert_eq!(target_step(None, &Verdict::Asked), TargetStep::AskStore);
        assert_eq!(
            target_step(None, &GRANTED),
            TargetStep::Lose { epoch: Epoch(4) }
        );
    }

    #[test]
    fn a_refused_or_failed_target_is_destroyed() {
        let refused = Verdict::Given(CommitReply::Refused {
            reason: "void".into(),
        });
        for phase in PHASES {
            assert_eq!(
                target_step(Some(&target(phase)), &refused),
                TargetStep::Destroy {
                    reason: "void".into()
                }
            );
        }
        let failed = target(MigrationPhase::Failed);
        assert!(matches!(
            target_step(Some(&failed), &Verdict::NotAsked),
            TargetStep::Destroy { .. }
        ));
    }

    #[test]
    fn a_source_waits_for_the_target_and_then_asks_the_store() {
        let awaiting = source(MigrationPhase::AwaitingCommit, true);
        let short = Duration::from_millis(500);
        assert_eq!(
            source_step(&awaiting, short, None),
            SourceStep::LookAgainIn(Duration::from_millis(1_500))
        );
        assert_eq!(
            source_step(&awaiting, SOURCE_PATIENCE, None),
            SourceStep::AskStore
        );
        let cut = source(MigrationPhase::AwaitingCommit, false);
        assert_eq!(
            source_step(&cut, Duration::ZERO, None),
            SourceStep::AskStore
        );
        let mut hashing = source(MigrationPhase::AwaitingCommit, true);
        hashing.progress.hashing_us = Some(3_000_000);
        assert_eq!(
            source_step(&hashing, SOURCE_PATIENCE, None),
            SourceStep::LookAgainIn(Duration::from_secs(12))
        );
        assert_eq!(
            source_step(&hashing, Duration::from_secs(14), None),
            SourceStep::AskStore
        );
        hashing.progress.hashing_us = Some(u64::MAX);
        assert_eq!(
            source_step(&hashing, SOURCE_PATIENCE + HASHING_LIMIT, None),
            SourceStep::AskStore
        );
        hashing.connected = false;
        assert_eq!(
            source_step(&hashing, Duration::ZERO, None),
            SourceStep::AskStore
        );
    }

    #[test]
    fn a_source_runs_again_only_by_the_stores_word() {
        let cut = source(MigrationPhase::AwaitingCommit, false);
        let run = Some(Resolution::RunHere { epoch: Epoch(3) });
        assert_eq!(
            source_step(&cut, SOURCE_PATIENCE, run),
            SourceStep::TellVmmToRun { epoch: Epoch(3) }
        );
        assert_eq!(
            source_step(&cut, SOURCE_PATIENCE, Some(Resolution::End)),
            SourceStep::Release
        );
        assert_eq!(
            source_step(&source(MigrationPhase::Failed, false), Duration::ZERO, None),
            SourceStep::Keep
        );
    }

    proptest! {
        /// The two ends act on the same answer of the store: whatever each has seen, never do both run.
        #[test]
        fn whatever_both_ends_have_seen_only_one_may_run(
            source_phase in 0..PHASES.len(), target_phase in 0..PHASES.len(),
            connected in any::<bool>(), granted in any::<bool>(), waited_ms in 0..5_000u64,
            hashing_us in any::<Option<u64>>()
        ) {
            let (verdict, resolution) = if granted {
                (GRANTED, Resolution::End)
            } else {
                let refused = CommitReply::Refused { reason: "void".into() };
                (Verdict::Given(refused), Resolution::RunHere { epoch: Epoch(3) })
            };
            let source_phase = PHASES[source_phase];
            // What the VMMs guarantee: the source completes only on the target's word.
            prop_assume!(granted || source_phase != MigrationPhase::Completed);
            let mut seen = source(source_phase, connected);
            seen.progress.hashing_us = hashing_us;
            let step = source_step(&seen, Duration::from_millis(waited_ms), Some(resolution));
            let source_runs = matches!(step, SourceStep::TellVmmToRun { .. });
            let step = target_step(Some(&target(PHASES[target_phase])), &verdict);
            let target_runs = matches!(step, TargetStep::TellVmm { .. } | TargetStep::Own { .. });
            prop_assert!(!(source_runs && target_runs));
            prop_assert!(!granted || !source_runs);
            prop_assert!(granted || !target_runs);
        }

        #[test]
        fn without_the_stores_word_nobody_starts_to_run(
            phase in 0..PHASES.len(), connected in any::<bool>(), waited_ms in 0..5_000u64, asked in any::<bool>(),
            hashing_us in any::<Option<u64>>()
        ) {
            let verdict = if asked { Verdict::Asked } else { Verdict::NotAsked };
            let step = target_step(Some(&target(PHASES[phase])), &verdict);
            let may_run = matches!(step, TargetStep::TellVmm { .. } | TargetStep::Own { .. });
            prop_assert!(!may_run);
            let mut seen = source(PHASES[phase], connected);
            seen.progress.hashing_us = hashing_us;
            let step = source_step(&seen, Duration::from_millis(waited_ms), None);
            let may_run = matches!(step, SourceStep::TellVmmToRun { .. });
            prop_assert!(!may_run);
        }
    }
}
