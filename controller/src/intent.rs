//! What can be asked of the controller, and what it answers.

mod devices;

pub use devices::{
    NewDevices, NewDisk, NewDiskSource, NewImage, NewNetwork, NewNic, NewSnapshot, NewVmDisk,
    NicAddress,
};

use crate::model::{
    DisksOnDelete, DisksOnMove, HostRejection, MaintenancePlan, MaintenancePolicy,
    PostCopyPermission, PowerIntent, RestoreOnCancel, ReturnPolicy,
};
use crate::plan::forecast::Forecast;
use godwit_wire::host_api::{LeasePolicy, StopMode};
use godwit_wire::id::{
    DiskId, HostId, ImageId, MaintenanceId, NetworkId, OperationId, SnapshotId, VmId,
};
use godwit_wire::machine::MachineSpec;
use godwit_wire::migration::MigrationPolicy;
use godwit_wire::unit::{Bytes, Mib};
use serde::Serialize;
use std::collections::BTreeMap;

/// One change asked for. Every one can be previewed, which changes nothing.
#[derive(Clone, Debug, PartialEq)]
pub enum Intent {
    /// Creates a VM, and starts it if it is wanted running.
    CreateVm(NewVm),
    /// Changes what may be changed of a VM.
    ChangeVm {
        /// Which VM.
        vm: VmId,
        /// What to change.
        change: VmChange,
    },
    /// Kills a VM and forgets it.
    DeleteVm {
        /// Which VM.
        vm: VmId,
        /// What becomes of its disks.
        disks: DisksOnDelete,
    },
    /// Places a VM and starts it.
    StartVm {
        /// Which VM.
        vm: VmId,
        /// Only there.
        host: Option<HostId>,
    },
    /// Stops a VM.
    StopVm {
        /// Which VM.
        vm: VmId,
        /// How.
        mode: StopMode,
    },
    /// Stops a VM and starts it on the same host.
    RebootVm {
        /// Which VM.
        vm: VmId,
        /// How to stop it.
        mode: StopMode,
    },
    /// Pauses a VM.
    PauseVm {
        /// Which VM.
        vm: VmId,
    },
    /// Lets a paused VM run.
    ResumeVm {
        /// Which VM.
        vm: VmId,
    },
    /// Moves a VM live.
    MigrateVm {
        /// Which VM.
        vm: VmId,
        /// Only there.
        target: Option<HostId>,
        /// Limits.
        policy: MigrationPolicy,
        /// What becomes of disks that the target does not see.
        disks: DisksOnMove,
    },
    /// Calls an operation off; what cannot be called off any more is finished.
    CancelOperation {
        /// Which.
        operation: OperationId,
    },
    /// No new VMs on a host.
    CordonHost {
        /// Which host.
        host: HostId,
        /// Why.
        reason: String,
    },
    /// New VMs on a host again.
    UncordonHost {
        /// Which host.
        host: HostId,
    },
    /// Moves everything off a host that answers but is failing; it stays cordoned.
    EvacuateHost {
        /// Which host.
        host: HostId,
        /// Why.
        reason: String,
    },
    /// Hands a host's VMs to VMMs of the program that its agent runs, their memory as it is.
    UpgradeHost {
        /// Which host.
        host: HostId,
    },
    /// Changes what migrations may use of a host and its links.
    ChangeHost {
        /// Which host.
        host: HostId,
        /// What to change.
        change: HostChange,
    },
    /// Takes an empty host out of the pool.
    RemoveHost {
        /// Which host.
        host: HostId,
    },
    /// The operator confirms that a host that is given up is off: nothing runs there any more, and its VMs may be
    /// started elsewhere, stopped and deleted, also those that nothing watches.
    ConfirmHostOff {
        /// Which host.
        host: HostId,
    },
    /// Imports an image.
    CreateImage(NewImage),
    /// Deletes an image that no disk is based on.
    DeleteImage {
        /// Which.
        image: ImageId,
    },
    /// Makes a disk.
    CreateDisk(NewDisk),
    /// Makes a disk larger, also while a VM runs with it.
    GrowDisk {
        /// Which.
        disk: DiskId,
        /// Its new size.
        bytes: Bytes,
    },
    /// Deletes a disk that no VM has.
    DeleteDisk {
        /// Which.
        disk: DiskId,
    },
    /// Saves a running or paused VM.
    CreateSnapshot(NewSnapshot),
    /// Starts a VM that is off from where it was saved.
    RestoreSnapshot {
        /// Which.
        snapshot: SnapshotId,
        /// Only there.
        host: Option<HostId>,
    },
    /// Deletes a snapshot.
    DeleteSnapshot {
        /// Which.
        snapshot: SnapshotId,
    },
    /// Makes a network.
    CreateNetwork(NewNetwork),
    /// Deletes a network that no VM is plugged into.
    DeleteNetwork {
        /// Which.
        network: NetworkId,
    },
    /// Plans a maintenance.
    CreateMaintenance(NewMaintenance),
    /// Plans it again and, if nothing stands in the way, drains the host.
    StartMaintenance {
        /// Which.
        maintenance: MaintenanceId,
    },
    /// Calls a maintenance off: the move in flight is finished and the host takes VMs again.
    CancelMaintenance {
        /// Which.
        maintenance: MaintenanceId,
        /// What becomes of VMs that have left.
        restore: RestoreOnCancel,
    },
    /// The work is over: checks the host and brings VMs home.
    FinishMaintenance {
        /// Which.
        maintenance: MaintenanceId,
    },
}

