//! The one way to change records: a transaction against the store, then the new view.
//!
//! Deciders read the latest view and collect writes in a [`Draft`]; each record they write is compared with the
//! revision it was read at, so a decision never rests on something that has changed meanwhile. Changes take
//! turns, which keeps views and events in the order of the store.

mod draft;

mod load;

pub(crate) use draft::Draft;

use crate::model::limits::MAX_EVENTS;
use crate::model::{DeletedVm, Event, Host, JoinToken, Severity};
use crate::store::{Revision, Store, StoreError, Txn, TxnOutcome};
use crate::view::{Index, Observed, Records, View};
use godwit_wire::id::{Epoch, HostId, VmId};
use godwit_wire::problem::Problem;
use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard};
use tokio::sync::{broadcast, watch};

/// Times a change is decided anew because another server was faster.
const MAX_CONFLICTS: usize = 5;
/// Events a subscriber may lag behind.
const EVENT_BUFFER: usize = 1_024;

/// How blocking store calls are made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Blocking {
    /// On a thread that may block.
    Elsewhere,
    /// Right here: for a store that does not block, under simulated time.
    #[cfg(test)]
    Here,
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Ledger {
    store: Arc<dyn Store>,
    blocking: Blocking,
    /// Held from decision to publication.
    turn: tokio::sync::Mutex<Books>,
    view: RwLock<Arc<View>>,
    version: watch::Sender<u64>,
    events: broadcast::Sender<Arc<Event>>,
    /// Latest events; read by those who missed some.
    recent: Mutex<VecDeque<Arc<Event>>>,
    /// Deleted VMs; read with every heartbeat.
    deleted: RwLock<BTreeMap<VmId, DeletedVm>>,
}

/// What only those who change records need to know.
#[derive(Debug, Default)]
pub(crate) struct Books {
    /// Revision of every key.
    revisions: BTreeMap<String, Revision>,
    tokens: BTreeMap<String, JoinToken>,
    /// Set when it is not known whether a transaction was written.
    stale: bool,
}

fn unavailable(error: &StoreError) -> Problem {
    let mut detail = error.to_string();
    let mut source = std::error::Error::source(error);
    while let Some(error) = source {
        detail = format!("{detail}: {error}");
        source = error.source();
    }
    tracing::error!(%detail, "the store failed");
    Problem::new(503, "store-unavailable", "The store does not work", detail)
        .with_remedy("look at the server's disk: space, permissions, health")
}

/// A turn to change records; nothing changes meanwhile.
#[derive(Debug)]
pub(crate) struct Turn<'a> {
    ledger: &'a Ledger,
    books: tokio::sync::MutexGuard<'a, Books>,
}

impl Ledger {
    /// Reads everything.
    pub(crate) fn open(store: Arc<dyn Store>, blocking: Blocking) -> Result<Self, StoreError> {
        let loaded = load::everything(store.as_ref())?;
        let ledger = Self {
            store,
            blocking,
            turn: tokio::sync::Mutex::new(loaded.books),
            version: watch::Sender::new(loaded.view.version),
            view: RwLock::new(Arc::new(loaded.view)),
            events: broadcast::Sender::new(EVENT_BUFFER),
            recent: Mutex::new(loaded.events),
            deleted: RwLock::new(loaded.deleted),
        };
        Ok(ledger)
    }

