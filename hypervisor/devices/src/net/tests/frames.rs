use super::support::*;
use crate::device::{Start, VirtioDevice};
use crate::mock::{Buffer, MockDriver, TRANSPORT_FEATURES};
use crate::net::{Link, Net, NetConfig, feature};
use crate::sys::tap::{HEADER_BYTES, Queueing};
use godwit_wire::devices::{MacAddress, NicLimits};
use std::time::{Duration, Instant};

/// Bytes that differ from frame to frame and within one.
fn payload(seed: usize, len: usize) -> Vec<u8> {
    (0..len).map(|nth| (nth * 7 + seed * 13) as u8).collect()
}

#[test]
fn frames_cross_a_bridge_between_two_cards() {
    let Some(network) = Network::new(&["t0", "t1"]) else {
        return;
    };
    let (mut left, mut right) = (working("t0"), working("t1"));
    network.forwards(&["t0", "t1"]);
    let buffers = offer_buffers(&mut right, 200, BUFFER_BYTES);
    for nth in 0..200 {
        let sent = frame(PEER, CARD, &payload(nth, 46 + nth * 7));
        send(&mut left, &with_header(&sent));
        let (bytes, count) = received(&mut right, &buffers);
        assert_eq!((&bytes[HEADER_BYTES..], count), (&sent[..], 1));
    }
    assert_eq!(metric(&left, "tx_packets"), 200);
    assert_eq!(metric(&right, "rx_packets"), 200);
    assert_eq!(metric(&left, "tx_bytes"), metric(&right, "rx_bytes"));
}

#[test]
fn frames_are_noted_both_ways_and_only_if_they_pass() {
    let Some(network) = Network::new(&["t0", "t1"]) else {
        return;
    };
    let (mut left, mut right) = (working("t0"), working("t1"));
    network.forwards(&["t0", "t1"]);
    let times = [&left, &right].map(|card| card.device().frame_times());
    let buffers = offer_buffers(&mut right, 2, BUFFER_BYTES);
    // Lost for want of an Ethernet header: it does not pass.
    send(&mut left, &with_header(&[1; 13]));
    left.device_mut().pause().unwrap();
    assert_eq!(times.each_ref().map(|card| card.latest_ns()), [None, None]);
    left.device_mut().resume().unwrap();

    send(&mut left, &with_header(&frame(PEER, CARD, &[1; 60])));
    received(&mut right, &buffers);
    // When they are paused, the turns in which the frame was used are over.
    for card in [&mut left, &mut right] {
        card.device_mut().pause().unwrap();
    }
    let [sent, came] = times.map(|card| (card.first_ns(), card.latest_ns()));
    assert!(sent.0.is_some() && sent.0 == sent.1, "{sent:?}");
    assert!(came.0.is_some() && came.0 == came.1, "{came:?}");
}

#[test]
fn a_card_that_announces_its_machine_has_passed_no_frame() {
    let Some(network) = Network::new(&["t0", "t1"]) else {
        return;
    };
    let (mut card, peer) = (working("t0"), Peer::new("t1"));
    network.forwards(&["t0", "t1"]);
    card.device_mut().announce();
    peer.receive();
    card.device_mut().pause().unwrap();
    assert_eq!(card.device().frame_times().first_ns(), None);
}

/// A TCP segment of `len` bytes for the kernel to cut up, with its header.
fn large_segment(len: usize) -> Vec<u8> {
    segment_from(1, len)
}

