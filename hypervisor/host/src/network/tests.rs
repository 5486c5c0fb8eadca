//! Real links in network namespaces of their own: each test runs itself again in one, which ends with it.

use super::dhcp::tests::{message_in, question};
use super::system::System;
use super::*;
use crate::sys::{open_tap, watch_readable};
use dhcproto::v4::MessageType;
use godwit_devices::skip::skip;
use godwit_wire::devices::MacAddress;
use godwit_wire::id::NetworkId;
use godwit_wire::network::{Subnet, Transport};
use std::future::Future;
use std::io::Read;
use std::net::Ipv4Addr;
use std::os::fd::{AsFd, OwnedFd};
use std::process::{Child, Command, Stdio};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

const PATIENCE: Duration = Duration::from_secs(20);
const SEND_AGAIN: Duration = Duration::from_millis(100);
/// Before each frame of a tap: nothing special about it.
const VNET_HEADER_BYTES: usize = 10;
const MARK: &str = "GODWIT_TEST_IN_NETWORK_NAMESPACE";

/// Runs the body in a network namespace of its own; where that is not allowed, says so.
fn in_own_network<F: Future<Output = ()>>(test: &str, body: impl FnOnce() -> F) {
    if std::env::var_os(MARK).is_some() {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        return runtime.block_on(body());
    }
    let allowed = Command::new("unshare")
        .args(["--net", "ip", "link"])
        .output();
    let filters = Command::new("nft").arg("--version").output();
    if !allowed.is_ok_and(|output| output.status.success()) || filters.is_err() {
        return skip("this needs root, iproute2 and nftables");
    }
    let again = Command::new("unshare")
        .arg("--net")
        .arg(std::env::current_exe().unwrap())
        .args([&format!("network::tests::{test}"), "--exact", "--nocapture"])
        .env(MARK, "1")
        .status()
        .unwrap();
    assert!(again.success(), "see above");
}

fn run(words: &str) {
    let words: Vec<&str> = words.split(' ').collect();
    let status = Command::new(words[0]).args(&words[1..]).status().unwrap();
    assert!(status.success(), "{words:?}");
}

fn output_of(words: &str) -> String {
    let words: Vec<&str> = words.split(' ').collect();
    let output = Command::new(words[0]).args(&words[1..]).output().unwrap();
    String::from_utf8(output.stdout).unwrap()
}

fn network(transport: Transport) -> Network {
    Network {
        network: NetworkId::fresh(),
        name: "lan".into(),
        transport,
        mtu: 1400,
        subnet: Some(Subnet {
            address: Ipv4Addr::new(10, 9, 0, 0),
            prefix: 24,
            gateway: Some(Ipv4Addr::new(10, 9, 0, 1)),
            dns: Vec::new(),
        }),
    }
}

fn nic(network: &Network, number: u8) -> Nic {
    Nic {
        name: "lan".into(),
        mac: mac(number),
        attach: NicAttach::Network {
            network: network.network,
        },
        address: Some(address(number)),
        queue_pairs: 1,
        limits: Default::default(),
    }
}

const fn mac(number: u8) -> MacAddress {
    MacAddress([0x52, 0x54, 0, 0, 0, number])
}

const fn address(number: u8) -> Ipv4Addr {
    Ipv4Addr::new(10, 9, 0, number)
}

async fn attach(networks: &Networks, network: &Network, number: u8) -> (VmId, NicAttachment) {
    let vm = VmId::fresh();
    let wanted = [nic(network, number)];
    let mut made = networks
        .attach(vm, &wanted, std::slice::from_ref(network))
        .await
        .unwrap();
    (vm, made.remove(0))
}

/// A guest's end of a tap.
struct Guest(AsyncFd<OwnedFd>);

impl Guest {
    fn on(tap: &str) -> Self {
        Self::with(open_tap(tap).unwrap())
    }

    fn with(tap: std::fs::File) -> Self {
        Self(watch_readable(tap.into()).unwrap())
    }

    fn send(&self, frame: &[u8]) {
        let bytes = [&[0; VNET_HEADER_BYTES], frame].concat();
        assert_eq!(
            rustix::io::write(self.0.get_ref(), &bytes).unwrap(),
            bytes.len()
        );
    }

