//! Names of the links we make. A link's name has 15 bytes at most, an id has 36: so names come from a digest, and an
//! alias beside says in full what a link is for, and whose it is.
//!
//! Bridges and what carries their frames belong to a network and may be shared by several agents of one machine; a tap
//! belongs to one agent's VM, so that a VM can move between two agents of one machine.

use godwit_wire::id::{HostId, NetworkId, VmId};
use ring::digest;

/// Digits of a digest in a name: with the prefix of three, what a name can have.
const DIGITS: usize = 12;

/// First bytes of the names of our bridges.
pub(crate) const BRIDGE_PREFIX: &str = "gwb";

/// The bridge of a network.
pub(crate) fn bridge(network: NetworkId) -> String {
    name(BRIDGE_PREFIX, &[network.0.as_bytes()])
}

/// The device that carries a network's frames to other hosts.
pub(crate) fn uplink(network: NetworkId) -> String {
    name("gwu", &[network.0.as_bytes()])
}

/// The tap of a card.
pub(crate) fn tap(host: HostId, vm: VmId, nic: &str) -> String {
    name("gwt", &[host.0.as_bytes(), vm.0.as_bytes(), nic.as_bytes()])
}

fn name(prefix: &str, parts: &[&[u8]]) -> String {
    let mut digest = digest::Context::new(&digest::SHA256);
    for part in parts {
        digest.update(part);
    }
    let digest = digest.finish();
    let hex = digest.as_ref().iter().map(|byte| format!("{byte:02x}"));
    let hex: String = hex.collect();
    format!("{prefix}{}", &hex[..DIGITS])
}

/// What a link is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Purpose {
    /// A tap of this VM of this host.
    Tap { host: HostId, vm: VmId },
    /// A bridge or uplink of this network.
    Network { network: NetworkId },
}

impl Purpose {
    /// As the link's alias.
    pub(crate) fn alias(self) -> String {
        match self {
            Self::Tap { host, vm } => format!("godwit:tap:{host}:{vm}"),
            Self::Network { network } => format!("godwit:network:{network}"),
        }
    }

    /// From a link's alias; `None` when the link is not ours.
    pub(crate) fn from_alias(alias: &str) -> Option<Self> {
        let mut parts = alias.strip_prefix("godwit:")?.split(':');
        let purpose = match parts.next()? {
            "tap" => Self::Tap {
                host: parts.next()?.parse().ok()?,
                vm: parts.next()?.parse().ok()?,
            },
            "network" => Self::Network {
                network: parts.next()?.parse().ok()?,
            },
            _ => return None,
        };
        parts.next().is_none().then_some(purpose)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_fit_and_two_agents_of_one_machine_have_taps_of_their_own() {
        let (vm, network) = (VmId::fresh(), NetworkId::fresh());
        let (one, other) = (HostId::fresh(), HostId::fresh());
        for name in [bridge(network), uplink(network), tap(one, vm, "lan")] {
            assert_eq!(name.len(), 15, "{name}");
        }
        assert_ne!(tap(one, vm, "lan"), tap(other, vm, "lan"));
        assert_ne!(tap(one, vm, "lan"), tap(one, vm, "wan"));
    }

    #[test]
    fn an_alias_reads_back_and_a_strangers_does_not() {
        for purpose in [
            Purpose::Tap {
                host: HostId::fresh(),
                vm: VmId::fresh(),
            },
            Purpose::Network {
                network: NetworkId::fresh(),
            },
        ] {
            assert_eq!(Purpose::from_alias(&purpose.alias()), Some(purpose));
            assert_eq!(Purpose::from_alias(&format!("{}:x", purpose.alias())), None);
        }
        assert_eq!(Purpose::from_alias("uplink to the office"), None);
        assert_eq!(Purpose::from_alias("godwit:tap:x:y"), None);
    }
}
