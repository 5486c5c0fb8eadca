//! A network of its own for each test: taps on a bridge, cards with a driver, and a bare tap as their peer.

use crate::device::Start;
use crate::mock::{Buffer, MockDriver};
use crate::net::{Net, NetConfig};
use crate::skip::skip;
use crate::sys::tap::{HEADER_BYTES, Queueing, Tap, enter_fresh_network_namespace};
use godwit_wire::devices::{MacAddress, NicLimits};
use std::process::Command;
use std::time::{Duration, Instant};
use vm_memory::GuestAddress;

/// Longest wait for anything in a test.
pub(super) const SOON: Duration = Duration::from_secs(10);
pub(super) const RECEIVE: usize = 0;
pub(super) const TRANSMIT: usize = 1;
/// Control queue of a card with one queue pair.
pub(super) const CONTROL: usize = 2;
pub(super) const MEMORY_BYTES: u64 = 16 << 20;
pub(super) const BUFFER_BYTES: u32 = 1536;

pub(super) const CARD: MacAddress = MacAddress([0x52, 0x54, 0, 0, 0, 1]);
pub(super) const PEER: MacAddress = MacAddress([0x52, 0x54, 0, 0, 0, 2]);

/// A bridge in a network namespace of the calling thread; vanishes with it.
pub(super) struct Network;

impl Network {
    /// `None`, and says so loudly, where networks cannot be made.
    pub(super) fn new(taps: &[&str]) -> Option<Self> {
        Self::with_queues(taps, Queueing::Single)
    }

    pub(super) fn with_queues(taps: &[&str], queueing: Queueing) -> Option<Self> {
        if let Err(error) = enter_fresh_network_namespace() {
            skip(format!("no network namespace: {error}"));
            return None;
        }
        if let Err(error) = std::fs::File::open("/dev/net/tun") {
            skip(format!("/dev/net/tun: {error}"));
            return None;
        }
        if Command::new("ip").arg("-V").output().is_err() {
            skip("ip (Debian: iproute2) is missing");
            return None;
        }
        // Frames that nobody in the test sent would have to be told apart.
        std::fs::write("/proc/sys/net/ipv6/conf/default/disable_ipv6", "1").ok();
        ip("link add br0 type bridge mcast_snooping 0");
        ip("link set br0 up");
        for tap in taps {
            let multi_queue = match queueing {
                Queueing::Single => "",
                Queueing::Multiple => " multi_queue",
            };
            ip(&format!(
                "tuntap add dev {tap} mode tap vnet_hdr{multi_queue}"
            ));
            ip(&format!("link set {tap} master br0"));
            ip(&format!("link set {tap} up"));
        }
        Some(Self)
    }

    /// Waits until the bridge forwards what comes from these taps, which must be open.
    pub(super) fn forwards(&self, taps: &[&str]) {
        let until = Instant::now() + SOON;
        for tap in taps {
            while !ip(&format!("-d link show {tap}")).contains("state forwarding") {
                assert!(Instant::now() < until, "{tap} does not forward");
                // The kernel has an event for this only on a netlink socket.
                std::thread::sleep(Duration::from_millis(5));
            }
        }
    }
}

pub(super) fn ip(arguments: &str) -> String {
    let output = Command::new("ip")
        .args(arguments.split_whitespace())
        .output()
        .unwrap();
    let problem = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "ip {arguments}: {problem}");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

pub(super) fn config(tap: &str) -> NetConfig {
    NetConfig {
        name: "lan".into(),
        mac: CARD,
        tap: tap.into(),
        mtu: 1500,
        queue_pairs: 1,
        limits: NicLimits::default(),
        address: None,
    }
}

/// A card on `tap` with a driver that has accepted everything and set DRIVER_OK.
pub(super) fn working(tap: &str) -> MockDriver<Net> {
    let mut driver = idle(tap);
    driver.activate(Start::Working).unwrap();
    driver
}

pub(super) fn idle(tap: &str) -> MockDriver<Net> {
    MockDriver::new(Net::open(config(tap)).unwrap(), MEMORY_BYTES)
}

