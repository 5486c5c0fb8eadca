//! Gives guests the addresses their networks have given them: a responder for static leases, on every bridge that has
//! some.
//!
//! Not dnsmasq: there is nothing to decide or to remember here, only to say what the control plane has decided; a
//! process per network, its configuration, its lease file and its address on every bridge would all have to be looked
//! after. And every host must answer for exactly the machines it has, or a machine that moves is answered twice.
//!
//! Questions are read here, option by option, because guests are hostile: the kept crate for this (`dhcproto`) ends the
//! process over an option of the wrong length. It judges the answers in the tests.
//!
//! The bridge needs no address: whole frames are read and written. A guest that renews asks everybody when its first
//! question, to the server's address, is not answered; that moment is set early.

use godwit_wire::devices::MacAddress;
use godwit_wire::network::Subnet;
use std::collections::BTreeMap;
use std::net::Ipv4Addr;

/// Ports of DHCP.
pub(crate) const SERVER_PORT: u16 = 67;
const CLIENT_PORT: u16 = 68;
/// Server identifier, the same on every host, so that a lease goes on after a move. Link-local: it is nobody else's.
const SERVER: Ipv4Addr = Ipv4Addr::new(169, 254, 0, 1);
/// A lease, and when a guest renews it: first with the server's address, then with everybody.
const LEASE_S: u32 = 24 * 3600;
const RENEW_S: u32 = LEASE_S / 2;
const REBIND_S: u32 = RENEW_S + 900;
const ETHERNET_BYTES: usize = 14;
const IP_BYTES: usize = 20;
const UDP_BYTES: usize = 8;
/// Shortest message that every client takes (RFC 1542, 2.1).
const SHORTEST_MESSAGE: usize = 300;

/// What one card is given.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Lease {
    pub(crate) address: Ipv4Addr,
    pub(crate) subnet: Subnet,
    pub(crate) mtu: u16,
}

/// What the cards on one bridge are given.
pub(crate) type Leases = BTreeMap<MacAddress, Lease>;

/// Bytes of a message before its options (RFC 2131, 2), and what the options begin with.
const FIXED_BYTES: usize = 236;
const COOKIE: [u8; 4] = [99, 130, 83, 99];

/// Codes of options (RFC 2132).
mod option {
    pub(super) const PAD: u8 = 0;
    pub(super) const SUBNET_MASK: u8 = 1;
    pub(super) const ROUTER: u8 = 3;
    pub(super) const NAME_SERVERS: u8 = 6;
    pub(super) const MTU: u8 = 26;
    pub(super) const REQUESTED_ADDRESS: u8 = 50;
    pub(super) const LEASE_TIME: u8 = 51;
    pub(super) const MESSAGE_TYPE: u8 = 53;
    pub(super) const SERVER: u8 = 54;
    pub(super) const RENEW_TIME: u8 = 58;
    pub(super) const REBIND_TIME: u8 = 59;
    pub(super) const END: u8 = 255;
}

/// Types of messages (RFC 2132, 9.6).
mod kind {
    pub(super) const DISCOVER: u8 = 1;
    pub(super) const OFFER: u8 = 2;
    pub(super) const REQUEST: u8 = 3;
    pub(super) const ACK: u8 = 5;
    pub(super) const NAK: u8 = 6;
    pub(super) const INFORM: u8 = 8;
}

/// What a guest asks; everything else in its message is left alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Question {
    /// Echoed in the answer.
    transaction: [u8; 4],
    flags: [u8; 2],
    address: Ipv4Addr,
    hardware: MacAddress,
    kind: u8,
    requested: Option<Ipv4Addr>,
    server: Option<Ipv4Addr>,
}

impl Question {
    /// Reads a message; `None` for what is none, or not whole.
    fn read(message: &[u8]) -> Option<Self> {
        // A request (1) over Ethernet (1) with addresses of 6 bytes.
        if message.get(..3)? != [1, 1, 6] || message.get(FIXED_BYTES..FIXED_BYTES + 4)? != COOKIE {
            return None;
        }
        let mut question = Self {
            transaction: message.get(4..8)?.try_into().ok()?,
            flags: message.get(10..12)?.try_into().ok()?,
            address: address_in(message.get(12..16)?)?,
            hardware: MacAddress(message.get(28..34)?.try_into().ok()?),
            kind: 0,
            requested: None,
            server: None,
        };
        let mut rest = message.get(FIXED_BYTES + 4..)?;
        while let Some((&code, after)) = rest.split_first() {
            match code {
                option::PAD => {
                    rest = after;
                    continue;
                }
                option::END => break,
                _ => {}
            }
            let (&length, after) = after.split_first()?;
            let value = after.get(..usize::from(length))?;
            match code {
                option::MESSAGE_TYPE => question.kind = *value.first()?,
                option::REQUESTED_ADDRESS => question.requested = Some(address_in(value)?),
                option::SERVER => question.server = Some(address_in(value)?),
                _ => {}
            }
            rest = after.get(usize::from(length)..)?;
        }
        Some(question)
    }

