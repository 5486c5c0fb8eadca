//! Frames by which a machine that arrived on a host makes itself known to the network: switches learn its port from
//! a reverse-ARP request (RFC 903), neighbours its address from a gratuitous ARP request (RFC 5227, section 3).
//!
//! They are written to the machine's end of the tap, so that to the bridge they come from the guest.

use crate::sys::tap::HEADER_BYTES;
use godwit_wire::devices::MacAddress;
use std::net::Ipv4Addr;
use std::time::Duration;

/// How often the frames are sent: any of them may be lost, and a bridge may still be bringing up its port.
pub const ROUNDS: u32 = 5;
/// Time between the first two rounds.
const FIRST_GAP: Duration = Duration::from_millis(50);
/// By how much each later gap is longer.
const GAP_GROWTH: Duration = Duration::from_millis(100);

/// Shortest Ethernet frame without its checksum.
const MIN_FRAME_BYTES: usize = 60;
const ETHERTYPE_ARP: u16 = 0x0806;
const ETHERTYPE_RARP: u16 = 0x8035;
const ARP_REQUEST: u16 = 1;
const RARP_REQUEST: u16 = 3;

/// How long to wait after `round` (the first is 0), if there is another.
pub fn gap_after(round: u32) -> Option<Duration> {
    (round + 1 < ROUNDS).then(|| FIRST_GAP + GAP_GROWTH * round)
}

/// The frames of one round, each behind an empty virtio-net header.
pub fn frames(mac: MacAddress, address: Option<Ipv4Addr>) -> Vec<Vec<u8>> {
    let unknown = Ipv4Addr::UNSPECIFIED;
    let mut frames = vec![frame(ETHERTYPE_RARP, RARP_REQUEST, mac, unknown, mac)];
    if let Some(address) = address {
        let nobody = MacAddress([0; 6]);
        frames.push(frame(ETHERTYPE_ARP, ARP_REQUEST, mac, address, nobody));
    }
    frames
}

fn frame(
    ethertype: u16,
    operation: u16,
    mac: MacAddress,
    address: Ipv4Addr,
    target: MacAddress,
) -> Vec<u8> {
    let mut frame = vec![0; HEADER_BYTES];
    frame.extend([0xff; 6]);
    frame.extend(mac.0);
    frame.extend(ethertype.to_be_bytes());
    // Ethernet and IPv4, with addresses of 6 and 4 bytes.
    frame.extend([0, 1, 8, 0, 6, 4]);
    frame.extend(operation.to_be_bytes());
    for hardware in [mac, target] {
        frame.extend(hardware.0);
        frame.extend(address.octets());
    }
    frame.resize(HEADER_BYTES + MIN_FRAME_BYTES, 0);
    frame
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAC: MacAddress = MacAddress([0x52, 0x54, 0, 1, 2, 3]);

    #[test]
    fn a_machine_without_a_known_address_asks_for_its_own() {
        let frames = frames(MAC, None);
        let [frame] = &frames[..] else {
            panic!("{frames:?}")
        };
        assert_eq!(frame.len(), 72);
        let bytes = &frame[HEADER_BYTES..];
        assert_eq!(bytes[..6], [0xff; 6]);
        assert_eq!(bytes[6..12], MAC.0);
        assert_eq!(bytes[12..22], [0x80, 0x35, 0, 1, 8, 0, 6, 4, 0, 3]);
        assert_eq!(bytes[22..28], MAC.0);
        assert_eq!(bytes[32..38], MAC.0);
    }

    #[test]
    fn a_known_address_is_announced_to_everybody() {
        let frames = frames(MAC, Some(Ipv4Addr::new(10, 0, 0, 7)));
        let bytes = &frames[1][HEADER_BYTES..];
        assert_eq!(bytes[12..22], [8, 6, 0, 1, 8, 0, 6, 4, 0, 1]);
        assert_eq!(bytes[28..32], [10, 0, 0, 7]);
        assert_eq!(bytes[38..42], [10, 0, 0, 7]);
    }

    #[test]
    fn gaps_grow_and_end() {
        let gaps: Vec<_> = (0..)
            .map_while(gap_after)
            .map(|gap| gap.as_millis())
            .collect();
        assert_eq!(gaps, [50, 150, 250, 350]);
    }
}