/// A VM to be.
#[derive(Clone, Debug, PartialEq)]
pub struct NewVm {
    /// Unique among the living.
    pub name: String,
    /// The machine, before `devices` are added.
    pub spec: MachineSpec,
    /// Disks, network cards and the rest, as the operator names them.
    pub devices: NewDevices,
    /// What it shall do at once; [`PowerIntent::Paused`] is not accepted.
    pub intent: PowerIntent,
    /// Only there.
    pub host: Option<HostId>,
    /// Whether it stops when its host loses contact.
    pub lease: LeasePolicy,
    /// What happens to it when its host is maintained.
    pub maintenance_policy: MaintenancePolicy,
    /// Whether its migrations may use post-copy.
    pub post_copy: PostCopyPermission,
}

/// What may be changed of a VM; `None` leaves a thing as it is.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct VmChange {
    /// New name.
    pub name: Option<String>,
    /// New machine, whose devices are not looked at; only while the VM is off.
    pub spec: Option<MachineSpec>,
    /// New devices; only while the VM is off.
    pub devices: NewDevices,
    /// Memory the guest shall live with until it is stopped; only while the VM has a machine.
    pub keep_memory: Option<Mib>,
    /// New lease policy; only while the VM is off.
    pub lease: Option<LeasePolicy>,
    /// New maintenance policy.
    pub maintenance_policy: Option<MaintenancePolicy>,
    /// Whether its migrations may use post-copy from now on.
    pub post_copy: Option<PostCopyPermission>,
}

/// What may be changed of a host; what is absent stays as it is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HostChange {
    /// What migrations may send from it, and as much to it.
    pub migration_bandwidth: Option<BandwidthLimit>,
    /// The same for its links, each way, by the host at the other end.
    pub link_bandwidth: BTreeMap<HostId, BandwidthLimit>,
}

/// What all migrations together may use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BandwidthLimit {
    /// All there is.
    None,
    /// So many bytes per second.
    BytesPerS(u64),
}

/// A maintenance to be.
#[derive(Clone, Debug, PartialEq)]
pub struct NewMaintenance {
    /// Which host.
    pub host: HostId,
    /// Why.
    pub reason: String,
    /// How VMs come back.
    pub return_policy: ReturnPolicy,
    /// Policies that differ from the VMs' own, for this maintenance only.
    pub overrides: BTreeMap<VmId, MaintenancePolicy>,
}

/// The request is stored; what takes time goes on as an operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Accepted {
    /// What was created or changed.
    pub resource: Resource,
    /// The operation that carries it out, if it takes one.
    pub operation: Option<OperationId>,
}

/// Something that was created or changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Resource {
    /// A VM.
    Vm(VmId),
    /// A host.
    Host(HostId),
    /// A maintenance.
    Maintenance(MaintenanceId),
    /// An operation.
    Operation(OperationId),
    /// An image.
    Image(ImageId),
    /// A disk.
    Disk(DiskId),
    /// A network.
    Network(NetworkId),
    /// A snapshot.
    Snapshot(SnapshotId),
}

/// What an intent would do.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Preview {
    /// In sentences.
    pub effects: Vec<String>,
    /// Where a VM would go, if one would be placed.
    pub placement: Option<Placement>,
    /// Every move, if VMs would be moved.
    pub plan: Option<MaintenancePlan>,
    /// What will become of a migration.
    pub forecast: Option<Forecast>,
}

/// Where a VM goes, and why not elsewhere.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Placement {
    /// There.
    pub host: HostId,
    /// Its name.
    pub host_name: String,
    /// Its score, 0 to 1: room left and CPU idle after the VM has come.
    pub score: f64,
    /// Hosts that were turned down.
    pub rejections: Vec<HostRejection>,
}

/// A permission to join the pool.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NewJoinToken {
    /// `gwj1.<secret>.<CA SHA-256 in hex>`: shown once, used once.
    pub token: String,
    /// Until when it can be used.
    pub expires_at: jiff::Timestamp,
}
