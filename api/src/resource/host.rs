//! Hosts.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use uuid::Uuid;

/// A host of the pool.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Host {
    /// Never changes.
    pub id: Uuid,
    /// Unique in the pool.
    pub name: String,
    /// Where its agent listens.
    pub address: String,
    /// Whether it takes and runs VMs.
    pub state: HostState,
    /// Why it is in this state, when that needs saying.
    pub reason: Option<String>,
    /// What it is.
    pub facts: HostFacts,
    /// What it uses.
    pub usage: HostUsage,
    /// What it can give.
    pub capacity: Capacity,
    /// What its VMs are promised.
    pub committed: Committed,
    /// The maintenance it is in.
    pub maintenance: Option<Uuid>,
    /// When it was last heard from.
    pub last_seen: Option<Timestamp>,
    /// Version of its program.
    pub version: String,
    /// Most bytes per second that all migrations together may send from it, and as many to it; no limit when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub migration_bandwidth_bytes_per_s: Option<u64>,
    /// Its links that are limited.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub links: Vec<HostLink>,
}

/// What all migrations together may send over the link between two hosts, each way.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct HostLink {
    /// The host at the other end.
    pub host: Uuid,
    /// Its name.
    pub host_name: String,
    /// Bytes per second.
    pub bytes_per_s: u64,
}

/// Whether a host takes and runs VMs.
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
pub enum HostState {
    /// It has a certificate and has not yet reported.
    Joining,
    /// It runs VMs and takes new ones.
    Up,
    /// It runs VMs and takes no new ones.
    Cordoned,
    /// It is being emptied or worked on.
    Maintenance,
    /// It is silent.
    Unreachable,
}

/// What a host is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct HostFacts {
    /// CPU.
    pub cpu: CpuFacts,
    /// Logical CPUs.
    pub cores: u32,
    /// Memory in all.
    pub memory_mib: u64,
    /// Memory that guests may use.
    pub guest_memory_mib: u64,
    /// Kernel release.
    pub kernel: String,
    /// New with every boot.
    pub boot_id: Uuid,
}

/// What a host's CPU can give to guests.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct CpuFacts {
    /// Highest named level.
    pub level: super::CpuBaseline,
    /// Equal signatures may exchange guests with baseline `host`.
    pub signature: String,
    /// Model name.
    pub model: String,
}

/// What a host uses.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct HostUsage {
    /// Busy share of all cores together, 0 to 100.
    pub cpu_percent: f64,
    /// Memory that is not available to new work.
    pub memory_used_bytes: u64,
    /// Memory of VMs that have moved away, kept for their return and given up when it is needed.
    #[serde(default)]
    pub kept_memory_bytes: u64,
    /// Stalls.
    pub pressure: Pressure,
}

/// Share of the last ten seconds in which some task stalled, in percent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Pressure {
    /// Waiting for a CPU.
    pub cpu_percent: f64,
    /// Waiting for memory.
    pub memory_percent: f64,
    /// Waiting for I/O.
    pub io_percent: f64,
}

/// What a host can give.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Capacity {
    /// Logical CPUs.
    pub cores: u32,
    /// Memory for guests.
    pub guest_memory_mib: u64,
}

/// What a host's VMs are promised.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Committed {
    /// vCPUs.
    pub vcpus: u32,
    /// Memory.
    pub memory_mib: u64,
    /// VMs.
    pub vms: u32,
}

/// A one-time token with which a host joins the pool.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct JoinToken {
    /// The token; it is shown only now.
    pub token: String,
    /// Address of the server that hosts join at.
    pub server: String,
    /// Command to run on the new host.
    pub command: String,
    /// When the token stops working.
    pub expires_at: Timestamp,
}
