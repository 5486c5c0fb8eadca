//! What the control plane and the host agents say to each other: HTTP + JSON over mutual TLS, both ways.
//!
//! The agent serves (only to the pool's server certificate):
//!
//! | method and path | body | answer |
//! |---|---|---|
//! | `GET /v1/host` | | [`HostReport`] |
//! | `PUT /v1/vms/{vm}` | [`StartVm`] | [`VmReport`] |
//! | `POST /v1/vms/{vm}/stop` | [`StopVm`] | [`VmReport`] |
//! | `POST /v1/vms/{vm}/pause`, `/resume` | [`VmCommand`] | [`VmReport`] |
//! | `POST /v1/vms/{vm}/balloon` | [`SetBalloon`] | [`VmReport`] |
//! | `PUT /v1/vms/{vm}/incoming` | [`PrepareIncoming`] | [`IncomingReady`](crate::vmm_api::IncomingReady) |
//! | `POST /v1/vms/{vm}/outgoing` | [`StartOutgoing`] | [`VmReport`] |
//! | `POST /v1/vms/{vm}/dirty-rate` | [`DirtyRateRequest`](crate::vmm_api::DirtyRateRequest) | [`DirtyRate`](crate::vmm_api::DirtyRate) |
//! | `POST /v1/vms/{vm}/migration/cancel` | [`CancelMigration`] | [`VmReport`] |
//! | `POST /v1/vms/{vm}/migration/bandwidth` | [`MigrationBandwidth`](crate::vmm_api::MigrationBandwidth) | [`VmReport`] |
//! | `POST /v1/vms/{vm}/upgrade` | [`UpgradeVm`] | [`UpgradedVm`]; the machine runs in a VMM of the agent's program then |
//! | `DELETE /v1/vms/{vm}?epoch=E` | | `204`; kills what is left of the VM and forgets it |
//! | `POST /v1/pools/{pool}/images/{image}` | [`ImportImage`](crate::storage::ImportImage) | [`ImageReport`](crate::storage::ImageReport) |
//! | `PUT /v1/pools/{pool}/images/{image}/content` | the bytes | [`ImageReport`](crate::storage::ImageReport) |
//! | `GET`, `DELETE /v1/pools/{pool}/images/{image}` | | [`ImageReport`](crate::storage::ImageReport); `204` |
//! | `POST /v1/pools/{pool}/disks/{disk}` | [`CreateDisk`](crate::storage::CreateDisk) | [`DiskReport`](crate::storage::DiskReport) |
//! | `POST /v1/pools/{pool}/disks/{disk}/grow` | [`GrowDisk`](crate::storage::GrowDisk) | [`DiskReport`](crate::storage::DiskReport) |
//! | `GET`, `DELETE /v1/pools/{pool}/disks/{disk}` | | [`DiskReport`](crate::storage::DiskReport); `204` |
//! | `POST /v1/vms/{vm}/snapshots/{snapshot}` | [`TakeSnapshot`](crate::storage::TakeSnapshot) | [`SnapshotReport`](crate::storage::SnapshotReport) |
//! | `GET`, `DELETE /v1/pools/{pool}/snapshots/{snapshot}` | | [`SnapshotReport`](crate::storage::SnapshotReport); `204` |
//! | `GET /v1/vms/{vm}/serial` | `Upgrade: godwit-serial` | raw bytes both ways, first the ring's content |
//!
//! The deletion of a disk with `?made_for=`, a migration's id or `none`, leaves alone what was not made for that
//! ([`made_for`](crate::storage::DiskReport::made_for)).
//!
//! The server serves to agents:
//!
//! | method and path | body | answer |
//! |---|---|---|
//! | `POST /v1/join` | [`JoinRequest`] (no client certificate) | [`JoinReply`] |
//! | `POST /v1/heartbeat` | [`Heartbeat`] | [`HeartbeatReply`] |
//! | `POST /v1/migrations/{migration}/commit` | [`CommitRequest`] | [`CommitReply`] |
//! | `POST /v1/migrations/{migration}/resolve` | [`ResolveRequest`] | [`Resolution`] |
//!
//! Errors are [`Problem`](crate::problem::Problem) bodies: `stale-epoch`, `stale-generation`, `not-found`,
//! `invalid-request`, and others that name what stood in the way.

