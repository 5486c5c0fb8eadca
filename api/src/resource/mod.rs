//! The resources of the REST API: what is promised to its users, and nothing of the inside.
//!
//! The server converts the controller's view into these at the edge; the command line reads them back. JSON is
//! snake_case, times are RFC 3339 in UTC, numbers carry their unit in their name.

mod device;
mod event;
mod host;
mod maintenance;
mod migration;
mod network;
mod operation;
mod problem;
mod request;
mod snapshot;
mod storage;
mod vm;

pub use device::{
    CloudInit, ConsoleKind, CreateVmDisk, CreateVmNic, DiskAccess, DiskFormat, DiskLimits,
    MemoryBacking, NicLimits, OnIoError, VmDisk, VmNic, Vsock,
};
pub use event::{Deleted, Event, Severity};
pub use host::{
    Capacity, Committed, CpuFacts, Host, HostFacts, HostLink, HostState, HostUsage, JoinToken,
    Pressure,
};
pub use maintenance::{
    Blocker, Maintenance, MaintenanceMove, MaintenancePlan, MaintenancePolicy, MaintenanceState,
    MoveAction, MovedState, PlannedMove, ReturnPolicy, VmOverride,
};
pub use migration::{
    Blackout, DirtyReading, Forecast, ForecastFigures, ForecastOption, ForecastReason, Foreseen,
    Migration, MigrationDisk, MigrationOutlook, MigrationPhase, MigrationProgress, MigrationState,
    PostCopy, VcpuBusy,
};
pub use network::{CreateNetwork, Lease, Network, NetworkAccepted, Subnet, Transport};
pub use operation::{
    HostAccepted, MaintenanceAccepted, Operation, OperationState, Step, StepState, Subject,
    SubjectKind, VmAccepted,
};
pub use problem::{FieldProblem, Problem};
pub use request::{
    CancelMaintenance, ChangeHost, ChangeVm, Compression, CreateJoinToken, CreateMaintenance,
    CreateVm, DeleteDisks, HostReason, LinkBandwidth, MigrateDisks, MigrateVm, MigrationPolicy,
    StartVm, StopMode, StopVm, Verify, VmTemplate,
};
pub use snapshot::{CreateSnapshot, RestoreSnapshot, Snapshot, SnapshotAccepted, SnapshotState};
pub use storage::{
    CreateDisk, CreateImage, Disk, DiskAccepted, DiskState, GrowDisk, Image, ImageAccepted,
    ImageSource, ImageState, Pool, PoolHost,
};
pub use vm::{
    Boot, CpuBaseline, LeasePolicy, MachineSpec, MachineType, PostCopyPermission, PowerIntent, Vm,
    VmMaintenancePolicy, VmState, VmUsage,
};

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// One page of a list.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct List<T> {
    /// The items of this page, sorted by id.
    pub items: Vec<T>,
    /// Cursor of the next page; null on the last one.
    pub next: Option<String>,
    /// Revision of the store this page was taken at; events after it are not yet in these items.
    pub revision: u64,
}

/// What a change would do; nothing was changed.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct DryRun {
    /// Always true, so that an answer cannot be mistaken for a change.
    pub dry_run: bool,
    /// What would happen, in order, one sentence each.
    pub changes: Vec<String>,
    /// Where the VM would go, when one would be placed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub placement: Option<Placement>,
    /// Every move, when VMs would be moved.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub plan: Option<MaintenancePlan>,
    /// What would become of it, when a VM would be migrated.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub forecast: Option<Forecast>,
}

/// The host a VM would be placed on, and why not the others.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Placement {
    /// The chosen host.
    pub host: uuid::Uuid,
    /// Its name.
    pub host_name: String,
    /// From 0 to 1: room left and CPU idle after the VM has come.
    pub score: f64,
    /// Hosts that were turned down.
    pub rejections: Vec<Rejection>,
}

/// Why a host was turned down.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Rejection {
    /// The host.
    pub host: uuid::Uuid,
    /// Its name.
    pub host_name: String,
    /// Name of the filter that turned it down.
    pub kind: String,
    /// What did not fit, with the numbers.
    pub detail: String,
    /// What to do about it.
    pub remedy: String,
}