    /// The latest view.
    pub(crate) fn view(&self) -> Arc<View> {
        self.view
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// Wakes with every new view.
    pub(crate) fn changed(&self) -> watch::Receiver<u64> {
        self.version.subscribe()
    }

    /// Events from now on.
    pub(crate) fn subscribe_events(&self) -> broadcast::Receiver<Arc<Event>> {
        self.events.subscribe()
    }

    /// Events after `after`, oldest first, at most `limit`.
    pub(crate) fn events_after(
        &self,
        after: u64,
        limit: usize,
    ) -> Result<Vec<Arc<Event>>, Problem> {
        let recent = self.recent();
        let oldest = recent.front().map_or(1, |event| event.revision);
        if after + 1 < oldest {
            let detail = format!("event {} is gone, the oldest kept is {oldest}", after + 1);
            return Err(
                Problem::new(410, "compacted", "Those events are gone", detail).with_remedy(
                    format!("read everything anew, then events after {}", oldest - 1),
                ),
            );
        }
        let begin = recent.partition_point(|event| event.revision <= after);
        Ok(recent.iter().skip(begin).take(limit).cloned().collect())
    }

    fn deleted_records(&self) -> RwLockReadGuard<'_, BTreeMap<VmId, DeletedVm>> {
        self.deleted.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// What is remembered of a VM that was deleted.
    pub(crate) fn deleted(&self, vm: VmId) -> Option<DeletedVm> {
        self.deleted_records().get(&vm).cloned()
    }

    /// Ids of VMs that were deleted, oldest first; those that may have left something behind at one of `hosts`
    /// must not be forgotten and are not among them.
    pub(crate) fn forgettable_vms(&self, hosts: &Records<HostId, Host>) -> Vec<VmId> {
        let owed = |record: &DeletedVm| record.left_behind.keys().any(|id| hosts.contains_key(id));
        let deleted = self.deleted_records();
        let forgettable = deleted.values().filter(|record| !owed(record));
        forgettable.map(|record| record.vm).collect()
    }

    /// What VMs, living and deleted, may have left behind at a host.
    pub(crate) fn left_behind(&self, host: HostId) -> BTreeMap<VmId, Epoch> {
        let deleted = self.deleted_records();
        let dead = deleted
            .values()
            .filter_map(|record| Some((record.vm, *record.left_behind.get(&host)?)));
        // Read after the lock on the deleted is held: a VM that is deleted meanwhile is in one of the two.
        dead.chain(self.view().left_behind(host)).collect()
    }

    fn recent(&self) -> MutexGuard<'_, VecDeque<Arc<Event>>> {
        self.recent.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for a turn.
    pub(crate) async fn turn(&self) -> Turn<'_> {
        Turn {
            ledger: self,
            books: self.turn.lock().await,
        }
    }

