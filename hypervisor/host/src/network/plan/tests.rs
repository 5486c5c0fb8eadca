//! The planner against a model of the kernel.

use super::*;
use proptest::prelude::*;
use uuid::Uuid;

const HOST: HostId = HostId(Uuid::from_u128(1));
const OTHER_HOST: HostId = HostId(Uuid::from_u128(2));
const OWN: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 0, 0, 1));

const fn vm(number: u128) -> VmId {
    VmId(Uuid::from_u128(100 + number))
}

const fn network_id(number: u128) -> NetworkId {
    NetworkId(Uuid::from_u128(200 + number))
}

fn network(number: u128, transport: Transport) -> Network {
    Network {
        network: network_id(number),
        name: format!("net-{number}"),
        transport,
        mtu: 1450,
        subnet: None,
    }
}

fn nic(number: u128, queue_pairs: u8) -> Nic {
    Nic {
        name: format!("nic-{number}"),
        mac: MacAddress::local(number as u64 + 1),
        attach: NicAttach::Network {
            network: network_id(number),
        },
        address: None,
        queue_pairs,
        limits: Default::default(),
    }
}

fn nothing_wanted() -> Wanted {
    Wanted {
        host: HOST,
        address: OWN,
        peers: BTreeSet::new(),
        vms: BTreeMap::new(),
        spared: BTreeSet::new(),
    }
}

fn hardware(name: &str) -> (String, Link) {
    let link = Link {
        mtu: 1500,
        up: true,
        ..Link::default()
    };
    (name.to_owned(), link)
}

/// What the kernel does.
fn carry_out(observed: &mut Observed, steps: &[Step]) {
    for step in steps {
        let links = &mut observed.links;
        let new = |kind: &str| Link {
            kind: Some(kind.to_owned()),
            mtu: 1500,
            ..Link::default()
        };
        let mut add = |name: &String, link: Link| {
            assert!(links.insert(name.clone(), link).is_none(), "{name} exists");
        };
        match step {
            Step::AddBridge { name } => add(name, new("bridge")),
            Step::AddTap { name, queues } => add(
                name,
                Link {
                    queues: *queues,
                    ..new("tun")
                },
            ),
            Step::AddVlan { name, lower, tag } => add(
                name,
                Link {
                    vlan: Some((*tag, lower.clone())),
                    ..new("vlan")
                },
            ),
            Step::AddVxlan { name, vni, local } => add(
                name,
                Link {
                    vxlan: Some((*vni, Some(*local))),
                    ..new("vxlan")
                },
            ),
            Step::Alias { name, purpose } => {
                links.get_mut(name).unwrap().purpose = Some(*purpose);
            }
            Step::SetMtu { name, mtu } => links.get_mut(name).unwrap().mtu = (*mtu).into(),
            Step::Join { name, bridge } => {
                assert_eq!(links[bridge].kind.as_deref(), Some("bridge"));
                links.get_mut(name).unwrap().master = Some(bridge.clone());
            }
            Step::Up { name } => links.get_mut(name).unwrap().up = true,
            Step::Delete { name } => {
                links.remove(name).unwrap();
                for link in links.values_mut() {
                    if link.master.as_ref() == Some(name) {
                        link.master = None;
                    }
                }
                observed.floods.remove(name);
            }
            Step::AddFlood { name, peer } => {
                assert!(links.contains_key(name));
                assert!(
                    observed
                        .floods
                        .entry(name.clone())
                        .or_default()
                        .insert(*peer)
                );
            }
            Step::RemoveFlood { name, peer } => {
                assert!(observed.floods.get_mut(name).unwrap().remove(peer));
            }
        }
    }
}

/// Does what the plan says and checks that nothing is left to do.
fn reach(wanted: &Wanted, observed: &mut Observed) -> Plan {
    let first = plan(wanted, observed);
    carry_out(observed, &first.steps);
    let second = plan(wanted, observed);
    assert_eq!(second.steps, [], "after {first:?}");
    first
}

#[test]
fn a_network_is_made_with_the_first_vm_and_goes_with_the_last() {
    let mut wanted = nothing_wanted();
    wanted.peers = ["10.0.0.1", "10.0.0.2", "10.0.0.3", "fd00::1"]
        .iter()
        .map(|address| address.parse().unwrap())
        .collect();
    let vxlan = network(1, Transport::Vxlan { vni: 77 });
    for number in [1, 2] {
        wanted.vms.insert(
            vm(number),
            Wish {
                nics: vec![nic(1, number as u8)],
                networks: vec![vxlan.clone()],
            },
        );
    }
    let mut observed = Observed {
        links: [hardware("eth0")].into(),
        ..Observed::default()
    };
    reach(&wanted, &mut observed);
    assert_eq!(observed.links.len(), 1 + 2 + 2);
    let uplink = names::uplink(network_id(1));
    let floods: Vec<String> = observed.floods[&uplink]
        .iter()
        .map(ToString::to_string)
        .collect();
    // Every other host, and only those that can be reached from this one's address.
    assert_eq!(floods, ["10.0.0.2", "10.0.0.3"]);
    let several = observed
        .links
        .values()
        .filter(|link| link.queues == Queues::Several);
    assert_eq!(several.count(), 1);

    wanted.vms.remove(&vm(1));
    let leaving = reach(&wanted, &mut observed).leaving;
    assert_eq!(leaving, [names::tap(HOST, vm(1), "nic-1")].into());
    assert_eq!(observed.links.len(), 1 + 2 + 1);
    wanted.vms.clear();
    reach(&wanted, &mut observed);
    assert_eq!(observed.links.keys().collect::<Vec<_>>(), ["eth0"]);
}

