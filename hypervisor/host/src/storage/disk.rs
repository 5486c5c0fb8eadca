//! Disks: what machines write to.

use super::copy::{Part, copy};
use super::error::{StorageError, check_size};
use super::image::{allocated_at, from_disk};
use super::pool::{Kind, PoolGuard, extension};
use super::qcow2::{self, Backing};
use super::work::{Begin, Key, Progress};
use super::{OpenPool, Storage};
use godwit_wire::devices::DiskFormat;
use godwit_wire::id::{DiskId, ImageId, MigrationId, PoolId};
use godwit_wire::storage::{CreateDisk, DiskOrigin, DiskReport, GrowDisk, ImageReport, WorkState};
use godwit_wire::unit::Bytes;
use rustix::fs::FlockOperation;
use std::fs::File;
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::sync::Arc;

/// Where a disk's bytes are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Located {
    pub(crate) path: PathBuf,
    pub(crate) format: DiskFormat,
    pub(crate) lock: PathBuf,
}

impl Storage {
    /// Creates a disk; a full copy only begins. Must be called inside a tokio runtime, may block.
    pub(crate) fn create_disk(
        self: &Arc<Self>,
        pool: PoolId,
        disk: DiskId,
        ask: &CreateDisk,
    ) -> Result<DiskReport, StorageError> {
        let open = self.pool(pool)?;
        match self.disk(pool, disk) {
            Ok(report) if !matches!(report.state, WorkState::Failed { .. }) => return Ok(report),
            Ok(_) | Err(StorageError::NoSuchDisk(_)) => {}
            Err(error) => return Err(error),
        }
        if let Some(bytes) = ask.bytes {
            check_size(bytes)?;
        }
        match ask.from {
            DiskOrigin::Blank => {
                let bytes = ask.bytes.ok_or(StorageError::Invalid {
                    field: "bytes",
                    problem: "a blank disk needs a size".to_owned(),
                    remedy: "give one",
                })?;
                let guard = open.lock()?;
                let part = Part::create(&open, open.part(Kind::Disk, disk.0))?;
                fill_blank(&part, ask.format, bytes, None)?;
                let new = DiskReport {
                    made_for: ask.made_for,
                    ..report(disk, ask.format, bytes, None)
                };
                publish(&open, &guard, &part, new)?;
            }
            DiskOrigin::Image { image } => {
                self.create_from_image(&open, pool, disk, image, ask)?;
            }
            DiskOrigin::Disk { disk: source } => {
                self.copy_disk(&open, pool, disk, source, ask)?;
            }
        }
        self.pools_changed();
        self.disk(pool, disk)
    }

    fn create_from_image(
        self: &Arc<Self>,
        open: &OpenPool,
        pool: PoolId,
        disk: DiskId,
        image: ImageId,
        ask: &CreateDisk,
    ) -> Result<(), StorageError> {
        // Under the lock the image cannot be deleted before its new child is on record.
        let guard = open.lock()?;
        let base = open
            .read_record::<ImageReport>(Kind::Image, image.0)?
            .ok_or(StorageError::NoSuchImage(image))?;
        let bytes = larger(ask.bytes, base.virtual_bytes)?;
        match (ask.format, base.format) {
            (DiskFormat::Qcow2, format) => {
                let backing = Backing {
                    file: from_disk(open, image, format),
                    format: extension(format),
                };
                let part = Part::create(open, open.part(Kind::Disk, disk.0))?;
                fill_blank(&part, DiskFormat::Qcow2, bytes, Some(backing))?;
                let new = DiskReport {
                    made_for: ask.made_for,
                    ..report(disk, DiskFormat::Qcow2, bytes, Some(image))
                };
                publish(open, &guard, &part, new)
            }
            (DiskFormat::Raw, DiskFormat::Raw) => {
                let from = open.data(Kind::Image, image.0, DiskFormat::Raw);
                let copying = FullCopy {
                    key: disk_key(pool, disk),
                    source: open.open_file(&from, File::options().read(true))?,
                    from,
                    new: DiskReport {
                        made_for: ask.made_for,
                        ..report(disk, DiskFormat::Raw, bytes, None)
                    },
                    held: Vec::new(),
                };
                drop(guard);
                self.begin_copy(open, copying)
            }
            (DiskFormat::Raw, DiskFormat::Qcow2) => Err(StorageError::Invalid {
                field: "format",
                problem: "a raw disk cannot be made from a qcow2 image".to_owned(),
                remedy: "make a qcow2 disk, or import the image as raw",
            }),
        }
    }

