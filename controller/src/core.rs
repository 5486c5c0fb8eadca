//! What the controller's parts share.

use crate::drive::host_driver::{HostAddress, HostDriver};
use crate::drive::pulses::Pulses;
use crate::ha::debts::Debts;
use crate::ha::detector::Waits;
use crate::ledger::Ledger;
use crate::model::Host;
use crate::model::limits::{MAX_AUTOMATIC_RESTARTS, RESTARTS_FORGIVEN_AFTER};
use crate::view::View;
use godwit_wire::id::{HostId, OperationId, VmId};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// First pause before a VM is started again by itself; doubles with every time.
const FIRST_RESTART_PAUSE: Duration = Duration::from_secs(1);

/// What can be set.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Settings {
    /// Migrations one host takes part in at the same time before it is known what its links carry.
    pub(crate) migrations_per_host: usize,
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Core {
    pub(crate) ledger: Ledger,
    pub(crate) driver: Arc<dyn HostDriver>,
    pub(crate) pulses: Pulses,
    pub(crate) debts: Debts,
    pub(crate) settings: Settings,
    /// Operations that have an executor.
    executing: Mutex<BTreeSet<OperationId>>,
    restarts: Mutex<BTreeMap<VmId, Restarts>>,
    pub(crate) stopping: CancellationToken,
    pub(crate) tasks: TaskTracker,
}

#[derive(Clone, Copy, Debug)]
struct Restarts {
    count: u32,
    latest: Instant,
}

impl Core {
    pub(crate) fn new(ledger: Ledger, driver: Arc<dyn HostDriver>, settings: Settings) -> Self {
        Self {
            ledger,
            driver,
            pulses: Pulses::new(Waits::STANDARD),
            // Replies are numbered by ones, and fewer than a million a second: the next server's numbers are higher.
            debts: Debts::new(jiff::Timestamp::now().as_microsecond().max(1) as u64),
            settings,
            executing: Mutex::default(),
            restarts: Mutex::default(),
            stopping: CancellationToken::new(),
            tasks: TaskTracker::new(),
        }
    }

    pub(crate) fn view(&self) -> Arc<View> {
        self.ledger.view()
    }

    /// Where a host's agent listens.
    pub(crate) fn address(&self, host: HostId) -> Option<HostAddress> {
        let view = self.view();
        let host: &Host = view.hosts.get(&host)?;
        Some(HostAddress {
            host: host.id,
            address: host.facts.address,
        })
    }

    /// Waits until `find` sees what it looks for in a view; it looks at the present one first.
    pub(crate) async fn until<T>(&self, mut find: impl FnMut(&View) -> Option<T>) -> T {
        let mut changed = self.ledger.changed();
        loop {
            changed.mark_unchanged();
            if let Some(found) = find(&self.view()) {
                return found;
            }
            if changed.changed().await.is_err() {
                // The ledger lives in `self`; it cannot be gone.
                std::future::pending::<()>().await;
            }
        }
    }

    fn executing(&self) -> MutexGuard<'_, BTreeSet<OperationId>> {
        self.executing
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Claims an operation for an executor; false when it has one.
    pub(crate) fn claim(&self, operation: OperationId) -> bool {
        self.executing().insert(operation)
    }

    /// Gives an operation back.
    pub(crate) fn unclaim(&self, operation: OperationId) {
        self.executing().remove(&operation);
    }

    fn restarts(&self) -> MutexGuard<'_, BTreeMap<VmId, Restarts>> {
        self.restarts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Counts an automatic restart; returns how many there were in a row.
    pub(crate) fn count_restart(&self, vm: VmId, now: Instant) -> u32 {
        let mut restarts = self.restarts();
        let entry = restarts.entry(vm).or_insert(Restarts {
            count: 0,
            latest: now,
        });
        if now.saturating_duration_since(entry.latest) > RESTARTS_FORGIVEN_AFTER {
            entry.count = 0;
        }
        *entry = Restarts {
            count: entry.count + 1,
            latest: now,
        };
        entry.count
    }

    /// When a VM may be started again by itself; `None` when at once.
    pub(crate) fn restart_due(&self, vm: VmId, now: Instant) -> Option<Instant> {
        let entry = self.restarts().get(&vm).copied()?;
        let doublings = entry.count.saturating_sub(1).min(MAX_AUTOMATIC_RESTARTS);
        let due = entry.latest + FIRST_RESTART_PAUSE * 2u32.pow(doublings);
        (due > now).then_some(due)
    }

    /// The operator has taken over: automatic restarts count afresh.
    pub(crate) fn forgive_restarts(&self, vm: VmId) {
        self.restarts().remove(&vm);
    }
}
