//! Intents about networks.

use super::Decision;
use crate::intent::{NewNetwork, Resource};
use crate::ledger::Draft;
use crate::model::limits::MAX_NETWORKS;
use crate::model::{Actor, Network, Subject, name};
use crate::view::View;
use godwit_wire::id::NetworkId;
use godwit_wire::network::{MAX_VLAN, MAX_VNI, Subnet, Transport};
use godwit_wire::problem::{FieldProblem, Problem};
use std::net::Ipv4Addr;

/// Least frame payload that carries IPv4 (RFC 791).
const MIN_MTU: u16 = 576;
/// Largest frame payload of common hardware.
const MAX_MTU: u16 = 9_216;
/// Ethernet's ordinary frame payload.
const USUAL_MTU: u16 = 1_500;
/// What VXLAN adds to each frame.
const VXLAN_HEADER: u16 = 50;
/// Longest name of a network interface in Linux.
const MAX_INTERFACE_NAME: usize = 15;
/// Shortest prefix of a subnet.
const MIN_PREFIX: u8 = 8;
/// Longest prefix of a subnet: two addresses besides its ends.
const MAX_PREFIX: u8 = 30;
/// Most name servers that machines are told.
const MAX_DNS: usize = 8;

fn usual_mtu(transport: &Transport) -> u16 {
    match transport {
        Transport::Vxlan { .. } => USUAL_MTU - VXLAN_HEADER,
        _ => USUAL_MTU,
    }
}

fn check_transport(view: &View, transport: &Transport, found: &mut Vec<FieldProblem>) {
    let mut bad = |field: &str, problem: String, remedy: &str| {
        found.push(FieldProblem::new(
            format!("transport.{field}"),
            problem,
            remedy,
        ));
    };
    let interface = |name: &str| {
        !name.is_empty()
            && name.len() <= MAX_INTERFACE_NAME
            && !name.contains(['/', ' ', '\0'])
            && name != "."
            && name != ".."
    };
    match transport {
        Transport::Local => {}
        Transport::Bridge { bridge } if !interface(bridge) => {
            let problem = format!("{bridge:?} is no name of a network interface");
            bad("bridge", problem, "give the name of a bridge on the hosts");
        }
        Transport::Bridge { .. } => {}
        Transport::Vlan { uplink, tag } => {
            if !interface(uplink) {
                let problem = format!("{uplink:?} is no name of a network interface");
                bad(
                    "uplink",
                    problem,
                    "give the name of an interface on the hosts",
                );
            }
            if *tag == 0 || *tag > MAX_VLAN {
                let problem = format!("{tag} is outside 1..={MAX_VLAN}");
                bad("tag", problem, "choose a tag within the limits");
            }
        }
        Transport::Vxlan { vni } if *vni == 0 || *vni > MAX_VNI => {
            let problem = format!("{vni} is outside 1..={MAX_VNI}");
            bad("vni", problem, "choose an identifier within the limits");
        }
        Transport::Vxlan { .. } => {}
    }
    // Two bridges on one VLAN or VXLAN would be one network under two names, with two sets of addresses.
    let same =
        |other: &Network| *transport != Transport::Local && other.network.transport == *transport;
    if let Some(other) = view.networks.values().find(|other| same(other)) {
        let problem = format!("the network {} uses it already", other.name());
        let remedy = "use that network, or choose another identifier";
        found.push(FieldProblem::new("transport", problem, remedy));
    }
}

