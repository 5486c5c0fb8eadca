//! Virtual machines.

use super::{CloudInit, ConsoleKind, MemoryBacking, Migration, VmDisk, VmNic, Vsock};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use uuid::Uuid;

/// A virtual machine.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Vm {
    /// Never changes.
    pub id: Uuid,
    /// Unique in the pool.
    pub name: String,
    /// The machine the guest sees.
    pub spec: MachineSpec,
    /// Its disks, in the order the guest finds them.
    #[serde(default)]
    pub disks: Vec<VmDisk>,
    /// Its network cards, in the order the guest finds them.
    #[serde(default)]
    pub nics: Vec<VmNic>,
    /// What cloud-init finds.
    #[serde(default)]
    pub cloud_init: Option<CloudInit>,
    /// Sockets between guest and host.
    #[serde(default)]
    pub vsock: Option<Vsock>,
    /// Which console the serial stream talks to.
    #[serde(default)]
    pub console: ConsoleKind,
    /// How its host backs its memory.
    #[serde(default)]
    pub memory_backing: MemoryBacking,
    /// What the operator wants.
    pub intent: PowerIntent,
    /// What is.
    pub state: VmState,
    /// Why it is in this state, when that needs saying.
    pub reason: Option<String>,
    /// The host that owns it.
    pub host: Option<Uuid>,
    /// Name of that host.
    pub host_name: Option<String>,
    /// The host it returns to after a maintenance.
    pub home: Option<Uuid>,
    /// Grows by one each time the VM is given to a host.
    pub epoch: u64,
    /// What it does when its host loses contact.
    pub lease: LeasePolicy,
    /// What a maintenance does with it.
    pub maintenance_policy: VmMaintenancePolicy,
    /// Whether migrations may let the guest go ahead of its memory.
    #[serde(default)]
    pub post_copy: PostCopyPermission,
    /// What it uses.
    pub usage: VmUsage,
    /// The migration under way.
    pub migration: Option<Migration>,
    /// The operation under way.
    pub operation: Option<Uuid>,
    /// When it was created.
    pub created_at: Timestamp,
    /// When its state last changed.
    pub changed_at: Timestamp,
}

/// The machine a VM is: the same on every host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct MachineSpec {
    /// Versioned platform.
    #[serde(default)]
    pub machine_type: MachineType,
    /// Number of vCPUs, 1 to 64.
    #[schema(minimum = 1, maximum = 64)]
    pub vcpus: u8,
    /// Guest memory.
    #[schema(minimum = 16, maximum = 262144)]
    pub memory_mib: u64,
    /// What it boots.
    pub boot: Boot,
    /// CPU features the guest sees.
    #[serde(default)]
    pub cpu: CpuBaseline,
}

/// A versioned machine platform.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub enum MachineType {
    /// In-kernel irqchip, COM1, ACPI.
    #[serde(rename = "godwit-1")]
    Godwit1,
    /// With a PCI Express bus, virtio devices and a power button.
    #[default]
    #[serde(rename = "godwit-2")]
    Godwit2,
}

/// What a machine boots.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Boot {
    /// The test and demo guest that is built into the program.
    Pilot,
    /// A Linux kernel: bzImage, or an uncompressed x86-64 ELF.
    Linux {
        /// Path of the kernel on the host.
        kernel: String,
        /// Path of the initial RAM disk on the host.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        initrd: Option<String>,
        /// Kernel command line.
        #[serde(default)]
        cmdline: String,
    },
}

/// Named CPU feature level.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema, clap::ValueEnum,
)]
pub enum CpuBaseline {
    /// SSE4.2, POPCNT, CMPXCHG16B.
    #[default]
    #[serde(rename = "x86-64-v2")]
    #[value(name = "x86-64-v2")]
    V2,
    /// AVX2, BMI, FMA, MOVBE.
    #[serde(rename = "x86-64-v3")]
    #[value(name = "x86-64-v3")]
    V3,
    /// AVX-512 F, BW, CD, DQ, VL.
    #[serde(rename = "x86-64-v4")]
    #[value(name = "x86-64-v4")]
    V4,
    /// Whatever the host has; moves only between equal CPUs.
    #[serde(rename = "host")]
    #[value(name = "host")]
    Host,
}

/// What the operator wants of a VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum PowerIntent {
    /// It shall run.
    Running,
    /// It shall not run.
    Stopped,
    /// It shall be there and stand still.
    Paused,
}

/// What a VM is doing.
#[derive(
    Clone,
    Copy,
    Debug,
    PartialEq,
    Eq,
    PartialOrd,
    Ord,
    Serialize,
    Deserialize,
    ToSchema,
    clap::ValueEnum,
)]
#[serde(rename_all = "snake_case")]
#[value(rename_all = "snake_case")]
pub enum VmState {
    /// Waits to be placed.
    Pending,
    /// A host is starting it.
    Starting,
    /// It runs.
    Running,
    /// It stands still.
    Paused,
    /// It runs and is moving to another host.
    Migrating,
    /// A host is stopping it.
    Stopping,
    /// It is off.
    Stopped,
    /// It could not be started or ended by itself.
    Failed,
    /// Its host is silent.
    Unreachable,
    /// Its host is silent, and it must not start elsewhere without proof that the host is off.
    AwaitingFence,
}

/// What a VM does when its host loses contact with the control plane.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema, clap::ValueEnum,
)]
#[serde(rename_all = "snake_case")]
pub enum LeasePolicy {
    /// It stops itself when the host's lease ends, so that it can be started elsewhere.
    #[default]
    Watched,
    /// It goes on, and is never started elsewhere without proof that its host is off.
    Unwatched,
}

/// What a maintenance of its host does with a VM.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema, clap::ValueEnum,
)]
#[serde(rename_all = "snake_case")]
pub enum VmMaintenancePolicy {
    /// Move it live.
    #[default]
    Migrate,
    /// Stop it and start it on another host.
    RestartElsewhere,
    /// Stop it and start it again on this host afterwards.
    StopAndReturn,
    /// Do not touch it: the maintenance waits for the operator.
    Block,
}

/// Whether migrations of a VM may use post-copy, whoever asks for them.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema, clap::ValueEnum,
)]
#[serde(rename_all = "snake_case")]
pub enum PostCopyPermission {
    /// Those that are asked to.
    #[default]
    Allowed,
    /// None: one that asks for it is refused.
    Forbidden,
}

/// What a VM uses.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct VmUsage {
    /// In percent of one core.
    pub cpu_percent: f64,
    /// Resident memory of its VMM process.
    pub rss_bytes: u64,
    /// Exits from guest mode.
    pub exits_per_s: f64,
    /// Guest memory dirtied.
    pub dirty_bytes_per_s: u64,
}
