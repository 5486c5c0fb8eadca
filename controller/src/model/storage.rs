//! Images and disks: what is kept in the storage pools. Which hosts see which pool is observed, not stored.

use godwit_wire::devices::DiskFormat;
use godwit_wire::id::{DiskId, HostId, ImageId, MigrationId, OperationId, PoolId, VmId};
use godwit_wire::storage::{DiskOrigin, ImportSource};
use godwit_wire::unit::Bytes;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};

/// An image as stored.
///
/// ```text
/// importing ─▶ [uploading] ─▶ ready
///      └────────────┴──────▶ failed
/// ```
/// A failed import has left nothing in the pool; its record stays until it is deleted, so that the reason is seen.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Image {
    /// Identity.
    pub id: ImageId,
    /// Unique among images.
    pub name: String,
    /// Where it is.
    pub pool: PoolId,
    /// Where it comes from.
    pub source: ImportSource,
    /// Where it stands.
    pub state: ImageState,
    /// Format it is kept in; before it is ready, the format asked for.
    pub format: Option<DiskFormat>,
    /// Size of the disk it holds; 0 before it is ready.
    pub virtual_bytes: Bytes,
    /// Room it takes; 0 before it is ready.
    pub file_bytes: Bytes,
    /// SHA-256 of what was imported, in hexadecimal; before it is ready, the one it must have.
    pub sha256: Option<String>,
    /// The operation that is changing it.
    pub operation: Option<OperationId>,
    /// When it was created.
    pub created_at: Timestamp,
    /// When this record last changed.
    pub changed_at: Timestamp,
}

/// Where an image stands.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "state", rename_all = "snake_case")]
pub enum ImageState {
    /// A host is to read it, or reads it.
    Importing,
    /// A host waits for its bytes, or receives them.
    Uploading {
        /// Which host.
        host: HostId,
    },
    /// Disks can be made from it.
    Ready,
    /// It could not be imported.
    Failed {
        /// Why.
        reason: String,
    },
}

/// A disk as stored. Which VM has it is not stored here: the VMs' specs say so (see
/// [`View::attached_to`](crate::view::View::attached_to)).
///
/// ```text
/// creating ─▶ ready
///     └─────▶ failed   (nothing is left in the pool)
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Disk {
    /// Identity.
    pub id: DiskId,
    /// Unique among disks.
    pub name: String,
    /// Where it is.
    pub pool: PoolId,
    /// Size the guest sees; `None` until the pool has said how large its origin is.
    pub bytes: Option<Bytes>,
    /// Format.
    pub format: DiskFormat,
    /// What it is made from.
    pub origin: DiskOrigin,
    /// The migration that brought it into its pool; `None` of one that was made there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub made_for: Option<MigrationId>,
    /// The VM it was created with, and with which it goes unless asked otherwise.
    pub created_with: Option<VmId>,
    /// Where it stands.
    pub state: DiskState,
    /// The operation that is changing it.
    pub operation: Option<OperationId>,
    /// When it was created.
    pub created_at: Timestamp,
    /// When this record last changed.
    pub changed_at: Timestamp,
}

/// Where a disk stands.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "state", rename_all = "snake_case")]
pub enum DiskState {
    /// A host is to make it, or makes it.
    Creating,
    /// It can be used.
    Ready,
    /// It could not be made.
    Failed {
        /// Why.
        reason: String,
    },
}

impl Disk {
    /// The image it is a thin copy of.
    pub const fn base(&self) -> Option<ImageId> {
        match self.origin {
            DiskOrigin::Image { image } => Some(image),
            DiskOrigin::Blank | DiskOrigin::Disk { .. } => None,
        }
    }
}

/// What becomes of a VM's disks when it is deleted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DisksOnDelete {
    /// All of them stay.
    Keep,
    /// Those that were created with it go with it; others stay.
    #[default]
    Delete,
}

#[cfg(test)]
mod tests {
    use super::*;
    use expect_test::expect;
    use uuid::Uuid;

    #[test]
    fn records_keep_their_written_form() {
        let disk = Disk {
            id: DiskId(Uuid::from_u128(1)),
            name: "web-1-root".into(),
            pool: PoolId(Uuid::from_u128(2)),
            bytes: Some(Bytes(1 << 30)),
            format: DiskFormat::Qcow2,
            origin: DiskOrigin::Image {
                image: ImageId(Uuid::from_u128(3)),
            },
            made_for: None,
            created_with: Some(VmId(Uuid::from_u128(4))),
            state: DiskState::Ready,
            operation: None,
            created_at: Timestamp::UNIX_EPOCH,
            changed_at: Timestamp::UNIX_EPOCH,
        };
        let text = serde_json::to_string(&disk).unwrap();
        expect![[r#"{"id":"00000000-0000-0000-0000-000000000001","name":"web-1-root","pool":"00000000-0000-0000-0000-000000000002","bytes":1073741824,"format":"qcow2","origin":{"kind":"image","image":"00000000-0000-0000-0000-000000000003"},"created_with":"00000000-0000-0000-0000-000000000004","state":{"state":"ready"},"operation":null,"created_at":"1970-01-01T00:00:00Z","changed_at":"1970-01-01T00:00:00Z"}"#]].assert_eq(&text);
        assert_eq!(serde_json::from_str::<Disk>(&text).unwrap(), disk);
    }
}
