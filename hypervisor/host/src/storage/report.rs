//! What the server is told about pools: sampled in the background, because a file system may hang and heartbeats must
//! not.

use super::Storage;
use super::error::StorageError;
use super::pool::Pool;
use godwit_wire::id::PoolId;
use godwit_wire::storage::PoolReport;
use godwit_wire::unit::Bytes;
use std::collections::BTreeSet;
use std::sync::{Arc, PoisonError};
use std::time::Duration;
use tokio_util::task::AbortOnDropHandle;
use uuid::Uuid;

/// Time between two samples; nothing announces that a file system fills.
const SAMPLE_EVERY: Duration = Duration::from_secs(5);
/// How long a pool may take to answer before its report says so.
const ANSWER_WITHIN: Duration = Duration::from_secs(5);

impl Storage {
    /// The latest samples; never blocks.
    pub(crate) fn reports(&self) -> Vec<PoolReport> {
        self.reports
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// Samples all pools once.
    pub(crate) async fn sample(self: &Arc<Self>) {
        let mut fresh: Vec<PoolReport> = Vec::new();
        let former = self.reports();
        let mut seen = BTreeSet::new();
        for pool in &self.pools {
            let former = former.iter().find(|report| report.name == pool.name());
            let silent = || {
                let trouble = format!("its file system has not answered for {ANSWER_WITHIN:?}");
                in_trouble(pool, former, trouble)
            };
            let mut report = if pool.begin_to_examine() {
                let asked = {
                    let pool = pool.clone();
                    tokio::task::spawn_blocking(move || {
                        let found = examine(&pool);
                        pool.examined();
                        found
                    })
                };
                match tokio::time::timeout(ANSWER_WITHIN, asked).await {
                    Ok(Ok(Ok(report))) => report,
                    Ok(Ok(Err(error))) => in_trouble(pool, former, error.to_string()),
                    Ok(Err(error)) => in_trouble(pool, former, error.to_string()),
                    Err(_) => silent(),
                }
            } else {
                silent()
            };
            if !seen.insert(report.pool) && report.trouble.is_none() {
                report.trouble = Some("another --storage of this host is the same pool".to_owned());
            }
            log_change(former, &report);
            fresh.push(report);
        }
        *self.reports.lock().unwrap_or_else(PoisonError::into_inner) = fresh;
    }

    /// Keeps sampling until the handle is dropped.
    pub(crate) fn keep_sampling(self: &Arc<Self>) -> AbortOnDropHandle<()> {
        let storage = self.clone();
        AbortOnDropHandle::new(tokio::spawn(async move {
            loop {
                storage.sample().await;
                tokio::select! {
                    () = tokio::time::sleep(SAMPLE_EVERY) => {}
                    () = storage.changed.notified() => {}
                }
            }
        }))
    }
}

fn examine(pool: &Pool) -> Result<PoolReport, StorageError> {
    let id = pool.open()?;
    let room = pool.room()?;
    Ok(PoolReport {
        pool: id,
        name: pool.name().to_owned(),
        total_bytes: room.total,
        free_bytes: room.free,
        trouble: None,
    })
}

/// The id it had; a pool that never answered has none that means anything.
fn in_trouble(pool: &Pool, former: Option<&PoolReport>, trouble: String) -> PoolReport {
    PoolReport {
        pool: former.map_or(PoolId(Uuid::nil()), |report| report.pool),
        name: pool.name().to_owned(),
        total_bytes: Bytes(0),
        free_bytes: Bytes(0),
        trouble: Some(trouble),
    }
}

fn log_change(former: Option<&PoolReport>, now: &PoolReport) {
    let before = former.map(|report| &report.trouble);
    match &now.trouble {
        Some(trouble) if before != Some(&now.trouble) => {
            tracing::warn!(pool = now.name, trouble, "a storage pool cannot be used");
        }
        None if before.is_none_or(Option::is_some) => {
            tracing::info!(pool = now.name, id = %now.pool, free = %now.free_bytes, "a storage pool can be used");
        }
        _ => {}
    }
}
