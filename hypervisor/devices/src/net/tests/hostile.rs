use super::support::*;
use crate::device::{Start, VirtioDevice};
use crate::mock::{Buffer, INDIRECT, MockDriver, NEXT, WRITE};
use crate::net::Net;
use crate::sys::tap::HEADER_BYTES;
use proptest::prelude::*;
use virtio_queue::desc::split::Descriptor;
use vm_memory::GuestAddress;

/// What a driver gone wrong does to a card.
struct Misdeed {
    name: &'static str,
    queue: usize,
    descriptors: &'static [(u64, u32, u16, u16)],
}

const MISDEEDS: &[Misdeed] = &[
    Misdeed {
        name: "a loop",
        queue: TRANSMIT,
        descriptors: &[(0x10_0000, 64, NEXT, 1), (0x10_0000, 64, NEXT, 0)],
    },
    Misdeed {
        name: "a frame past the end of memory",
        queue: TRANSMIT,
        descriptors: &[(MEMORY_BYTES - 16, 64, 0, 0)],
    },
    Misdeed {
        name: "a frame without a whole header",
        queue: TRANSMIT,
        descriptors: &[(0x10_0000, 11, 0, 0)],
    },
    Misdeed {
        name: "a frame only the device can write",
        queue: TRANSMIT,
        descriptors: &[(0x10_0000, 100, WRITE, 0)],
    },
    Misdeed {
        name: "a successor outside the table",
        queue: TRANSMIT,
        descriptors: &[(0x10_0000, 64, NEXT, 9999)],
    },
    Misdeed {
        name: "a table in itself",
        queue: TRANSMIT,
        descriptors: &[(0x1000, 16, INDIRECT, 0)],
    },
    Misdeed {
        name: "an empty descriptor",
        queue: TRANSMIT,
        descriptors: &[(0x10_0000, 0, 0, 0)],
    },
    Misdeed {
        name: "a buffer past the end of memory",
        queue: RECEIVE,
        descriptors: &[(MEMORY_BYTES - 16, 2048, WRITE, 0)],
    },
    Misdeed {
        name: "a buffer that wraps around",
        queue: RECEIVE,
        descriptors: &[(u64::MAX - 10, 2048, WRITE, 0)],
    },
    Misdeed {
        name: "a buffer too small for a header",
        queue: RECEIVE,
        descriptors: &[(0x10_0000, 11, WRITE, 0)],
    },
    Misdeed {
        name: "a buffer that cannot be written",
        queue: RECEIVE,
        descriptors: &[(0x10_0000, 2048, 0, 0)],
    },
    Misdeed {
        name: "a command without room for an answer",
        queue: CONTROL,
        descriptors: &[(0x10_0000, 3, 0, 0)],
    },
    Misdeed {
        name: "a command that loops",
        queue: CONTROL,
        descriptors: &[(0x10_0000, 3, NEXT, 0)],
    },
];

/// The card sends and receives.
fn works(card: &mut MockDriver<Net>, peer: &Peer) {
    let sent = frame(PEER, CARD, &[7; 60]);
    send(card, &with_header(&sent));
    assert_eq!(peer.receive()[HEADER_BYTES..], sent);
    let buffers = offer_buffers(card, 1, BUFFER_BYTES);
    let sent = frame(CARD, PEER, &[8; 60]);
    peer.send(&sent);
    assert_eq!(received(card, &buffers).0[HEADER_BYTES..], sent);
}

#[test]
fn a_card_stops_at_what_no_driver_does_and_works_again_after_a_reset() {
    let Some(network) = Network::new(&["t0", "t1"]) else {
        return;
    };
    let (mut card, peer) = (working("t0"), Peer::new("t1"));
    network.forwards(&["t0", "t1"]);
    for misdeed in MISDEEDS {
        for (index, (address, len, flags, next)) in (0..).zip(misdeed.descriptors) {
            let descriptor = Descriptor::new(*address, *len, *flags, *next);
            card.write_descriptor(misdeed.queue, index, descriptor);
        }
        card.offer(misdeed.queue, 0);
        card.kick(misdeed.queue);
        let why = card.wait_needs_reset(SOON);
        assert!(why.is_some(), "{} goes unnoticed", misdeed.name);
        // It does nothing more, whatever is asked of it.
        for queue in [RECEIVE, TRANSMIT, CONTROL] {
            card.kick(queue);
        }
        card.pause().unwrap();
        card.device_mut().resume().unwrap();
        assert_eq!(card.poll_used(misdeed.queue), None, "{}", misdeed.name);
        card.reset();
        card.activate(Start::Working).unwrap();
        works(&mut card, &peer);
        card.reset();
        card.activate(Start::Working).unwrap();
    }
}