/// The subnet with the host bits of its address cleared.
fn check_subnet(subnet: &Subnet, found: &mut Vec<FieldProblem>) -> Subnet {
    let mut bad = |field: &str, problem: String, remedy: &str| {
        found.push(FieldProblem::new(
            format!("subnet.{field}"),
            problem,
            remedy,
        ));
    };
    if !(MIN_PREFIX..=MAX_PREFIX).contains(&subnet.prefix) {
        let problem = format!(
            "/{} is outside /{MIN_PREFIX} to /{MAX_PREFIX}",
            subnet.prefix
        );
        bad("prefix", problem, "choose a prefix within the limits");
        return subnet.clone();
    }
    let network = subnet.address.to_bits() & subnet.mask().to_bits();
    let clean = Subnet {
        address: Ipv4Addr::from_bits(network),
        ..subnet.clone()
    };
    let without_router = Subnet {
        gateway: None,
        ..clean.clone()
    };
    if let Some(gateway) = subnet.gateway.filter(|g| !without_router.can_give(*g)) {
        let problem = format!(
            "{gateway} is no machine's address in {}/{}",
            clean.address, clean.prefix
        );
        bad("gateway", problem, "give an address inside the subnet");
    }
    if subnet.dns.len() > MAX_DNS {
        let problem = format!("{} name servers are too many", subnet.dns.len());
        bad("dns", problem, "give at most 8");
    }
    clean
}

pub(super) fn create(
    view: &View,
    draft: &mut Draft<'_>,
    new: &NewNetwork,
    actor: &Actor,
) -> Result<Decision, Problem> {
    let mut problems: Vec<FieldProblem> = name::problem("name", &new.name).into_iter().collect();
    check_transport(view, &new.transport, &mut problems);
    let subnet = new
        .subnet
        .as_ref()
        .map(|subnet| check_subnet(subnet, &mut problems));
    let mtu = new.mtu.unwrap_or_else(|| usual_mtu(&new.transport));
    if !(MIN_MTU..=MAX_MTU).contains(&mtu) {
        problems.push(FieldProblem::new(
            "mtu",
            format!("{mtu} is outside {MIN_MTU}..={MAX_MTU}"),
            "leave it out, or choose a size within the limits",
        ));
    }
    if !problems.is_empty() {
        return Err(Problem::invalid(problems));
    }
    if view.find_network(&new.name).is_some() {
        let detail = format!("there is a network {} already", new.name);
        return Err(Problem::conflict("name-taken", detail)
            .with_remedy("choose another name, or delete that network first"));
    }
    if view.networks.len() >= MAX_NETWORKS {
        let detail = format!("a pool has at most {MAX_NETWORKS} networks");
        return Err(Problem::conflict("pool-full", detail));
    }
    let id = NetworkId::fresh();
    let effect = format!("the network {} is created", new.name);
    draft.info(
        "network.created",
        Subject::network(id, &new.name),
        actor,
        format!("network {} created", new.name),
    );
    draft.put_network(Network {
        network: godwit_wire::network::Network {
            network: id,
            name: new.name.clone(),
            transport: new.transport.clone(),
            mtu,
            subnet,
        },
        created_at: draft.now(),
        changed_at: draft.now(),
    });
    Ok(Decision::new(Resource::Network(id), None, effect))
}

pub(super) fn delete(
    view: &View,
    draft: &mut Draft<'_>,
    id: NetworkId,
    actor: &Actor,
) -> Result<Decision, Problem> {
    let network = view
        .networks
        .get(&id)
        .ok_or_else(|| Problem::not_found("network", id))?;
    let plugged = view.plugged_into(id);
    if let Some(vm) = plugged.first().and_then(|vm| view.vms.get(vm)) {
        let others = match plugged.len() - 1 {
            0 => String::new(),
            others => format!(" and {others} others"),
        };
        let detail = format!(
            "{}{others} are plugged into the network {}",
            vm.name,
            network.name()
        );
        return Err(Problem::conflict("in-use", detail)
            .with_remedy("delete those VMs, or give them cards on other networks"));
    }
    let effect = format!("the network {} is deleted", network.name());
    draft.info(
        "network.deleted",
        Subject::network(id, network.name()),
        actor,
        format!("network {} deleted", network.name()),
    );
    draft.delete_network(network);
    Ok(Decision::new(Resource::Network(id), None, effect))
}