use crate::id::{Epoch, Generation, HostId, MigrationId, SuccessionId, VmId};
use crate::machine::{CpuFacts, MachineSpec};
use crate::migration::{
    MigrationIdentity, MigrationPolicy, MigrationRole, MigrationStatus, MigrationToken,
};
use crate::network::{Network, Peers};
use crate::storage::{PoolReport, RestoreFrom};
use crate::succession::SuccessionBlackout;
use crate::unit::Mib;
use crate::usage::{HostUsage, VmUsage};
use crate::vmm_api::VmmState;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use uuid::Uuid;

/// Token of the HTTP upgrade that carries a serial console.
pub const SERIAL_UPGRADE: &str = "godwit-serial";

/// Most VMs on one host; bounds every list in this API.
pub const MAX_VMS_PER_HOST: usize = 1024;

/// How often an idle agent sends a heartbeat. A change of any VM's state or migration phase sends one at once,
/// and a migration under way one every [`HEARTBEAT_BUSY_MS`].
pub const HEARTBEAT_MS: u64 = 1_000;
/// See [`HEARTBEAT_MS`].
pub const HEARTBEAT_BUSY_MS: u64 = 250;

/// What a host is; changes only with a new boot or a new version.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostFacts {
    /// Name the operator knows it by.
    pub name: String,
    /// Where its agent listens for the control plane.
    pub address: SocketAddr,
    /// CPU.
    pub cpu: CpuFacts,
    /// Logical CPUs.
    pub cores: u32,
    /// Memory in all.
    pub memory_mib: Mib,
    /// Memory that guests may use: all of it less what the host keeps for itself.
    pub guest_memory_mib: Mib,
    /// Kernel release.
    pub kernel: String,
    /// Version of the program.
    pub version: String,
    /// `/proc/sys/kernel/random/boot_id`: a new one proves that everything from before is gone.
    pub boot_id: Uuid,
}

/// One VM on a host, as the agent sees it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct VmReport {
    /// Which VM.
    pub vm: VmId,
    /// Epoch it has here.
    pub epoch: Epoch,
    /// Latest generation the agent has carried out.
    pub generation: Generation,
    /// What its VMM does; `None` when the VMM process is gone without having been told to go.
    pub state: Option<VmmState>,
    /// What it uses.
    pub usage: VmUsage,
    /// Its latest migration.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub migration: Option<MigrationStatus>,
    /// Counters of its devices, in every [`COUNTERS_EVERY`]th heartbeat; absent means as last told.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub devices: Option<Vec<DeviceCounters>>,
}

/// Heartbeats from one with the counters of devices to the next.
pub const COUNTERS_EVERY: u64 = 10;
/// Most devices of a VM, and most counters of one, that are told of.
pub const MAX_COUNTED: usize = 64;

/// Counters of one device of a VM, since its machine was built.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceCounters {
    /// Name in the spec, or `rng`, `balloon`, `console`, `vsock`, `seed`.
    pub name: String,
    /// `block`, `net`, …
    pub kind: String,
    /// By name: `a`-`z` and `_`.
    pub counters: BTreeMap<String, u64>,
}

/// Everything an agent knows.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct HostReport {
    /// Facts.
    pub facts: HostFacts,
    /// Use of the host.
    pub usage: HostUsage,
    /// Its VMs, sorted by id, at most [`MAX_VMS_PER_HOST`].
    pub vms: Vec<VmReport>,
    /// Its storage pools.
    #[serde(default)]
    pub pools: Vec<PoolReport>,
}

