//! One pool: a directory with a mark that says which pool it is.
//!
//! ```text
//! unusable ──directory there, mark read or made──▶ usable ──unmounted, unreadable──▶ unusable
//! ```
//!
//! The mark is made once, by whichever host comes first, and never written over: a mark that cannot be read makes the
//! pool unusable, because a new one would cut every disk in it off from the machines that name them.
//!
//! Every path is made of ids; what is in a pool is never followed through a symbolic link.

use super::error::StorageError;
use godwit_channel::file::{self, Access};
use godwit_wire::devices::DiskFormat;
use godwit_wire::id::{HostId, PoolId};
use godwit_wire::unit::Bytes;
use rustix::fs::{FlockOperation, OFlags};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use uuid::Uuid;

/// Layout of a pool.
const POOL_VERSION: u32 = 1;
/// Longest mark or record read.
const MAX_RECORD_BYTES: u64 = 64 * 1024;
/// How long another host may hold a pool's lock; it is never held for long work.
const LOCK_TIMEOUT: Duration = Duration::from_secs(10);
/// Pause between two attempts: a lock over the network announces itself to nobody.
const LOCK_PAUSE: Duration = Duration::from_millis(20);

/// `godwit-pool.json`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct PoolMark {
    version: u32,
    pool: PoolId,
}

/// Who answers for a pool's directory being there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Origin {
    /// The agent: it is made if absent.
    Ours,
    /// The operator: an absent directory may be one that is not mounted yet.
    Operators,
}

/// Where a pool is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct PoolPlace {
    pub(crate) name: String,
    pub(crate) directory: PathBuf,
    pub(crate) origin: Origin,
}

/// What is kept in a pool.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Kind {
    Image,
    Disk,
    Snapshot,
}

impl Kind {
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Image => "image",
            Self::Disk => "disk",
            Self::Snapshot => "snapshot",
        }
    }

    const fn directory(self) -> &'static str {
        match self {
            Self::Image => "images",
            Self::Disk => "disks",
            Self::Snapshot => "snapshots",
        }
    }
}

/// Extension of a file of this format.
pub(crate) const fn extension(format: DiskFormat) -> &'static str {
    match format {
        DiskFormat::Raw => "raw",
        DiskFormat::Qcow2 => "qcow2",
    }
}

/// Room in a pool.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Room {
    pub(crate) total: Bytes,
    pub(crate) free: Bytes,
}

/// Room where `path` is; may block as long as its file system does.
pub(crate) fn room_at(path: &Path) -> io::Result<Room> {
    let found = rustix::fs::statvfs(path)?;
    Ok(Room {
        total: Bytes(found.f_blocks.saturating_mul(found.f_frsize)),
        free: Bytes(found.f_bavail.saturating_mul(found.f_frsize)),
    })
}

/// One pool.
#[derive(Debug)]
pub(crate) struct Pool {
    place: PoolPlace,
    /// Ends the names of this host's unfinished files.
    host: HostId,
    /// Whether what a former agent left unfinished is gone.
    cleaned: AtomicBool,
    parts: AtomicU64,
    /// Set while a look at it has not come back; a file system that hangs holds only one.
    examining: AtomicBool,
    guard: Mutex<()>,
}

/// Held while records are looked at and changed together.
#[derive(Debug)]
pub(crate) struct PoolGuard<'a> {
    _process: MutexGuard<'a, ()>,
    /// Locked against other hosts; the lock ends with the file.
    _file: File,
}

impl Pool {
    pub(crate) fn new(place: PoolPlace, host: HostId) -> Self {
        Self {
            place,
            host,
            cleaned: AtomicBool::new(false),
            parts: AtomicU64::new(0),
            examining: AtomicBool::new(false),
            guard: Mutex::new(()),
        }
    }

    pub(crate) fn name(&self) -> &str {
        &self.place.name
    }

    /// Whether nobody else is looking; whoever is told so says when it is done.
    pub(crate) fn begin_to_examine(&self) -> bool {
        !self.examining.swap(true, Ordering::AcqRel)
    }

