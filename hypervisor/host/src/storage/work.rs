//! Long work on pools: who does it, how far it has come, how it ended.
//!
//! ```text
//! begin ──▶ working ──▶ done (the record in the pool says so from then on)
//!              │ ──fails──▶ failed, remembered until it is begun anew, deleted, or the agent ends
//!              └───deleted─▶ gone; what was written is removed
//! ```

use super::error::StorageError;
use super::pool::Kind;
use godwit_wire::devices::DiskFormat;
use godwit_wire::id::PoolId;
use godwit_wire::storage::WorkState;
use godwit_wire::unit::Bytes;
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tokio::sync::{Semaphore, oneshot};
use uuid::Uuid;

/// Most pieces of work known at once, failed ones included: the oldest failures make way.
const MAX_WORK: usize = 128;
/// Most of them under way; more would only fight for the same disks.
const MAX_UNDER_WAY: usize = 4;

/// What is worked on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Key {
    pub(crate) pool: PoolId,
    pub(crate) kind: Kind,
    pub(crate) id: Uuid,
}

/// How far a piece of work has come; shared with whoever does it.
#[derive(Debug, Default)]
pub(crate) struct Progress {
    done: AtomicU64,
    total: AtomicU64,
    cancelled: AtomicBool,
}

impl Progress {
    pub(crate) fn new(total: Bytes) -> Arc<Self> {
        let progress = Self::default();
        progress.expect(total);
        Arc::new(progress)
    }

    pub(crate) fn expect(&self, total: Bytes) {
        self.total.store(total.0, Ordering::Relaxed);
    }

    /// Takes note of work done, and of nobody wanting it any more.
    pub(crate) fn advance(&self, bytes: u64) -> Result<(), StorageError> {
        self.done.fetch_add(bytes, Ordering::Relaxed);
        self.wanted()
    }

    pub(crate) fn wanted(&self) -> Result<(), StorageError> {
        if self.cancelled.load(Ordering::Acquire) {
            return Err(StorageError::Cancelled);
        }
        Ok(())
    }

    fn state(&self) -> WorkState {
        WorkState::Working {
            done_bytes: Bytes(self.done.load(Ordering::Relaxed)),
            total_bytes: Bytes(self.total.load(Ordering::Relaxed)),
        }
    }
}

/// Content that is sent to us in pieces; dropped sender: it broke off, or is complete.
pub(crate) type Upload = oneshot::Sender<tokio::sync::mpsc::Receiver<bytes::Bytes>>;

/// A piece of work as others see it.
#[derive(Debug)]
pub(crate) struct Work {
    pub(crate) format: DiskFormat,
    pub(crate) virtual_bytes: Bytes,
    progress: Arc<Progress>,
    failure: Option<String>,
    /// Grows with every piece of work, to tell the oldest.
    number: u64,
    /// Where the content of an upload goes, until it comes.
    upload: Option<Upload>,
}

impl Work {
    pub(crate) fn state(&self) -> WorkState {
        match &self.failure {
            None => self.progress.state(),
            Some(reason) => WorkState::Failed {
                reason: reason.clone(),
            },
        }
    }

    pub(crate) fn has_failed(&self) -> bool {
        self.failure.is_some()
    }
}

/// What a piece of work is to be reported as.
#[derive(Debug)]
pub(crate) struct Begin {
    pub(crate) key: Key,
    pub(crate) format: DiskFormat,
    pub(crate) virtual_bytes: Bytes,
    pub(crate) progress: Arc<Progress>,
    pub(crate) upload: Option<Upload>,
}

/// All long work of this agent.
#[derive(Debug)]
pub(crate) struct WorkTable {
    table: Mutex<Table>,
    places: Arc<Semaphore>,
}

#[derive(Debug, Default)]
struct Table {
    by_key: BTreeMap<Key, Work>,
    begun: u64,
    /// Disks that are read by work on others.
    sources: BTreeMap<Key, usize>,
}

impl WorkTable {
    pub(crate) fn new() -> Self {
        Self {
            table: Mutex::default(),
            places: Arc::new(Semaphore::new(MAX_UNDER_WAY)),
        }
    }

