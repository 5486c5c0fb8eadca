//! Feature bits and configuration space of a network card (virtio 1.2, 5.1.3 and 5.1.4).

use crate::sys::tap::Offloads;
use godwit_wire::devices::MacAddress;

/// The device takes frames whose checksum is not computed.
pub const CSUM: u64 = 1 << 0;
/// The driver takes frames whose checksum is not computed.
pub const GUEST_CSUM: u64 = 1 << 1;
/// The device says how large frames may be.
pub const MTU: u64 = 1 << 3;
/// The device has an address.
pub const MAC: u64 = 1 << 5;
/// The driver takes TCP over IPv4 unsegmented.
pub const GUEST_TSO4: u64 = 1 << 7;
/// The driver takes TCP over IPv6 unsegmented.
pub const GUEST_TSO6: u64 = 1 << 8;
/// The driver takes unsegmented TCP with congestion notification.
pub const GUEST_ECN: u64 = 1 << 9;
/// The device takes TCP over IPv4 unsegmented.
pub const HOST_TSO4: u64 = 1 << 11;
/// The device takes TCP over IPv6 unsegmented.
pub const HOST_TSO6: u64 = 1 << 12;
/// The device takes unsegmented TCP with congestion notification.
pub const HOST_ECN: u64 = 1 << 13;
/// A frame may fill several receive buffers.
pub const MRG_RXBUF: u64 = 1 << 15;
/// The configuration space has a status.
pub const STATUS: u64 = 1 << 16;
/// There is a control queue.
pub const CTRL_VQ: u64 = 1 << 17;
/// The control queue sets the receive mode.
pub const CTRL_RX: u64 = 1 << 18;
/// The control queue sets the finer receive modes.
pub const CTRL_RX_EXTRA: u64 = 1 << 20;
/// The driver can be asked to announce itself.
pub const GUEST_ANNOUNCE: u64 = 1 << 21;
/// There are several queue pairs.
pub const MQ: u64 = 1 << 22;
/// The control queue sets the address.
pub const CTRL_MAC_ADDR: u64 = 1 << 23;

/// What a card with so many queue pairs offers.
pub(super) fn offered(queue_pairs: u16) -> u64 {
    let always = CSUM
        | GUEST_CSUM
        | MTU
        | MAC
        | GUEST_TSO4
        | GUEST_TSO6
        | GUEST_ECN
        | HOST_TSO4
        | HOST_TSO6
        | HOST_ECN
        | MRG_RXBUF
        | STATUS
        | CTRL_VQ
        | CTRL_RX
        | CTRL_RX_EXTRA
        | GUEST_ANNOUNCE
        | CTRL_MAC_ADDR;
    if queue_pairs > 1 { always | MQ } else { always }
}

/// What the kernel may leave undone in frames for a driver that accepted `features`. Segmentation depends on
/// checksums (5.1.3.1).
pub(super) fn offloads(features: u64) -> Offloads {
    if features & GUEST_CSUM == 0 {
        return Offloads::default();
    }
    let segments = features & (GUEST_TSO4 | GUEST_TSO6) != 0;
    let mut flags = Offloads::CHECKSUM;
    for (wanted, flag) in [
        (features & GUEST_TSO4 != 0, Offloads::TSO4),
        (features & GUEST_TSO6 != 0, Offloads::TSO6),
        (segments && features & GUEST_ECN != 0, Offloads::TSO_ECN),
    ] {
        if wanted {
            flags |= flag;
        }
    }
    Offloads(flags)
}

/// Whether a driver that accepted `features` may get frames larger than the network's.
pub(super) fn takes_unsegmented(features: u64) -> bool {
    offloads(features).0 & (Offloads::TSO4 | Offloads::TSO6) != 0
}

/// Status bit: the link is up.
const LINK_UP: u16 = 1;
/// Status bit: the driver shall announce itself.
const ANNOUNCE: u16 = 2;
/// Bytes of the configuration space that this device fills.
const CONFIG_BYTES: usize = 12;

/// What the driver reads about its card.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct ConfigSpace {
    pub(super) mac: MacAddress,
    pub(super) link: super::Link,
    pub(super) announce: bool,
    pub(super) queue_pairs: u16,
    pub(super) mtu: u16,
}

impl ConfigSpace {
    /// Copies from byte `offset` on; zeros lie past the end.
    pub(super) fn read(&self, offset: u32, data: &mut [u8]) {
        let mut status = 0;
        if self.link == super::Link::Up {
            status |= LINK_UP;
        }
        if self.announce {
            status |= ANNOUNCE;
        }
        let mut bytes = [0; CONFIG_BYTES];
        bytes[..6].copy_from_slice(&self.mac.0);
        bytes[6..8].copy_from_slice(&status.to_le_bytes());
        bytes[8..10].copy_from_slice(&self.queue_pairs.to_le_bytes());
        bytes[10..12].copy_from_slice(&self.mtu.to_le_bytes());
        let from = usize::try_from(offset).unwrap_or(usize::MAX);
        for (nth, byte) in data.iter_mut().enumerate() {
            let at = from.saturating_add(nth);
            *byte = bytes.get(at).copied().unwrap_or(0);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn segmentation_is_asked_for_only_with_checksums() {
        assert_eq!(offloads(GUEST_TSO4 | GUEST_TSO6), Offloads(0));
        assert_eq!(offloads(GUEST_CSUM | GUEST_TSO4), Offloads(3));
        assert_eq!(offloads(GUEST_CSUM | GUEST_ECN), Offloads(1));
    }

    #[test]
    fn several_queue_pairs_are_offered_only_when_there_are_several() {
        assert_eq!(offered(1) & MQ, 0);
        assert_eq!(offered(2) & MQ, MQ);
    }

    proptest! {
        #[test]
        fn configuration_is_read_in_any_pieces(offset in any::<u32>(), len in 0usize..64) {
            let config = ConfigSpace {
                mac: MacAddress([0x52, 1, 2, 3, 4, 5]),
                link: super::super::Link::Up,
                announce: true,
                queue_pairs: 2,
                mtu: 1500,
            };
            let whole = [0x52, 1, 2, 3, 4, 5, 3, 0, 2, 0, 0xdc, 5];
            let mut data = vec![0xaa; len];
            config.read(offset, &mut data);
            for (nth, byte) in data.iter().enumerate() {
                prop_assert_eq!(*byte, whole.get(offset as usize + nth).copied().unwrap_or(0));
            }
        }
    }
}
