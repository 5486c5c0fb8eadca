use super::support::*;
use crate::device::{DeviceError, Plug, SavedBody, Start, VirtioDevice};
use crate::mock::MockDriver;
use crate::net::filter::{Addresses, Filter};
use crate::net::{Net, NetConfig, announce};
use crate::sys::tap::HEADER_BYTES;
use godwit_wire::devices::MacAddress;
use std::net::Ipv4Addr;
use std::sync::Arc;
use std::time::Duration;

const OTHER: MacAddress = MacAddress([0x52, 9, 9, 9, 9, 9]);

#[test]
fn a_paused_card_touches_nothing_and_goes_on_where_it_stood() {
    let Some(network) = Network::new(&["t0", "t1"]) else {
        return;
    };
    let (mut card, peer) = (working("t0"), Peer::new("t1"));
    network.forwards(&["t0", "t1"]);
    let buffers = offer_buffers(&mut card, 8, BUFFER_BYTES);
    let sent = frame(CARD, PEER, &[1; 60]);
    peer.send(&sent);
    received(&mut card, &buffers);
    let positions = card.device_mut().pause().unwrap();
    assert_eq!(card.device_mut().pause().unwrap(), positions);
    // Buffers that the card had looked at and not used count as not taken.
    let places: Vec<_> = positions
        .iter()
        .map(|at| (at.index, at.next_avail, at.next_used))
        .collect();
    assert_eq!(places, [(0, 1, 1), (1, 0, 0), (2, 0, 0)]);
    peer.send(&sent);
    let out = card.place(&with_header(&frame(PEER, CARD, &[2; 60])));
    card.submit(TRANSMIT, &[crate::mock::Buffer::Readable(out, 86)]);
    card.kick(TRANSMIT);
    assert_eq!(card.wait_used(RECEIVE, Duration::from_millis(30)), None);
    assert_eq!(card.poll_used(TRANSMIT), None);
    card.device_mut().resume().unwrap();
    assert_eq!(received(&mut card, &buffers).0[HEADER_BYTES..], sent);
    assert_eq!(peer.receive()[HEADER_BYTES..][14..], [2; 60]);
}

#[test]
fn a_card_arrives_with_its_settings_and_announces_itself() {
    let Some(network) = Network::new(&["t0", "t1", "t2"]) else {
        return;
    };
    let (mut card, peer) = (working("t0"), Peer::new("t2"));
    let target = Net::open(NetConfig {
        address: Some(Ipv4Addr::new(10, 0, 0, 7)),
        ..config("t1")
    });
    network.forwards(&["t0", "t1", "t2"]);
    assert_eq!(
        command(&mut card, CONTROL, &[&[1, 1][..], &OTHER.0].concat()),
        0
    );
    assert_eq!(command(&mut card, CONTROL, &[0, 0, 0]), 0);
    let buffers = offer_buffers(&mut card, 8, BUFFER_BYTES);
    peer.send(&frame(OTHER, PEER, &[1; 60]));
    received(&mut card, &buffers);

    let (mut card, _source) = card.move_to(target.unwrap()).unwrap();
    // What the network sends here before the machine runs is not for it.
    peer.send(&frame(OTHER, PEER, &[2; 60]));
    card.device_mut().resume().unwrap();
    card.device_mut().announce();
    assert!(card.wait_config_interrupts(1, SOON));
    let mut config = [0; 8];
    card.device().read_config(0, &mut config);
    assert_eq!((&config[..6], config[6]), (&OTHER.0[..], 3));

    let expected = announce::frames(OTHER, Some(Ipv4Addr::new(10, 0, 0, 7)));
    for _ in 0..announce::ROUNDS {
        for expected in &expected {
            assert_eq!(peer.receive(), *expected);
        }
    }
    assert_eq!(command(&mut card, CONTROL, &[3, 0]), 0);
    card.device().read_config(0, &mut config);
    assert_eq!(config[6], 1);

    let sent = frame(OTHER, PEER, &[3; 60]);
    for to in [CARD, OTHER] {
        peer.send(&frame(to, PEER, &[3; 60]));
    }
    assert_eq!(received(&mut card, &buffers).0[HEADER_BYTES..], sent);
    assert_eq!(metric(&card, "rx_packets"), 2);
}

#[test]
fn a_driver_that_cannot_announce_is_not_asked_to() {
    let Some(network) = Network::new(&["t0", "t1"]) else {
        return;
    };
    let peer = Peer::new("t1");
    let mut card = idle("t0");
    // Not active at all: one round, so that switches learn the port.
    network.forwards(&["t0", "t1"]);
    card.device_mut().announce();
    assert_eq!(peer.receive(), announce::frames(CARD, None)[0]);
    card.accept(crate::mock::TRANSPORT_FEATURES);
    card.activate(Start::Working).unwrap();
    card.device_mut().announce();
    for _ in 0..announce::ROUNDS {
        assert_eq!(peer.receive(), announce::frames(CARD, None)[0]);
    }
    assert!(!card.wait_config_interrupts(1, Duration::ZERO));
}

