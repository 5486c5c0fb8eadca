//! Why something cannot be done in a pool.

use godwit_channel::file::FileError;
use godwit_wire::id::{DiskId, ImageId, MigrationId, PoolId, SnapshotId};
use godwit_wire::problem::{FieldProblem, Problem};
use godwit_wire::storage::ANOTHER_COPY;
use godwit_wire::unit::Bytes;
use std::io;
use std::path::{Path, PathBuf};

/// Why something cannot be done in a pool.
#[derive(Debug, thiserror::Error)]
pub(crate) enum StorageError {
    /// This host does not have it.
    #[error("this host has no storage pool {0}")]
    NoSuchPool(PoolId),
    /// It is not there now.
    #[error("storage pool {name} cannot be used: {reason}")]
    PoolUnusable { name: String, reason: String },
    /// Never made, or deleted.
    #[error("there is no image {0} in the pool")]
    NoSuchImage(ImageId),
    /// Never made, or deleted.
    #[error("there is no disk {0} in the pool")]
    NoSuchDisk(DiskId),
    /// Never taken, or deleted.
    #[error("there is no snapshot {0} in the pool")]
    NoSuchSnapshot(SnapshotId),
    /// The machine could not be saved.
    #[error("the machine was not saved: {0}")]
    NotSaved(String),
    /// Another piece of work has it.
    #[error("{what} {id} is being worked on")]
    Busy { what: &'static str, id: String },
    /// A machine writes it.
    #[error("a machine uses disk {0}")]
    DiskInUse(DiskId),
    /// It is not the copy that was left any more.
    #[error("the disk {disk} that is in the pool is another one: {}", origin(*made_for))]
    AnotherCopy {
        disk: DiskId,
        /// What the one that is there was made for.
        made_for: Option<MigrationId>,
    },
    /// Disks are thin copies of it.
    #[error("disk {child} is a thin copy of image {image}")]
    ImageInUse { image: ImageId, child: DiskId },
    /// A value of the request.
    #[error("{field}: {problem}")]
    Invalid {
        field: &'static str,
        problem: String,
        remedy: &'static str,
    },
    /// Bytes that are no image a machine could use.
    #[error("{problem}; {remedy}")]
    BadImage {
        problem: String,
        remedy: &'static str,
    },
    /// No room.
    #[error(
        "storage pool {pool} is full; delete what is not needed there, or make the pool larger"
    )]
    Full { pool: String },
    /// Too much at once.
    #[error("{0} pieces of work are under way on this host's pools, the most there can be")]
    TooMuchWork(usize),
    /// Nobody waits for it any more.
    #[error("it was deleted meanwhile")]
    Cancelled,
    /// A file.
    #[error("cannot {action} {}: {cause}", path.display())]
    Io {
        action: &'static str,
        path: PathBuf,
        /// Shown at once, because operators see only this line.
        cause: io::Error,
    },
}

impl StorageError {
    /// Names the file an I/O error is about; a full pool is told apart.
    pub(crate) fn io(action: &'static str, path: &Path, pool: &str, cause: io::Error) -> Self {
        match cause.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Self::Full {
                pool: pool.to_owned(),
            },
            _ => Self::Io {
                action,
                path: path.to_owned(),
                cause,
            },
        }
    }

    /// The same for an error that names its file.
    pub(crate) fn file(pool: &str, error: FileError) -> Self {
        Self::io(error.action, &error.path, pool, error.source)
    }

    /// As the API answers it.
    pub(crate) fn problem(&self) -> Problem {
        let detail = self.to_string();
        match self {
            Self::NoSuchPool(pool) => Problem::not_found("storage pool", pool),
            Self::NoSuchImage(image) => Problem::not_found("image", image),
            Self::NoSuchDisk(disk) => Problem::not_found("disk", disk),
            Self::NoSuchSnapshot(snapshot) => Problem::not_found("snapshot", snapshot),
            Self::NotSaved(_) => Problem::conflict("not-saved", detail),
            Self::PoolUnusable { .. } => Problem::conflict("pool-unusable", detail)
                .with_remedy("mount or repair the directory given with --storage"),
            Self::Busy { .. } => {
                Problem::conflict("busy", detail).with_remedy("wait until it is done")
            }
            Self::AnotherCopy { .. } => Problem::conflict(ANOTHER_COPY, detail)
                .with_remedy("delete the disk itself, if it is not needed"),
            Self::DiskInUse(_) => {
                Problem::conflict("disk-in-use", detail).with_remedy("stop the machine first")
            }
            Self::ImageInUse { .. } => Problem::conflict("image-in-use", detail)
                .with_remedy("delete the disks made from it first"),
            Self::Invalid {
                field,
                problem,
                remedy,
            } => Problem::invalid(vec![FieldProblem::new(*field, problem.as_str(), *remedy)]),
            Self::BadImage { .. } => {
                Problem::new(422, "bad-image", "The image cannot be used", detail)
            }
            Self::Full { .. } => Problem::new(507, "pool-full", "The storage pool is full", detail),
            Self::TooMuchWork(_) => Problem::new(503, "busy", "Busy", detail),
            Self::Cancelled => Problem::conflict("cancelled", detail),
            Self::Io { .. } => Problem::internal(detail),
        }
    }
}

fn origin(made_for: Option<MigrationId>) -> String {
    match made_for {
        None => "it was made here".to_owned(),
        Some(migration) => format!("it was made for migration {migration}"),
    }
}

/// Bytes that do not fit where they shall go.
pub(crate) fn check_size(bytes: Bytes) -> Result<(), StorageError> {
    use godwit_wire::storage::{MAX_DISK, MIN_DISK};
    if (MIN_DISK..=MAX_DISK).contains(&bytes) && bytes.0.is_multiple_of(512) {
        return Ok(());
    }
    Err(StorageError::Invalid {
        field: "bytes",
        problem: format!("a disk cannot have {} bytes", bytes.0),
        remedy: "give a multiple of 512 from 1 MiB to 64 TiB",
    })
}