/// The same from host and port `from`.
fn segment_from(from: u8, len: usize) -> Vec<u8> {
    const HEADERS: u16 = 14 + 20 + 20;
    let mut bytes = vec![1, 1];
    bytes.extend(HEADERS.to_le_bytes());
    bytes.extend(1446u16.to_le_bytes());
    // The checksum begins with the TCP header and goes to its bytes 16 and 17.
    bytes.extend(34u16.to_le_bytes());
    bytes.extend(16u16.to_le_bytes());
    bytes.extend([0, 0]);
    bytes.extend(PEER.0);
    bytes.extend(CARD.0);
    bytes.extend([8, 0]);
    let mut ip = vec![0x45, 0];
    ip.extend((40 + len as u16).to_be_bytes());
    ip.extend([0, 1, 0, 0, 64, 6, 0, 0, 10, 0, 0, from, 10, 0, 0, 2]);
    let sum = !ones_sum(&ip);
    ip[10..12].copy_from_slice(&sum.to_be_bytes());
    bytes.extend(&ip);
    // The driver leaves the pseudo header's sum in the checksum field.
    let pseudo = [&ip[12..20], &[0, 6], &(20 + len as u16).to_be_bytes()].concat();
    bytes.extend([
        0x10, from, 0x20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0x50, 0x10, 0xff, 0xff,
    ]);
    bytes.extend(ones_sum(&pseudo).to_be_bytes());
    bytes.extend([0, 0]);
    bytes.extend(payload(1, len));
    bytes
}

fn ones_sum(bytes: &[u8]) -> u16 {
    let mut sum: u32 = bytes
        .chunks(2)
        .map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]])))
        .sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}

const LARGE: usize = 60_000;
const TCP_DATA: usize = HEADER_BYTES + 54;

#[test]
fn a_large_segment_arrives_whole_over_several_buffers() {
    let Some(network) = Network::new(&["t0", "t1"]) else {
        return;
    };
    let (mut left, mut right) = (working("t0"), working("t1"));
    network.forwards(&["t0", "t1"]);
    let buffers = offer_buffers(&mut right, 128, BUFFER_BYTES);
    // The first is read into few buffers and copied on, the second straight into all of them.
    for _ in 0..2 {
        send(&mut left, &large_segment(LARGE));
        let (bytes, count) = received(&mut right, &buffers);
        assert_eq!(bytes.len(), TCP_DATA + LARGE);
        assert_eq!(
            usize::from(count),
            bytes.len().div_ceil(BUFFER_BYTES as usize)
        );
        assert!(bytes[TCP_DATA..] == payload(1, LARGE));
    }
    assert_eq!(metric(&right, "rx_packets"), 2);
}

#[test]
fn a_driver_without_segmentation_gets_frames_of_the_networks_size() {
    let Some(network) = Network::new(&["t0", "t1"]) else {
        return;
    };
    let (mut left, mut right) = (working("t0"), idle("t1"));
    right.accept(TRANSPORT_FEATURES | feature::MAC);
    right.activate(Start::Working).unwrap();
    network.forwards(&["t0", "t1"]);
    let buffers = offer_buffers(&mut right, 64, BUFFER_BYTES);
    send(&mut left, &large_segment(LARGE));
    let mut data: Vec<u8> = Vec::new();
    while data.len() < LARGE {
        let (bytes, count) = received(&mut right, &buffers);
        assert!(bytes.len() <= HEADER_BYTES + 1514);
        assert_eq!((bytes[0], count), (0, 1), "nothing is left to compute");
        data.extend(&bytes[TCP_DATA..]);
    }
    assert!(data == payload(1, LARGE));
}

#[test]
fn a_frame_waits_for_the_buffers_it_needs() {
    let Some(network) = Network::new(&["t0", "t1"]) else {
        return;
    };
    let (mut left, mut right) = (working("t0"), working("t1"));
    network.forwards(&["t0", "t1"]);
    let mut buffers = offer_buffers(&mut right, 3, BUFFER_BYTES);
    send(&mut left, &large_segment(LARGE));
    let small = frame(PEER, CARD, &payload(5, 100));
    send(&mut left, &with_header(&small));
    assert_eq!(right.wait_used(RECEIVE, Duration::from_millis(50)), None);
    for _ in 0..12 {
        buffers.extend(offer_buffers(&mut right, 4, BUFFER_BYTES));
    }
    let (bytes, _) = received(&mut right, &buffers);
    assert!(bytes[TCP_DATA..] == payload(1, LARGE));
    let (bytes, _) = received(&mut right, &buffers);
    assert_eq!(&bytes[HEADER_BYTES..], small);
    assert_eq!(metric(&right, "rx_dropped"), 0);
}