    /// Looks at the work on `key`, if there is any.
    pub(crate) fn look<T>(&self, key: Key, look: impl FnOnce(&Work) -> T) -> Option<T> {
        self.table().by_key.get(&key).map(look)
    }

    /// Begins work in the background; must be called inside a tokio runtime. Only its failure is kept.
    pub(crate) fn begin(
        self: &Arc<Self>,
        begin: Begin,
        work: impl FnOnce() -> Result<(), StorageError> + Send + 'static,
    ) -> Result<(), StorageError> {
        let key = begin.key;
        let number = self.enter(begin)?;
        let table = self.clone();
        let places = self.places.clone();
        tokio::spawn(async move {
            // Never closed.
            let _place = places.acquire_owned().await;
            let outcome = tokio::task::spawn_blocking(work)
                .await
                .unwrap_or_else(|error| {
                    tracing::error!(%error, "work on a pool has failed");
                    Err(StorageError::Cancelled)
                });
            table.ended(key, number, outcome);
        });
        Ok(())
    }

    fn enter(&self, begin: Begin) -> Result<u64, StorageError> {
        let mut table = self.table();
        if table
            .by_key
            .get(&begin.key)
            .is_some_and(|work| !work.has_failed())
        {
            return Err(busy(begin.key));
        }
        if table.by_key.len() >= MAX_WORK {
            let oldest = table.by_key.iter().filter(|(_, work)| work.has_failed());
            let oldest = oldest
                .min_by_key(|(_, work)| work.number)
                .map(|(key, _)| *key);
            let oldest = oldest.ok_or(StorageError::TooMuchWork(MAX_WORK))?;
            table.by_key.remove(&oldest);
        }
        table.begun += 1;
        let number = table.begun;
        let work = Work {
            format: begin.format,
            virtual_bytes: begin.virtual_bytes,
            progress: begin.progress,
            failure: None,
            number,
            upload: begin.upload,
        };
        table.by_key.insert(begin.key, work);
        Ok(number)
    }

    fn ended(&self, key: Key, number: u64, outcome: Result<(), StorageError>) {
        let mut table = self.table();
        let Some(work) = table
            .by_key
            .get_mut(&key)
            .filter(|work| work.number == number)
        else {
            return;
        };
        match outcome {
            Ok(()) => {
                table.by_key.remove(&key);
            }
            Err(error) => {
                tracing::warn!(what = key.kind.name(), id = %key.id, %error, "work on a pool failed");
                work.failure = Some(error.to_string());
                work.upload = None;
            }
        }
    }

    /// Takes the place where an upload's content goes; there is only one.
    pub(crate) fn take_upload(&self, key: Key) -> Option<Upload> {
        self.table().by_key.get_mut(&key)?.upload.take()
    }

    /// Nobody wants it any more, whether it is under way or has failed.
    pub(crate) fn cancel(&self, key: Key) {
        if let Some(work) = self.table().by_key.remove(&key) {
            work.progress.cancelled.store(true, Ordering::Release);
        }
    }

    /// Marks a disk as read by other work, for as long as the guard lives.
    pub(crate) fn read_from(self: &Arc<Self>, key: Key) -> Reading {
        *self.table().sources.entry(key).or_default() += 1;
        Reading {
            table: self.clone(),
            key,
        }
    }

    /// Refuses while other work reads it.
    pub(crate) fn not_read(&self, key: Key) -> Result<(), StorageError> {
        if self.table().sources.contains_key(&key) {
            return Err(busy(key));
        }
        Ok(())
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        // Every critical section leaves the table whole.
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// See [`WorkTable::read_from`].
#[derive(Debug)]
pub(crate) struct Reading {
    table: Arc<WorkTable>,
    key: Key,
}

impl Drop for Reading {
    fn drop(&mut self) {
        let mut table = self.table.table();
        if let Some(count) = table.sources.get_mut(&self.key) {
            *count -= 1;
            if *count == 0 {
                table.sources.remove(&self.key);
            }
        }
    }
}

fn busy(key: Key) -> StorageError {
    StorageError::Busy {
        what: key.kind.name(),
        id: key.id.to_string(),
    }
}
