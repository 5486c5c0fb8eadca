//! Where this host has what a machine's spec names: disks, the seed, taps.

use super::driver::Driver;
use super::ledger::unwritable;
use crate::record::{VmDirectory, VmRecord};
use crate::seed::seed;
use crate::storage::{Storage, StorageError};
use godwit_channel::file::{self, Access};
use godwit_wire::devices::{
    Attachments, Devices, Disk, DiskAccess, DiskAttachment, DiskFormat, DiskSource,
};
use godwit_wire::id::VmId;
use godwit_wire::problem::{FieldProblem, Problem};
use std::fs;
use std::path::{Path, PathBuf};

impl Driver {
    /// Gets ready what the machine needs of this host. What it makes goes with the VM.
    pub(super) async fn attach(&mut self, record: &VmRecord) -> Result<Attachments, Problem> {
        let context = self.context.clone();
        let (vm, directory) = (self.vm, self.directory.clone());
        let devices = record.spec.devices.clone();
        let networks = record.networks.clone();
        self.unless_doomed(async move {
            let vsock = devices.vsock.map(|_| directory.path().to_owned());
            let nics = devices.nics.clone();
            let storage = context.storage.clone();
            // A pool may be slow.
            let found =
                tokio::task::spawn_blocking(move || disks(&storage, vm, &directory, &devices));
            let disks = found
                .await
                .map_err(|error| Problem::internal(error.to_string()))??;
            Ok(Attachments {
                disks,
                nics: context.networks.attach(vm, &nics, &networks).await?,
                vsock,
            })
        })
        .await
    }
}

fn disks(
    storage: &Storage,
    vm: VmId,
    directory: &VmDirectory,
    devices: &Devices,
) -> Result<Vec<DiskAttachment>, Problem> {
    let mut found = Vec::with_capacity(devices.disk_count());
    for (index, disk) in devices.disks.iter().enumerate() {
        found.push(attachment(
            storage,
            disk,
            &format!("spec.disks[{index}].source"),
        )?);
    }
    if let Some(spec) = &devices.cloud_init {
        let content = seed(vm, spec).map_err(|error| {
            Problem::invalid(vec![FieldProblem::new(
                "spec.cloud_init",
                format!("no seed disk can be made of it: {error}"),
                "make the documents shorter",
            )])
        })?;
        let path = directory.seed();
        file::write_atomically(&path, &content, Access::Private)
            .map_err(|error| unwritable(&error))?;
        found.push(DiskAttachment {
            path,
            format: DiskFormat::Raw,
            lock: None,
        });
    }
    Ok(found)
}

fn attachment(storage: &Storage, disk: &Disk, field: &str) -> Result<DiskAttachment, Problem> {
    let (path, format, lock) = match &disk.source {
        DiskSource::Volume { pool, disk } => {
            let located = storage
                .locate(*pool, *disk)
                .map_err(|error| not_there(field, &error))?;
            (located.path, located.format, Some(located.lock))
        }
        DiskSource::File { path, format } => {
            let found = fs::metadata(path).map_err(|error| {
                Problem::invalid(vec![FieldProblem::new(
                    format!("{field}.path"),
                    format!("{}: {error}", path.display()),
                    "give a file that this host has, or make a disk in a storage pool",
                )])
            })?;
            (
                path.clone(),
                *format,
                found.is_file().then(|| lock_of(path)),
            )
        }
    };
    Ok(DiskAttachment {
        path,
        format,
        lock: lock.filter(|_| disk.access == DiskAccess::ReadWrite),
    })
}

/// The lock beside a file that is in no pool. A device has none: who may write it is for its own array to say.
fn lock_of(path: &Path) -> PathBuf {
    let mut lock = path.as_os_str().to_owned();
    lock.push(".lock");
    lock.into()
}

fn not_there(field: &str, error: &StorageError) -> Problem {
    let problem = error.problem();
    let remedy = problem.remedy.clone();
    Problem {
        fields: vec![FieldProblem::new(
            field,
            problem.detail.clone(),
            remedy.unwrap_or_else(|| "choose a disk that this host has".to_owned()),
        )],
        ..problem
    }
}
