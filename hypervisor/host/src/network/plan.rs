//! What has to be done so that a host's links are what its VMs and networks need. Pure.
//!
//! ```text
//!  guest ── tap gwt… ──┐
//!  guest ── tap gwt… ──┼── bridge gwb… ── uplink gwu… (VLAN on an interface, or VXLAN to every peer)
//!                      └── or the operator's bridge
//! ```
//!
//! A network's bridge is made with the first tap of a VM here and goes with the last one, whoever's it is. Links that
//! others made are used where a network names them, and never changed.

use super::names::{self, Purpose};
use godwit_wire::devices::{MacAddress, Nic, NicAttach};
use godwit_wire::id::{HostId, NetworkId, VmId};
use godwit_wire::network::{Network, Transport};
use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr};

/// What a VM's network cards need.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Wish {
    pub(crate) nics: Vec<Nic>,
    pub(crate) networks: Vec<Network>,
}

/// What this host's VMs need in all.
#[derive(Clone, Debug)]
pub(crate) struct Wanted {
    pub(crate) host: HostId,
    /// Address by which the pool reaches this host.
    pub(crate) address: IpAddr,
    /// Addresses of all hosts of the pool.
    pub(crate) peers: BTreeSet<IpAddr>,
    pub(crate) vms: BTreeMap<VmId, Wish>,
    /// VMs nothing is known about: what they have stays.
    pub(crate) spared: BTreeSet<VmId>,
}

/// A link as the kernel has it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Link {
    pub(crate) index: u32,
    pub(crate) address: Option<MacAddress>,
    /// `bridge`, `tun`, `vlan`, `vxlan`, …; none for hardware.
    pub(crate) kind: Option<String>,
    pub(crate) master: Option<String>,
    pub(crate) mtu: u32,
    pub(crate) purpose: Option<Purpose>,
    pub(crate) up: bool,
    pub(crate) queues: Queues,
    /// Tag and lower interface of a VLAN.
    pub(crate) vlan: Option<(u16, String)>,
    /// Identifier and own address of a VXLAN.
    pub(crate) vxlan: Option<(u32, Option<IpAddr>)>,
}

/// Whether a tap has one queue pair or several; the one who opens it must say the same.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Queues {
    #[default]
    One,
    Several,
}

/// What the kernel has.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Observed {
    pub(crate) links: BTreeMap<String, Link>,
    /// Where each of our VXLANs floods to.
    pub(crate) floods: BTreeMap<String, BTreeSet<IpAddr>>,
}

/// One change.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Step {
    AddBridge {
        name: String,
    },
    AddTap {
        name: String,
        queues: Queues,
    },
    AddVlan {
        name: String,
        lower: String,
        tag: u16,
    },
    AddVxlan {
        name: String,
        vni: u32,
        local: IpAddr,
    },
    Alias {
        name: String,
        purpose: Purpose,
    },
    SetMtu {
        name: String,
        mtu: u16,
    },
    Join {
        name: String,
        bridge: String,
    },
    Up {
        name: String,
    },
    Delete {
        name: String,
    },
    AddFlood {
        name: String,
        peer: IpAddr,
    },
    RemoveFlood {
        name: String,
        peer: IpAddr,
    },
}

/// What stands in the way of a network.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Trouble {
    #[error("this host has no bridge {bridge}")]
    NoBridge { bridge: String },
    #[error("this host has no interface {uplink}")]
    NoUplink { uplink: String },
    #[error("{name} is taken by a link that is not ours")]
    NameTaken { name: String },
}

/// One card's tap and where it is plugged in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Plug {
    pub(crate) tap: String,
    pub(crate) vm: VmId,
    pub(crate) mac: MacAddress,
    pub(crate) address: Option<Ipv4Addr>,
    pub(crate) queues: Queues,
    pub(crate) network: NetworkId,
    pub(crate) bridge: String,
    pub(crate) mtu: u16,
}

/// What to do, and what cannot be done.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Plan {
    pub(crate) steps: Vec<Step>,
    pub(crate) trouble: BTreeMap<NetworkId, Trouble>,
    /// Taps that go away: their rules go after them.
    pub(crate) leaving: BTreeSet<String>,
}

impl Wanted {
    /// Networks with a card here. Where two VMs bring different words about one, the later VM's count.
    pub(crate) fn networks(&self) -> BTreeMap<NetworkId, &Network> {
        let mut found = BTreeMap::new();
        for wish in self.vms.values() {
            for nic in &wish.nics {
                let NicAttach::Network { network } = nic.attach else {
                    continue;
                };
                if let Some(known) = wish.networks.iter().find(|n| n.network == network) {
                    found.insert(network, known);
                }
            }
        }
        found
    }

