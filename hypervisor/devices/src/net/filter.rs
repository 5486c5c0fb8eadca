//! Which frames a card takes (virtio 1.2, 5.1.6.5.1 and 5.1.6.5.2).

use godwit_wire::devices::MacAddress;
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;

/// Most addresses the filter keeps of each kind; a driver that wants more gets all frames of that kind.
pub const MAX_FILTER_ADDRESSES: usize = 64;

/// Addresses of one kind that the driver asked for.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Addresses {
    /// None besides what else the filter says.
    #[default]
    None,
    /// These: at most [`MAX_FILTER_ADDRESSES`].
    These(BTreeSet<MacAddress>),
    /// More than the filter keeps: all.
    TooMany,
}

impl Addresses {
    /// Keeps as many as there may be.
    pub fn of(addresses: impl Iterator<Item = MacAddress>) -> Self {
        let mut kept = BTreeSet::new();
        for address in addresses {
            kept.insert(address);
            if kept.len() > MAX_FILTER_ADDRESSES {
                return Self::TooMany;
            }
        }
        if kept.is_empty() {
            Self::None
        } else {
            Self::These(kept)
        }
    }

    fn contains(&self, address: MacAddress) -> bool {
        match self {
            Self::None => false,
            Self::These(kept) => kept.contains(&address),
            Self::TooMany => true,
        }
    }

    /// Whether it keeps its own limit; a saved one may not.
    pub fn is_bounded(&self) -> bool {
        !matches!(self, Self::These(kept) if kept.len() > MAX_FILTER_ADDRESSES)
    }
}

/// A switch of the receive mode.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// All frames.
    Promiscuous,
    /// All multicast frames.
    AllMulticast,
    /// All unicast frames.
    AllUnicast,
    /// No multicast frames.
    NoMulticast,
    /// No unicast frames.
    NoUnicast,
    /// No broadcast frames.
    NoBroadcast,
}

/// What a mode is switched to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Switch {
    /// On.
    On,
    /// Off.
    Off,
}

/// Which frames the card takes.
///
/// Source addresses are not looked at: whether a guest may use an address is the network's to say, and the host's
/// packet filter sees frames that reach it past any card.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Filter {
    /// The card's address.
    pub mac: MacAddress,
    /// [`Mode::Promiscuous`].
    pub promiscuous: bool,
    /// [`Mode::AllMulticast`].
    pub all_multicast: bool,
    /// [`Mode::AllUnicast`].
    pub all_unicast: bool,
    /// [`Mode::NoMulticast`].
    pub no_multicast: bool,
    /// [`Mode::NoUnicast`].
    pub no_unicast: bool,
    /// [`Mode::NoBroadcast`].
    pub no_broadcast: bool,
    /// Further unicast addresses.
    pub unicast: Addresses,
    /// Multicast addresses.
    pub multicast: Addresses,
}

impl Filter {
    /// Takes every frame, as a card does whose driver sets no mode.
    pub fn open(mac: MacAddress) -> Self {
        Self {
            mac,
            promiscuous: true,
            all_multicast: false,
            all_unicast: false,
            no_multicast: false,
            no_unicast: false,
            no_broadcast: false,
            unicast: Addresses::None,
            multicast: Addresses::None,
        }
    }

    /// Switches one mode.
    pub fn set(&mut self, mode: Mode, to: Switch) {
        let switch = match mode {
            Mode::Promiscuous => &mut self.promiscuous,
            Mode::AllMulticast => &mut self.all_multicast,
            Mode::AllUnicast => &mut self.all_unicast,
            Mode::NoMulticast => &mut self.no_multicast,
            Mode::NoUnicast => &mut self.no_unicast,
            Mode::NoBroadcast => &mut self.no_broadcast,
        };
        *switch = to == Switch::On;
    }

    /// Whether a frame to `destination` is for this card.
    pub fn accepts(&self, destination: MacAddress) -> bool {
        if self.promiscuous {
            return true;
        }
        if destination.0 == [0xff; 6] {
            return !self.no_broadcast;
        }
        if destination.0[0] & 1 == 1 {
            return !self.no_multicast
                && (self.all_multicast || self.multicast.contains(destination));
        }
        !self.no_unicast
            && (self.all_unicast || destination == self.mac || self.unicast.contains(destination))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OWN: MacAddress = MacAddress([0x52, 0, 0, 0, 0, 1]);
    const OTHER: MacAddress = MacAddress([0x52, 0, 0, 0, 0, 2]);
    const GROUP: MacAddress = MacAddress([0x01, 0, 0x5e, 0, 0, 1]);
    const ALL: MacAddress = MacAddress([0xff; 6]);

    fn accepted(filter: &Filter) -> [bool; 4] {
        [OWN, OTHER, GROUP, ALL].map(|address| filter.accepts(address))
    }

    #[test]
    fn a_card_takes_everything_until_its_driver_narrows_it() {
        let mut filter = Filter::open(OWN);
        assert_eq!(accepted(&filter), [true; 4]);
        filter.set(Mode::Promiscuous, Switch::Off);
        assert_eq!(accepted(&filter), [true, false, false, true]);
    }

    #[test]
    fn each_mode_opens_or_closes_its_kind_of_frames() {
        for (mode, expected) in [
            (Mode::AllMulticast, [true, false, true, true]),
            (Mode::AllUnicast, [true, true, false, true]),
            (Mode::NoUnicast, [false, false, false, true]),
            (Mode::NoBroadcast, [true, false, false, false]),
            (Mode::NoMulticast, [true, false, false, true]),
        ] {
            let mut filter = Filter::open(OWN);
            filter.set(Mode::Promiscuous, Switch::Off);
            filter.set(mode, Switch::On);
            assert_eq!(accepted(&filter), expected, "{mode:?}");
        }
    }

    #[test]
    fn tables_add_addresses_and_too_many_add_all() {
        let mut filter = Filter::open(OWN);
        filter.set(Mode::Promiscuous, Switch::Off);
        filter.unicast = Addresses::of([OTHER].into_iter());
        filter.multicast = Addresses::of([GROUP].into_iter());
        assert_eq!(accepted(&filter), [true; 4]);
        filter.unicast = Addresses::of((0..=MAX_FILTER_ADDRESSES as u64).map(MacAddress::local));
        assert_eq!(filter.unicast, Addresses::TooMany);
        assert!(filter.accepts(OTHER));
    }
}
