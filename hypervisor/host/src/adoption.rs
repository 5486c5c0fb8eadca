//! What a starting agent does about each VM its predecessor has left. Pure.
//!
//! A VM is reported as gone only when its process certainly is: the server starts it elsewhere on that word.

use crate::record::{Purpose, Started, VmRecord};
use godwit_wire::migration::{MigrationPhase, MigrationStatus};
use godwit_wire::vmm_api::{VmmInfo, VmmState};
use uuid::Uuid;

/// What became of the VMM process.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Found {
    /// There is none, or the host has booted since.
    NoProcess,
    /// There is one, but its API does not answer.
    Silent,
    /// There is one, and this is what it says.
    Answers(Box<VmmInfo>),
}

/// What to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Adoption {
    /// Take it over as it is.
    Live,
    /// The VM had ended before; kill a process that should not be there and go on reporting the end.
    StillEnded,
    /// Nothing is left: report the VM as gone.
    Lost,
    /// Kill what is left and report the VM as gone.
    KillAndLose {
        /// For the log.
        reason: String,
    },
    /// Kill what is left; the VM was never this host's.
    Forget {
        /// For the log.
        reason: String,
    },
}

/// Decides; `boot_id` is the host's present one.
pub(crate) fn adopt(record: &VmRecord, boot_id: Uuid, found: &Found) -> Adoption {
    if record.end.is_some() {
        return Adoption::StillEnded;
    }
    let found = if record.boot_id == boot_id {
        found
    } else {
        &Found::NoProcess
    };
    match (found, record.purpose) {
        (Found::NoProcess, Purpose::Receiving { .. }) => Adoption::Forget {
            reason: "its process is gone".to_owned(),
        },
        (Found::NoProcess, Purpose::Owned | Purpose::Granted { .. }) => Adoption::Lost,
        // It may well be running its guest: leave it alone, its lease guards it.
        (Found::Silent, _) if record.started == Started::Yes => Adoption::Live,
        (Found::Silent, _) => unfinished(record),
        (Found::Answers(info), _) => adopt_answering(record, info),
    }
}

fn adopt_answering(record: &VmRecord, info: &VmmInfo) -> Adoption {
    if info.vm.is_some_and(|vm| vm != record.vm) {
        let reason = format!("its VMM runs VM {:?} instead", info.vm);
        return Adoption::KillAndLose { reason };
    }
    let empty = matches!(info.state, VmmState::Empty | VmmState::Created);
    match record.purpose {
        _ if empty || info.vm.is_none() => unfinished(record),
        Purpose::Owned if info.epoch < record.epoch => Adoption::KillAndLose {
            reason: format!(
                "its VMM has epoch {} and the VM is at epoch {}",
                info.epoch, record.epoch
            ),
        },
        Purpose::Owned | Purpose::Granted { .. } => Adoption::Live,
        Purpose::Receiving { migration } => match &info.migration {
            Some(MigrationStatus {
                migration: under_way,
                phase,
                ..
            }) if *under_way == migration && !ended(*phase) => Adoption::Live,
            _ => Adoption::Forget {
                reason: "its migration ended meanwhile".to_owned(),
            },
        },
    }
}

/// A start that the former agent did not see through is not finished by guesswork: the server sends a new one.
fn unfinished(record: &VmRecord) -> Adoption {
    let reason = "its start was not finished".to_owned();
    match record.purpose {
        Purpose::Receiving { .. } => Adoption::Forget { reason },
        Purpose::Owned | Purpose::Granted { .. } => Adoption::KillAndLose { reason },
    }
}

/// Whether a VMM in this state has a machine that was told to start.
pub(crate) fn has_started(state: &VmmState) -> bool {
    matches!(
        state,
        VmmState::Running | VmmState::Paused { .. } | VmmState::Incoming
    )
}