/// Makes receive buffers available and gives their addresses by head.
pub(super) fn offer_buffers(
    driver: &mut MockDriver<Net>,
    count: usize,
    bytes: u32,
) -> Vec<(u16, GuestAddress)> {
    let buffers = (0..count)
        .map(|_| {
            let address = driver.allocate(bytes);
            let head = driver.submit(RECEIVE, &[Buffer::Writable(address, bytes)]);
            (head.unwrap(), address)
        })
        .collect();
    driver.kick(RECEIVE);
    buffers
}

/// The next frame the card gave its driver, with its header, and over how many buffers.
pub(super) fn received(
    driver: &mut MockDriver<Net>,
    buffers: &[(u16, GuestAddress)],
) -> (Vec<u8>, u16) {
    let mut frame = Vec::new();
    let mut count = 1;
    let mut nth = 0;
    while nth < count {
        // After the first buffer of a frame the others must be there.
        let used = if nth == 0 {
            driver.wait_used(RECEIVE, SOON)
        } else {
            driver.poll_used(RECEIVE)
        };
        let used = used.unwrap_or_else(|| panic!("buffer {nth} of {count} is missing"));
        let (_, address) = buffers
            .iter()
            .rev()
            .find(|(head, _)| *head == used.head)
            .unwrap();
        let bytes = driver.bytes(*address, used.len);
        if nth == 0 {
            count = u16::from_le_bytes([bytes[10], bytes[11]]);
        }
        frame.extend(bytes);
        nth += 1;
    }
    (frame, count)
}

/// An Ethernet frame of an experimental protocol (0x88b5), without a header.
pub(super) fn frame(to: MacAddress, from: MacAddress, payload: &[u8]) -> Vec<u8> {
    [&to.0[..], &from.0, &[0x88, 0xb5], payload].concat()
}

pub(super) fn with_header(frame: &[u8]) -> Vec<u8> {
    [&[0; HEADER_BYTES][..], frame].concat()
}

/// Sends a frame through the card.
pub(super) fn send(driver: &mut MockDriver<Net>, bytes: &[u8]) {
    let address = driver.place(bytes);
    let buffers = [Buffer::Readable(address, bytes.len() as u32)];
    driver.request(TRANSMIT, &buffers, SOON).unwrap();
}

/// A command's answer.
pub(super) fn command(driver: &mut MockDriver<Net>, queue: usize, bytes: &[u8]) -> u8 {
    let (request, answer) = (driver.place(bytes), driver.place(&[0xaa]));
    let buffers = [
        Buffer::Readable(request, bytes.len() as u32),
        Buffer::Writable(answer, 1),
    ];
    driver.request(queue, &buffers, SOON).unwrap();
    driver.bytes(answer, 1)[0]
}

pub(super) fn metric(driver: &MockDriver<Net>, name: &str) -> u64 {
    use crate::device::VirtioDevice;
    let metrics = driver.device().metrics();
    metrics.iter().find(|(found, _)| *found == name).unwrap().1
}

/// Waits for a counter that another thread moves.
pub(super) fn wait_for_metric(driver: &MockDriver<Net>, name: &str, least: u64) {
    let until = Instant::now() + SOON;
    while metric(driver, name) < least {
        assert!(Instant::now() < until, "{name}: {:?}", metric(driver, name));
        std::thread::yield_now();
    }
}

/// A bare tap as the other end of the wire.
pub(super) struct Peer(Tap);

impl Peer {
    pub(super) fn new(tap: &str) -> Self {
        Self(Tap::open(tap, Queueing::Single).unwrap())
    }

    pub(super) fn tap(&self) -> &Tap {
        &self.0
    }

    pub(super) fn send(&self, frame: &[u8]) {
        self.0.write(&with_header(frame)).unwrap();
    }

    /// The next frame with its header.
    pub(super) fn receive(&self) -> Vec<u8> {
        use rustix::event::{PollFd, PollFlags, Timespec, poll};
        let mut bytes = vec![0; 70_000];
        let until = Instant::now() + SOON;
        loop {
            match self.0.read(&mut bytes) {
                Ok(len) => {
                    bytes.truncate(len);
                    return bytes;
                }
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
                Err(error) => panic!("{error}"),
            }
            assert!(Instant::now() < until, "no frame arrives");
            let limit = Timespec {
                tv_sec: 1,
                tv_nsec: 0,
            };
            poll(&mut [PollFd::new(&self.0, PollFlags::IN)], Some(&limit)).unwrap();
        }
    }
}
