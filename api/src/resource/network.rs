//! Networks.

use super::Operation;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use uuid::Uuid;

/// A network.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Network {
    /// Never changes.
    pub id: Uuid,
    /// Unique among networks.
    pub name: String,
    /// How frames get from host to host.
    pub transport: Transport,
    /// Largest frame payload.
    pub mtu: u16,
    /// Addresses that VMs are given.
    pub subnet: Option<Subnet>,
    /// Addresses that VMs have, ascending.
    pub leases: Vec<Lease>,
    /// VMs that are plugged in.
    pub vms: u64,
    /// When it was created.
    pub created_at: Timestamp,
    /// When it last changed.
    pub changed_at: Timestamp,
}

/// An address that a VM has.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Lease {
    /// The address.
    pub address: String,
    /// The VM.
    pub vm: Uuid,
    /// Its name.
    pub vm_name: String,
}

/// How frames get from host to host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum Transport {
    /// Not at all: VMs reach those on the same host.
    Local,
    /// A bridge that exists on every host.
    Bridge {
        /// Name of the bridge.
        bridge: String,
    },
    /// A VLAN on an interface that every host has.
    Vlan {
        /// Name of the interface.
        uplink: String,
        /// Tag, 1 to 4094.
        tag: u16,
    },
    /// A VXLAN between the hosts.
    Vxlan {
        /// Network identifier, 1 to 16777215.
        vni: u32,
    },
}

/// Addresses of a network.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Subnet {
    /// Such as `10.1.0.0/16`, with a prefix of 8 to 30.
    pub cidr: String,
    /// Router that VMs are told.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gateway: Option<String>,
    /// Name servers that VMs are told.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub dns: Vec<String>,
}

/// Makes a network.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CreateNetwork {
    /// Unique among networks: `a`-`z`, digits, `.` and `-`, at most 63.
    pub name: String,
    /// How frames get from host to host.
    pub transport: Transport,
    /// Largest frame payload; 1500, or 1450 for a VXLAN, when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mtu: Option<u16>,
    /// Addresses to give to VMs; the network has its own when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub subnet: Option<Subnet>,
}

/// A change to a network was accepted.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct NetworkAccepted {
    /// Always null: it takes no time.
    pub operation: Option<Operation>,
    /// The network as it is now.
    pub network: Network,
}
