//! Commands of the control queue (virtio 1.2, 5.1.6.5): bytes in, a [`Command`] or the reason for refusing it out.

use super::filter::{Addresses, Mode, Switch};
use godwit_wire::devices::MacAddress;

/// Longest command that is looked at: a table of more addresses than any filter keeps.
pub const MAX_COMMAND_BYTES: usize = 8 * 1024;

/// Answer to a command that was carried out.
pub const OK: u8 = 0;
/// Answer to one that was not.
pub const ERROR: u8 = 1;

const CLASS_RX: u8 = 0;
const CLASS_MAC: u8 = 1;
const CLASS_ANNOUNCE: u8 = 3;
const CLASS_MQ: u8 = 4;

const MAC_TABLE_SET: u8 = 0;
const MAC_ADDR_SET: u8 = 1;
const ANNOUNCE_ACK: u8 = 0;
const MQ_PAIRS_SET: u8 = 0;

/// What a driver asks of its card.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Command {
    /// Switch a receive mode.
    SetMode {
        /// Which.
        mode: Mode,
        /// On or off.
        to: Switch,
    },
    /// Take frames to these addresses too.
    SetTable {
        /// Addresses of single cards.
        unicast: Addresses,
        /// Addresses of groups.
        multicast: Addresses,
    },
    /// Have this address.
    SetAddress(MacAddress),
    /// The driver has announced itself.
    AnnounceDone,
    /// Use this many queue pairs.
    SetPairs(u16),
}

/// Why a command is not carried out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// It has no class and number, or is longer than [`MAX_COMMAND_BYTES`].
    #[error("a command of {bytes} bytes")]
    Length {
        /// Its length.
        bytes: usize,
    },
    /// Nobody knows it.
    #[error("command {command} of class {class} is not known")]
    Unknown {
        /// Its class.
        class: u8,
        /// Its number in the class.
        command: u8,
    },
    /// Its data is not what belongs to it.
    #[error("command {command} of class {class} comes with unusable data")]
    Data {
        /// Its class.
        class: u8,
        /// Its number in the class.
        command: u8,
    },
}

impl Command {
    /// Reads a command: class, number, data.
    pub fn parse(bytes: &[u8]) -> Result<Self, Refusal> {
        let ([class, command, data @ ..], true) = (bytes, bytes.len() <= MAX_COMMAND_BYTES) else {
            return Err(Refusal::Length { bytes: bytes.len() });
        };
        let (class, command) = (*class, *command);
        let bad = Refusal::Data { class, command };
        match (class, command) {
            (CLASS_RX, _) => {
                let mode = match command {
                    0 => Mode::Promiscuous,
                    1 => Mode::AllMulticast,
                    2 => Mode::AllUnicast,
                    3 => Mode::NoMulticast,
                    4 => Mode::NoUnicast,
                    5 => Mode::NoBroadcast,
                    _ => return Err(Refusal::Unknown { class, command }),
                };
                match data {
                    [0] => Ok(Self::SetMode {
                        mode,
                        to: Switch::Off,
                    }),
                    [_] => Ok(Self::SetMode {
                        mode,
                        to: Switch::On,
                    }),
                    _ => Err(bad),
                }
            }
            (CLASS_MAC, MAC_TABLE_SET) => {
                let (unicast, rest) = table(data).ok_or(bad)?;
                match table(rest) {
                    Some((multicast, [])) => Ok(Self::SetTable { unicast, multicast }),
                    _ => Err(bad),
                }
            }
            (CLASS_MAC, MAC_ADDR_SET) => match <[u8; 6]>::try_from(data).map(MacAddress) {
                Ok(mac) if mac.is_unicast() => Ok(Self::SetAddress(mac)),
                _ => Err(bad),
            },
            (CLASS_ANNOUNCE, ANNOUNCE_ACK) if data.is_empty() => Ok(Self::AnnounceDone),
            (CLASS_ANNOUNCE, ANNOUNCE_ACK) => Err(bad),
            (CLASS_MQ, MQ_PAIRS_SET) => match <[u8; 2]>::try_from(data) {
                Ok(pairs) => Ok(Self::SetPairs(u16::from_le_bytes(pairs))),
                Err(_) => Err(bad),
            },
            _ => Err(Refusal::Unknown { class, command }),
        }
    }