    /// Sends until the answer comes: a link that has just come up takes a moment to forward.
    async fn ask(&self, frame: &[u8], of: &Self, wanted: impl Fn(&[u8]) -> bool) -> Vec<u8> {
        loop {
            self.send(frame);
            let answer = of.next(&wanted);
            if let Ok(answer) = tokio::time::timeout(SEND_AGAIN, answer).await {
                return answer;
            }
        }
    }

    /// The next frame that is one of ours: with a text after its first 60 bytes, or a DHCP answer.
    async fn next(&self, wanted: impl Fn(&[u8]) -> bool) -> Vec<u8> {
        let mut buffer = vec![0; 4096];
        let comes = async {
            loop {
                let read = |tap: &OwnedFd| Ok(rustix::io::read(tap, &mut buffer[..])?);
                let length = self.0.async_io(Interest::READABLE, read).await.unwrap();
                let frame = &buffer[VNET_HEADER_BYTES..length];
                if wanted(frame) {
                    return frame.to_vec();
                }
            }
        };
        tokio::time::timeout(PATIENCE, comes)
            .await
            .expect("no frame has come")
    }
}

/// A broadcast frame with a text in it.
/// Length of every IPv4 packet sent here.
const IPV4_BYTES: usize = 100;

fn frame(from: MacAddress, kind: u16, head: &[u8], text: &str) -> Vec<u8> {
    let mut frame = [&[0xff; 6][..], &from.0, &kind.to_be_bytes(), head].concat();
    frame.resize(60, 0);
    frame.extend(b"text:");
    frame.extend(text.as_bytes());
    // As long as the IPv4 header says: a bridge cuts off what is longer and drops what is shorter.
    frame.resize(14 + IPV4_BYTES, 0);
    frame
}

fn text_of(frame: &[u8]) -> Option<String> {
    let text = frame.get(60..)?.strip_prefix(b"text:")?;
    let text = String::from_utf8_lossy(text);
    Some(text.trim_end_matches('\0').to_owned())
}

fn arp(mac: MacAddress, address: Ipv4Addr) -> Vec<u8> {
    [
        &[0, 1, 8, 0, 6, 4, 0, 1][..],
        &mac.0,
        &address.octets(),
        &[0; 10],
    ]
    .concat()
}

/// IPv4 with UDP from and to these ports.
fn udp(source: Ipv4Addr, ports: (u16, u16)) -> Vec<u8> {
    let mut head = vec![0x45, 0, 0, IPV4_BYTES as u8, 0, 0, 0, 0, 64, 17, 0, 0];
    head.extend(source.octets());
    head.extend([255; 4]);
    // A bridge may look at it.
    let sum = super::dhcp::checksum(&head);
    head[10..12].copy_from_slice(&sum.to_be_bytes());
    head.extend(ports.0.to_be_bytes());
    head.extend(ports.1.to_be_bytes());
    head.extend([0, IPV4_BYTES as u8 - 20, 0, 0]);
    head
}

/// IPv6 with a router advertisement.
fn router_advertisement() -> Vec<u8> {
    let mut head = vec![0x60, 0, 0, 0, 0, 16, 58, 255];
    head.extend([0xfe, 0x80, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1]);
    head.extend([0xff, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1]);
    head.extend([134, 0, 0, 0]);
    head
}

#[test]
fn taps_and_bridges_come_with_a_vm_and_go_with_it() {
    in_own_network("taps_and_bridges_come_with_a_vm_and_go_with_it", || {
        come_and_go(Transport::Local)
    });
}

#[test]
fn a_vlan_comes_with_a_vm_and_goes_with_it() {
    in_own_network("a_vlan_comes_with_a_vm_and_goes_with_it", || async {
        run("ip link add up0 type veth peer name up1");
        run("ip link set up0 up");
        if !vlans_work() {
            return skip("this kernel has no VLANs (module 8021q)");
        }
        let transport = Transport::Vlan {
            uplink: "up0".into(),
            tag: 33,
        };
        come_and_go(transport).await;
    });
}

/// Whether the link `up0` can carry VLANs.
fn vlans_work() -> bool {
    let probe = "ip link add link up0 name probe type vlan id 1 && ip link del probe";
    Command::new("sh")
        .args(["-c", probe])
        .status()
        .unwrap()
        .success()
}