#[test]
fn what_the_operator_has_not_made_is_trouble_for_its_network_only() {
    let mut wanted = nothing_wanted();
    let bridged = network(
        1,
        Transport::Bridge {
            bridge: "br0".into(),
        },
    );
    let tagged = network(
        2,
        Transport::Vlan {
            uplink: "eth9".into(),
            tag: 5,
        },
    );
    let local = network(3, Transport::Local);
    wanted.vms.insert(
        vm(1),
        Wish {
            nics: vec![nic(1, 1), nic(2, 1), nic(3, 1)],
            networks: vec![bridged, tagged, local],
        },
    );
    let mut observed = Observed {
        // A thing of that name, but no bridge.
        links: [hardware("br0")].into(),
        ..Observed::default()
    };
    let trouble = reach(&wanted, &mut observed).trouble;
    assert_eq!(
        trouble,
        [
            (
                network_id(1),
                Trouble::NoBridge {
                    bridge: "br0".into()
                }
            ),
            (
                network_id(2),
                Trouble::NoUplink {
                    uplink: "eth9".into()
                }
            ),
        ]
        .into()
    );
    assert_eq!(observed.links.len(), 1 + 2);
}

#[test]
fn a_vm_that_nothing_is_known_about_keeps_its_taps() {
    let mut wanted = nothing_wanted();
    let wish = Wish {
        nics: vec![nic(1, 1)],
        networks: vec![network(1, Transport::Local)],
    };
    wanted.vms.insert(vm(1), wish);
    let mut observed = Observed::default();
    reach(&wanted, &mut observed);
    let before = observed.clone();
    wanted.vms.clear();
    wanted.spared.insert(vm(1));
    reach(&wanted, &mut observed);
    assert_eq!(observed, before);
}

fn transport() -> impl Strategy<Value = Transport> {
    prop_oneof![
        Just(Transport::Local),
        Just(Transport::Bridge {
            bridge: "br0".into()
        }),
        Just(Transport::Bridge {
            bridge: "absent".into()
        }),
        (1..4_u16).prop_map(|tag| Transport::Vlan {
            uplink: "eth0".into(),
            tag
        }),
        (1..4_u32).prop_map(|vni| Transport::Vxlan { vni }),
    ]
}

fn wish() -> impl Strategy<Value = Wish> {
    (
        proptest::collection::vec((0..3_u128, 1..3_u8), 0..4),
        proptest::collection::vec(transport(), 3),
    )
        .prop_map(|(cards, transports)| {
            let mut nics: Vec<Nic> = Vec::new();
            for (number, queue_pairs) in cards {
                let card = nic(number, queue_pairs);
                if nics.iter().all(|known| known.name != card.name) {
                    nics.push(card);
                }
            }
            let networks = transports.into_iter().enumerate();
            Wish {
                nics,
                networks: networks
                    .map(|(number, t)| network(number as u128, t))
                    .collect(),
            }
        })
}

fn wanted() -> impl Strategy<Value = Wanted> {
    (
        proptest::collection::btree_map((0..5_u128).prop_map(vm), wish(), 0..4),
        proptest::collection::btree_set((1..6_u8).prop_map(|n| IpAddr::from([10, 0, 0, n])), 0..5),
        any::<bool>(),
    )
        .prop_map(|(vms, peers, second_host)| Wanted {
            host: if second_host { OTHER_HOST } else { HOST },
            peers,
            vms,
            ..nothing_wanted()
        })
}

proptest! {
    /// Two agents of one machine take turns, each with ever new wishes.
    #[test]
    fn whatever_is_wanted_in_whatever_order_one_plan_reaches_it(turns in proptest::collection::vec(wanted(), 1..8)) {
        let bridge = Link { kind: Some("bridge".into()), ..hardware("br0").1 };
        let given: BTreeMap<_, _> = [hardware("eth0"), ("br0".to_owned(), bridge)].into();
        let mut observed = Observed { links: given.clone(), ..Observed::default() };
        let taps_of = |observed: &Observed, host: HostId| -> BTreeSet<String> {
            let ours = |link: &Link| matches!(link.purpose, Some(Purpose::Tap { host: of, .. }) if of == host);
            observed.links.iter().filter(|(_, link)| ours(link)).map(|(name, _)| name.clone()).collect()
        };
        for wanted in &turns {
            let other = if wanted.host == HOST { OTHER_HOST } else { HOST };
            let others_before = taps_of(&observed, other);
            let done = reach(wanted, &mut observed);
            prop_assert_eq!(taps_of(&observed, other), others_before);
            let working: BTreeSet<String> = wanted.plugs().into_iter()
                .filter(|plug| !done.trouble.contains_key(&plug.network))
                .map(|plug| plug.tap)
                .collect();
            prop_assert!(taps_of(&observed, wanted.host).is_superset(&working));
            for (name, link) in &given {
                prop_assert_eq!(&observed.links[name], link);
            }
        }
        for host in [HOST, OTHER_HOST] {
            reach(&Wanted { host, ..nothing_wanted() }, &mut observed);
        }
        prop_assert_eq!(observed.links, given);
        prop_assert!(observed.floods.is_empty());
    }
}
