//! A server that dies at a chosen transaction: what it had not written it never does.

use crate::store::memory::MemoryStore;
use crate::store::{Entry, Revision, Store, StoreError, Txn, TxnOutcome, Watched};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;
use tokio::sync::Notify;

/// One server process.
#[derive(Debug)]
pub(super) struct Life {
    dead: AtomicBool,
    died: Notify,
    left: AtomicU64,
    used: AtomicU64,
}

impl Life {
    pub(super) fn new(dies_after: Option<u64>) -> Arc<Self> {
        Arc::new(Self {
            dead: AtomicBool::new(false),
            died: Notify::new(),
            left: AtomicU64::new(dies_after.unwrap_or(u64::MAX)),
            used: AtomicU64::new(0),
        })
    }

    pub(super) fn end(&self) {
        self.dead.store(true, Ordering::SeqCst);
        self.died.notify_waiters();
        self.died.notify_one();
    }

    pub(super) fn is_over(&self) -> bool {
        self.dead.load(Ordering::SeqCst)
    }

    pub(super) async fn died(&self) {
        if !self.is_over() {
            self.died.notified().await;
        }
    }

    /// Lets it die after so many further transactions.
    pub(super) fn dies_after(&self, transactions: u64) {
        self.left.store(transactions, Ordering::SeqCst);
    }

    /// Transactions so far.
    pub(super) fn transactions(&self) -> u64 {
        self.used.load(Ordering::SeqCst)
    }

    fn count(&self) {
        self.used.fetch_add(1, Ordering::SeqCst);
        if self.left.fetch_sub(1, Ordering::SeqCst) <= 1 {
            self.end();
        }
    }
}

#[derive(Debug)]
pub(super) struct CrashStore {
    inner: Arc<MemoryStore>,
    life: Arc<Life>,
}

impl CrashStore {
    pub(super) fn new(inner: Arc<MemoryStore>, life: Arc<Life>) -> Self {
        Self { inner, life }
    }

    fn alive(&self) -> Result<(), StoreError> {
        match self.life.is_over() {
            true => Err(StoreError::Engine {
                action: "live",
                source: "the server is dead".into(),
            }),
            false => Ok(()),
        }
    }
}

impl Store for CrashStore {
    fn get(&self, key: &str) -> Result<Option<Entry>, StoreError> {
        self.alive()?;
        self.inner.get(key)
    }

    fn list(&self, prefix: &str) -> Result<(Vec<Entry>, Revision), StoreError> {
        self.alive()?;
        self.inner.list(prefix)
    }

    fn txn(&self, txn: &Txn) -> Result<TxnOutcome, StoreError> {
        self.alive()?;
        let outcome = self.inner.txn(txn)?;
        self.life.count();
        self.alive()?;
        Ok(outcome)
    }

    fn watch(&self, prefix: &str, after: Revision, wait: Duration) -> Result<Watched, StoreError> {
        self.inner.watch(prefix, after, wait)
    }

    fn compact(&self, upto: Revision) -> Result<(), StoreError> {
        self.inner.compact(upto)
    }

    fn revision(&self) -> Result<Revision, StoreError> {
        self.inner.revision()
    }
}
