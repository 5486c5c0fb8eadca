//! An engine that forgets everything when it is dropped: for simulations.

use super::contract::{
    Compare, Entry, Revision, Store, StoreError, Txn, TxnOutcome, Watched, Write,
};
use super::history::History;
use std::collections::BTreeMap;
use std::ops::Bound;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// See the module.
#[derive(Debug)]
pub struct MemoryStore {
    content: Mutex<Content>,
    history: History,
}

#[derive(Debug, Default)]
struct Content {
    entries: BTreeMap<String, (Vec<u8>, Revision)>,
    revision: Revision,
}

impl Default for MemoryStore {
    fn default() -> Self {
        Self {
            content: Mutex::default(),
            history: History::after(Revision(0)),
        }
    }
}

impl MemoryStore {
    /// An empty store.
    pub fn new() -> Self {
        Self::default()
    }

    fn content(&self) -> MutexGuard<'_, Content> {
        // Every change below is complete before anything can panic.
        self.content.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Content {
    fn holds(&self, compare: &Compare) -> bool {
        match compare {
            Compare::Absent { key } => !self.entries.contains_key(key),
            Compare::Unchanged { key, revision } => self
                .entries
                .get(key)
                .is_some_and(|(_, written)| written == revision),
        }
    }
}

impl Store for MemoryStore {
    fn get(&self, key: &str) -> Result<Option<Entry>, StoreError> {
        let content = self.content();
        Ok(content.entries.get(key).map(|(value, revision)| Entry {
            key: key.to_owned(),
            value: value.clone(),
            revision: *revision,
        }))
    }

    fn list(&self, prefix: &str) -> Result<(Vec<Entry>, Revision), StoreError> {
        let content = self.content();
        let from = (Bound::Included(prefix.to_owned()), Bound::Unbounded);
        let entries = content
            .entries
            .range(from)
            .take_while(|(key, _)| key.starts_with(prefix))
            .map(|(key, (value, revision))| Entry {
                key: key.clone(),
                value: value.clone(),
                revision: *revision,
            })
            .collect();
        Ok((entries, content.revision))
    }

    fn txn(&self, txn: &Txn) -> Result<TxnOutcome, StoreError> {
        txn.check()?;
        let mut content = self.content();
        if !txn.compares.iter().all(|compare| content.holds(compare)) {
            return Ok(TxnOutcome::Conflict);
        }
        if txn.writes.is_empty() {
            return Ok(TxnOutcome::Committed(content.revision));
        }
        let revision = Revision(content.revision.0 + 1);
        for write in &txn.writes {
            match write {
                Write::Put { key, value } => {
                    content
                        .entries
                        .insert(key.clone(), (value.clone(), revision));
                }
                Write::Delete { key } => {
                    content.entries.remove(key);
                }
            }
        }
        content.revision = revision;
        self.history.push(revision, &txn.writes);
        Ok(TxnOutcome::Committed(revision))
    }

    fn watch(&self, prefix: &str, after: Revision, wait: Duration) -> Result<Watched, StoreError> {
        Ok(self.history.watch(prefix, after, wait))
    }

    fn compact(&self, upto: Revision) -> Result<(), StoreError> {
        self.history.compact(upto);
        Ok(())
    }

    fn revision(&self) -> Result<Revision, StoreError> {
        Ok(self.content().revision)
    }
}
