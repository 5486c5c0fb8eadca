//! Saved machines. A snapshot has memory, vCPUs and devices, and no disks.

use godwit_wire::devices::DiskAccess;
use godwit_wire::id::{Epoch, OperationId, PoolId, SnapshotId, VmId};
use godwit_wire::machine::MachineSpec;
use godwit_wire::unit::Bytes;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};

/// A snapshot as stored.
///
/// ```text
/// creating ─▶ ready
///     └─────▶ failed   (nothing is left in the pool)
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Snapshot {
    /// Identity.
    pub id: SnapshotId,
    /// Unique among the snapshots of its VM.
    pub name: String,
    /// The VM.
    pub vm: VmId,
    /// Where it is.
    pub pool: PoolId,
    /// The machine that was saved; the VM must still be that machine to go on from it.
    pub spec: MachineSpec,
    /// Epoch under which it was taken. A machine with writable disks goes on from it only as long as nobody has
    /// claimed them since; its host makes sure of that.
    pub epoch: Epoch,
    /// CPU signature of the host the VM was booted on.
    pub booted_on: Option<String>,
    /// Room it takes; 0 before it is ready.
    pub bytes: Bytes,
    /// How long the guest stood still for it.
    pub pause_us: u64,
    /// Where it stands.
    pub state: SnapshotState,
    /// The operation that is changing it.
    pub operation: Option<OperationId>,
    /// When it was asked for.
    pub created_at: Timestamp,
    /// When this record last changed.
    pub changed_at: Timestamp,
}

/// Where a snapshot stands.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "state", rename_all = "snake_case")]
pub enum SnapshotState {
    /// A host is to take it, or takes it.
    Creating,
    /// A VM can go on from it.
    Ready,
    /// It could not be taken.
    Failed {
        /// Why.
        reason: String,
    },
}

/// What a VM does once it is saved.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AfterSnapshot {
    /// It runs on.
    #[default]
    GoOn,
    /// It is stopped where it stands: its disks stay as the snapshot knows them.
    Stop,
}

/// The first disk that the guest may write; such a machine cannot run on after it was saved.
pub fn writable_disk(spec: &MachineSpec) -> Option<&str> {
    let disks = spec.devices.disks.iter();
    disks
        .filter(|disk| disk.access == DiskAccess::ReadWrite)
        .map(|disk| disk.name.as_str())
        .next()
}
