//! Packet gaps: only the target of a migration knows how long the guest's network was silent, and it knows no sooner
//! than the first frame has passed there. By then the record has mostly been given the source's last figures; the gap is
//! added when the target tells it, for as long as it tells it. No heartbeat waits for that, because a lease does.

use crate::core::Core;
use crate::ledger::Draft;
use crate::loops::STORE_PAUSE;
use crate::model::Migration;
use crate::view::View;
use godwit_wire::id::MigrationId;
use godwit_wire::migration::MigrationRole;
use godwit_wire::problem::Problem;
use std::sync::Arc;

/// A gap that its record lacks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Gap {
    migration: MigrationId,
    us: u64,
}

/// Adds gaps to their records as they become known, for ever.
pub(crate) async fn write_down_for_ever(core: Arc<Core>) {
    let mut changed = core.ledger.changed();
    loop {
        changed.mark_unchanged();
        let gaps = unwritten(&core.view());
        if gaps.is_empty() {
            if changed.changed().await.is_err() {
                return;
            }
        } else if let Err(problem) = write_down(&core, &gaps).await {
            tracing::error!(%problem, "the packet gaps of migrations could not be written");
            tokio::time::sleep(STORE_PAUSE).await;
        }
    }
}

/// What targets tell that is not written down yet.
fn unwritten(view: &View) -> Vec<Gap> {
    let reports = view
        .observed
        .iter()
        .flat_map(|(host, observed)| observed.vms.values().map(|report| (*host, report)));
    let told = reports.filter_map(|(host, report)| {
        let status = report.migration.as_ref()?;
        let gap = Gap {
            migration: status.migration,
            us: status.progress.packet_gap_us?,
        };
        let record = view.migrations.get(&gap.migration)?;
        let ours = status.role == MigrationRole::Target
            && (record.target, record.vm) == (host, report.vm)
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

async fn write_down(core: &Core, gaps: &[Gap]) -> Result<(), Problem> {
    core.ledger
        .change(|view: &View, draft: &mut Draft<'_>| {
            for gap in gaps {
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
        })
        .await
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::view::Observed;
    use godwit_wire::host_api::VmReport;
    use godwit_wire::id::{Epoch, Generation, HostId, VmId};
    use godwit_wire::migration::{MigrationPhase, MigrationProgress, MigrationStatus};
    use godwit_wire::usage::VmUsage;

    fn ended() -> Migration {
        Migration::committed(
            HostId::fresh(),
            HostId::fresh(),
            MigrationProgress::default(),
        )
    }

    /// A record, and what a host tells.
    fn view(migration: &Migration, host: HostId, told: &VmReport) -> View {
        let mut view = View::default();
        let record = (migration.id, Arc::new(migration.clone()));
        view.migrations = Arc::new([record].into());
        let mut observed = Observed::nothing_yet();
        observed.vms.insert(told.vm, told.clone());
        view.observed = Arc::new([(host, Arc::new(observed))].into());
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
        assert_eq!(unwritten(&view(&migration, host, &told)), [gap]);
        let nothing = report(&migration, None);
        assert_eq!(unwritten(&view(&migration, host, &nothing)), []);
        // What comes of the source's figures brings the gap along.
        migration.progress = None;
        assert_eq!(unwritten(&view(&migration, host, &told)), []);
        migration.progress = told
            .migration
            .as_ref()
            .map(|status| status.progress.clone());
        assert_eq!(unwritten(&view(&migration, host, &told)), []);
    }

    #[test]
    fn nobody_but_the_target_of_this_vm_is_believed() {
        let migration = ended();
        let told = report(&migration, Some(7));
        assert_eq!(unwritten(&view(&migration, migration.source, &told)), []);
        let of_another = VmReport {
            vm: VmId::fresh(),
            ..told.clone()
        };
        assert_eq!(
            unwritten(&view(&migration, migration.target, &of_another)),
            []
        );
        let mut as_source = told;
        as_source.migration.as_mut().unwrap().role = MigrationRole::Source;
        assert_eq!(
            unwritten(&view(&migration, migration.target, &as_source)),
            []
        );
    }
}