/// Starts a VM; repeated with the same generation it changes nothing.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StartVm {
    /// Name for logs and process titles.
    pub name: String,
    /// Epoch under which this host owns it.
    pub epoch: Epoch,
    /// Order of commands.
    pub generation: Generation,
    /// The machine.
    pub spec: MachineSpec,
    /// Whether the VM must stop when this host's lease runs out.
    pub lease: LeasePolicy,
    /// The networks its cards are plugged into.
    #[serde(default)]
    pub networks: Vec<Network>,
    /// What it goes on from; it boots when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub restore: Option<RestoreFrom>,
}

/// What a VM does when its host loses contact with the control plane.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LeasePolicy {
    /// It stops itself when the lease ends, so that it can be started elsewhere.
    #[default]
    Watched,
    /// It goes on; it is never started elsewhere without proof that this host is off.
    Unwatched,
}

/// How a VM is stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum StopMode {
    /// The guest is asked and given this long, then killed.
    Graceful {
        /// How long to wait.
        timeout_ms: u64,
    },
    /// At once.
    Kill,
}

/// Stops a VM; answers when it has stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StopVm {
    /// Epoch under which this host owns it.
    pub epoch: Epoch,
    /// Order of commands.
    pub generation: Generation,
    /// How.
    pub mode: StopMode,
}

/// Pauses or resumes a VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmCommand {
    /// Epoch under which this host owns it.
    pub epoch: Epoch,
    /// Order of commands.
    pub generation: Generation,
}

/// Asks a VM's guest to live with so much memory and give the rest back.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SetBalloon {
    /// Epoch under which this host owns it.
    pub epoch: Epoch,
    /// Order of commands.
    pub generation: Generation,
    /// Memory the guest keeps; its full size gives everything back to it.
    pub keep_mib: Mib,
}

/// Makes this host ready to receive a VM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PrepareIncoming {
    /// Name for logs.
    pub name: String,
    /// Epoch under which the source owns it (the target will run under a later one).
    pub epoch: Epoch,
    /// Order of commands.
    pub generation: Generation,
    /// The machine.
    pub spec: MachineSpec,
    /// As in [`StartVm`].
    pub lease: LeasePolicy,
    /// The networks its cards are plugged into.
    #[serde(default)]
    pub networks: Vec<Network>,
    /// The migration.
    pub migration: MigrationId,
    /// As in [`IncomingRequest`](crate::vmm_api::IncomingRequest).
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub arriving_disks: BTreeSet<String>,
    /// What the target's VMM proves itself with.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub identity: Option<MigrationIdentity>,
}

/// Makes this host send a VM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StartOutgoing {
    /// Epoch under which this host owns it.
    pub epoch: Epoch,
    /// Order of commands.
    pub generation: Generation,
    /// The migration.
    pub migration: MigrationId,
    /// Where the target's VMM listens.
    pub target: SocketAddr,
    /// The token it gave out.
    pub token: MigrationToken,
    /// Limits.
    pub policy: MigrationPolicy,
    /// As in [`OutgoingRequest`](crate::vmm_api::OutgoingRequest).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fixed_cost_us: Option<u64>,
    /// As in [`OutgoingRequest`](crate::vmm_api::OutgoingRequest).
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub leaving_disks: BTreeSet<String>,
    /// What the source's VMM proves itself with.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub identity: Option<MigrationIdentity>,
}

/// Calls a migration off at one end. Asked of the source before anything is final; asked of the target it
/// destroys the half-filled machine. Refused with `409 too-late` when only the store can decide.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CancelMigration {
    /// The migration.
    pub migration: MigrationId,
    /// Epoch of the VM at the source.
    pub epoch: Epoch,
}

/// Lets a VMM of the agent's own program take the machine over, its memory as it is. A machine that runs in one already
/// is left alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct UpgradeVm {
    /// Epoch under which this host owns it; it stays.
    pub epoch: Epoch,
    /// The attempt: repeated with the same one, the answer is the same.
    pub succession: SuccessionId,
}

