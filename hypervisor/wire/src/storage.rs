//! Storage pools, images and disks, as the host agents report and change them.
//!
//! A pool is a directory with a `godwit-pool.json` that holds its [`PoolId`]: two hosts that report the same id see
//! the same directory, so the pool is shared. Inside:
//!
//! ```text
//! godwit-pool.json             PoolMark
//! images/<image>.qcow2|raw     read-only bases; <image>.json beside holds their ImageReport
//! disks/<disk>.qcow2|raw       disks, thin copies of images; <disk>.json: DiskReport; <disk>.lock: the epoch lock
//! snapshots/<snapshot>/        saved machines, as their VMMs write them; <snapshot>.json: SnapshotReport
//! ```

use crate::devices::DiskFormat;
use crate::id::{DiskId, Epoch, ImageId, MigrationId, PoolId, SnapshotId};
use crate::unit::Bytes;
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// Most pools of a host.
pub const MAX_POOLS: usize = 32;
/// Smallest and largest disk.
pub const MIN_DISK: Bytes = Bytes(1 << 20);
/// Largest disk.
pub const MAX_DISK: Bytes = Bytes(64 << 40);

/// A pool as one host sees it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PoolReport {
    /// Which pool; the same on every host that shares it.
    pub pool: PoolId,
    /// Name the operator gave it (`--storage NAME=DIR`).
    pub name: String,
    /// Room in all.
    pub total_bytes: Bytes,
    /// Room left.
    pub free_bytes: Bytes,
    /// Why it cannot be used now.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub trouble: Option<String>,
}

/// State of a long piece of work on a pool.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "state", rename_all = "snake_case")]
pub enum WorkState {
    /// Under way.
    Working {
        /// Done so far.
        done_bytes: Bytes,
        /// To do in all, as far as known.
        total_bytes: Bytes,
    },
    /// Done: the thing can be used.
    Ready,
    /// It failed, and nothing is left of it.
    Failed {
        /// Why, and what would help.
        reason: String,
    },
}

/// An image in a pool.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageReport {
    /// Which.
    pub image: ImageId,
    /// Whether it can be used.
    #[serde(flatten)]
    pub state: WorkState,
    /// Format it is kept in.
    pub format: DiskFormat,
    /// Size of the disk it holds.
    pub virtual_bytes: Bytes,
    /// Room it takes.
    pub file_bytes: Bytes,
    /// SHA-256 of the file that was imported, in hexadecimal.
    pub sha256: String,
}

/// A disk in a pool.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskReport {
    /// Which.
    pub disk: DiskId,
    /// Whether it can be used.
    #[serde(flatten)]
    pub state: WorkState,
    /// Format.
    pub format: DiskFormat,
    /// Size the guest sees.
    pub virtual_bytes: Bytes,
    /// Room it takes.
    pub file_bytes: Bytes,
    /// The image it is a thin copy of.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub base: Option<ImageId>,
    /// The migration that it was made for, to take a disk's content in; `None` of an original. It tells apart what a
    /// pool holds of one disk at different times.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub made_for: Option<MigrationId>,
}

/// What stands for "made for no migration" in the query of a deletion.
pub const MADE_FOR_NONE: &str = "none";
/// Kind of the problem that answers the deletion of a disk which was not made for what the query names.
pub const ANOTHER_COPY: &str = "another-copy";

/// Imports an image. Repeating it while it works, or after it is done, answers with the present report.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImportImage {
    /// Where from.
    pub source: ImportSource,
    /// Format of the source; absent means: look at it. (Nobody hostile has written to it yet as a disk.)
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub format: Option<DiskFormat>,
    /// Refuse it unless this is its SHA-256.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sha256: Option<String>,
}

/// Where an image comes from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum ImportSource {
    /// A file on the host.
    Path {
        /// Absolute path.
        path: PathBuf,
    },
    /// Bytes that are sent afterwards with `PUT …/content`.
    Upload {
        /// How many.
        bytes: Bytes,
    },
}

/// Creates a disk. Repeating it answers with the present report.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CreateDisk {
    /// Size the guest sees; absent takes the size of what it is made from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bytes: Option<Bytes>,
    /// Format of the new disk; [`DiskFormat::Qcow2`] for thin copies.
    pub format: DiskFormat,
    /// What it is made from.
    pub from: DiskOrigin,
    /// The migration whose content it is to take in. It is written down with the disk and stays there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub made_for: Option<MigrationId>,
}

/// What a new disk is made from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum DiskOrigin {
    /// Nothing: it reads as zeros.
    Blank,
    /// A thin copy of an image.
    Image {
        /// The image.
        image: ImageId,
    },
    /// A full copy of another disk that no running machine writes.
    Disk {
        /// The disk.
        disk: DiskId,
    },
}

/// Makes a disk larger; a machine that runs with it here sees it at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GrowDisk {
    /// The new size; never smaller than the present one.
    pub bytes: Bytes,
}

/// A saved machine in a pool.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SnapshotReport {
    /// Which.
    pub snapshot: SnapshotId,
    /// Whether it can be used.
    #[serde(flatten)]
    pub state: WorkState,
    /// Room it takes.
    pub bytes: Bytes,
    /// How long the guest stood still for it.
    pub pause_us: u64,
}

/// Saves a machine that is here to a pool; it goes on as it was. Repeating it answers with the present report.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TakeSnapshot {
    /// Epoch under which this host owns the VM.
    pub epoch: Epoch,
    /// Where to keep it.
    pub pool: PoolId,
}

/// The saved machine that a VM goes on from instead of booting.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RestoreFrom {
    /// Where it is.
    pub pool: PoolId,
    /// Which.
    pub snapshot: SnapshotId,
    /// The epoch under which it was taken: whoever claimed one of its writable disks since, under this epoch or
    /// another VM's, has made it useless.
    pub epoch: Epoch,
}

/// Kind of the problem with which a restore is refused because a disk was claimed since.
pub const DISKS_MOVED_ON: &str = "disks-moved-on";
