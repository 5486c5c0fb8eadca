//! Storage pools, images and disks.

use super::{DiskFormat, Operation};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use uuid::Uuid;

/// A storage pool: a directory that one host or several see.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Pool {
    /// The same on every host that sees it.
    pub id: Uuid,
    /// Name its hosts give it.
    pub name: String,
    /// Whether several hosts see it: VMs with disks in it can move between them.
    pub shared: bool,
    /// Room in all.
    pub total_bytes: u64,
    /// Room left.
    pub free_bytes: u64,
    /// Hosts that see it.
    pub hosts: Vec<PoolHost>,
}

/// A host that sees a pool.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct PoolHost {
    /// The host.
    pub host: Uuid,
    /// Its name.
    pub host_name: String,
    /// Why it cannot use the pool now.
    pub trouble: Option<String>,
}

/// An image that disks are made from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Image {
    /// Never changes.
    pub id: Uuid,
    /// Unique among images.
    pub name: String,
    /// Where it is.
    pub pool: Uuid,
    /// Name of that pool.
    pub pool_name: String,
    /// Where it stands.
    pub state: ImageState,
    /// Why it is in this state, when that needs saying.
    pub reason: Option<String>,
    /// Format it is kept in.
    pub format: Option<DiskFormat>,
    /// Size of the disk it holds; 0 before it is ready.
    pub virtual_bytes: u64,
    /// Room it takes; 0 before it is ready.
    pub file_bytes: u64,
    /// SHA-256 of what was imported, in hexadecimal.
    pub sha256: Option<String>,
    /// Disks that are thin copies of it.
    pub disks: u64,
    /// The operation under way.
    pub operation: Option<Uuid>,
    /// When it was created.
    pub created_at: Timestamp,
    /// When it last changed.
    pub changed_at: Timestamp,
}

/// Where an image stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum ImageState {
    /// A host reads it.
    Importing,
    /// A host waits for its bytes: `PUT /v1/images/{image}/content`.
    Uploading,
    /// Disks can be made from it.
    Ready,
    /// It could not be imported and is being removed.
    Failed,
}

/// A disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Disk {
    /// Never changes.
    pub id: Uuid,
    /// Unique among disks.
    pub name: String,
    /// Where it is.
    pub pool: Uuid,
    /// Name of that pool.
    pub pool_name: String,
    /// Size the guest sees; null while that is not known.
    pub bytes: Option<u64>,
    /// Format.
    pub format: DiskFormat,
    /// The image it is a thin copy of.
    pub image: Option<Uuid>,
    /// Name of that image.
    pub image_name: Option<String>,
    /// The VM that may write it.
    pub attached_to: Option<Uuid>,
    /// Name of that VM.
    pub attached_to_name: Option<String>,
    /// The VM it was created with, and with which it is deleted unless asked otherwise.
    pub created_with: Option<Uuid>,
    /// Where it stands.
    pub state: DiskState,
    /// Why it is in this state, when that needs saying.
    pub reason: Option<String>,
    /// The operation under way.
    pub operation: Option<Uuid>,
    /// When it was created.
    pub created_at: Timestamp,
    /// When it last changed.
    pub changed_at: Timestamp,
}

/// Where a disk stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum DiskState {
    /// A host makes it.
    Creating,
    /// It can be used.
    Ready,
    /// It could not be made and is being removed.
    Failed,
}

/// Imports an image.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CreateImage {
    /// Unique among images: `a`-`z`, digits, `.` and `-`, at most 63.
    pub name: String,
    /// Id or name of the pool to keep it in; the only choice when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pool: Option<String>,
    /// Where it comes from.
    pub source: ImageSource,
    /// Format of the source; looked at when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub format: Option<DiskFormat>,
    /// SHA-256 the source must have, in hexadecimal.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sha256: Option<String>,
}

/// Where an image comes from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum ImageSource {
    /// A file on a host.
    Path {
        /// Absolute path.
        path: String,
        /// Id or name of the host; any that has the pool when absent.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        host: Option<String>,
    },
    /// Bytes that are sent with `PUT /v1/images/{image}/content` afterwards.
    Upload {
        /// How many.
        bytes: u64,
    },
}

/// Makes a disk: blank, a thin copy of an image, or a full copy of another disk.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CreateDisk {
    /// Unique among disks: `a`-`z`, digits, `.` and `-`, at most 63.
    pub name: String,
    /// Id or name of the pool; that of what it is made from, or the only choice, when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pool: Option<String>,
    /// Size; that of what it is made from when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bytes: Option<u64>,
    /// Format; what suits it when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub format: Option<DiskFormat>,
    /// Id or name of the image it is a thin copy of.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image: Option<String>,
    /// Id or name of the disk it is a full copy of; no running VM may have that.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub clone_of: Option<String>,
}

/// Makes a disk larger.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct GrowDisk {
    /// Its new size.
    pub bytes: u64,
}

/// A change to an image was accepted.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct ImageAccepted {
    /// The operation that carries it out; null when nothing is left to do.
    pub operation: Option<Operation>,
    /// The image as it is now.
    pub image: Image,
}

/// A change to a disk was accepted.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct DiskAccepted {
    /// The operation that carries it out; null when nothing is left to do.
    pub operation: Option<Operation>,
    /// The disk as it is now.
    pub disk: Disk,
}