async fn come_and_go(transport: Transport) {
    let system = System::default();
    let before = system.observe().await.unwrap();
    let (host, own) = (HostId::fresh(), [10, 0, 0, 1].into());
    let networks = Networks::new(host, own);
    let wanted = network(transport);
    let (vm, attachment) = attach(&networks, &wanted, 5).await;
    assert_eq!(attachment.mtu, 1400);
    let observed = system.observe().await.unwrap();
    let tap = &observed.links[&attachment.tap];
    assert_eq!((tap.up, tap.mtu), (true, 1400));
    if let Transport::Vlan { uplink, tag } = &wanted.transport {
        let link = &observed.links[&names::uplink(wanted.network)];
        assert_eq!(link.vlan, Some((*tag, uplink.clone())));
        assert_eq!((link.up, &link.master), (true, &tap.master));
    }
    assert!(output_of("nft list table bridge godwit").contains(&attachment.tap));

    // Nothing is left to do, and the next agent takes over what this one has made.
    let index = tap.index;
    let next = Networks::new(host, own);
    next.adopt(vm, &[nic(&wanted, 5)], std::slice::from_ref(&wanted));
    let outcome = next.reconcile().await.unwrap();
    assert_eq!(outcome.plan, Plan::default());
    assert_eq!(outcome.observed.links[&attachment.tap].index, index);

    // One that knows of no VM removes what is left, and its rules.
    let forgetful = Networks::new(host, own);
    forgetful.reconcile().await.unwrap();
    assert_eq!(system.observe().await.unwrap(), before);
    assert!(!output_of("nft list table bridge godwit").contains(&attachment.tap));
}

#[test]
fn a_card_whose_network_cannot_be_built_is_named_and_nothing_is_left() {
    in_own_network(
        "a_card_whose_network_cannot_be_built_is_named_and_nothing_is_left",
        || async {
            let before = System::default().observe().await.unwrap();
            let networks = Networks::new(HostId::fresh(), [10, 0, 0, 1].into());
            let good = network(Transport::Local);
            let bad = network(Transport::Bridge {
                bridge: "br7".into(),
            });
            let vm = VmId::fresh();
            let nics = [
                nic(&good, 5),
                Nic {
                    name: "wan".into(),
                    ..nic(&bad, 6)
                },
            ];
            let refused = networks.attach(vm, &nics, &[good, bad]).await.unwrap_err();
            assert_eq!(refused.fields.len(), 1);
            assert_eq!(refused.fields[0].field, "spec.nics[1].attach.network");
            assert!(refused.fields[0].problem.contains("br7"));
            networks.reconcile().await.unwrap();
            assert_eq!(System::default().observe().await.unwrap(), before);
            let tap = Nic {
                attach: NicAttach::Tap { tap: "none".into() },
                ..nics[0].clone()
            };
            let refused = networks.attach(vm, &[tap], &[]).await.unwrap_err();
            assert_eq!(refused.fields[0].field, "spec.nics[0].attach.tap");
        },
    );
}

#[test]
fn a_guest_is_given_its_address_over_its_tap() {
    in_own_network("a_guest_is_given_its_address_over_its_tap", || async {
        let networks = Networks::new(HostId::fresh(), [10, 0, 0, 1].into());
        let local = network(Transport::Local);
        let (vm, attachment) = attach(&networks, &local, 5).await;
        let guest = Guest::on(&attachment.tap);
        let is_answer = |frame: &[u8]| frame.get(34..36) == Some(&[0, 67]);
        for (asks, answers) in [
            (MessageType::Discover, MessageType::Offer),
            (MessageType::Request, MessageType::Ack),
        ] {
            let wanted = dhcproto::v4::DhcpOption::RequestedIpAddress(address(5));
            let asked = question(mac(5), asks, vec![wanted]);
            let is_it = |frame: &[u8]| {
                is_answer(frame) && message_in(frame).opts().msg_type() == Some(answers)
            };
            let message = message_in(&guest.ask(&asked, &guest, is_it).await);
            assert_eq!(message.yiaddr(), address(5));
            assert_eq!(message.opts().msg_type(), Some(answers));
        }
        // A second VM on the same bridge is served by the same responder.
        let (_, second) = attach(&networks, &local, 6).await;
        let second = Guest::on(&second.tap);
        let asked = question(mac(6), MessageType::Discover, vec![]);
        let message = message_in(&second.ask(&asked, &second, is_answer).await);
        assert_eq!(message.yiaddr(), address(6));
        assert_eq!(networks.applied.lock().await.responders.len(), 1);
        networks.detach(vm);
        networks.clear().await;
        assert!(networks.applied.lock().await.responders.is_empty());
    });
}