    /// Waits for a turn, decides and commits. `decide` may be asked again when another server was faster.
    pub(crate) async fn change<T>(
        &self,
        decide: impl FnMut(&View, &mut Draft<'_>) -> Result<T, Problem>,
    ) -> Result<T, Problem> {
        self.turn().await.change(decide).await
    }

    /// Decides without committing: what a change would do.
    pub(crate) fn rehearse<T>(
        &self,
        decide: impl FnOnce(&View, &mut Draft<'_>) -> Result<T, Problem>,
    ) -> Result<T, Problem> {
        let (view, books) = (self.view(), Books::default());
        decide(&view, &mut Draft::on(&view, &books))
    }

    /// Publishes a change of what is observed; `update` tells whether anything did change.
    pub(crate) fn observe(&self, host: HostId, update: impl FnOnce(&mut Observed) -> bool) {
        let mut current = self.view.write().unwrap_or_else(PoisonError::into_inner);
        let mut observed = current
            .observed
            .get(&host)
            .map_or_else(Observed::nothing_yet, |observed| observed.as_ref().clone());
        if !update(&mut observed) {
            return;
        }
        let mut view = current.as_ref().clone();
        Arc::make_mut(&mut view.observed).insert(host, Arc::new(observed));
        self.publish(&mut current, view);
    }

    /// Forgets what was observed of a host.
    pub(crate) fn forget_observed(&self, host: HostId) {
        let mut current = self.view.write().unwrap_or_else(PoisonError::into_inner);
        let mut view = current.as_ref().clone();
        Arc::make_mut(&mut view.observed).remove(&host);
        self.publish(&mut current, view);
    }

    fn publish(&self, current: &mut Arc<View>, mut view: View) {
        view.version = current.version + 1;
        let version = view.version;
        *current = Arc::new(view);
        self.version.send_replace(version);
    }

    async fn blocking<T: Send + 'static>(
        &self,
        call: impl FnOnce(&dyn Store) -> Result<T, StoreError> + Send + 'static,
    ) -> Result<T, StoreError> {
        match self.blocking {
            #[cfg(test)]
            Blocking::Here => call(self.store.as_ref()),
            Blocking::Elsewhere => {
                let store = self.store.clone();
                let done = tokio::task::spawn_blocking(move || call(store.as_ref())).await;
                done.unwrap_or_else(|error| {
                    Err(StoreError::Engine {
                        action: "finish a call",
                        source: Box::new(error),
                    })
                })
            }
        }
    }
}

impl Turn<'_> {
    /// See [`Ledger::change`].
    pub(crate) async fn change<T>(
        &mut self,
        mut decide: impl FnMut(&View, &mut Draft<'_>) -> Result<T, Problem>,
    ) -> Result<T, Problem> {
        for _ in 0..MAX_CONFLICTS {
            if self.books.stale {
                self.reload().await.map_err(|error| unavailable(&error))?;
            }
            let view = self.ledger.view();
            let mut draft = Draft::on(&view, &self.books);
            let decision = decide(&view, &mut draft)?;
            if draft.is_empty() {
                return Ok(decision);
            }
            let written = draft
                .finish()
                .map_err(|error| Problem::internal(error.to_string()))?;
            if self.commit(written).await? {
                return Ok(decision);
            }
            tracing::warn!("another server changed the same records; deciding again");
            self.books.stale = true;
        }
        Err(
            Problem::conflict("contended", "other servers keep changing the same records")
                .with_remedy("try again"),
        )
    }

    async fn commit(&mut self, written: draft::Written) -> Result<bool, Problem> {
        let txn: Txn = written.txn.clone();
        // Until the outcome is known it is unknown: a caller that is dropped meanwhile leaves the books stale.
        self.books.stale = true;
        let outcome = self.ledger.blocking(move |store| store.txn(&txn)).await;
        let revision = match outcome {
            Ok(TxnOutcome::Committed(revision)) => revision,
            Ok(TxnOutcome::Conflict) => return Ok(false),
            Err(error) => return Err(unavailable(&error)),
        };
        self.books.stale = false;
        self.ledger.apply(&mut self.books, written, revision);
        Ok(true)
    }

    async fn reload(&mut self) -> Result<(), StoreError> {
        let store = self.ledger.store.clone();
        let loaded = self
            .ledger
            .blocking(move |_| load::everything(store.as_ref()))
            .await?;
        *self.books = loaded.books;
        *self
            .ledger
            .deleted
            .write()
            .unwrap_or_else(PoisonError::into_inner) = loaded.deleted;
        let mut recent = self.ledger.recent();
        let last = recent.back().map_or(0, |event| event.revision);
        let missed: Vec<_> = loaded
            .events
            .iter()
            .filter(|event| event.revision > last)
            .cloned()
            .collect();
        *recent = loaded.events;
        drop(recent);
        let mut current = self
            .ledger
            .view
            .write()
            .unwrap_or_else(PoisonError::into_inner);
        let view = View {
            observed: current.observed.clone(),
            ..loaded.view
        };
        self.ledger.publish(&mut current, view);
        drop(current);
        for event in missed {
            let _ = self.ledger.events.send(event);
        }
        Ok(())
    }
}

impl Ledger {
    fn apply(&self, books: &mut Books, written: draft::Written, revision: Revision) {
        written.note_revisions(&mut books.revisions, revision);
        for (digest, token) in written.tokens {
            match token {
                Some(token) => drop(books.tokens.insert(digest, token)),
                None => drop(books.tokens.remove(&digest)),
            }
        }
        if !written.deleted.is_empty() || !written.forgotten.is_empty() {
            let mut deleted = self.deleted.write().unwrap_or_else(PoisonError::into_inner);
            deleted.extend(
                written
                    .deleted
                    .iter()
                    .map(|record| (record.vm, record.clone())),
            );
            deleted.retain(|vm, _| !written.forgotten.contains(vm));
        }
        {
            let mut recent = self.recent();
            recent.extend(written.events.iter().cloned());
            while recent.len() > MAX_EVENTS {
                recent.pop_front();
            }
        }
        {
            let mut current = self.view.write().unwrap_or_else(PoisonError::into_inner);
            let mut view = current.as_ref().clone();
            let names = written.records.names(&view);
            written.records.apply(&mut view);
            view.revision = revision;
            view.event_revision = written
                .events
                .last()
                .map_or(view.event_revision, |event| event.revision);
            view.index = Arc::new(Index::of(&view, names));
            self.publish(&mut current, view);
        }
        for event in written.events {
            log(&event);
            // Nobody listening is fine.
            let _ = self.events.send(event);
        }
    }
}

fn log(event: &Event) {
    let (kind, subject, id, actor) = (
        &event.kind,
        &event.subject.name,
        event.subject.id,
        &event.actor,
    );
    match event.severity {
        Severity::Info => tracing::info!(kind, subject, %id, %actor, "{}", event.message),
        Severity::Warning => tracing::warn!(kind, subject, %id, %actor, "{}", event.message),
        Severity::Error => tracing::error!(kind, subject, %id, %actor, "{}", event.message),
    }
}
