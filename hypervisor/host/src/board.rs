//! What is known of every VM here, for heartbeats: written by the VMs' drivers, read by the heartbeat loop.

use godwit_wire::host_api::VmReport;
use godwit_wire::id::VmId;
use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use tokio::sync::Notify;

/// How long an entry stays.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stay {
    /// Until its driver retracts it.
    WithTheVm,
    /// Until the server has heard it: the VM is already gone from here.
    UntilHeard,
}

#[derive(Clone, Debug)]
struct Entry {
    report: VmReport,
    stay: Stay,
}

/// The board.
#[derive(Debug, Default)]
pub(crate) struct Board {
    entries: Mutex<BTreeMap<VmId, Entry>>,
    changed: Notify,
}

impl Board {
    /// Shows `report`; a change of state or phase, unlike one of figures, is worth a heartbeat at once.
    pub(crate) fn publish(&self, report: VmReport) {
        self.put(report, Stay::WithTheVm);
    }

    /// Shows `report` until the server has heard it once.
    pub(crate) fn bid_farewell(&self, report: VmReport) {
        // Its devices are gone, and a heartbeat without their counters must say the same.
        let report = VmReport {
            devices: None,
            ..report
        };
        self.put(report, Stay::UntilHeard);
    }

    fn put(&self, report: VmReport, stay: Stay) {
        let notable = {
            let mut entries = self.entries();
            let notable = entries
                .get(&report.vm)
                .is_none_or(|entry| differs(&entry.report, &report));
            entries.insert(report.vm, Entry { report, stay });
            notable
        };
        if notable {
            self.changed.notify_one();
        }
    }

    /// The VM is no longer here.
    pub(crate) fn retract(&self, vm: VmId) {
        if self.entries().remove(&vm).is_some() {
            self.changed.notify_one();
        }
    }

    /// The server has heard these reports: farewells among them have served their purpose.
    pub(crate) fn heard(&self, reports: &[VmReport]) {
        let mut entries = self.entries();
        for heard in reports {
            if entries
                .get(&heard.vm)
                .is_some_and(|e| e.stay == Stay::UntilHeard && e.report == *heard)
            {
                entries.remove(&heard.vm);
            }
        }
    }

    /// All reports, sorted by VM.
    pub(crate) fn reports(&self) -> Vec<VmReport> {
        self.entries()
            .values()
            .map(|entry| entry.report.clone())
            .collect()
    }

    pub(crate) fn len(&self) -> usize {
        self.entries().len()
    }

    /// Whether a migration is under way, so that the operator wants news more often.
    pub(crate) fn is_busy(&self) -> bool {
        let under_way = |entry: &Entry| {
            entry
                .report
                .migration
                .as_ref()
                .is_some_and(|m| !m.phase.is_final())
        };
        self.entries().values().any(under_way)
    }

    /// Completes after a notable change since the last call.
    pub(crate) async fn changed(&self) {
        self.changed.notified().await;
    }

    fn entries(&self) -> MutexGuard<'_, BTreeMap<VmId, Entry>> {
        // Every critical section leaves the map whole.
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn differs(old: &VmReport, new: &VmReport) -> bool {
    let phase = |report: &VmReport| report.migration.as_ref().map(|m| (m.migration, m.phase));
    (old.epoch, old.generation, &old.state, phase(old))
        != (new.epoch, new.generation, &new.state, phase(new))
}

#[cfg(test)]
mod tests {
    use super::*;
    use godwit_wire::id::{Epoch, Generation};
    use godwit_wire::usage::VmUsage;
    use godwit_wire::vmm_api::VmmState;

    fn report(vm: VmId, epoch: u64) -> VmReport {
        VmReport {
            vm,
            epoch: Epoch(epoch),
            generation: Generation(1),
            state: Some(VmmState::Running),
            usage: VmUsage::default(),
            migration: None,
            devices: None,
        }
    }

    #[tokio::test]
    async fn a_farewell_stays_until_it_was_heard_and_a_vm_as_long_as_it_is_here() {
        let board = Board::default();
        let (gone, here) = (report(VmId::fresh(), 1), report(VmId::fresh(), 1));
        board.publish(here.clone());
        board.bid_farewell(gone.clone());
        board.changed().await;
        let told = board.reports();
        assert_eq!(told.len(), 2);
        board.heard(&told);
        assert_eq!(board.reports(), [here]);
    }

    #[tokio::test]
    async fn a_farewell_that_was_overtaken_by_news_is_not_lost() {
        let board = Board::default();
        let vm = VmId::fresh();
        board.bid_farewell(report(vm, 1));
        let told = board.reports();
        board.bid_farewell(report(vm, 2));
        board.heard(&told);
        assert_eq!(board.reports(), [report(vm, 2)]);
    }

    #[test]
    fn figures_alone_do_not_hurry_a_heartbeat() {
        let old = report(VmId::fresh(), 1);
        let mut new = old.clone();
        new.usage.cpu_percent = 50.0;
        assert!(!differs(&old, &new));
        new.state = None;
        assert!(differs(&old, &new));
    }
}
