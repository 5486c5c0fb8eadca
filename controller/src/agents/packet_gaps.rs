//! Packet gaps: only the target of a migration knows how long the guest's network was silent, and it knows no sooner
//! than the first frame has passed there. By then the record has mostly been given the source's last figures; the gap is
//! added when a heartbeat of the target tells it, for as long as it tells it.

use crate::core::Core;
use crate::ledger::Draft;
use crate::model::Migration;
use crate::view::View;
use godwit_wire::host_api::VmReport;
use godwit_wire::id::{HostId, MigrationId};
use godwit_wire::migration::MigrationRole;

/// A gap that its record lacks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Gap {
    migration: MigrationId,
    us: u64,
}

/// What `host` tells in its `reports` that is not written down yet.
pub(super) fn unwritten(view: &View, host: HostId, reports: &[VmReport]) -> Vec<Gap> {
    let told = reports.iter().filter_map(|vm| {
        let status = vm.migration.as_ref()?;
        let gap = Gap {
            migration: status.migration,
            us: status.progress.packet_gap_us?,
        };
        let record = view.migrations.get(&gap.migration)?;
        let ours = status.role == MigrationRole::Target
            && (record.target, record.vm) == (host, vm.vm)
            && lacks_gap(record);
        ours.then_some(gap)
    });
    told.collect()
}

/// One without figures gets the gap with them.
fn lacks_gap(record: &Migration) -> bool {
    record
        .progress
        .as_ref()
        .is_some_and(|progress| progress.packet_gap_us.is_none())
}

/// Adds them to their records; the lease does not depend on it, and what fails is told again.
pub(super) async fn write_down(core: &Core, gaps: Vec<Gap>) {
    if gaps.is_empty() {
        return;
    }
    let add = |view: &View, draft: &mut Draft<'_>| {
        for gap in &gaps {
            let record = view.migrations.get(&gap.migration);
            if let Some(record) = record.filter(|record| lacks_gap(record)) {
                let mut record = record.as_ref().clone();
                if let Some(progress) = &mut record.progress {
                    progress.packet_gap_us = Some(gap.us);
                }
                draft.put_migration(record);
            }
        }
        Ok(())
    };
    if let Err(problem) = core.ledger.change(add).await {
        tracing::error!(%problem, "the packet gaps of migrations could not be written");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{HeldBack, MigrationState};
    use godwit_wire::id::{Epoch, Generation, OperationId, VmId};
    use godwit_wire::migration::{
        MigrationPhase, MigrationPolicy, MigrationProgress, MigrationStatus,
    };
    use godwit_wire::usage::VmUsage;
    use jiff::Timestamp;
    use std::sync::Arc;

    fn ended() -> Migration {
        Migration {
            id: MigrationId::fresh(),
            vm: VmId::fresh(),
            vm_name: "a".into(),
            source: HostId::fresh(),
            source_name: "source".into(),
            target: HostId::fresh(),
            target_name: "target".into(),
            epoch: Epoch(1),
            prepare_generation: Generation(1),
            send_generation: Generation(2),
            policy: MigrationPolicy::default(),
            disks: Vec::new(),
            operation: OperationId::fresh(),
            state: MigrationState::Committed { epoch: Epoch(2) },
            phase: Some(MigrationPhase::Completed),
            progress: Some(MigrationProgress::default()),
            held_back: HeldBack::No,
            foreseen: None,
            started_at: Timestamp::UNIX_EPOCH,
            ended_at: Some(Timestamp::UNIX_EPOCH),
        }
    }

    fn view(migration: &Migration) -> View {
        let mut view = View::default();
        let record = (migration.id, Arc::new(migration.clone()));
        view.migrations = Arc::new([record].into());
        view
    }

    /// What the target says of it.
    fn report(migration: &Migration, packet_gap_us: Option<u64>) -> VmReport {
        VmReport {
            vm: migration.vm,
            epoch: Epoch(2),
            generation: Generation(1),
            state: None,
            usage: VmUsage::default(),
            migration: Some(MigrationStatus {
                migration: migration.id,
                sequence: 9,
                role: MigrationRole::Target,
                phase: MigrationPhase::Completed,
                progress: MigrationProgress {
                    packet_gap_us,
                    ..MigrationProgress::default()
                },
                connected: false,
                reason: None,
            }),
            devices: None,
        }
    }

    #[test]
    fn what_the_target_tells_is_written_down_until_it_is_there() {
        let mut migration = ended();
        let (host, told) = (migration.target, report(&migration, Some(7)));
        let gap = Gap {
            migration: migration.id,
            us: 7,
        };
        assert_eq!(
            unwritten(&view(&migration), host, std::slice::from_ref(&told)),
            [gap]
        );
        let nothing = report(&migration, None);
        assert_eq!(unwritten(&view(&migration), host, &[nothing]), []);
        // What comes of the source's figures brings the gap along.
        migration.progress = None;
        assert_eq!(
            unwritten(&view(&migration), host, std::slice::from_ref(&told)),
            []
        );
        migration.progress = told
            .migration
            .as_ref()
            .map(|status| status.progress.clone());
        assert_eq!(unwritten(&view(&migration), host, &[told]), []);
    }

    #[test]
    fn nobody_but_the_target_of_this_vm_is_believed() {
        let migration = ended();
        let view = view(&migration);
        let told = report(&migration, Some(7));
        assert_eq!(
            unwritten(&view, migration.source, std::slice::from_ref(&told)),
            []
        );
        let of_another = VmReport {
            vm: VmId::fresh(),
            ..told.clone()
        };
        assert_eq!(unwritten(&view, migration.target, &[of_another]), []);
        let mut as_source = told;
        as_source.migration.as_mut().unwrap().role = MigrationRole::Source;
        assert_eq!(unwritten(&view, migration.target, &[as_source]), []);
    }
}