#[test]
fn a_guest_cannot_pretend_to_be_another() {
    in_own_network("a_guest_cannot_pretend_to_be_another", || async {
        let networks = Networks::new(HostId::fresh(), [10, 0, 0, 1].into());
        let local = network(Transport::Local);
        let (_, first) = attach(&networks, &local, 5).await;
        let (_, second) = attach(&networks, &local, 6).await;
        let (guest, peer) = (Guest::on(&first.tap), Guest::on(&second.tap));
        const ARP: u16 = 0x0806;
        const IP: u16 = 0x0800;
        const IPV6: u16 = 0x86dd;
        let (own, other) = (mac(5), mac(6));
        let hello = frame(own, ARP, &arp(own, address(5)), "hello");
        let is_text = |frame: &[u8]| text_of(frame).is_some();
        guest.ask(&hello, &peer, is_text).await;
        for (bad, kind, head) in [
            (other, ARP, arp(other, address(5))),
            (own, ARP, arp(other, address(5))),
            (own, ARP, arp(own, address(6))),
            (own, IP, udp(address(6), (9, 9))),
            (own, IP, udp(Ipv4Addr::UNSPECIFIED, (9, 9))),
            (own, IP, udp(address(5), (67, 68))),
            (own, IPV6, router_advertisement()),
            (
                own,
                0x8100,
                [&[0, 5, 8, 0][..], &udp(address(6), (9, 9))].concat(),
            ),
        ] {
            guest.send(&frame(bad, kind, &head, "forged"));
        }
        let good = [
            ("own ARP", ARP, arp(own, address(5))),
            ("ARP probe", ARP, arp(own, Ipv4Addr::UNSPECIFIED)),
            ("own address", IP, udp(address(5), (9, 9))),
            ("RARP announcement", 0x8035, arp(own, Ipv4Addr::UNSPECIFIED)),
        ];
        for (text, kind, head) in &good {
            guest.send(&frame(own, *kind, head, text));
        }
        // Frames keep their order: had a forged one come through, it would come first.
        for (text, _, _) in &good {
            let is_new = |frame: &[u8]| text_of(frame).is_some_and(|text| text != "hello");
            let seen = peer.next(is_new).await;
            assert_eq!(text_of(&seen).as_deref(), Some(*text));
        }
    });
}

/// Another network namespace, as long as a process is in it.
struct Namespace(Child);

