//! Bodies of requests.

use super::{CloudInit, ConsoleKind, CreateVmDisk, CreateVmNic, MemoryBacking, Vsock};
use super::{
    LeasePolicy, MachineSpec, PostCopyPermission, ReturnPolicy, VmMaintenancePolicy, VmOverride,
};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

fn yes() -> bool {
    true
}

/// Creates a VM. Give either `spec` or `template`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CreateVm {
    /// Unique in the pool: `a`-`z`, digits, `.` and `-`, at most 63.
    pub name: String,
    /// The machine.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub spec: Option<MachineSpec>,
    /// A ready-made machine.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub template: Option<VmTemplate>,
    /// Its disks, in the order the guest finds them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub disks: Vec<CreateVmDisk>,
    /// Its network cards, in the order the guest finds them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub nics: Vec<CreateVmNic>,
    /// What cloud-init finds; no seed disk when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cloud_init: Option<CloudInit>,
    /// Sockets between guest and host; none when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vsock: Option<Vsock>,
    /// Which console the serial stream talks to.
    #[serde(default)]
    pub console: ConsoleKind,
    /// How its host backs its memory.
    #[serde(default)]
    pub memory_backing: MemoryBacking,
    /// Whether it starts at once.
    #[serde(default = "yes")]
    pub start: bool,
    /// Id or name of the host to place it on; the best one when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub host: Option<String>,
    /// What it does when its host loses contact.
    #[serde(default)]
    pub lease: LeasePolicy,
    /// What a maintenance does with it.
    #[serde(default)]
    pub maintenance_policy: VmMaintenancePolicy,
    /// Whether migrations may let the guest go ahead of its memory.
    #[serde(default)]
    pub post_copy: PostCopyPermission,
}

/// A ready-made machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema, clap::ValueEnum)]
#[serde(rename_all = "snake_case")]
pub enum VmTemplate {
    /// The pilot with 1 vCPU and 64 MiB.
    Pilot,
}

/// Changes a VM; absent fields stay as they are.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ChangeVm {
    /// A new name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// A new machine; only while the VM is off.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub spec: Option<MachineSpec>,
    /// All its disks anew; only while the VM is off. Disks that are left out stay in their pools.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disks: Option<Vec<CreateVmDisk>>,
    /// All its network cards anew; only while the VM is off. A card that keeps name and network keeps its addresses.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub nics: Option<Vec<CreateVmNic>>,
    /// What cloud-init finds; only while the VM is off.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cloud_init: Option<CloudInit>,
    /// Sockets between guest and host; only while the VM is off.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vsock: Option<Vsock>,
    /// Which console the serial stream talks to; only while the VM is off.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub console: Option<ConsoleKind>,
    /// How its host backs its memory; only while the VM is off.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory_backing: Option<MemoryBacking>,
    /// Memory the guest shall live with, in MiB: its balloon takes the rest until the VM is stopped, and all of it gives
    /// everything back. Only while the VM runs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub keep_memory_mib: Option<u64>,
    /// What it does when its host loses contact; only while the VM is off.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lease: Option<LeasePolicy>,
    /// What a maintenance does with it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub maintenance_policy: Option<VmMaintenancePolicy>,
    /// Whether migrations may let the guest go ahead of its memory; holds for those that begin from now on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub post_copy: Option<PostCopyPermission>,
}

/// What becomes of a VM's disks when it is deleted.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema, clap::ValueEnum,
)]
#[serde(rename_all = "snake_case")]
pub enum DeleteDisks {
    /// All of them stay.
    Keep,
    /// Those that were created with it are deleted; others stay.
    #[default]
    Delete,
}

/// Stops a VM.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct StopVm {
    /// How.
    #[serde(default)]
    pub mode: StopMode,
    /// How long the guest is given before it is killed; 30 s when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub timeout_ms: Option<u64>,
}

/// How a VM is stopped.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum StopMode {
    /// The guest is asked first.
    #[default]
    Graceful,
    /// At once.
    Kill,
}

