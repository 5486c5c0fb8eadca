//! Saved machines.

use super::Operation;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use uuid::Uuid;

/// A saved machine: memory, vCPUs and devices, and no disks.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Snapshot {
    /// Never changes.
    pub id: Uuid,
    /// Unique among the snapshots of its VM.
    pub name: String,
    /// The VM.
    pub vm: Uuid,
    /// Name of the VM.
    pub vm_name: String,
    /// Where it is.
    pub pool: Uuid,
    /// Name of that pool.
    pub pool_name: String,
    /// Where it stands.
    pub state: SnapshotState,
    /// Why it is in this state, when that needs saying.
    pub reason: Option<String>,
    /// Whether the VM has writable disks: it goes on from it only until a disk is claimed again, by whomever.
    pub needs_disks: bool,
    /// Room it takes; 0 before it is ready.
    pub bytes: u64,
    /// How long the guest stood still for it.
    pub pause_us: u64,
    /// The operation under way.
    pub operation: Option<Uuid>,
    /// When it was asked for.
    pub created_at: Timestamp,
    /// When it last changed.
    pub changed_at: Timestamp,
}

/// Where a snapshot stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum SnapshotState {
    /// It is being taken.
    Creating,
    /// The VM can go on from it.
    Ready,
    /// It could not be taken; nothing is left of it.
    Failed,
}

/// Saves a VM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CreateSnapshot {
    /// Unique among the VM's snapshots: `a`-`z`, digits, `.` and `-`, at most 63.
    pub name: String,
    /// Id or name of the storage pool; that of the VM's first disk, or the only choice, when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pool: Option<String>,
    /// Whether the VM stops with it. One with writable disks must, because a snapshot does not hold them.
    #[serde(default)]
    pub stop: bool,
}

/// Lets a VM that is off go on from where it was saved.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct RestoreSnapshot {
    /// Id or name of the host to start it on; the best one when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub host: Option<String>,
}

/// A change to a snapshot was accepted.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct SnapshotAccepted {
    /// What carries it out.
    pub operation: Option<Operation>,
    /// The snapshot as it is now.
    pub snapshot: Snapshot,
}
