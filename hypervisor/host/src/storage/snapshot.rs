//! Saved machines. A VMM writes the directory and gives it its name when it is complete; the record comes last.

use super::Storage;
use super::error::StorageError;
use super::pool::Kind;
use super::work::{Begin, Key, Progress};
use godwit_wire::devices::DiskFormat;
use godwit_wire::id::{PoolId, SnapshotId};
use godwit_wire::storage::{SnapshotReport, WorkState};
use godwit_wire::unit::Bytes;
use godwit_wire::vmm_api::SnapshotInfo;
use std::path::{Path, PathBuf};
use std::sync::Arc;

const fn key(pool: PoolId, snapshot: SnapshotId) -> Key {
    Key {
        pool,
        kind: Kind::Snapshot,
        id: snapshot.0,
    }
}

impl Storage {
    /// Begins to save a machine of at most `memory`: `save` writes it to the directory it is given, and blocks for as
    /// long as that takes. Must be called inside a tokio runtime, may block.
    pub(crate) fn take_snapshot(
        self: &Arc<Self>,
        pool: PoolId,
        snapshot: SnapshotId,
        memory: Bytes,
        save: impl FnOnce(&Path) -> Result<SnapshotInfo, String> + Send + 'static,
    ) -> Result<SnapshotReport, StorageError> {
        let open = self.pool(pool)?;
        match self.snapshot(pool, snapshot) {
            Ok(report) if !matches!(report.state, WorkState::Failed { .. }) => return Ok(report),
            Ok(_) | Err(StorageError::NoSuchSnapshot(_)) => {}
            Err(error) => return Err(error),
        }
        let progress = Progress::new(memory);
        let begin = Begin {
            key: key(pool, snapshot),
            format: DiskFormat::Raw,
            virtual_bytes: memory,
            progress: progress.clone(),
            upload: None,
        };
        let storage = self.clone();
        let work = move || {
            // Complete and yet without a record: what a former agent had asked for.
            open.remove_snapshot(snapshot.0)?;
            let [directory, _] = open.snapshot(snapshot.0);
            let saved = save(&directory).map_err(StorageError::NotSaved);
            let done = saved.and_then(|info| {
                let guard = open.lock()?;
                progress.wanted()?;
                let report = SnapshotReport {
                    snapshot,
                    state: WorkState::Ready,
                    bytes: info.bytes,
                    pause_us: info.pause_us,
                };
                open.write_record(Kind::Snapshot, snapshot.0, &report)?;
                drop(guard);
                Ok(())
            });
            if done.is_err() {
                open.remove_snapshot(snapshot.0)?;
            }
            storage.pools_changed();
            done
        };
        match self.work.begin(begin, work) {
            // Somebody was faster.
            Ok(()) | Err(StorageError::Busy { .. }) => self.snapshot(pool, snapshot),
            Err(error) => Err(error),
        }
    }

    /// How a snapshot is; may block.
    pub(crate) fn snapshot(
        &self,
        pool: PoolId,
        snapshot: SnapshotId,
    ) -> Result<SnapshotReport, StorageError> {
        let open = self.pool(pool)?;
        let under_way = self.work.look(key(pool, snapshot), |work| SnapshotReport {
            snapshot,
            state: work.state(),
            bytes: Bytes(0),
            pause_us: 0,
        });
        if let Some(report) = &under_way
            && matches!(report.state, WorkState::Working { .. })
        {
            return Ok(report.clone());
        }
        open.read_record(Kind::Snapshot, snapshot.0)?
            .or(under_way)
            .ok_or(StorageError::NoSuchSnapshot(snapshot))
    }

    /// Where a snapshot is that can be used; may block.
    pub(crate) fn locate_snapshot(
        &self,
        pool: PoolId,
        snapshot: SnapshotId,
    ) -> Result<PathBuf, StorageError> {
        match self.snapshot(pool, snapshot)?.state {
            WorkState::Ready => {
                let [directory, _] = self.pool(pool)?.snapshot(snapshot.0);
                Ok(directory)
            }
            WorkState::Working { .. } => Err(StorageError::Busy {
                what: Kind::Snapshot.name(),
                id: snapshot.to_string(),
            }),
            WorkState::Failed { .. } => Err(StorageError::NoSuchSnapshot(snapshot)),
        }
    }

    /// Deletes a snapshot, or what there is of it; may block. A machine that goes on from it has its files open.
    pub(crate) fn delete_snapshot(
        &self,
        pool: PoolId,
        snapshot: SnapshotId,
    ) -> Result<(), StorageError> {
        let open = self.pool(pool)?;
        let guard = open.lock()?;
        self.work.cancel(key(pool, snapshot));
        open.remove(&guard, Kind::Snapshot, snapshot.0)?;
        self.pools_changed();
        Ok(())
    }
}
