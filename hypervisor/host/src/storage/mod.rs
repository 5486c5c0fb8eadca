//! Storage pools of this host: directories with images and disks (`godwit_wire::storage` has the layout).
//!
//! A thing exists when its record does. It is written beside its place, synced, linked into place, and recorded last;
//! whatever happens before that leaves nothing. Everything is safe to repeat by its id. What changes together changes
//! under the pool's lock, which other hosts that share the pool take too.
//!
//! Functions that say so block, as long as the pool's file system does: they are called off the runtime's threads.

mod copy;
mod disk;
mod error;
mod image;
mod pool;
mod qcow2;
mod report;
mod room;
mod snapshot;
mod work;

#[cfg(test)]
mod tests;

pub(crate) use error::StorageError;
pub(crate) use image::MAX_PIECES_WAITING as MAX_UPLOAD_PIECES_WAITING;
pub(crate) use pool::{Origin, PoolPlace, Room, room_at};
pub(crate) use room::{RoomStep, RoomWatch};

use godwit_wire::id::{HostId, PoolId};
use godwit_wire::storage::PoolReport;
use pool::Pool;
use std::sync::{Arc, Mutex};
use tokio::sync::Notify;
use work::WorkTable;

/// A pool that can be used now.
type OpenPool = Arc<Pool>;

/// All pools of this host, and the work on them.
#[derive(Debug)]
pub(crate) struct Storage {
    pools: Vec<Arc<Pool>>,
    work: Arc<WorkTable>,
    reports: Mutex<Vec<PoolReport>>,
    changed: Notify,
}

impl Storage {
    pub(crate) fn new(places: Vec<PoolPlace>, host: HostId) -> Arc<Self> {
        let pools = places
            .into_iter()
            .map(|place| Arc::new(Pool::new(place, host)))
            .collect();
        Arc::new(Self {
            pools,
            work: Arc::new(WorkTable::new()),
            reports: Mutex::default(),
            changed: Notify::new(),
        })
    }

    /// The pool with this id, if it can be used; the first one, should two directories claim it.
    fn pool(&self, wanted: PoolId) -> Result<OpenPool, StorageError> {
        let reports = self.reports();
        // The one that had the id before is asked first: another's file system may hang.
        let likely = |pool: &&Arc<Pool>| {
            let mut known = reports.iter().filter(|report| report.pool == wanted);
            known.any(|report| report.name == pool.name())
        };
        let order = self.pools.iter().filter(likely);
        let order = order.chain(self.pools.iter().filter(|pool| !likely(pool)));
        let mut trouble = None;
        for pool in order {
            match pool.open() {
                Ok(id) if id == wanted => return Ok(pool.clone()),
                Ok(_) => {}
                Err(error) => trouble = Some(error),
            }
        }
        // It may be the one that is in trouble; only its report can tell, from a time when it was not.
        let known = |report: &PoolReport| report.pool == wanted && report.trouble.is_some();
        match trouble {
            Some(trouble) if reports.iter().any(known) => Err(trouble),
            _ => Err(StorageError::NoSuchPool(wanted)),
        }
    }

    /// Figures of a pool are out of date.
    fn pools_changed(&self) {
        self.changed.notify_one();
    }
}