#[test]
fn states_that_cannot_be_are_refused() {
    let Some(_network) = Network::new(&["t0"]) else {
        return;
    };
    let mut card = MockDriver::new(Net::open(config("t0")).unwrap(), MEMORY_BYTES);
    let good = card.device().save().unwrap();
    card.device_mut().restore(good.clone()).unwrap();
    assert_eq!(card.device().save().unwrap(), good);
    let changed = |field: &str, value: SavedBody| {
        let SavedBody::Map(mut fields) = good.clone() else {
            panic!("not a map")
        };
        let place = fields
            .iter_mut()
            .find(|(name, _)| name.as_text() == Some(field));
        place.unwrap().1 = value;
        SavedBody::Map(fields)
    };
    for (field, value) in [
        ("version", SavedBody::from(2)),
        ("mtu", SavedBody::from(9000)),
        ("queue_pairs", SavedBody::from(2)),
        ("pairs_in_use", SavedBody::from(0)),
        ("pairs_in_use", SavedBody::from(2)),
        ("filter", SavedBody::Null),
        ("counters", SavedBody::from("many")),
    ] {
        let refused = card.device_mut().restore(changed(field, value));
        assert!(
            matches!(refused, Err(DeviceError::BadState { .. })),
            "{field}: {refused:?}"
        );
    }
    assert!(card.device_mut().restore(SavedBody::Null).is_err());
    assert_eq!(card.device().save().unwrap(), good);
}

/// A card without a tap device, which a state does not ask for.
fn unplugged() -> Net {
    let config = NetConfig {
        queue_pairs: 2,
        ..config("t0")
    };
    Net::plugged(config, Plug::Inherited).unwrap()
}

#[test]
fn the_saved_state_of_version_1_is_written_as_ever_and_read() {
    let card = unplugged();
    {
        let mut settings = card.shared.settings();
        settings.filter = Arc::new(Filter {
            promiscuous: false,
            no_broadcast: true,
            unicast: Addresses::of([OTHER, PEER].into_iter()),
            multicast: Addresses::TooMany,
            ..Filter::open(OTHER)
        });
        (settings.pairs, settings.announce) = (2, true);
    }
    let counters = &card.shared.counters;
    counters.rx_packets.add(1);
    counters.rx_bytes.add(2);
    counters.rx_dropped.add(3);
    counters.rx_filtered.add(4);
    counters.rx_limited.add(5);
    counters.tx_packets.add(6);
    counters.tx_bytes.add(7);
    counters.tx_dropped.add(8);
    counters.tx_limited.add(9);
    let state = card.save().unwrap();
    expect_test::expect![[r#"
        {
          "version": 1,
          "mtu": 1500,
          "queue_pairs": 2,
          "filter": {
            "mac": "52:09:09:09:09:09",
            "promiscuous": false,
            "all_multicast": false,
            "all_unicast": false,
            "no_multicast": false,
            "no_unicast": false,
            "no_broadcast": true,
            "unicast": {
              "these": ["52:09:09:09:09:09", "52:54:00:00:00:02"],
            },
            "multicast": "too_many",
          },
          "pairs_in_use": 2,
          "announce": true,
          "counters": {
            "rx_packets": 1,
            "rx_bytes": 2,
            "rx_dropped": 3,
            "rx_filtered": 4,
            "rx_limited": 5,
            "tx_packets": 6,
            "tx_bytes": 7,
            "tx_dropped": 8,
            "tx_limited": 9,
          },
        }
    "#]]
    .assert_eq(&crate::golden::text_of(&state));
    let mut target = unplugged();
    target.restore(state.clone()).unwrap();
    assert_eq!(target.save().unwrap(), state);
}

#[test]
fn the_saved_state_of_a_fresh_card_is_written_as_ever() {
    let state = unplugged().save().unwrap();
    expect_test::expect![[r#"
        {
          "version": 1,
          "mtu": 1500,
          "queue_pairs": 2,
          "filter": {
            "mac": "52:54:00:00:00:01",
            "promiscuous": true,
            "all_multicast": false,
            "all_unicast": false,
            "no_multicast": false,
            "no_unicast": false,
            "no_broadcast": false,
            "unicast": "none",
            "multicast": "none",
          },
          "pairs_in_use": 1,
          "announce": false,
          "counters": {
            "rx_packets": 0,
            "rx_bytes": 0,
            "rx_dropped": 0,
            "rx_filtered": 0,
            "rx_limited": 0,
            "tx_packets": 0,
            "tx_bytes": 0,
            "tx_dropped": 0,
            "tx_limited": 0,
          },
        }
    "#]]
    .assert_eq(&crate::golden::text_of(&state));
}
