//! What the controller knows: VMs, hosts, images, disks, networks, maintenances, operations, migrations and events,
//! as they are stored.
//!
//! Every record is JSON in the store. Enums are tagged and new fields carry defaults, so that a newer server
//! reads what an older one wrote.

pub mod limits;

pub mod actor;

pub mod name;

pub mod vm;

pub mod host;

pub mod storage;

pub mod network;

pub mod rejection;

pub mod snapshot;

pub mod moving_disk;

pub mod migration;

pub mod maintenance;

pub mod operation;

pub mod event;

pub use actor::Actor;
pub use event::{Event, Severity, Subject, SubjectKind};
pub use host::{Cordon, DeletedVm, Host, HostState, JoinToken, Liveness, TokenUse};
pub use maintenance::{
    Blocker, BlockerKind, Maintenance, MaintenancePlan, MaintenanceState, MoveAction, MovedState,
    MovedVm, PlannedMove, RestoreOnCancel, ReturnPolicy,
};
pub use migration::{Foreseen, ForeseenOutcome, HeldBack, Migration, MigrationState};
pub use moving_disk::{BlankDisk, DisksOnMove, MovingDisk};
pub use network::Network;
pub use operation::{
    MigrateCause, MoveState, MoveTask, Operation, OperationState, Placed, ProvisionCause,
    StartCause, Step, StepState, UpgradeState, UpgradeTask, Work,
};
pub use rejection::{DiskTie, HostRejection, Rejection};
pub use snapshot::{AfterSnapshot, Snapshot, SnapshotState, writable_disk};
pub use storage::{Disk, DiskState, DisksOnDelete, Image, ImageState};
pub use vm::{MaintenancePolicy, PostCopyPermission, PowerIntent, Retry, Trouble, Vm, VmState};
