//! Saving a machine to a pool, and going on from one that was saved.
//!
//! A snapshot has memory, vCPUs and devices, and no disks. A guest that goes on from it must find its disks as they
//! were, or it writes what it remembers over what is there. So before a machine with writable disks goes on, the lock
//! beside each disk must still name this VM and the epoch under which the snapshot was taken: whoever else claims a
//! disk, or the same VM when it is started again, leaves another record there.

use super::driver::Driver;
use super::handover::not_running;
use crate::storage::StorageError;
use godwit_channel::uds::UdsClient;
use godwit_wire::devices::{Attachments, DiskAccess, DiskSource};
use godwit_wire::id::{Epoch, SnapshotId, VmId};
use godwit_wire::machine::MachineSpec;
use godwit_wire::problem::Problem;
use godwit_wire::storage::{DISKS_MOVED_ON, RestoreFrom, SnapshotReport, TakeSnapshot};
use godwit_wire::vmm_api::{SnapshotInfo, SnapshotRequest};
use http::Method;
use serde::Deserialize;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// How long a VMM may take to save a machine: as long as its memory takes to be written.
const SAVE_TIMEOUT: Duration = Duration::from_secs(3600);
/// Longest lock record read.
const MAX_LOCK_BYTES: u64 = 4096;

/// What a disk's lock says about who claimed it last.
#[derive(Debug, PartialEq, Eq, Deserialize)]
struct LastWriter {
    vm: VmId,
    epoch: Epoch,
}

impl Driver {
    /// `POST /v1/vms/{vm}/snapshots/{snapshot}`.
    pub(super) async fn save(
        &mut self,
        (snapshot, ask): (SnapshotId, TakeSnapshot),
    ) -> Result<SnapshotReport, Problem> {
        self.not_doomed(ask.epoch)?;
        self.nothing_moves()?;
        let holding = self.holding.as_ref().ok_or_else(|| not_running(self.vm))?;
        if holding.record.epoch != ask.epoch {
            return Err(Problem::conflict(
                "stale-epoch",
                format!(
                    "VM {} has epoch {} here, not {}",
                    self.vm, holding.record.epoch, ask.epoch
                ),
            ));
        }
        let live = holding.live.as_ref().ok_or_else(|| not_running(self.vm))?;
        let (vmm, epoch) = (live.vmm.clone(), ask.epoch);
        let memory = holding.record.spec.memory_mib.bytes();
        let storage = self.context.storage.clone();
        let runtime = self.context.runtime.clone();
        let spec = holding.record.spec.clone();
        let begun = tokio::task::spawn_blocking(move || {
            without_devices(&spec)?;
            storage
                .take_snapshot(ask.pool, snapshot, memory, move |directory| {
                    runtime.block_on(write(vmm, epoch, directory.to_owned()))
                })
                .map_err(|error| error.problem())
        });
        self.unless_doomed(async move {
            begun
                .await
                .map_err(|error| Problem::internal(error.to_string()))?
        })
        .await
    }

    /// Where the saved machine is, once it is sure that its disks are as they were.
    pub(super) async fn saved_machine(
        &mut self,
        from: RestoreFrom,
        spec: &MachineSpec,
        attachments: &Attachments,
    ) -> Result<PathBuf, Problem> {
        let storage = self.context.storage.clone();
        let vm = self.vm;
        let locks: Vec<PathBuf> = attachments
            .disks
            .iter()
            .filter_map(|disk| disk.lock.clone())
            .collect();
        let spec = spec.clone();
        let look = tokio::task::spawn_blocking(move || {
            without_devices(&spec)?;
            for lock in &locks {
                unclaimed_since(lock, vm, from.epoch)?;
            }
            storage
                .locate_snapshot(from.pool, from.snapshot)
                .map_err(|error: StorageError| error.problem())
        });
        self.unless_doomed(async move {
            look.await
                .map_err(|error| Problem::internal(error.to_string()))?
        })
        .await
    }
}

async fn write(vmm: UdsClient, epoch: Epoch, directory: PathBuf) -> Result<SnapshotInfo, String> {
    let request = SnapshotRequest { epoch, directory };
    vmm.request_within(SAVE_TIMEOUT, Method::POST, "/v1/snapshot", Some(&request))
        .await
        .map_err(|error| error.into_problem().detail)
}

/// Refuses a machine that writes to a device: it has no lock beside it, so nothing tells who wrote it last. May block.
fn without_devices(spec: &MachineSpec) -> Result<(), Problem> {
    let device = spec.devices.disks.iter().find(|disk| {
        disk.access == DiskAccess::ReadWrite
            && matches!(&disk.source, DiskSource::File { path, .. }
                if std::fs::metadata(path).is_ok_and(|found| !found.is_file()))
    });
    match device {
        None => Ok(()),
        Some(disk) => Err(Problem::conflict(
            DISKS_MOVED_ON,
            format!(
                "disk {} is a device: nothing tells whether it is written after the snapshot is taken",
                disk.name
            ),
        )
        .with_remedy("start the VM instead, or put the disk into a storage pool")),
    }
}

/// Whether nobody has claimed the disk since `vm` had it under `epoch`.
fn unclaimed_since(lock: &Path, vm: VmId, epoch: Epoch) -> Result<(), Problem> {
    let mut text = String::new();
    let read =
        File::open(lock).and_then(|file| file.take(MAX_LOCK_BYTES).read_to_string(&mut text));
    let moved_on = |detail: String| {
        Problem::conflict(DISKS_MOVED_ON, detail)
            .with_remedy("start the VM instead: it boots from its disks as they are now")
    };
    let unknown = |why: String| {
        moved_on(format!(
            "{} does not tell who wrote the disk last: {why}",
            lock.display()
        ))
    };
    read.map_err(|error| unknown(error.to_string()))?;
    let last: LastWriter =
        serde_json::from_str(text.trim_end()).map_err(|error| unknown(error.to_string()))?;
    if last == (LastWriter { vm, epoch }) {
        return Ok(());
    }
    let whose = if last.vm == vm {
        "the VM".into()
    } else {
        format!("VM {}", last.vm)
    };
    Err(moved_on(format!(
        "a disk was written after the snapshot was taken: {whose} had it under epoch {}, and the snapshot is of epoch {epoch}",
        last.epoch
    )))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_is_as_it_was_only_if_nobody_claimed_it_since() {
        let dir = tempfile::tempdir().unwrap();
        let lock = dir.path().join("disk.lock");
        let (vm, other) = (VmId::fresh(), VmId::fresh());
        let judge = || unclaimed_since(&lock, vm, Epoch(4)).map_err(|problem| problem.kind);
        let moved_on = || Err(DISKS_MOVED_ON.to_owned());
        assert_eq!(judge(), moved_on(), "nobody knows");
        let claimed_by = |vm: VmId, epoch: u64| {
            let record = serde_json::json!({ "vm": vm, "epoch": epoch, "host": "h" });
            std::fs::write(&lock, format!("{:<512}", record.to_string())).unwrap();
        };
        claimed_by(vm, 4);
        assert_eq!(judge(), Ok(()));
        claimed_by(vm, 5);
        assert_eq!(judge(), moved_on());
        claimed_by(other, 4);
        assert_eq!(judge(), moved_on());
        std::fs::write(&lock, "{").unwrap();
        assert_eq!(judge(), moved_on());
    }
}
