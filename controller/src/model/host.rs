//! A host of the pool.

use crate::model::Actor;
use godwit_wire::host_api::HostFacts;
use godwit_wire::id::{Epoch, HostId, MaintenanceId, VmId};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// A host as stored. Whether it answers is not stored: that is observed anew by every server.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Host {
    /// Identity; the common name of its certificate.
    pub id: HostId,
    /// What it said about itself last.
    pub facts: HostFacts,
    /// Set while no new VM may be placed here.
    pub cordon: Option<Cordon>,
    /// The maintenance it is in.
    pub maintenance: Option<MaintenanceId>,
    /// When it joined.
    pub joined_at: Timestamp,
    /// When its first heartbeat came; `None` while it is joining.
    pub first_heard_at: Option<Timestamp>,
    /// Most bytes per second that all migrations together may send from here, and as many to here; no limit when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub migration_bandwidth: Option<u64>,
    /// The same for the links to hosts with a greater id, each way. A link is kept with one of its hosts only.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub link_bandwidth: BTreeMap<HostId, u64>,
}

impl Host {
    /// Name the operator knows it by.
    pub fn name(&self) -> &str {
        &self.facts.name
    }
}

/// Why a host takes no new VMs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cordon {
    /// Why.
    pub reason: String,
    /// Who did it.
    pub actor: Actor,
    /// When.
    pub at: Timestamp,
}

/// What a host is to the pool.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum HostState {
    /// Has a certificate; its first heartbeat has not come yet.
    Joining,
    /// Takes VMs.
    Up,
    /// Keeps what it has and takes no new VMs.
    Cordoned,
    /// Emptied for work on it.
    Maintenance,
    /// Silent.
    Unreachable,
}

impl HostState {
    /// The name in the API.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Joining => "joining",
            Self::Up => "up",
            Self::Cordoned => "cordoned",
            Self::Maintenance => "maintenance",
            Self::Unreachable => "unreachable",
        }
    }
}

/// How a host stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Liveness {
    /// Heard of late.
    Up,
    /// Heartbeats are missing; nothing new is placed there.
    Suspect,
    /// Its lease may be over; the operator is told.
    Unreachable,
    /// Its watched VMs have stopped themselves: they may start elsewhere.
    RestartAllowed,
}

impl Liveness {
    /// Whether the host counts as silent.
    pub const fn is_silent(self) -> bool {
        matches!(self, Self::Unreachable | Self::RestartAllowed)
    }
}

/// A one-time permission to join, stored under the SHA-256 of its secret.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct JoinToken {
    /// Who made it.
    pub actor: Actor,
    /// Until when it can be used.
    pub expires_at: Timestamp,
    /// The host that used it. It may ask again with the same key, because the answer may have been lost.
    pub used: Option<TokenUse>,
}

/// How a token was used.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TokenUse {
    /// The host.
    pub host: HostId,
    /// SHA-256 of its certificate request, in hex.
    pub csr_sha256: String,
}

/// What is remembered of a VM that was deleted: any copy that turns up is to be destroyed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeletedVm {
    /// Which VM.
    pub vm: VmId,
    /// Its last epoch.
    pub epoch: Epoch,
    /// As [`Vm::left_behind`](super::Vm::left_behind).
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub left_behind: BTreeMap<HostId, Epoch>,
}