    /// Every card that gets a tap from us.
    pub(crate) fn plugs(&self) -> Vec<Plug> {
        let networks = self.networks();
        let mut plugs = Vec::new();
        for (&vm, wish) in &self.vms {
            for nic in &wish.nics {
                let NicAttach::Network { network } = nic.attach else {
                    continue;
                };
                let Some(known) = networks.get(&network) else {
                    continue;
                };
                plugs.push(Plug {
                    tap: names::tap(self.host, vm, &nic.name),
                    vm,
                    mac: nic.mac,
                    address: nic.address,
                    queues: if nic.queue_pairs > 1 {
                        Queues::Several
                    } else {
                        Queues::One
                    },
                    network,
                    bridge: bridge_of(known),
                    mtu: known.mtu,
                });
            }
        }
        plugs
    }
}

/// The bridge a network's taps join.
pub(crate) fn bridge_of(network: &Network) -> String {
    match &network.transport {
        Transport::Bridge { bridge } => bridge.clone(),
        Transport::Local | Transport::Vlan { .. } | Transport::Vxlan { .. } => {
            names::bridge(network.network)
        }
    }
}

/// Plans the way from what is to what is wanted. Carried out, it leaves nothing to plan.
pub(crate) fn plan(wanted: &Wanted, observed: &Observed) -> Plan {
    let mut planner = Planner {
        wanted,
        observed,
        plan: Plan::default(),
    };
    let networks = wanted.networks();
    for network in networks.values() {
        if let Err(trouble) = planner.network(network) {
            planner.plan.trouble.insert(network.network, trouble);
        }
    }
    let plugs = wanted.plugs();
    for plug in &plugs {
        if !planner.plan.trouble.contains_key(&plug.network)
            && let Err(trouble) = planner.tap(plug)
        {
            planner.plan.trouble.insert(plug.network, trouble);
        }
    }
    planner.remove_taps(&plugs);
    planner.remove_networks(&networks);
    planner.plan
}

struct Planner<'a> {
    wanted: &'a Wanted,
    observed: &'a Observed,
    plan: Plan,
}