    fn copy_disk(
        self: &Arc<Self>,
        open: &OpenPool,
        pool: PoolId,
        disk: DiskId,
        source: DiskId,
        ask: &CreateDisk,
    ) -> Result<(), StorageError> {
        let key = disk_key(pool, source);
        let guard = open.lock()?;
        let old = self.recorded(open, source)?;
        if old.format != ask.format {
            return Err(StorageError::Invalid {
                field: "format",
                problem: format!("disk {source} is {}", extension(old.format)),
                remedy: "a full copy keeps the format",
            });
        }
        let bytes = larger(ask.bytes, old.virtual_bytes)?;
        // Others of this process first: two handles of one process do not lock each other out.
        self.work.not_read(key)?;
        let lock = self.claim(open, source)?;
        let reading = self.work.read_from(key);
        let from = open.data(Kind::Disk, source.0, old.format);
        let copying = FullCopy {
            key: disk_key(pool, disk),
            source: open.open_file(&from, File::options().read(true))?,
            from,
            new: DiskReport {
                made_for: ask.made_for,
                ..report(disk, old.format, bytes, old.base)
            },
            held: vec![Held::Lock(lock), Held::Reading(reading)],
        };
        drop(guard);
        self.begin_copy(open, copying)
    }

    fn begin_copy(
        self: &Arc<Self>,
        open: &OpenPool,
        copying: FullCopy,
    ) -> Result<(), StorageError> {
        let progress = Progress::new(copying.new.virtual_bytes);
        let begin = Begin {
            key: copying.key,
            format: copying.new.format,
            virtual_bytes: copying.new.virtual_bytes,
            progress: progress.clone(),
            upload: None,
        };
        let (storage, open) = (self.clone(), open.clone());
        match self
            .work
            .begin(begin, move || copying.carry_out(&storage, &open, &progress))
        {
            // Somebody was faster.
            Err(StorageError::Busy { .. }) => Ok(()),
            other => other,
        }
    }

    /// How a disk is; may block.
    pub(crate) fn disk(&self, pool: PoolId, disk: DiskId) -> Result<DiskReport, StorageError> {
        let open = self.pool(pool)?;
        let under_way = self.work.look(disk_key(pool, disk), |work| DiskReport {
            state: work.state(),
            ..report(disk, work.format, work.virtual_bytes, None)
        });
        if let Some(report) = &under_way
            && matches!(report.state, WorkState::Working { .. })
        {
            // Recorded a moment ago, perhaps; but not all of the work is done.
            return Ok(report.clone());
        }
        match self.recorded(&open, disk) {
            Err(StorageError::NoSuchDisk(_)) => under_way.ok_or(StorageError::NoSuchDisk(disk)),
            recorded => recorded,
        }
    }

    /// Grows a disk that nobody uses; may block. [`StorageError::DiskInUse`] when a machine has to do it.
    pub(crate) fn grow_disk(
        &self,
        pool: PoolId,
        disk: DiskId,
        ask: GrowDisk,
    ) -> Result<DiskReport, StorageError> {
        check_size(ask.bytes)?;
        let open = self.pool(pool)?;
        let guard = open.lock()?;
        let old = self.recorded(&open, disk)?;
        larger(Some(ask.bytes), old.virtual_bytes)?;
        if ask.bytes > old.virtual_bytes {
            self.work.not_read(disk_key(pool, disk))?;
            let lock = self.claim(&open, disk)?;
            let path = open.data(Kind::Disk, disk.0, old.format);
            let file = open.open_file(&path, File::options().read(true).write(true))?;
            let grown = match old.format {
                DiskFormat::Raw => file.set_len(ask.bytes.0),
                DiskFormat::Qcow2 => file
                    .try_clone()
                    .and_then(|file| qcow2::grow(file, ask.bytes)),
            };
            grown
                .and_then(|()| file.sync_all())
                .map_err(|error| open.io("grow", &path, error))?;
            drop(lock);
        }
        self.record_size(&open, &guard, old)
    }