#[test]
fn a_frame_that_no_full_ring_holds_is_dropped() {
    let Some(network) = Network::new(&["t0", "t1"]) else {
        return;
    };
    let (mut left, mut right) = (working("t0"), working("t1"));
    network.forwards(&["t0", "t1"]);
    let buffers = offer_buffers(&mut right, 256, 64);
    send(&mut left, &large_segment(LARGE));
    let small = frame(PEER, CARD, &payload(5, 400));
    send(&mut left, &with_header(&small));
    let (bytes, count) = received(&mut right, &buffers);
    assert_eq!((&bytes[HEADER_BYTES..], count), (&small[..], 7));
    assert_eq!(metric(&right, "rx_dropped"), 1);
}

#[test]
fn frames_wait_in_the_tap_while_there_are_no_buffers() {
    let Some(network) = Network::new(&["t0", "t1"]) else {
        return;
    };
    let (mut card, peer) = (working("t0"), Peer::new("t1"));
    network.forwards(&["t0", "t1"]);
    let sent: Vec<_> = (0..50)
        .map(|nth| frame(CARD, PEER, &payload(nth, 60)))
        .collect();
    for sent in &sent {
        peer.send(sent);
    }
    let buffers = offer_buffers(&mut card, 50, BUFFER_BYTES);
    for sent in &sent {
        assert_eq!(received(&mut card, &buffers).0[HEADER_BYTES..], *sent);
    }
    // Once more, after the ring ran dry.
    peer.send(&sent[0]);
    let buffers = offer_buffers(&mut card, 1, BUFFER_BYTES);
    assert_eq!(received(&mut card, &buffers).0[HEADER_BYTES..], sent[0]);
}

#[test]
fn pages_that_frames_were_read_into_are_marked() {
    let Some(network) = Network::new(&["t0", "t1"]) else {
        return;
    };
    let (mut card, peer) = (working("t0"), Peer::new("t1"));
    network.forwards(&["t0", "t1"]);
    // A page nobody else writes.
    card.allocate(8192);
    let address = card.allocate(8192);
    let page = address.0.next_multiple_of(4096);
    assert!(!card.dirty_pages().contains(&(page / 4096)));
    card.submit(
        RECEIVE,
        &[Buffer::Writable(vm_memory::GuestAddress(page), 2048)],
    );
    card.kick(RECEIVE);
    peer.send(&frame(CARD, PEER, &payload(0, 60)));
    card.wait_used(RECEIVE, SOON).unwrap();
    assert!(card.dirty_pages().contains(&(page / 4096)));
}

#[test]
fn the_filter_keeps_out_what_the_driver_does_not_want() {
    let Some(network) = Network::new(&["t0", "t1"]) else {
        return;
    };
    let (mut card, peer) = (working("t0"), Peer::new("t1"));
    network.forwards(&["t0", "t1"]);
    let other = MacAddress([0x52, 9, 9, 9, 9, 9]);
    let group = MacAddress([0x33, 0x33, 0, 0, 0, 1]);
    assert_eq!(command(&mut card, CONTROL, &[0, 0, 0]), 0);
    let buffers = offer_buffers(&mut card, 64, BUFFER_BYTES);
    let expect = |card: &mut MockDriver<Net>, arriving: &[MacAddress]| {
        for to in [other, group, CARD] {
            peer.send(&frame(to, PEER, &payload(0, 60)));
        }
        for to in arriving {
            assert_eq!(received(card, &buffers).0[HEADER_BYTES..][..6], to.0);
        }
    };
    expect(&mut card, &[CARD]);
    assert_eq!(metric(&card, "rx_filtered"), 2);
    let mut table = vec![1, 0, 1, 0, 0, 0];
    table.extend(other.0);
    table.extend([1, 0, 0, 0]);
    table.extend(group.0);
    assert_eq!(command(&mut card, CONTROL, &table), 0);
    expect(&mut card, &[other, group, CARD]);
    // Another address for the card itself, and an empty table.
    assert_eq!(
        command(&mut card, CONTROL, &[&[1, 1][..], &other.0].concat()),
        0
    );
    assert_eq!(
        command(&mut card, CONTROL, &[1, 0, 0, 0, 0, 0, 0, 0, 0, 0]),
        0
    );
    expect(&mut card, &[other]);
    let mut mac = [0; 6];
    card.device().read_config(0, &mut mac);
    assert_eq!(mac, other.0);
}