    /// The feature without which the command means nothing.
    pub fn feature(&self) -> u64 {
        use super::feature;
        match self {
            Self::SetMode {
                mode: Mode::Promiscuous | Mode::AllMulticast,
                ..
            }
            | Self::SetTable { .. } => feature::CTRL_RX,
            Self::SetMode { .. } => feature::CTRL_RX_EXTRA,
            Self::SetAddress(_) => feature::CTRL_MAC_ADDR,
            Self::AnnounceDone => feature::GUEST_ANNOUNCE,
            Self::SetPairs(_) => feature::MQ,
        }
    }
}

/// A counted list of addresses, and what follows it.
fn table(bytes: &[u8]) -> Option<(Addresses, &[u8])> {
    let (count, rest) = bytes.split_first_chunk::<4>()?;
    let len = usize::try_from(u32::from_le_bytes(*count))
        .ok()?
        .checked_mul(6)?;
    let (entries, rest) = rest.split_at_checked(len)?;
    let addresses = entries
        .chunks_exact(6)
        .filter_map(|entry| entry.try_into().ok().map(MacAddress));
    Some((Addresses::of(addresses), rest))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn commands_are_read_as_the_specification_lays_them_out() {
        assert_eq!(
            Command::parse(&[0, 1, 1]),
            Ok(Command::SetMode {
                mode: Mode::AllMulticast,
                to: Switch::On
            })
        );
        assert_eq!(
            Command::parse(&[1, 1, 0x52, 0, 0, 0, 0, 9]),
            Ok(Command::SetAddress(MacAddress([0x52, 0, 0, 0, 0, 9])))
        );
        assert_eq!(Command::parse(&[3, 0]), Ok(Command::AnnounceDone));
        assert_eq!(Command::parse(&[4, 0, 3, 0]), Ok(Command::SetPairs(3)));
        let mut bytes = vec![1, 0, 1, 0, 0, 0];
        bytes.extend([0x52, 0, 0, 0, 0, 1]);
        bytes.extend([0; 4]);
        assert_eq!(
            Command::parse(&bytes),
            Ok(Command::SetTable {
                unicast: Addresses::of([MacAddress([0x52, 0, 0, 0, 0, 1])].into_iter()),
                multicast: Addresses::None,
            })
        );
    }

    #[test]
    fn commands_of_wrong_lengths_are_refused() {
        for bytes in [
            &[][..],
            &[0],
            &[0, 0],
            &[0, 0, 1, 1],
            &[0, 6, 1],
            &[1, 0],
            &[1, 0, 0, 0, 0, 0],
            &[1, 0, 0xff, 0xff, 0xff, 0xff, 0, 0, 0, 0],
            &[1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 7],
            &[1, 1, 0x52, 0, 0, 0, 0],
            &[1, 1, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff],
            &[3, 0, 0],
            &[4, 0, 1],
            &[4, 0, 1, 0, 0],
            &[9, 9, 9],
        ] {
            assert!(Command::parse(bytes).is_err(), "{bytes:?}");
        }
        assert!(Command::parse(&vec![0; MAX_COMMAND_BYTES + 1]).is_err());
    }

    proptest! {
        #[test]
        fn any_bytes_give_a_command_within_bounds_or_a_refusal(
            class in 0u8..6,
            bytes in prop::collection::vec(any::<u8>(), 0..1024),
        ) {
            let bytes = [&[class][..], &bytes].concat();
            if let Ok(Command::SetTable { unicast, multicast }) = Command::parse(&bytes) {
                prop_assert!(unicast.is_bounded() && multicast.is_bounded());
            }
        }

        #[test]
        fn tables_of_any_size_are_read_whole(unicast in 0usize..100, multicast in 0usize..100) {
            let mut bytes = vec![1, 0];
            for count in [unicast, multicast] {
                bytes.extend((count as u32).to_le_bytes());
                bytes.extend((0..count).flat_map(|nth| MacAddress::local(nth as u64).0));
            }
            let expected = |count: usize| Addresses::of((0..count as u64).map(MacAddress::local));
            prop_assert_eq!(Command::parse(&bytes), Ok(Command::SetTable {
                unicast: expected(unicast),
                multicast: expected(multicast),
            }));
        }
    }
}