fn ended(phase: MigrationPhase) -> bool {
    // A completed one cannot be: the record would say `Granted`. Should it be, the VM must not go on here.
    phase.is_final()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::End;
    use crate::record::tests::{record, spec};
    use godwit_wire::id::{Epoch, MigrationId, VmId};
    use godwit_wire::machine::{CpuBaseline, CpuFacts};
    use godwit_wire::migration::{MigrationProgress, MigrationRole};
    use godwit_wire::unit::Bytes;
    use godwit_wire::vmm_api::{Counters, StopReason};

    const BOOT: Uuid = Uuid::nil();

    fn answer(record: &VmRecord, epoch: u64, state: VmmState) -> Found {
        Found::Answers(Box::new(VmmInfo {
            version: "1".into(),
            pid: 1,
            vm: Some(record.vm),
            epoch: Epoch(epoch),
            spec: Some(spec()),
            state,
            uptime_ms: 1,
            cpu: CpuFacts {
                level: CpuBaseline::V2,
                signature: "s".into(),
                model: "m".into(),
            },
            guest_resident_bytes: Bytes(0),
            guest_expected_bytes: Bytes(0),
            counters: Counters::default(),
            vcpus: Vec::new(),
            devices: Vec::new(),
            migration: None,
            succession: None,
        }))
    }

    fn started(purpose: Purpose, epoch: u64) -> VmRecord {
        VmRecord {
            started: Started::Yes,
            ..record(purpose, epoch)
        }
    }

    #[test]
    fn a_running_vm_is_taken_over_and_a_dead_one_is_lost() {
        let record = started(Purpose::Owned, 2);
        assert_eq!(
            adopt(&record, BOOT, &answer(&record, 2, VmmState::Running)),
            Adoption::Live
        );
        assert_eq!(adopt(&record, BOOT, &Found::NoProcess), Adoption::Lost);
    }

    #[test]
    fn a_vmm_that_does_not_answer_may_be_running_and_is_never_called_gone() {
        let record = started(Purpose::Owned, 2);
        assert_eq!(adopt(&record, BOOT, &Found::Silent), Adoption::Live);
    }

    #[test]
    fn after_a_new_boot_everything_is_gone_whatever_has_the_same_process_id() {
        let record = started(Purpose::Owned, 2);
        assert_eq!(
            adopt(&record, Uuid::max(), &answer(&record, 2, VmmState::Running)),
            Adoption::Lost
        );
    }

    #[test]
    fn an_older_copy_and_an_unfinished_start_are_killed() {
        let record = started(Purpose::Owned, 3);
        let older = adopt(&record, BOOT, &answer(&record, 2, VmmState::Running));
        assert!(matches!(older, Adoption::KillAndLose { .. }));
        let created = adopt(&record, BOOT, &answer(&record, 3, VmmState::Created));
        assert!(matches!(created, Adoption::KillAndLose { .. }));
        let stranger = VmRecord {
            vm: VmId::fresh(),
            ..record.clone()
        };
        assert!(matches!(
            adopt(&stranger, BOOT, &answer(&record, 3, VmmState::Running)),
            Adoption::KillAndLose { .. }
        ));
    }

    #[test]
    fn a_migration_under_way_goes_on_and_one_that_ended_is_forgotten() {
        let migration = MigrationId::fresh();
        let record = started(Purpose::Receiving { migration }, 3);
        let Found::Answers(mut info) = answer(&record, 3, VmmState::Incoming) else {
            unreachable!()
        };
        info.migration = Some(MigrationStatus {
            migration,
            sequence: 1,
            role: MigrationRole::Target,
            phase: MigrationPhase::AwaitingCommit,
            progress: MigrationProgress::default(),
            connected: true,
            reason: None,
        });
        assert_eq!(
            adopt(&record, BOOT, &Found::Answers(info.clone())),
            Adoption::Live
        );
        if let Some(status) = &mut info.migration {
            status.phase = MigrationPhase::Failed;
        }
        assert!(matches!(
            adopt(&record, BOOT, &Found::Answers(info)),
            Adoption::Forget { .. }
        ));
    }

    #[test]
    fn a_granted_commit_the_vmm_has_not_heard_of_is_carried_on() {
        let record = started(
            Purpose::Granted {
                migration: MigrationId::fresh(),
            },
            4,
        );
        assert_eq!(
            adopt(&record, BOOT, &answer(&record, 3, VmmState::Incoming)),
            Adoption::Live
        );
        assert_eq!(adopt(&record, BOOT, &Found::NoProcess), Adoption::Lost);
    }

    #[test]
    fn what_had_ended_stays_ended() {
        let mut record = started(Purpose::Owned, 2);
        record.end = Some(End::Stopped {
            reason: StopReason::GuestHalted,
        });
        assert_eq!(
            adopt(&record, BOOT, &answer(&record, 2, VmmState::Running)),
            Adoption::StillEnded
        );
    }
}