/// In what the machine runs now.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct UpgradedVm {
    /// What was done.
    pub outcome: UpgradeOutcome,
    /// Process id of its VMM.
    pub pid: u32,
    /// How long the guest stood still.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub blackout: Option<SuccessionBlackout>,
}

/// What an upgrade did.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum UpgradeOutcome {
    /// Another process runs the machine.
    Upgraded,
    /// It ran in a VMM of the agent's program before.
    Current,
}

/// A host asks to become part of the pool.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct JoinRequest {
    /// Secret part of the one-time token.
    pub token: String,
    /// PKCS #10 request for the host's key, PEM.
    pub csr_pem: String,
    /// What it is.
    pub facts: HostFacts,
}

/// The host is part of the pool.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct JoinReply {
    /// Its identity; also the certificate's common name.
    pub host: HostId,
    /// Its certificate, PEM.
    pub certificate_pem: String,
    /// The pool's CA certificate, PEM.
    pub ca_pem: String,
}

/// Sent by an agent to renew its lease and say how things are.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Heartbeat {
    /// Who.
    pub host: HostId,
    /// New with every start of the agent process.
    pub incarnation: Uuid,
    /// Grows with every heartbeat of an incarnation.
    pub sequence: u64,
    /// Number of the latest reply whose orders this incarnation has carried out, all of them; 0 before the first.
    #[serde(default)]
    pub obeyed: u64,
    /// Everything it knows.
    pub report: HostReport,
}

/// What the server answers to a heartbeat.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HeartbeatReply {
    /// Grows with every reply of a server process to this host; echoed as [`Heartbeat::obeyed`]. 0: nothing to
    /// acknowledge.
    #[serde(default)]
    pub number: u64,
    /// The lease now ends this long after the agent *sent* the heartbeat.
    pub lease_ms: u64,
    /// Things to put right at once.
    #[serde(default)]
    pub orders: Vec<Order>,
    /// Addresses of all hosts of the pool.
    #[serde(default)]
    pub peers: Peers,
}

/// Something the store knows and the agent does not.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "order", rename_all = "snake_case")]
pub enum Order {
    /// Another host owns this VM, or nobody does: kill what is here if its epoch is at most this one.
    Destroy {
        /// Which VM.
        vm: VmId,
        /// Highest epoch to kill.
        epoch: Epoch,
    },
    /// This VM stopped itself when the lease ran out, and is still this host's: let it run again.
    Resume {
        /// Which VM.
        vm: VmId,
        /// Epoch it must have.
        epoch: Epoch,
    },
}

/// The target holds a whole, verified machine and asks for the commit. Safe to repeat.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CommitRequest {
    /// Which VM.
    pub vm: VmId,
    /// The target host.
    pub host: HostId,
    /// Epoch the source had.
    pub epoch: Epoch,
}

/// The store's decision; it stands for ever.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "decision", rename_all = "snake_case")]
pub enum CommitReply {
    /// The target owns the VM under this epoch and may run it.
    Granted {
        /// The new epoch.
        epoch: Epoch,
    },
    /// The migration is void: destroy what was received.
    Refused {
        /// Why.
        reason: String,
    },
}

/// One end asks what became of a migration whose other end is silent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ResolveRequest {
    /// Which VM.
    pub vm: VmId,
    /// The asking host.
    pub host: HostId,
    /// Which end it is.
    pub role: MigrationRole,
    /// Epoch of the VM at the source.
    pub epoch: Epoch,
}

/// What the asking end has to do; a source's question voids a migration that is still open.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "resolution", rename_all = "snake_case")]
pub enum Resolution {
    /// Source: the migration is void, run again.
    RunHere {
        /// Epoch to run under.
        epoch: Epoch,
    },
    /// The VM belongs elsewhere: end what is here.
    End,
    /// Target: still open, ask for the commit or wait.
    Open,
}