    /// Takes note of a size that a machine has given to its disk; may block.
    pub(crate) fn disk_has_grown(
        &self,
        pool: PoolId,
        disk: DiskId,
    ) -> Result<DiskReport, StorageError> {
        let open = self.pool(pool)?;
        let guard = open.lock()?;
        let old = self.recorded(&open, disk)?;
        self.record_size(&open, &guard, old)
    }

    fn record_size(
        &self,
        open: &OpenPool,
        _guard: &PoolGuard<'_>,
        old: DiskReport,
    ) -> Result<DiskReport, StorageError> {
        let new = self.recorded(open, old.disk)?;
        open.write_record(Kind::Disk, old.disk.0, &new)?;
        Ok(new)
    }

    /// Deletes a disk that nobody uses, or stops its making; may block.
    pub(crate) fn delete_disk(&self, pool: PoolId, disk: DiskId) -> Result<(), StorageError> {
        self.remove_disk(pool, disk, Which::Any)
    }

    /// As [`delete_disk`](Self::delete_disk), but only the one that was made for `made_for`, or the original: a command
    /// that comes late must not delete a disk that has come back since.
    pub(crate) fn erase_copy(
        &self,
        pool: PoolId,
        disk: DiskId,
        made_for: Option<MigrationId>,
    ) -> Result<(), StorageError> {
        self.remove_disk(pool, disk, Which::MadeFor(made_for))
    }

    fn remove_disk(&self, pool: PoolId, disk: DiskId, which: Which) -> Result<(), StorageError> {
        let open = self.pool(pool)?;
        let key = disk_key(pool, disk);
        self.work.not_read(key)?;
        let guard = open.lock()?;
        // Nothing is made or removed while the pool is locked. Before it is looked at whether a machine uses the disk:
        // that another one is used is nobody's failure.
        if let Which::MadeFor(expected) = which
            && let Some(found) = open.read_record::<DiskReport>(Kind::Disk, disk.0)?
            && found.made_for != expected
        {
            let made_for = found.made_for;
            return Err(StorageError::AnotherCopy { disk, made_for });
        }
        let lock = match self.claim(&open, disk) {
            Err(StorageError::NoSuchDisk(_)) => None,
            claimed => Some(claimed?),
        };
        self.work.cancel(key);
        open.remove(&guard, Kind::Disk, disk.0)?;
        drop(lock);
        self.pools_changed();
        Ok(())
    }

    /// Where a disk's bytes are; may block.
    pub(crate) fn locate(&self, pool: PoolId, disk: DiskId) -> Result<Located, StorageError> {
        let open = self.pool(pool)?;
        if let Some(true) = self
            .work
            .look(disk_key(pool, disk), |work| !work.has_failed())
        {
            return Err(StorageError::Busy {
                what: "disk",
                id: disk.to_string(),
            });
        }
        let report = self.recorded(&open, disk)?;
        let path = open.data(Kind::Disk, disk.0, report.format);
        // Refuses a symbolic link before a VMM follows it.
        open.open_file(&path, File::options().read(true))?;
        Ok(Located {
            path,
            format: report.format,
            lock: open.disk_lock(disk.0),
        })
    }

    /// The record, with the sizes its file has now.
    fn recorded(&self, open: &OpenPool, disk: DiskId) -> Result<DiskReport, StorageError> {
        let report = open
            .read_record::<DiskReport>(Kind::Disk, disk.0)?
            .ok_or(StorageError::NoSuchDisk(disk))?;
        let path = open.data(Kind::Disk, disk.0, report.format);
        let file = open.open_file(&path, File::options().read(true))?;
        let size = match report.format {
            DiskFormat::Raw => file.metadata().map(|found| Bytes(found.len())),
            DiskFormat::Qcow2 => qcow2::virtual_size(&file),
        };
        Ok(DiskReport {
            virtual_bytes: size.map_err(|error| open.io("read", &path, error))?,
            file_bytes: allocated_at(&path),
            ..report
        })
    }