#[test]
fn commands_without_their_feature_or_out_of_range_are_refused() {
    let Some(_network) = Network::new(&["t0"]) else {
        return;
    };
    let mut card = idle("t0");
    card.accept(TRANSPORT_FEATURES | feature::CTRL_VQ | feature::CTRL_RX);
    card.activate(Start::Working).unwrap();
    for (bytes, answer) in [
        (&[0, 0, 1][..], 0),
        (&[0, 2, 1], 1),
        (&[1, 1, 0x52, 0, 0, 0, 0, 1], 1),
        (&[3, 0], 1),
        (&[4, 0, 1, 0], 1),
        (&[0, 0], 1),
        (&[7], 1),
    ] {
        assert_eq!(command(&mut card, CONTROL, bytes), answer, "{bytes:?}");
    }
    assert_eq!(card.needs_reset(), None);
}

#[test]
fn several_queue_pairs_work_once_the_driver_asks_for_them() {
    let Some(network) = Network::with_queues(&["t0", "t1"], Queueing::Multiple) else {
        return;
    };
    let pairs = |tap: &str| {
        let config = NetConfig {
            queue_pairs: 2,
            ..config(tap)
        };
        MockDriver::new(Net::open(config).unwrap(), MEMORY_BYTES)
    };
    let (mut left, mut right) = (pairs("t0"), pairs("t1"));
    left.activate(Start::Working).unwrap();
    right.activate(Start::Working).unwrap();
    network.forwards(&["t0", "t1"]);
    let control = 4;
    assert_eq!(command(&mut right, control, &[4, 0, 3, 0]), 1);
    assert_eq!(command(&mut right, control, &[4, 0, 0, 0]), 1);
    assert_eq!(command(&mut right, control, &[4, 0, 2, 0]), 0);
    // The kernel spreads flows by their hash: of many flows some come to each queue, whatever its seed.
    for queue in [0, 2] {
        for _ in 0..200 {
            let address = right.allocate(BUFFER_BYTES);
            right.submit(queue, &[Buffer::Writable(address, BUFFER_BYTES)]);
        }
        right.kick(queue);
    }
    // A queue that is being attached loses frames; each flow therefore repeats until both queues have had some.
    let until = Instant::now() + SOON;
    let mut seen = [0, 0];
    let mut flow = 0u8;
    while seen.contains(&0) {
        assert!(Instant::now() < until, "one queue gets no frames: {seen:?}");
        flow = flow.wrapping_add(1);
        let mut bytes = segment_from(flow, 200);
        // Nothing to cut up.
        bytes[1] = 0;
        send(&mut left, &bytes);
        for (seen, queue) in seen.iter_mut().zip([0, 2]) {
            while right.poll_used(queue).is_some() {
                *seen += 1;
            }
        }
    }
}

