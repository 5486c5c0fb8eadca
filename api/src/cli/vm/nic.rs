//! A network card on the command line, as `godwit vmm --nic` has it too: a word, then options between commas.

use crate::resource::CreateVmNic;
use godwit_wire::devices::{MAX_QUEUE_PAIRS, MacAddress};

/// `NETWORK[=ADDRESS][,mac=ADDRESS][,queues=PAIRS]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct NicArg {
    network: String,
    /// `auto` when nothing is said; the server judges it.
    address: String,
    mac: Option<MacAddress>,
    queue_pairs: Option<u8>,
}

impl NicArg {
    /// Reads it; the error begins with the part that is wrong.
    pub(super) fn parse(text: &str) -> Result<Self, String> {
        let mut words = text.split(',');
        let place = words.next().unwrap_or_default();
        let (network, address) = place.split_once('=').unwrap_or((place, "auto"));
        if network.is_empty() {
            return Err("network: a card needs one, as in lan or lan=10.1.2.3".into());
        }
        if address.is_empty() {
            return Err(
                "address: write an IPv4 address, auto or none behind the =, or leave the = out"
                    .into(),
            );
        }
        let mut card = Self {
            network: network.to_owned(),
            address: address.to_owned(),
            mac: None,
            queue_pairs: None,
        };
        for word in words {
            match word.split_once('=') {
                Some(("mac", mac)) => card.mac = Some(read_mac(mac)?),
                Some(("queues", pairs)) => card.queue_pairs = Some(read_pairs(pairs)?),
                _ => return Err(format!("{word:?} is none of mac=ADDRESS, queues=PAIRS")),
            }
        }
        Ok(card)
    }

    /// What the server is asked for.
    pub(super) fn card(&self) -> CreateVmNic {
        CreateVmNic {
            name: None,
            network: self.network.clone(),
            mac: self.mac.map(|mac| mac.to_string()),
            address: self.address.clone(),
            queue_pairs: self.queue_pairs,
            limits: Default::default(),
        }
    }
}

fn read_mac(text: &str) -> Result<MacAddress, String> {
    let mac: MacAddress = text.parse().map_err(|error| format!("mac: {error}"))?;
    match mac.is_unicast() {
        true => Ok(mac),
        false => Err(format!("mac: {mac} is no address of a single card")),
    }
}

fn read_pairs(text: &str) -> Result<u8, String> {
    let pairs = text
        .parse()
        .map_err(|_| format!("queues: {text:?} is no number"))?;
    match pairs {
        1..=MAX_QUEUE_PAIRS => Ok(pairs),
        _ => Err(format!("queues: {pairs} is outside 1..={MAX_QUEUE_PAIRS}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_network_alone_leaves_the_rest_to_the_server() {
        let card = NicArg::parse("lan").unwrap().card();
        assert_eq!(
            (card.network.as_str(), card.address.as_str()),
            ("lan", "auto")
        );
        assert_eq!((card.mac, card.queue_pairs), (None, None));
    }

    #[test]
    fn address_mac_and_queues_reach_the_server() {
        let card = NicArg::parse("lan=10.1.2.3,queues=2,mac=52:54:00:AB:cd:01")
            .unwrap()
            .card();
        assert_eq!(
            (card.network.as_str(), card.address.as_str()),
            ("lan", "10.1.2.3")
        );
        assert_eq!(card.mac.as_deref(), Some("52:54:00:ab:cd:01"));
        assert_eq!(card.queue_pairs, Some(2));
        let unmanaged = NicArg::parse("lan=none,queues=8").unwrap().card();
        assert_eq!(unmanaged.address, "none");
        assert_eq!(unmanaged.queue_pairs, Some(8));
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (text, field) in [
            ("", "network: "),
            ("=10.1.2.3", "network: "),
            ("lan=", "address: "),
            ("lan,queues=0", "queues: 0 is outside 1..=8"),
            ("lan,queues=9", "queues: 9 is outside 1..=8"),
            ("lan,queues=many", "queues: \"many\" "),
            ("lan,mac=52:54:00", "mac: \"52:54:00\" "),
            ("lan,mac=01:00:5e:00:00:01", "mac: 01:00:5e:00:00:01 "),
            ("lan,mtu=9000", "\"mtu=9000\" is none of "),
            ("lan,", "\"\" is none of "),
        ] {
            let error = NicArg::parse(text).unwrap_err();
            assert!(error.starts_with(field), "{text}: {error}");
        }
    }
}