    fn wants_broadcast(&self) -> bool {
        self.flags[0] & 0x80 != 0
    }
}

fn address_in(bytes: &[u8]) -> Option<Ipv4Addr> {
    <[u8; 4]>::try_from(bytes).ok().map(Ipv4Addr::from)
}

/// The frame that answers `frame`, if it asks for one of our leases. `own` is the address of the bridge.
pub(crate) fn answer(leases: &Leases, own: MacAddress, frame: &[u8]) -> Option<Vec<u8>> {
    let source = MacAddress(frame.get(6..12)?.try_into().ok()?);
    // The packet filter lets each guest use only its own address.
    let lease = leases.get(&source)?;
    let asked = Question::read(frame.get(ETHERNET_BYTES + IP_BYTES + UDP_BYTES..)?)?;
    if asked.hardware != source {
        return None;
    }
    let kind = reply_kind(&asked, lease)?;
    let message = reply(&asked, kind, lease);
    let to = if asked.wants_broadcast() || kind == kind::NAK {
        (MacAddress([0xff; 6]), Ipv4Addr::BROADCAST)
    } else {
        (source, lease.address)
    };
    Some(frame_of(own, to, &message))
}

fn reply_kind(asked: &Question, lease: &Lease) -> Option<u8> {
    match asked.kind {
        kind::DISCOVER => Some(kind::OFFER),
        kind::INFORM => Some(kind::ACK),
        // It has taken another server's offer.
        kind::REQUEST if asked.server.is_some_and(|server| server != SERVER) => None,
        kind::REQUEST if asked.requested.unwrap_or(asked.address) == lease.address => {
            Some(kind::ACK)
        }
        kind::REQUEST => Some(kind::NAK),
        _ => None,
    }
}

fn reply(asked: &Question, kind: u8, lease: &Lease) -> Vec<u8> {
    let informs = asked.kind == kind::INFORM;
    let given = if kind == kind::NAK || informs {
        Ipv4Addr::UNSPECIFIED
    } else {
        lease.address
    };
    let mut message = vec![2, 1, 6, 0];
    message.extend(asked.transaction);
    message.extend([0, 0]);
    message.extend(asked.flags);
    message.extend(asked.address.octets());
    message.extend(given.octets());
    // No next server, no relay.
    message.extend([0; 8]);
    message.extend(asked.hardware.0);
    message.resize(FIXED_BYTES, 0);
    message.extend(COOKIE);
    let mut add = |code: u8, value: &[u8]| {
        // An option has at most 255 bytes.
        let value = &value[..value.len().min(252)];
        message.extend([code, value.len() as u8]);
        message.extend(value);
    };
    add(option::MESSAGE_TYPE, &[kind]);
    add(option::SERVER, &SERVER.octets());
    if kind != kind::NAK {
        add(option::SUBNET_MASK, &lease.subnet.mask().octets());
        add(option::MTU, &lease.mtu.to_be_bytes());
        if let Some(gateway) = lease.subnet.gateway {
            add(option::ROUTER, &gateway.octets());
        }
        if !lease.subnet.dns.is_empty() {
            let servers = lease.subnet.dns.iter().flat_map(|server| server.octets());
            add(option::NAME_SERVERS, &servers.collect::<Vec<u8>>());
        }
        if !informs {
            add(option::LEASE_TIME, &LEASE_S.to_be_bytes());
            add(option::RENEW_TIME, &RENEW_S.to_be_bytes());
            add(option::REBIND_TIME, &REBIND_S.to_be_bytes());
        }
    }
    message.push(option::END);
    message.resize(message.len().max(SHORTEST_MESSAGE), 0);
    message
}