/// Moves a running VM to another host.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct MigrateVm {
    /// Id or name of the host to go to; the best one when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub target: Option<String>,
    /// Limits.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub policy: Option<MigrationPolicy>,
    /// What becomes of disks that the target does not see; `shared_only` when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disks: Option<MigrateDisks>,
    /// Id or name, at the target, of the storage pool that disks go to which move along; one of the same name, else the
    /// roomiest, when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disk_pool: Option<String>,
}

/// What becomes of a VM's disks that the target of a migration does not see.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum MigrateDisks {
    /// They keep the VM from going there.
    SharedOnly,
    /// Their content moves along, into a storage pool of the target with room for all of it.
    Along,
}

/// Starts a VM.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct StartVm {
    /// Id or name of the host to start it on; the best one when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub host: Option<String>,
}

/// Takes a host out of use.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct HostReason {
    /// Why; shown to everyone who looks.
    #[serde(default)]
    pub reason: String,
}

/// Changes what migrations may use of a host and its links; absent fields stay as they are. Those that run share what they
/// may use.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ChangeHost {
    /// Most bytes per second that all migrations together may send from it, and as many to it; 0 for no limit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub migration_bandwidth_bytes_per_s: Option<u64>,
    /// The same for its links, each way; those that are not named stay as they are.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub link_bandwidth: Vec<LinkBandwidth>,
}

/// What all migrations together may send over the link to another host, each way.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct LinkBandwidth {
    /// Id or name of the other host.
    pub host: String,
    /// Bytes per second; 0 for no limit.
    pub bytes_per_s: u64,
}

/// Limits of one migration; absent ones have their usual values.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct MigrationPolicy {
    /// Longest time the guest may stand still; 300 ms when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub downtime_limit_ms: Option<u64>,
    /// Most rounds before the migration gives up; 30 when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_rounds: Option<u32>,
    /// How the target proves that it holds everything.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub verify: Option<Verify>,
    /// Connections that carry pages, at most 16; the source chooses when absent or 0.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lanes: Option<u32>,
    /// Most bytes per second on all of them together; no limit when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_bandwidth_bytes_per_s: Option<u64>,
    /// Most of their time, in percent and at most 99, that vCPUs may be kept from running when the guest dirties
    /// memory faster than it can be sent; 0 never slows the guest; 80 when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_throttle_percent: Option<u32>,
    /// Whether pages are compressed; `auto` when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub compression: Option<Compression>,
    /// Whether the guest may run at the target before all of its memory is there, when it cannot be brought below the
    /// downtime limit otherwise: until the rest has followed, the loss of either host loses the running guest. Not
    /// allowed when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub allow_postcopy: Option<bool>,
    /// The migration ends, one way or the other, within this time; no limit when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub deadline_s: Option<u64>,
}

/// Whether a migration compresses pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema, clap::ValueEnum)]
#[serde(rename_all = "snake_case")]
pub enum Compression {
    /// Where it was measured to be faster than sending them as they are.
    Auto,
    /// Never.
    Off,
}

/// How the target of a migration proves that it holds everything.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema, clap::ValueEnum)]
#[serde(rename_all = "snake_case")]
pub enum Verify {
    /// A checksum per frame, page counts and a checksum of the state.
    Frames,
    /// Also a hash of all guest memory, which lengthens the blackout.
    WholeMemory,
}

/// Plans a maintenance of a host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CreateMaintenance {
    /// Id or name of the host.
    pub host: String,
    /// Why; shown to everyone who looks.
    #[serde(default)]
    pub reason: String,
    /// What happens afterwards to the VMs that left.
    #[serde(default, rename = "return")]
    pub returning: ReturnPolicy,
    /// Other policies for single VMs.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub overrides: Vec<VmOverride>,
}

/// Calls a maintenance off.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CancelMaintenance {
    /// Whether VMs that have left already come home.
    #[serde(default = "yes")]
    pub restore: bool,
}

/// Makes a token with which a host can join.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CreateJoinToken {
    /// How long it can be used; one hour when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ttl_s: Option<u64>,
}

impl Default for CancelMaintenance {
    fn default() -> Self {
        Self { restore: true }
    }
}
