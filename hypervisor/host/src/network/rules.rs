//! Packet filter rules against guests that pretend to be others: one table, one chain per tap.
//!
//! They look at frames before the bridge does, so nothing a guest sends passes them by. A guest may send only from its
//! card's own address; ARP and IPv4 only from the address its network has given it, where it has given one; no answers
//! of a DHCP server, no router advertisements, no tagged frames. Guests do not reach the host through its own bridges,
//! except to ask for an address.
//!
//! Every document states all of a tap's rules and can be repeated; nftables takes each as a whole or not at all.

use super::names::BRIDGE_PREFIX;
use super::plan::Plug;
use std::collections::BTreeSet;
use std::fmt::Write;

/// Rules that all taps share.
const COMMON: &str = r#"add table bridge godwit
add map bridge godwit taps { type ifname : verdict; }
add set bridge godwit inner { type ifname; }
add chain bridge godwit guests { type filter hook prerouting priority -300; policy accept; }
flush chain bridge godwit guests
add rule bridge godwit guests iifname vmap @taps
add chain bridge godwit host { type filter hook input priority -200; policy accept; }
flush chain bridge godwit host
add rule bridge godwit host iifname @inner udp dport 67 accept
add rule bridge godwit host iifname @inner drop
add rule bridge godwit host iifname "gwu*" drop
"#;

/// What makes these taps safe to use.
pub(crate) fn adding(plugs: &[Plug]) -> String {
    let mut text = COMMON.to_owned();
    for plug in plugs {
        let (tap, mac) = (&plug.tap, plug.mac);
        let _ = writeln!(text, "add chain bridge godwit {tap}");
        let _ = writeln!(text, "flush chain bridge godwit {tap}");
        let mut rule = |rule: &str| {
            let _ = writeln!(text, "add rule bridge godwit {tap} {rule}");
        };
        rule(&format!("ether saddr != {mac} drop"));
        rule("ether type { 8021q, 8021ad } drop");
        rule(&format!("arp saddr ether != {mac} drop"));
        if let Some(address) = plug.address {
            // Nobody's address: a probe whether an address is free, and a guest that asks for one.
            rule(&format!("arp saddr ip != {{ {address}, 0.0.0.0 }} drop"));
            rule("ip saddr 0.0.0.0 udp sport 68 udp dport 67 accept");
            rule(&format!("ip saddr != {address} drop"));
        }
        rule("udp sport { 67, 547 } drop");
        rule("icmpv6 type { nd-router-advert, nd-redirect } drop");
        let _ = writeln!(
            text,
            "add element bridge godwit taps {{ \"{tap}\" : jump {tap} }}"
        );
        // An operator's own bridge may well lead to the host.
        if plug.bridge.starts_with(BRIDGE_PREFIX) {
            let _ = writeln!(text, "add element bridge godwit inner {{ \"{tap}\" }}");
        }
    }
    text
}

/// What removes the rules of these taps, whether they are there or not.
pub(crate) fn removing(taps: &BTreeSet<String>) -> String {
    let mut text = COMMON.to_owned();
    for tap in taps {
        // Only what is there can be deleted: so it is added first.
        let _ = writeln!(text, "add chain bridge godwit {tap}");
        let _ = writeln!(
            text,
            "add element bridge godwit taps {{ \"{tap}\" : jump {tap} }}"
        );
        let _ = writeln!(text, "delete element bridge godwit taps {{ \"{tap}\" }}");
        let _ = writeln!(text, "add element bridge godwit inner {{ \"{tap}\" }}");
        let _ = writeln!(text, "delete element bridge godwit inner {{ \"{tap}\" }}");
        let _ = writeln!(text, "flush chain bridge godwit {tap}");
        let _ = writeln!(text, "delete chain bridge godwit {tap}");
    }
    text
}