#[test]
fn an_available_index_out_of_range_stops_the_card() {
    let Some(_network) = Network::new(&["t0"]) else {
        return;
    };
    for queue in [RECEIVE, TRANSMIT, CONTROL] {
        let mut card = working("t0");
        card.set_available_index(queue, 257);
        card.kick(queue);
        let why = card.wait_needs_reset(SOON).unwrap();
        assert!(why.contains("available index"), "{why}");
    }
}

#[test]
fn frames_that_are_none_are_dropped_and_the_card_works_on() {
    let Some(network) = Network::new(&["t0", "t1"]) else {
        return;
    };
    let (mut card, peer) = (working("t0"), Peer::new("t1"));
    network.forwards(&["t0", "t1"]);
    // Only a header; less than an Ethernet header; more than any frame; a header that contradicts its frame.
    send(&mut card, &[0; 12]);
    send(&mut card, &[0; 25]);
    send(&mut card, &vec![0; 70_000]);
    let mut lying = with_header(&frame(PEER, CARD, &[1; 60]));
    lying[..10].copy_from_slice(&[1, 1, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff]);
    send(&mut card, &lying);
    assert_eq!(metric(&card, "tx_dropped"), 4);
    assert_eq!(card.needs_reset(), None);
    works(&mut card, &peer);
}

#[test]
fn a_buffer_too_small_for_a_frame_is_never_written_past() {
    let Some(network) = Network::new(&["t0", "t1"]) else {
        return;
    };
    let (mut card, peer) = (idle("t0"), Peer::new("t1"));
    card.accept(crate::mock::TRANSPORT_FEATURES);
    card.activate(Start::Working).unwrap();
    network.forwards(&["t0", "t1"]);
    let address = card.place(&[0xee; 512]);
    card.submit(RECEIVE, &[Buffer::Writable(address, 100)]);
    card.kick(RECEIVE);
    peer.send(&frame(CARD, PEER, &[1; 400]));
    wait_for_metric(&card, "rx_dropped", 1);
    assert_eq!(card.bytes(GuestAddress(address.0 + 100), 412), [0xee; 412]);
    // It is still there for a frame that fits.
    let sent = frame(CARD, PEER, &[2; 60]);
    peer.send(&sent);
    let used = card.wait_used(RECEIVE, SOON).unwrap();
    assert_eq!(used.len as usize, HEADER_BYTES + sent.len());
    assert_eq!(card.bytes(address, used.len)[HEADER_BYTES..], sent);
}

#[test]
fn a_card_survives_any_rings() {
    let Some(network) = Network::new(&["t0", "t1"]) else {
        return;
    };
    let (mut card, peer) = (working("t0"), Peer::new("t1"));
    network.forwards(&["t0", "t1"]);
    let descriptor = (0..MEMORY_BYTES + 0x1000, 0u32..0x2_0000, 0u16..8, 0u16..10);
    let rings = prop::collection::vec((0usize..3, prop::collection::vec(descriptor, 8)), 1..6);
    let mut runner = proptest::test_runner::TestRunner::new_with_rng(
        ProptestConfig::with_cases(64),
        proptest::test_runner::TestRng::deterministic_rng(
            proptest::test_runner::RngAlgorithm::ChaCha,
        ),
    );
    let card = std::cell::RefCell::new(&mut card);
    runner
        .run(&rings, |rings| {
            let mut card = card.borrow_mut();
            for (queue, descriptors) in &rings {
                for (index, (address, len, flags, next)) in (0..).zip(descriptors) {
                    let descriptor = Descriptor::new(*address, *len, *flags, *next);
                    card.write_descriptor(*queue, index, descriptor);
                }
                for head in 0..9 {
                    card.offer(*queue, head);
                }
                card.kick(*queue);
                peer.send(&frame(CARD, PEER, &[3; 60]));
            }
            // Nothing is in flight after this, whatever the rings said.
            card.pause().unwrap();
            card.device_mut().resume().unwrap();
            card.reset();
            card.activate(Start::Working).unwrap();
            Ok(())
        })
        .unwrap();
    let mut card = card.borrow_mut();
    // What the chains made the card send is still in the peer's tap.
    card.reset();
    card.activate(Start::Working).unwrap();
    let mut bytes = [0; 64];
    while peer.tap().read(&mut bytes).is_ok() {}
    works(&mut card, &peer);
}