fn frame_of(from: MacAddress, to: (MacAddress, Ipv4Addr), message: &[u8]) -> Vec<u8> {
    let (mac, address) = to;
    let udp_length = u16::try_from(UDP_BYTES + message.len()).unwrap_or(u16::MAX);
    let mut udp = Vec::with_capacity(usize::from(udp_length));
    udp.extend(SERVER_PORT.to_be_bytes());
    udp.extend(CLIENT_PORT.to_be_bytes());
    udp.extend(udp_length.to_be_bytes());
    udp.extend([0, 0]);
    udp.extend(message);
    let mut pseudo = Vec::with_capacity(12 + udp.len());
    pseudo.extend(SERVER.octets());
    pseudo.extend(address.octets());
    pseudo.extend([0, 17]);
    pseudo.extend(udp_length.to_be_bytes());
    pseudo.extend(&udp);
    // A sum of 0 would mean that there is none (RFC 768).
    let sum = match checksum(&pseudo) {
        0 => u16::MAX,
        sum => sum,
    };
    udp[6..8].copy_from_slice(&sum.to_be_bytes());

    let length = u16::try_from(IP_BYTES + udp.len()).unwrap_or(u16::MAX);
    let mut ip = Vec::with_capacity(IP_BYTES);
    ip.extend([0x45, 0]);
    ip.extend(length.to_be_bytes());
    ip.extend([0, 0, 0, 0, 64, 17, 0, 0]);
    ip.extend(SERVER.octets());
    ip.extend(address.octets());
    let sum = checksum(&ip);
    ip[10..12].copy_from_slice(&sum.to_be_bytes());

    let mut frame = Vec::with_capacity(ETHERNET_BYTES + usize::from(length));
    frame.extend(mac.0);
    frame.extend(from.0);
    frame.extend([0x08, 0x00]);
    frame.extend(ip);
    frame.extend(udp);
    frame
}

/// The Internet checksum (RFC 1071).
pub(super) fn checksum(bytes: &[u8]) -> u16 {
    let words = bytes
        .chunks(2)
        .map(|pair| u32::from(pair[0]) << 8 | pair.get(1).copied().map_or(0, u32::from));
    let mut sum = words.fold(0_u32, |sum, word| {
        let sum = sum + word;
        (sum & 0xffff) + (sum >> 16)
    });
    sum = (sum & 0xffff) + (sum >> 16);
    !u16::try_from(sum).unwrap_or(u16::MAX)
}