impl Planner<'_> {
    fn step(&mut self, step: Step) {
        self.plan.steps.push(step);
    }

    fn network(&mut self, network: &Network) -> Result<(), Trouble> {
        if let Transport::Bridge { bridge } = &network.transport {
            let there = self.observed.links.get(bridge);
            return match there {
                Some(link) if link.kind.as_deref() == Some("bridge") => Ok(()),
                _ => Err(Trouble::NoBridge {
                    bridge: bridge.clone(),
                }),
            };
        }
        if let Transport::Vlan { uplink, .. } = &network.transport
            && !self.observed.links.contains_key(uplink)
        {
            return Err(Trouble::NoUplink {
                uplink: uplink.clone(),
            });
        }
        let purpose = Purpose::Network {
            network: network.network,
        };
        let bridge = names::bridge(network.network);
        let made = self.ours(&bridge, purpose, |link| {
            link.kind.as_deref() == Some("bridge")
        })?;
        if !made {
            self.step(Step::AddBridge {
                name: bridge.clone(),
            });
        }
        self.settle(&bridge, made, purpose, network.mtu, None);
        self.uplink(network, purpose, &bridge)
    }

    /// The device that carries the network's frames to other hosts, if there is one.
    fn uplink(&mut self, network: &Network, purpose: Purpose, bridge: &str) -> Result<(), Trouble> {
        let name = names::uplink(network.network);
        let (made, add) = match &network.transport {
            Transport::Local | Transport::Bridge { .. } => {
                if self.ours(&name, purpose, |_| false)? {
                    debug_assert!(false, "what does not fit is never taken for made");
                }
                return Ok(());
            }
            Transport::Vlan { uplink, tag } => {
                let made = self.ours(&name, purpose, |link| {
                    link.vlan.as_ref() == Some(&(*tag, uplink.clone()))
                })?;
                let add = Step::AddVlan {
                    name: name.clone(),
                    lower: uplink.clone(),
                    tag: *tag,
                };
                (made, add)
            }
            Transport::Vxlan { vni } => {
                let local = self.wanted.address;
                let made = self.ours(&name, purpose, |link| {
                    link.vxlan == Some((*vni, Some(local)))
                })?;
                let add = Step::AddVxlan {
                    name: name.clone(),
                    vni: *vni,
                    local,
                };
                (made, add)
            }
        };
        if !made {
            self.step(add);
        }
        self.settle(&name, made, purpose, network.mtu, Some(bridge));
        if matches!(network.transport, Transport::Vxlan { .. }) {
            self.floods(&name, made);
        }
        Ok(())
    }

    /// A VXLAN floods to every other host, and to nobody else.
    fn floods(&mut self, name: &str, made: bool) {
        let nobody = BTreeSet::new();
        let present = match self.observed.floods.get(name) {
            Some(present) if made => present,
            _ => &nobody,
        };
        let own = self.wanted.address;
        let wanted: BTreeSet<IpAddr> = self
            .wanted
            .peers
            .iter()
            .copied()
            .filter(|peer| *peer != own && peer.is_ipv4() == own.is_ipv4())
            .collect();
        for peer in wanted.difference(present) {
            self.plan.steps.push(Step::AddFlood {
                name: name.to_owned(),
                peer: *peer,
            });
        }
        for peer in present.difference(&wanted) {
            self.plan.steps.push(Step::RemoveFlood {
                name: name.to_owned(),
                peer: *peer,
            });
        }
    }

    fn tap(&mut self, plug: &Plug) -> Result<(), Trouble> {
        let purpose = Purpose::Tap {
            host: self.wanted.host,
            vm: plug.vm,
        };
        let made = self.ours(&plug.tap, purpose, |link| {
            link.kind.as_deref() == Some("tun") && link.queues == plug.queues
        })?;
        if !made {
            self.step(Step::AddTap {
                name: plug.tap.clone(),
                queues: plug.queues,
            });
        }
        self.settle(&plug.tap, made, purpose, plug.mtu, Some(&plug.bridge));
        Ok(())
    }

    /// Whether the link is there and fits; one of ours that does not fit makes way.
    fn ours(
        &mut self,
        name: &str,
        purpose: Purpose,
        fits: impl Fn(&Link) -> bool,
    ) -> Result<bool, Trouble> {
        let Some(link) = self.observed.links.get(name) else {
            return Ok(false);
        };
        // A link that was made and not yet named is what an interrupted agent has left.
        if link.purpose.is_some_and(|known| known != purpose) {
            return Err(Trouble::NameTaken {
                name: name.to_owned(),
            });
        }
        if link.purpose.is_some() && fits(link) {
            return Ok(true);
        }
        self.step(Step::Delete {
            name: name.to_owned(),
        });
        Ok(false)
    }

    /// Everything about a link that can be set at any time.
    fn settle(&mut self, name: &str, made: bool, purpose: Purpose, mtu: u16, bridge: Option<&str>) {
        let nothing = Link::default();
        let present = match self.observed.links.get(name) {
            Some(link) if made => link,
            _ => &nothing,
        };
        let name = || name.to_owned();
        if present.purpose != Some(purpose) {
            self.plan.steps.push(Step::Alias {
                name: name(),
                purpose,
            });
        }
        if present.mtu != u32::from(mtu) {
            self.plan.steps.push(Step::SetMtu { name: name(), mtu });
        }
        if let Some(bridge) = bridge
            && present.master.as_deref() != Some(bridge)
        {
            self.plan.steps.push(Step::Join {
                name: name(),
                bridge: bridge.to_owned(),
            });
        }
        if !present.up {
            self.plan.steps.push(Step::Up { name: name() });
        }
    }

    fn remove_taps(&mut self, plugs: &[Plug]) {
        for (name, link) in &self.observed.links {
            let Some(Purpose::Tap { host, vm }) = link.purpose else {
                continue;
            };
            let wanted = plugs.iter().any(|plug| plug.tap == *name);
            if host == self.wanted.host && !wanted && !self.wanted.spared.contains(&vm) {
                self.plan.leaving.insert(name.clone());
                self.plan.steps.push(Step::Delete { name: name.clone() });
            }
        }
    }

    /// Bridges without a port other than their own uplink.
    fn remove_networks(&mut self, networks: &BTreeMap<NetworkId, &Network>) {
        for (name, link) in &self.observed.links {
            let Some(Purpose::Network { network }) = link.purpose else {
                continue;
            };
            let used = |port: (&String, &Link)| {
                let (port, link) = port;
                link.master.as_deref() == Some(names::bridge(network).as_str())
                    && *port != names::uplink(network)
                    && !self.plan.leaving.contains(port)
            };
            if !networks.contains_key(&network) && !self.observed.links.iter().any(used) {
                self.plan.steps.push(Step::Delete { name: name.clone() });
            }
        }
    }
}

#[cfg(test)]
mod tests;