impl Namespace {
    fn new() -> Self {
        let mut child = Command::new("unshare")
            .args(["--net", "sh", "-c", "echo ready; read wait"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut ready = [0; 6];
        child.stdout.take().unwrap().read_exact(&mut ready).unwrap();
        Self(child)
    }

    fn enter(&self) -> String {
        format!("nsenter --net --target {}", self.0.id())
    }

    fn open_tap(&self, name: &str) -> std::fs::File {
        let namespace = std::fs::File::open(format!("/proc/{}/ns/net", self.0.id())).unwrap();
        let name = name.to_owned();
        let opening = std::thread::spawn(move || {
            rustix::thread::move_into_link_name_space(
                namespace.as_fd(),
                Some(rustix::thread::LinkNameSpaceType::Network),
            )
            .unwrap();
            open_tap(&name).unwrap()
        });
        opening.join().unwrap()
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        drop(self.0.stdin.take());
        self.0.wait().unwrap();
    }
}

#[test]
fn two_hosts_are_one_network_over_a_vxlan() {
    in_own_network("two_hosts_are_one_network_over_a_vxlan", || async {
        let there = Namespace::new();
        let enter = there.enter();
        let pid = there.0.id();
        run(&format!(
            "ip link add v0 type veth peer name v1 netns {pid}"
        ));
        run("ip addr add 192.0.2.1/24 dev v0");
        run("ip link set v0 up");
        run(&format!("{enter} ip addr add 192.0.2.2/24 dev v1"));
        run(&format!("{enter} ip link set v1 up"));
        let near = Networks::new(HostId::fresh(), [192, 0, 2, 1].into());
        let through = System {
            through: enter.split(' ').map(str::to_owned).collect(),
        };
        let far = Networks::through(through, HostId::fresh(), [192, 0, 2, 2].into());
        // The responders' sockets would all be in this namespace.
        let vxlan = Network {
            subnet: None,
            ..network(Transport::Vxlan { vni: 4242 })
        };
        let (near_vm, near_tap) = attach(&near, &vxlan, 5).await;
        let (_, far_tap) = attach(&far, &vxlan, 6).await;
        let peers: Peers = vec![[192, 0, 2, 1].into(), [192, 0, 2, 2].into()];
        near.set_peers(peers.clone());
        far.set_peers(peers);
        let seen = near.reconcile().await.unwrap().observed;
        assert_eq!(
            seen.floods[&names::uplink(vxlan.network)],
            [IpAddr::from([192, 0, 2, 2])].into()
        );
        far.reconcile().await.unwrap();
        let near_guest = Guest::on(&near_tap.tap);
        let far_guest = Guest::with(there.open_tap(&far_tap.tap));
        let hello = frame(mac(5), 0x0806, &arp(mac(5), address(5)), "from near");
        let is_text = |frame: &[u8]| text_of(frame).is_some();
        let seen = near_guest.ask(&hello, &far_guest, is_text).await;
        assert_eq!(text_of(&seen).as_deref(), Some("from near"));
        let hello = frame(mac(6), 0x0806, &arp(mac(6), address(6)), "from far");
        let seen = far_guest.ask(&hello, &near_guest, is_text).await;
        assert_eq!(text_of(&seen).as_deref(), Some("from far"));

        // A host that leaves the pool is flooded no more.
        near.set_peers(vec![[192, 0, 2, 1].into()]);
        let seen = near.reconcile().await.unwrap().observed;
        assert_eq!(
            seen.floods
                .get(&names::uplink(vxlan.network))
                .map_or(0, BTreeSet::len),
            0
        );
        near.detach(near_vm);
        drop(near_guest);
        let left = near.reconcile().await.unwrap().observed;
        assert!(!left.links.contains_key(&names::uplink(vxlan.network)));
        assert!(!left.links.contains_key(&names::bridge(vxlan.network)));
    });
}

#[test]
fn two_hosts_are_one_network_over_a_vlan_and_another_tag_is_another_network() {
    let name = "two_hosts_are_one_network_over_a_vlan_and_another_tag_is_another_network";
    in_own_network(name, || async {
        let there = Namespace::new();
        let enter = there.enter();
        let pid = there.0.id();
        // The uplink has one name on every host.
        run(&format!(
            "ip link add up0 type veth peer name up0 netns {pid}"
        ));
        if !vlans_work() {
            return skip("this kernel has no VLANs (module 8021q)");
        }
        run("ip link set up0 up");
        run(&format!("{enter} ip link set up0 up"));
        let near = Networks::new(HostId::fresh(), [192, 0, 2, 1].into());
        let through = System {
            through: enter.split(' ').map(str::to_owned).collect(),
        };
        let far = Networks::through(through, HostId::fresh(), [192, 0, 2, 2].into());
        let vlan = |tag| Network {
            subnet: None,
            ..network(Transport::Vlan {
                uplink: "up0".into(),
                tag,
            })
        };
        let (ours, others) = (vlan(100), vlan(200));
        let (_, near_tap) = attach(&near, &ours, 5).await;
        let (_, far_tap) = attach(&far, &ours, 6).await;
        let (_, stranger_tap) = attach(&far, &others, 7).await;
        let near_guest = Guest::on(&near_tap.tap);
        let far_guest = Guest::with(there.open_tap(&far_tap.tap));
        let stranger = Guest::with(there.open_tap(&stranger_tap.tap));
        let is_text = |frame: &[u8]| text_of(frame).is_some();
        let hello = frame(mac(5), 0x0806, &arp(mac(5), address(5)), "from near");
        let seen = near_guest.ask(&hello, &far_guest, is_text).await;
        assert_eq!(text_of(&seen).as_deref(), Some("from near"));
        let hello = frame(mac(6), 0x0806, &arp(mac(6), address(6)), "from far");
        let seen = far_guest.ask(&hello, &near_guest, is_text).await;
        assert_eq!(text_of(&seen).as_deref(), Some("from far"));
        // Had the broadcasts above reached the other network, they would come first there.
        let (_, own_tap) = attach(&near, &others, 8).await;
        let own = Guest::on(&own_tap.tap);
        let hello = frame(mac(8), 0x0806, &arp(mac(8), address(8)), "among strangers");
        let seen = own.ask(&hello, &stranger, is_text).await;
        assert_eq!(text_of(&seen).as_deref(), Some("among strangers"));
    });
}