pub(crate) mod responder;

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use dhcproto::v4::{DhcpOption, Flags, Message, MessageType, OptionCode};
    use dhcproto::{Decodable, Decoder, Encodable};
    use proptest::prelude::*;

    pub(crate) const GUEST: MacAddress = MacAddress([0x52, 0x54, 0, 1, 2, 3]);
    const BRIDGE: MacAddress = MacAddress([2, 0, 0, 0, 0, 1]);

    pub(crate) fn lease() -> Lease {
        Lease {
            address: Ipv4Addr::new(10, 1, 0, 5),
            subnet: Subnet {
                address: Ipv4Addr::new(10, 1, 0, 0),
                prefix: 24,
                gateway: Some(Ipv4Addr::new(10, 1, 0, 1)),
                dns: vec![Ipv4Addr::new(9, 9, 9, 9)],
            },
            mtu: 1450,
        }
    }

    /// A question as a guest sends it.
    pub(crate) fn question(mac: MacAddress, kind: MessageType, more: Vec<DhcpOption>) -> Vec<u8> {
        let zero = Ipv4Addr::UNSPECIFIED;
        let mut message = Message::new_with_id(77, zero, zero, zero, zero, &mac.0);
        message.opts_mut().insert(DhcpOption::MessageType(kind));
        for option in more {
            message.opts_mut().insert(option);
        }
        let udp = message.to_vec().unwrap();
        let mut frame = [&[0xff; 6][..], &mac.0, &[8, 0]].concat();
        let mut ip = vec![0x45, 0];
        ip.extend((28 + udp.len() as u16).to_be_bytes());
        ip.extend([0, 0, 0, 0, 64, 17, 0, 0, 0, 0, 0, 0, 255, 255, 255, 255]);
        let sum = checksum(&ip);
        ip[10..12].copy_from_slice(&sum.to_be_bytes());
        frame.extend(ip);
        frame.extend([0, 68, 0, 67]);
        frame.extend((8 + udp.len() as u16).to_be_bytes());
        frame.extend([0, 0]);
        frame.extend(udp);
        frame
    }

    pub(crate) fn message_in(frame: &[u8]) -> Message {
        Message::decode(&mut Decoder::new(&frame[42..])).unwrap()
    }

    fn ask(kind: MessageType, more: Vec<DhcpOption>) -> Option<Message> {
        let leases = [(GUEST, lease())].into();
        answer(&leases, BRIDGE, &question(GUEST, kind, more)).map(|frame| message_in(&frame))
    }

    #[test]
    fn a_guest_is_offered_its_address_with_everything_it_needs() {
        let leases = [(GUEST, lease())].into();
        let frame = answer(
            &leases,
            BRIDGE,
            &question(GUEST, MessageType::Discover, vec![]),
        )
        .unwrap();
        assert_eq!((&frame[..6], &frame[6..12]), (&GUEST.0[..], &BRIDGE.0[..]));
        // Both checksums come out even.
        assert_eq!(checksum(&frame[14..34]), 0);
        let pseudo = [&frame[26..34], &[0, 17], &frame[38..40], &frame[34..]].concat();
        assert_eq!(checksum(&pseudo), 0);
        let offer = message_in(&frame);
        assert_eq!((offer.xid(), offer.yiaddr()), (77, lease().address));
        let options = offer.opts();
        assert_eq!(options.msg_type(), Some(MessageType::Offer));
        for option in [
            DhcpOption::SubnetMask(Ipv4Addr::new(255, 255, 255, 0)),
            DhcpOption::Router(vec![Ipv4Addr::new(10, 1, 0, 1)]),
            DhcpOption::DomainNameServer(vec![Ipv4Addr::new(9, 9, 9, 9)]),
            DhcpOption::InterfaceMtu(1450),
            DhcpOption::AddressLeaseTime(LEASE_S),
        ] {
            assert_eq!(options.get(OptionCode::from(&option)), Some(&option));
        }
    }

    #[test]
    fn a_guest_may_have_its_own_address_and_no_other() {
        let request = |address| {
            ask(
                MessageType::Request,
                vec![DhcpOption::RequestedIpAddress(address)],
            )
            .unwrap()
        };
        let granted = request(lease().address);
        assert_eq!(granted.opts().msg_type(), Some(MessageType::Ack));
        let refused = request(Ipv4Addr::new(10, 1, 0, 6));
        assert_eq!(refused.opts().msg_type(), Some(MessageType::Nak));
        assert_eq!(refused.yiaddr(), Ipv4Addr::UNSPECIFIED);
    }

    #[test]
    fn strangers_and_those_who_chose_another_server_get_no_answer() {
        let stranger = MacAddress([0x52, 0x54, 0, 9, 9, 9]);
        let leases = [(GUEST, lease())].into();
        let asked = question(stranger, MessageType::Discover, vec![]);
        assert_eq!(answer(&leases, BRIDGE, &asked), None);
        // From a known card, in the name of another.
        let mut forged = asked;
        forged[6..12].copy_from_slice(&GUEST.0);
        assert_eq!(answer(&leases, BRIDGE, &forged), None);
        let elsewhere = DhcpOption::ServerIdentifier(Ipv4Addr::new(10, 1, 0, 1));
        assert!(ask(MessageType::Request, vec![elsewhere]).is_none());
        assert!(ask(MessageType::Release, vec![]).is_none());
    }

    #[test]
    fn who_asks_for_a_broadcast_gets_one() {
        let mut asked = question(GUEST, MessageType::Discover, vec![]);
        let flags: u16 = Flags::default().set_broadcast().into();
        asked[52..54].copy_from_slice(&flags.to_be_bytes());
        let leases = [(GUEST, lease())].into();
        let frame = answer(&leases, BRIDGE, &asked).unwrap();
        assert_eq!(frame[..6], [0xff; 6]);
        assert_eq!(frame[30..34], [0xff; 4]);
    }

    proptest! {
        #[test]
        fn no_frame_panics_the_responder(mut frame in proptest::collection::vec(any::<u8>(), 0..700)) {
            let leases = [(GUEST, lease())].into();
            if frame.len() > 70 {
                let genuine = question(GUEST, MessageType::Discover, vec![]);
                frame[..70].copy_from_slice(&genuine[..70]);
            }
            let _ = answer(&leases, BRIDGE, &frame);
        }
    }
}