#[test]
fn limits_hold_frames_back_and_lose_none() {
    let Some(network) = Network::new(&["t0", "t1"]) else {
        return;
    };
    let limits = NicLimits {
        receive_bytes_per_s: Some(100_000),
        transmit_bytes_per_s: Some(100_000),
    };
    let limited = |tap: &str| NetConfig {
        limits,
        ..config(tap)
    };
    let mut left = MockDriver::new(Net::open(limited("t0")).unwrap(), MEMORY_BYTES);
    let mut right = MockDriver::new(Net::open(config("t1")).unwrap(), MEMORY_BYTES);
    left.activate(Start::Working).unwrap();
    right.activate(Start::Working).unwrap();
    network.forwards(&["t0", "t1"]);
    let bytes = with_header(&frame(PEER, CARD, &payload(0, 986)));
    limited_stream(&mut left, &mut right, &bytes);
    assert!(metric(&left, "tx_limited") > 0);
    limited_stream(&mut right, &mut left, &bytes);
    assert!(metric(&left, "rx_limited") > 0);
}

/// 130 kB at 100 kB/s with 100 kB in the bucket: about 0.3 s.
fn limited_stream(sender: &mut MockDriver<Net>, receiver: &mut MockDriver<Net>, bytes: &[u8]) {
    let started = Instant::now();
    let buffers = offer_buffers(receiver, 130, BUFFER_BYTES);
    let address = sender.place(bytes);
    for _ in 0..130 {
        let chain = [Buffer::Readable(address, bytes.len() as u32)];
        sender.submit(TRANSMIT, &chain).unwrap();
    }
    sender.kick(TRANSMIT);
    for _ in 0..130 {
        received(receiver, &buffers);
    }
    assert!(started.elapsed() >= Duration::from_millis(200));
}

#[test]
fn an_unplugged_card_loses_frames_and_tells_its_driver() {
    let Some(network) = Network::new(&["t0", "t1"]) else {
        return;
    };
    let (mut card, peer) = (working("t0"), Peer::new("t1"));
    network.forwards(&["t0", "t1"]);
    let status = |card: &MockDriver<Net>| {
        let mut status = [0; 2];
        card.device().read_config(6, &mut status);
        status
    };
    assert_eq!(status(&card), [1, 0]);
    card.device_mut().set_link(Link::Down);
    assert!(card.wait_config_interrupts(1, SOON));
    assert_eq!(status(&card), [0, 0]);
    send(&mut card, &with_header(&frame(PEER, CARD, &payload(0, 60))));
    assert_eq!(metric(&card, "tx_dropped"), 1);
    let buffers = offer_buffers(&mut card, 4, BUFFER_BYTES);
    peer.send(&frame(CARD, PEER, &payload(0, 60)));
    wait_for_metric(&card, "rx_dropped", 1);
    card.device_mut().set_link(Link::Up);
    let sent = frame(CARD, PEER, &payload(1, 60));
    peer.send(&sent);
    assert_eq!(received(&mut card, &buffers).0[HEADER_BYTES..], sent);
}

#[test]
fn taps_that_cannot_be_used_are_refused_with_a_remedy() {
    let Some(_network) = Network::new(&["t0"]) else {
        return;
    };
    let refused = |config| Net::open(config).unwrap_err().to_string();
    let missing = refused(config("nix"));
    assert!(
        missing.contains("ip tuntap add dev nix mode tap vnet_hdr`"),
        "{missing}"
    );
    let several = NetConfig {
        queue_pairs: 2,
        ..config("t0")
    };
    let single = refused(several.clone());
    assert!(
        single.contains("t0") && single.contains("multi_queue"),
        "{single}"
    );
    let bridge = refused(config("br0"));
    assert!(bridge.contains("br0 is no tap device"), "{bridge}");
    let name = refused(config("a-name-that-is-too-long"));
    assert!(name.contains("no name of a network interface"), "{name}");
    let held = Net::open(config("t0")).unwrap();
    let busy = refused(config("t0"));
    assert!(busy.contains("in use"), "{busy}");
    drop(held);
    Net::open(config("t0")).unwrap();
    let tiny = refused(NetConfig {
        mtu: 67,
        ..config("t0")
    });
    assert!(tiny.contains("at least 68"), "{tiny}");
}
