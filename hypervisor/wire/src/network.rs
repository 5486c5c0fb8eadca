//! Networks of the pool, as the host agents build them.

use crate::id::NetworkId;
use serde::{Deserialize, Serialize};
use std::net::{IpAddr, Ipv4Addr};

/// Largest VLAN tag.
pub const MAX_VLAN: u16 = 4094;
/// Largest VXLAN network identifier.
pub const MAX_VNI: u32 = (1 << 24) - 1;
/// UDP port of VXLAN (RFC 7348).
pub const VXLAN_PORT: u16 = 4789;

/// A network: everything a host needs to plug a machine into it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Network {
    /// Which.
    pub network: NetworkId,
    /// Name the operator gave it.
    pub name: String,
    /// How frames get from host to host.
    pub transport: Transport,
    /// Largest frame payload; a VXLAN needs 50 bytes less than the network below it.
    pub mtu: u16,
    /// Addresses that DHCP gives to machines; absent leaves them to the network.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub subnet: Option<Subnet>,
}

/// How frames get from host to host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Transport {
    /// Not at all: a bridge on each host for the machines there.
    Local,
    /// A bridge that exists on every host, with whatever uplink the operator gave it.
    Bridge {
        /// Name of the bridge.
        bridge: String,
    },
    /// A VLAN on an interface that every host has.
    Vlan {
        /// Name of the interface.
        uplink: String,
        /// Tag, 1 to [`MAX_VLAN`].
        tag: u16,
    },
    /// A VXLAN between the hosts of the pool, flooding to all of them (head-end replication).
    Vxlan {
        /// Network identifier, 1 to [`MAX_VNI`].
        vni: u32,
    },
}

/// Addresses of a network.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Subnet {
    /// The network's address.
    pub address: Ipv4Addr,
    /// Length of its prefix, 8 to 30.
    pub prefix: u8,
    /// Router that machines are told.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gateway: Option<Ipv4Addr>,
    /// Name servers that machines are told.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub dns: Vec<Ipv4Addr>,
}

impl Subnet {
    /// The netmask.
    pub const fn mask(&self) -> Ipv4Addr {
        let bits = if self.prefix == 0 {
            0
        } else {
            u32::MAX << (32 - self.prefix as u32)
        };
        Ipv4Addr::from_bits(bits)
    }

    /// Whether a machine may have `address`: inside, and neither the network's own, nor broadcast, nor the router.
    pub fn can_give(&self, address: Ipv4Addr) -> bool {
        let (mask, bits) = (self.mask().to_bits(), address.to_bits());
        bits & mask == self.address.to_bits() & mask
            && bits & !mask != 0
            && bits & !mask != !mask
            && Some(address) != self.gateway
    }

    /// Every address a machine may have, ascending.
    pub fn addresses(&self) -> impl Iterator<Item = Ipv4Addr> + '_ {
        let mask = self.mask().to_bits();
        let base = self.address.to_bits() & mask;
        (base..=base | !mask)
            .map(Ipv4Addr::from_bits)
            .filter(|address| self.can_give(*address))
    }
}

/// Addresses of all hosts of the pool, for VXLAN's flooding.
pub type Peers = Vec<IpAddr>;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_subnet_gives_neither_its_ends_nor_its_router() {
        let subnet = Subnet {
            address: Ipv4Addr::new(10, 1, 2, 0),
            prefix: 29,
            gateway: Some(Ipv4Addr::new(10, 1, 2, 1)),
            dns: Vec::new(),
        };
        let given: Vec<_> = subnet
            .addresses()
            .map(|address| address.octets()[3])
            .collect();
        assert_eq!(given, [2, 3, 4, 5, 6]);
        assert!(!subnet.can_give(Ipv4Addr::new(10, 1, 3, 2)));
    }
}