    pub(crate) fn examined(&self) {
        self.examining.store(false, Ordering::Release);
    }

    /// Which pool this is, now.
    pub(crate) fn open(&self) -> Result<PoolId, StorageError> {
        let root = &self.place.directory;
        if self.place.origin == Origin::Ours {
            self.make_directory(root)?;
        }
        if !self.is_plain_directory(root, "find")? {
            return Err(self.unusable(format!("{} is no directory", root.display())));
        }
        let mark = self.mark()?;
        for kind in [Kind::Image, Kind::Disk, Kind::Snapshot] {
            let path = self.directory(kind);
            self.make_directory(&path)?;
            if !self.is_plain_directory(&path, "use")? {
                return Err(self.unusable(format!("{} is no directory", path.display())));
            }
        }
        if !self.cleaned.swap(true, Ordering::AcqRel) {
            self.remove_parts()?;
        }
        Ok(mark.pool)
    }

    pub(crate) fn room(&self) -> Result<Room, StorageError> {
        let root = &self.place.directory;
        room_at(root).map_err(|source| self.io("examine", root, source))
    }

    fn mark(&self) -> Result<PoolMark, StorageError> {
        let path = self.place.directory.join("godwit-pool.json");
        if let Some(mark) = self.read_mark(&path)? {
            return Ok(mark);
        }
        let fresh = PoolMark {
            version: POOL_VERSION,
            pool: PoolId::fresh(),
        };
        let part = self
            .place
            .directory
            .join(format!(".godwit-pool.part-{}", self.host));
        let text = serde_json::to_vec_pretty(&fresh)
            .map_err(|error| self.io("write", &path, error.into()))?;
        file::write_atomically(&part, &text, Access::Public)
            .map_err(|error| StorageError::file(self.name(), error))?;
        // A link is made or not, also when two hosts try at once on a shared file system.
        let linked = fs::hard_link(&part, &path);
        let removed = fs::remove_file(&part);
        match linked {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                return Err(self.io("create", &path, error));
            }
            _ => {}
        }
        removed.map_err(|error| self.io("remove", &part, error))?;
        self.sync_directory(&self.place.directory)?;
        self.read_mark(&path)?
            .ok_or_else(|| self.unusable(format!("{} has disappeared", path.display())))
    }

    fn read_mark(&self, path: &Path) -> Result<Option<PoolMark>, StorageError> {
        let unreadable = |detail: String| {
            self.unusable(format!(
                "{} cannot be read: {detail}; restore it, a new one would make a new pool",
                path.display()
            ))
        };
        match self.read_json::<PoolMark>(path) {
            Ok(Some(mark)) if mark.version == POOL_VERSION => Ok(Some(mark)),
            Ok(Some(mark)) => Err(unreadable(format!(
                "version {} is not {POOL_VERSION}",
                mark.version
            ))),
            Ok(None) => Ok(None),
            Err(error) => Err(unreadable(error.to_string())),
        }
    }

    /// Keeps this and other agents from changing records meanwhile.
    pub(crate) fn lock(&self) -> Result<PoolGuard<'_>, StorageError> {
        // Nothing is left half done by a panic: files change in steps of their own.
        let process = self.guard.lock().unwrap_or_else(PoisonError::into_inner);
        let path = self.place.directory.join("godwit-pool.lock");
        let mut options = OpenOptions::new();
        options.create(true).truncate(false).write(true).mode(0o600);
        let file = self.open_file(&path, &mut options)?;
        let deadline = Instant::now() + LOCK_TIMEOUT;
        loop {
            match rustix::fs::fcntl_lock(&file, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => break,
                Err(rustix::io::Errno::AGAIN | rustix::io::Errno::ACCESS)
                    if Instant::now() < deadline =>
                {
                    std::thread::sleep(LOCK_PAUSE);
                }
                Err(error) => return Err(self.io("lock", &path, error.into())),
            }
        }
        Ok(PoolGuard {
            _process: process,
            _file: file,
        })
    }

    fn directory(&self, kind: Kind) -> PathBuf {
        self.place.directory.join(kind.directory())
    }

    /// The file with the bytes.
    pub(crate) fn data(&self, kind: Kind, id: Uuid, format: DiskFormat) -> PathBuf {
        self.directory(kind)
            .join(format!("{id}.{}", extension(format)))
    }

    /// The file that says what the bytes are; without it they are nothing.
    fn record(&self, kind: Kind, id: Uuid) -> PathBuf {
        self.directory(kind).join(format!("{id}.json"))
    }

    /// The directory of a saved machine, and the one it is while it is being written.
    pub(crate) fn snapshot(&self, id: Uuid) -> [PathBuf; 2] {
        let directory = self.directory(Kind::Snapshot);
        [
            directory.join(id.to_string()),
            directory.join(format!("{id}.partial")),
        ]
    }

    /// Removes a saved machine, or what there is of it.
    pub(crate) fn remove_snapshot(&self, id: Uuid) -> Result<(), StorageError> {
        for path in self.snapshot(id) {
            // A symbolic link is removed, not followed.
            match fs::remove_dir_all(&path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    return Err(self.io("remove", &path, error));
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// The lock of a disk.
    pub(crate) fn disk_lock(&self, id: Uuid) -> PathBuf {
        self.directory(Kind::Disk).join(format!("{id}.lock"))
    }

    /// A file that is not finished; only this agent removes it, and a successor at its start.
    pub(crate) fn part(&self, kind: Kind, id: Uuid) -> PathBuf {
        let number = self.parts.fetch_add(1, Ordering::Relaxed);
        self.directory(kind)
            .join(format!(".{id}.{number}.part-{}", self.host))
    }

    pub(crate) fn read_record<T: DeserializeOwned>(
        &self,
        kind: Kind,
        id: Uuid,
    ) -> Result<Option<T>, StorageError> {
        self.read_json(&self.record(kind, id))
    }

    pub(crate) fn write_record(
        &self,
        kind: Kind,
        id: Uuid,
        record: &impl Serialize,
    ) -> Result<(), StorageError> {
        let path = self.record(kind, id);
        let text = serde_json::to_vec_pretty(record)
            .map_err(|error| self.io("write", &path, error.into()))?;
        file::write_atomically(&path, &text, Access::Private)
            .map_err(|error| StorageError::file(self.name(), error))
    }

    /// Every record of a kind that can be read.
    pub(crate) fn records<T: DeserializeOwned>(&self, kind: Kind) -> Result<Vec<T>, StorageError> {
        let directory = self.directory(kind);
        let failed = |source| self.io("read", &directory, source);
        let mut found = Vec::new();
        for entry in fs::read_dir(&directory).map_err(failed)? {
            let path = entry.map_err(failed)?.path();
            if path
                .extension()
                .is_some_and(|extension| extension == "json")
            {
                found.extend(self.read_json(&path)?);
            }
        }
        Ok(found)
    }

    /// Makes a finished file what its record says, under the pool's lock. The unfinished name stays until the record
    /// is written, so that a successor knows what to undo.
    pub(crate) fn publish(
        &self,
        _guard: &PoolGuard<'_>,
        part: &Path,
        (kind, id, format): (Kind, Uuid, DiskFormat),
        record: &impl Serialize,
    ) -> Result<(), StorageError> {
        let data = self.data(kind, id, format);
        // Data without a record is what a crash has left.
        self.remove_file(&data)?;
        fs::hard_link(part, &data).map_err(|error| self.io("create", &data, error))?;
        self.sync_directory(&self.directory(kind))?;
        if let Err(error) = self.write_record(kind, id, record) {
            self.remove_file(&data)?;
            return Err(error);
        }
        self.remove_file(part)
    }

    /// Removes a thing: its record first, without which the rest is nothing.
    pub(crate) fn remove(
        &self,
        _guard: &PoolGuard<'_>,
        kind: Kind,
        id: Uuid,
    ) -> Result<(), StorageError> {
        self.remove_file(&self.record(kind, id))?;
        self.sync_directory(&self.directory(kind))?;
        if kind == Kind::Snapshot {
            return self.remove_snapshot(id);
        }
        for format in [DiskFormat::Raw, DiskFormat::Qcow2] {
            self.remove_file(&self.data(kind, id, format))?;
        }
        if kind == Kind::Disk {
            self.remove_file(&self.disk_lock(id))?;
        }
        Ok(())
    }

    /// Opens a file of the pool, never through a symbolic link.
    pub(crate) fn open_file(
        &self,
        path: &Path,
        options: &mut OpenOptions,
    ) -> Result<File, StorageError> {
        options
            .custom_flags(i32::try_from(OFlags::NOFOLLOW.bits()).unwrap_or_default())
            .open(path)
            .map_err(|error| self.io("open", path, error))
    }

    pub(crate) fn remove_file(&self, path: &Path) -> Result<(), StorageError> {
        match fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(self.io("remove", path, error))
            }
            _ => Ok(()),
        }
    }

    pub(crate) fn io(&self, action: &'static str, path: &Path, source: io::Error) -> StorageError {
        StorageError::io(action, path, self.name(), source)
    }

    /// What a former agent of this host has left unfinished, data that was never recorded included.
    fn remove_parts(&self) -> Result<(), StorageError> {
        let ending = format!(".part-{}", self.host);
        for kind in [Kind::Image, Kind::Disk] {
            let directory = self.directory(kind);
            let failed = |source| self.io("read", &directory, source);
            for entry in fs::read_dir(&directory).map_err(failed)? {
                let name = entry.map_err(failed)?.file_name();
                let Some(name) = name.to_str().filter(|name| name.ends_with(&ending)) else {
                    continue;
                };
                let id = name.trim_start_matches('.').split('.').next();
                if let Some(id) = id.and_then(|id| Uuid::parse_str(id).ok())
                    && !self.record(kind, id).exists()
                {
                    for format in [DiskFormat::Raw, DiskFormat::Qcow2] {
                        self.remove_file(&self.data(kind, id, format))?;
                    }
                }
                tracing::info!(pool = self.name(), file = name, "removing unfinished work");
                self.remove_file(&directory.join(name))?;
            }
        }
        Ok(())
    }

    fn read_json<T: DeserializeOwned>(&self, path: &Path) -> Result<Option<T>, StorageError> {
        match fs::symlink_metadata(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(self.io("read", path, error)),
            Ok(found) if !found.is_file() => {
                let error = io::Error::new(io::ErrorKind::InvalidData, "it is no ordinary file");
                return Err(self.io("read", path, error));
            }
            Ok(_) => {}
        }
        let text = match file::read_text(path, MAX_RECORD_BYTES) {
            Ok(text) => text,
            // Deleted meanwhile.
            Err(error) if error.is_missing() => return Ok(None),
            Err(error) => return Err(StorageError::file(self.name(), error)),
        };
        serde_json::from_str(&text)
            .map(Some)
            .map_err(|error| self.io("read", path, error.into()))
    }

    fn is_plain_directory(&self, path: &Path, action: &'static str) -> Result<bool, StorageError> {
        fs::symlink_metadata(path)
            // The operator may well name the pool itself through a link.
            .and_then(|found| {
                if path == self.place.directory {
                    fs::metadata(path)
                } else {
                    Ok(found)
                }
            })
            .map(|found| found.is_dir())
            .map_err(|error| self.unusable(format!("cannot {action} {}: {error}", path.display())))
    }

    fn make_directory(&self, path: &Path) -> Result<(), StorageError> {
        match fs::DirBuilder::new().mode(0o700).create(path) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                Err(self.io("create", path, error))
            }
            _ => Ok(()),
        }
    }

    pub(crate) fn sync_directory(&self, path: &Path) -> Result<(), StorageError> {
        File::open(path)
            .and_then(|directory| directory.sync_all())
            .map_err(|error| self.io("write", path, error))
    }

    pub(crate) fn unusable(&self, reason: String) -> StorageError {
        StorageError::PoolUnusable {
            name: self.name().to_owned(),
            reason,
        }
    }
}