    /// Keeps machines from using a disk, as long as the file is open. Only under the pool's lock, and only while no
    /// other work of this process reads the disk: a lock of a process ends with any of its handles.
    fn claim(&self, open: &OpenPool, disk: DiskId) -> Result<File, StorageError> {
        self.recorded(open, disk)?;
        let path = open.disk_lock(disk.0);
        let mut options = File::options();
        options
            .create(true)
            .truncate(false)
            .read(true)
            .write(true)
            .mode(0o600);
        let file = open.open_file(&path, &mut options)?;
        match rustix::fs::fcntl_lock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(file),
            Err(rustix::io::Errno::AGAIN | rustix::io::Errno::ACCESS) => {
                Err(StorageError::DiskInUse(disk))
            }
            Err(error) => Err(open.io("lock", &path, error.into())),
        }
    }
}

/// Which of the disks that a pool may hold under one id, one after the other, is to be removed.
#[derive(Clone, Copy, Debug)]
enum Which {
    /// Whichever is there.
    Any,
    /// The one that was made for this migration; `None`: the original.
    MadeFor(Option<MigrationId>),
}

const fn disk_key(pool: PoolId, disk: DiskId) -> Key {
    Key {
        pool,
        kind: Kind::Disk,
        id: disk.0,
    }
}

fn report(
    disk: DiskId,
    format: DiskFormat,
    virtual_bytes: Bytes,
    base: Option<ImageId>,
) -> DiskReport {
    DiskReport {
        disk,
        state: WorkState::Ready,
        format,
        virtual_bytes,
        file_bytes: Bytes(0),
        base,
        made_for: None,
    }
}

/// The size asked for, or the present one; disks never shrink.
fn larger(asked: Option<Bytes>, present: Bytes) -> Result<Bytes, StorageError> {
    match asked {
        Some(asked) if asked < present => Err(StorageError::Invalid {
            field: "bytes",
            problem: format!(
                "{} bytes are less than the {} there are",
                asked.0, present.0
            ),
            remedy: "disks cannot shrink: ask for at least the present size",
        }),
        asked => Ok(asked.unwrap_or(present)),
    }
}

fn fill_blank(
    part: &Part<'_>,
    format: DiskFormat,
    bytes: Bytes,
    backing: Option<Backing>,
) -> Result<(), StorageError> {
    match format {
        DiskFormat::Raw => part.set_length(bytes.0)?,
        DiskFormat::Qcow2 => {
            qcow2::create(part.handle()?, bytes, backing).map_err(|error| part.failed(error))?
        }
    }
    part.sync()
}

fn publish(
    open: &OpenPool,
    guard: &PoolGuard<'_>,
    part: &Part<'_>,
    report: DiskReport,
) -> Result<(), StorageError> {
    if open
        .read_record::<DiskReport>(Kind::Disk, report.disk.0)?
        .is_some()
    {
        // Another host was faster with the same disk.
        return Ok(());
    }
    let what = (Kind::Disk, report.disk.0, report.format);
    open.publish(guard, &part.path, what, &report)?;
    tracing::info!(disk = %report.disk, pool = open.name(), size = %report.virtual_bytes, "a disk is made");
    Ok(())
}

/// What keeps the source of a copy from changing; only its being there matters.
#[derive(Debug)]
enum Held {
    Lock(#[expect(dead_code, reason = "open as long as it is locked")] File),
    Reading(#[expect(dead_code, reason = "counts as long as it lives")] super::work::Reading),
}

struct FullCopy {
    key: Key,
    source: File,
    from: PathBuf,
    new: DiskReport,
    held: Vec<Held>,
}

impl FullCopy {
    fn carry_out(
        self,
        storage: &Storage,
        open: &OpenPool,
        progress: &Progress,
    ) -> Result<(), StorageError> {
        let part = Part::create(open, open.part(Kind::Disk, self.new.disk.0))?;
        copy(&self.source, &self.from, &part, progress)?;
        match self.new.format {
            DiskFormat::Raw => part.set_length(self.new.virtual_bytes.0)?,
            DiskFormat::Qcow2 => qcow2::grow(part.handle()?, self.new.virtual_bytes)
                .map_err(|error| part.failed(error))?,
        }
        part.sync()?;
        let guard = open.lock()?;
        progress.wanted()?;
        // Its image is still there: the source, which could not be deleted meanwhile, is made from it too.
        publish(open, &guard, &part, self.new)?;
        drop(self.held);
        storage.pools_changed();
        Ok(())
    }
}
