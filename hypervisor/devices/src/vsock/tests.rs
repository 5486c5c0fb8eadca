//! A guest's driver at one end, host processes at the other.

use super::packet::{HEADER_BYTES, HOST_CID, Header, NO_RECEIVE, NO_SEND, Operation, STREAM};
use super::{SOCKET_NAME, Vsock, connection::BUFFER_BYTES};
use crate::device::{DeviceError, SavedBody, Start, VirtioDevice};
use crate::mock::{Buffer, MockDriver, NEXT, Used, WRITE};
use proptest::prelude::*;
use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::Duration;
use virtio_queue::desc::split::Descriptor;
use vm_memory::{Bytes, GuestAddress};

const CID: u32 = 5;
const RECEIVE: usize = 0;
const TRANSMIT: usize = 1;
const EVENT: usize = 2;
const MEMORY_BYTES: u64 = 16 << 20;
const SOON: Duration = Duration::from_secs(10);
const BUFFER: u32 = 4096;
const BUFFERS: usize = 64;
/// Port of the guest in most tests.
const PORT: u32 = 1234;

/// Address, length, flags, successor.
type RawDescriptor = (u64, u32, u16, u16);

struct Guest {
    driver: MockDriver<Vsock>,
    buffers: BTreeMap<u16, GuestAddress>,
    scratch: GuestAddress,
}

impl Guest {
    fn new(directory: &tempfile::TempDir) -> Self {
        let vsock = Vsock::new(CID, directory.path().to_owned()).unwrap();
        let mut driver = MockDriver::new(vsock, MEMORY_BYTES);
        driver.activate(Start::Working).unwrap();
        Self::with(driver)
    }

    fn with(driver: MockDriver<Vsock>) -> Self {
        let mut guest = Self {
            driver,
            buffers: BTreeMap::new(),
            scratch: GuestAddress(0),
        };
        guest.start_over();
        guest
    }

    /// Offers fresh buffers.
    fn start_over(&mut self) {
        self.buffers.clear();
        self.scratch = self.driver.allocate(BUFFER_BYTES * 2);
        for _ in 0..BUFFERS {
            let address = self.driver.allocate(BUFFER);
            self.offer(address);
        }
        self.driver.kick(RECEIVE);
    }

    fn offer(&mut self, address: GuestAddress) {
        let chain = [Buffer::Writable(address, BUFFER)];
        let head = self.driver.submit(RECEIVE, &chain).unwrap();
        self.buffers.insert(head, address);
    }

    fn reset(&mut self) {
        self.driver.reset();
        self.driver.activate(Start::Working).unwrap();
        self.start_over();
    }

    fn header(operation: Operation, host_port: u32) -> Header {
        Header {
            source_cid: CID.into(),
            target_cid: HOST_CID,
            source_port: PORT,
            target_port: host_port,
            socket_type: STREAM,
            operation: operation as u16,
            buffer_bytes: 1 << 20,
            ..Header::default()
        }
    }

    fn send(&mut self, header: Header, data: &[u8]) {
        let header = Header {
            len: data.len() as u32,
            ..header
        };
        self.send_as_is(&header, data);
    }

    fn send_as_is(&mut self, header: &Header, data: &[u8]) {
        let bytes = [&header.bytes()[..], data].concat();
        let memory = self.driver.memory();
        memory.write_slice(&bytes, self.scratch).unwrap();
        let chain = [Buffer::Readable(self.scratch, bytes.len() as u32)];
        self.driver.request(TRANSMIT, &chain, SOON).unwrap();
    }

    /// The next packet from the host.
    fn receive(&mut self) -> (Header, Vec<u8>) {
        let used = self.driver.wait_used(RECEIVE, SOON).expect("no packet");
        self.unpack(used)
    }

    /// The next packet from the host, if it is there already.
    fn receive_now(&mut self) -> Option<(Header, Vec<u8>)> {
        let used = self.driver.poll_used(RECEIVE)?;
        Some(self.unpack(used))
    }

    fn unpack(&mut self, used: Used) -> (Header, Vec<u8>) {
        let address = self.buffers.remove(&used.head).unwrap();
        let bytes = self.driver.bytes(address, used.len);
        self.offer(address);
        self.driver.kick(RECEIVE);
        let (header, data) = bytes.split_first_chunk().unwrap();
        let header = Header::parse(header);
        assert_eq!(
            (header.source_cid, header.target_cid),
            (HOST_CID, CID.into())
        );
        assert_eq!(header.len as usize, data.len());
        (header, data.to_vec())
    }

    fn expect(&mut self, operation: Operation) -> Header {
        let (header, _) = self.receive();
        assert_eq!(
            Operation::of(header.operation),
            Some(operation),
            "{header:?}"
        );
        header
    }

    /// Connects to a listener of the host.
    fn connect(&mut self, host_port: u32) {
        self.send(Self::header(Operation::Request, host_port), &[]);
        self.expect(Operation::Response);
    }

    fn works(&mut self, directory: &tempfile::TempDir) {
        let listener = listener(directory, 7);
        self.connect(7);
        let (mut stream, _) = listener.accept().unwrap();
        stream.write_all(b"hello").unwrap();
        assert_eq!(self.receive().1, b"hello");
        std::fs::remove_file(directory.path().join(format!("{SOCKET_NAME}_7"))).unwrap();
    }
}

fn listener(directory: &tempfile::TempDir, port: u32) -> UnixListener {
    UnixListener::bind(directory.path().join(format!("{SOCKET_NAME}_{port}"))).unwrap()
}

fn host_process(directory: &tempfile::TempDir) -> UnixStream {
    let stream = UnixStream::connect(directory.path().join(SOCKET_NAME)).unwrap();
    stream.set_read_timeout(Some(SOON)).unwrap();
    stream
}

fn pattern(from: usize, len: usize) -> Vec<u8> {
    (from..from + len)
        .map(|nth| (nth ^ (nth >> 8) ^ (nth >> 16)) as u8)
        .collect()
}

/// A header of a guest that has little room, so that the host must wait for it.
fn small(operation: Operation, forwarded: usize) -> Header {
    Header {
        forwarded: forwarded as u32,
        buffer_bytes: 16 * 1024,
        ..Guest::header(operation, 52)
    }
}

#[test]
fn megabytes_cross_both_ways_unharmed_and_within_credit() {
    const TOTAL: usize = 4 << 20;
    let directory = tempfile::tempdir().unwrap();
    let listener = listener(&directory, 52);
    let mut guest = Guest::new(&directory);
    guest.connect(52);
    let (stream, _) = listener.accept().unwrap();
    let mut reading = stream.try_clone().unwrap();
    let reader = std::thread::spawn(move || {
        let mut bytes = vec![0; TOTAL];
        reading.read_exact(&mut bytes).unwrap();
        bytes == pattern(0, TOTAL)
    });
    let mut writing = stream;
    let writer = std::thread::spawn(move || writing.write_all(&pattern(9, TOTAL)).unwrap());

    let (mut sent, mut taken, mut received) = (0, 0, Vec::with_capacity(TOTAL));
    while sent < TOTAL || received.len() < TOTAL || taken < TOTAL {
        let room = BUFFER_BYTES as usize - (sent - taken);
        let len = room.min(3000).min(TOTAL - sent);
        if len > 0 {
            guest.send(small(Operation::Data, received.len()), &pattern(sent, len));
            sent += len;
        }
        let next = if len > 0 {
            guest.receive_now()
        } else {
            // The host is asked what it has taken, so that there is always an answer to wait for.
            guest.send(small(Operation::CreditRequest, received.len()), &[]);
            Some(guest.receive())
        };
        let Some((header, data)) = next else {
            continue;
        };
        taken = header.forwarded as usize;
        assert!(taken <= sent);
        received.extend(data);
        match Operation::of(header.operation) {
            Some(Operation::Data | Operation::CreditRequest) => {
                guest.send(small(Operation::CreditUpdate, received.len()), &[]);
            }
            Some(Operation::CreditUpdate) => {}
            _ => panic!("{header:?}"),
        }
    }
    assert!(reader.join().unwrap());
    writer.join().unwrap();
    assert!(received == pattern(9, TOTAL));
}

#[test]
fn a_host_process_reaches_a_port_of_the_guest() {
    let directory = tempfile::tempdir().unwrap();
    let mut guest = Guest::new(&directory);
    let mut stream = host_process(&directory);
    // What follows the line belongs to the guest.
    stream.write_all(b"CONNECT 1234\nhello").unwrap();
    let request = guest.expect(Operation::Request);
    assert_eq!(request.target_port, PORT);
    guest.send(Guest::header(Operation::Response, request.source_port), &[]);
    let mut line = vec![0; format!("OK {}\n", request.source_port).len()];
    stream.read_exact(&mut line).unwrap();
    assert_eq!(line, format!("OK {}\n", request.source_port).as_bytes());
    assert_eq!(guest.receive().1, b"hello");
    guest.send(
        Guest::header(Operation::Data, request.source_port),
        b"there",
    );
    let mut bytes = [0; 5];
    stream.read_exact(&mut bytes).unwrap();
    assert_eq!(&bytes, b"there");
}

#[test]
fn a_guest_that_refuses_closes_the_host_processs_socket() {
    let directory = tempfile::tempdir().unwrap();
    let mut guest = Guest::new(&directory);
    let mut stream = host_process(&directory);
    stream.write_all(b"CONNECT 1234\n").unwrap();
    let request = guest.expect(Operation::Request);
    guest.send(Guest::header(Operation::Reset, request.source_port), &[]);
    assert_eq!(stream.read(&mut [0; 8]).unwrap(), 0);
    let mut stream = host_process(&directory);
    stream.write_all(b"GET / HTTP/1.1\r\n\r\n").unwrap();
    // Closed with bytes unread, which the kernel reports as a reset connection.
    assert!(!matches!(stream.read(&mut [0; 8]), Ok(1..)));
}

#[test]
fn what_no_connection_expects_is_answered_with_a_reset() {
    let directory = tempfile::tempdir().unwrap();
    let _listener = listener(&directory, 52);
    let mut guest = Guest::new(&directory);
    // Nobody listens; nothing is connected; another type of socket; an unknown operation.
    guest.send(Guest::header(Operation::Request, 53), &[]);
    assert_eq!(guest.expect(Operation::Reset).source_port, 53);
    guest.send(Guest::header(Operation::Data, 52), b"lost");
    guest.expect(Operation::Reset);
    let datagram = Header {
        socket_type: 3,
        ..Guest::header(Operation::Request, 52)
    };
    guest.send(datagram, &[]);
    guest.expect(Operation::Reset);
    let unknown = Header {
        operation: 99,
        ..Guest::header(Operation::Request, 52)
    };
    guest.send(unknown, &[]);
    guest.expect(Operation::Reset);
    // A connection that is asked for twice is gone.
    guest.connect(52);
    guest.send(Guest::header(Operation::Request, 52), &[]);
    guest.expect(Operation::Reset);
    // A reset is never answered, and others' packets are not believed.
    guest.send(Guest::header(Operation::Reset, 52), &[]);
    for (source_cid, target_cid) in [(6, HOST_CID), (CID.into(), 3), (HOST_CID, CID.into())] {
        let foreign = Header {
            source_cid,
            target_cid,
            ..Guest::header(Operation::Request, 53)
        };
        guest.send(foreign, &[]);
    }
    guest.connect(52);
}

#[test]
fn a_guest_beyond_its_credit_is_cut_off() {
    let directory = tempfile::tempdir().unwrap();
    let listener = listener(&directory, 52);
    let mut guest = Guest::new(&directory);
    guest.connect(52);
    let (_stream, _) = listener.accept().unwrap();
    let chunk = vec![7; 32 * 1024];
    // The process reads nothing: the kernel's socket and our buffer fill up, then the guest goes on.
    let mut reset = false;
    for _ in 0..200 {
        guest.send(Guest::header(Operation::Data, 52), &chunk);
        while let Some(used) = guest.driver.poll_used(RECEIVE) {
            let address = guest.buffers[&used.head];
            let bytes = guest.driver.bytes(address, HEADER_BYTES);
            let header = Header::parse(bytes.as_slice().try_into().unwrap());
            reset |= Operation::of(header.operation) == Some(Operation::Reset);
        }
        if reset {
            return;
        }
    }
    panic!("6 MiB went somewhere");
}

#[test]
fn each_direction_ends_by_itself() {
    let directory = tempfile::tempdir().unwrap();
    let listener = listener(&directory, 52);
    let mut guest = Guest::new(&directory);
    guest.connect(52);
    let (mut stream, _) = listener.accept().unwrap();
    stream.write_all(b"last").unwrap();
    stream.shutdown(std::net::Shutdown::Write).unwrap();
    assert_eq!(guest.receive().1, b"last");
    let shutdown = guest.expect(Operation::Shutdown);
    assert_eq!(shutdown.flags, NO_SEND);
    // The guest still speaks.
    guest.send(Guest::header(Operation::Data, 52), b"answer");
    let end = Header {
        flags: NO_SEND | NO_RECEIVE,
        ..Guest::header(Operation::Shutdown, 52)
    };
    guest.send(end, &[]);
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    assert_eq!(answer, "answer");
    guest.expect(Operation::Reset);
}

#[test]
fn a_guest_that_has_moved_learns_that_its_connections_are_gone() {
    let (here, there) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let listening = listener(&here, 52);
    let mut guest = Guest::new(&here);
    guest.connect(52);
    let (mut stream, _) = listening.accept().unwrap();
    let target = Vsock::new(CID, there.path().to_owned()).unwrap();
    let buffers = guest.buffers;
    let (driver, source) = guest.driver.move_to(target).unwrap();
    drop(source);
    assert_eq!(stream.read(&mut [0; 8]).unwrap(), 0);
    let mut guest = Guest {
        driver,
        buffers,
        scratch: guest.scratch,
    };
    guest.driver.device_mut().resume().unwrap();
    let event = guest.driver.place(&[0xff; 8]);
    let chain = [Buffer::Writable(event, 8)];
    let used = guest.driver.request(EVENT, &chain, SOON).unwrap();
    assert_eq!(used.len, 4);
    assert_eq!(guest.driver.bytes(event, 4), [0; 4]);
    // Once is enough.
    guest.driver.submit(EVENT, &chain).unwrap();
    guest.driver.kick(EVENT);
    guest.send(Guest::header(Operation::Data, 52), b"lost");
    guest.expect(Operation::Reset);
    assert_eq!(guest.driver.poll_used(EVENT), None);
    guest.works(&there);
}

#[test]
fn a_paused_vsock_moves_no_byte_and_keeps_its_connections() {
    let directory = tempfile::tempdir().unwrap();
    let listener = listener(&directory, 52);
    let mut guest = Guest::new(&directory);
    guest.connect(52);
    let (mut stream, _) = listener.accept().unwrap();
    guest.driver.device_mut().pause().unwrap();
    stream.write_all(b"later").unwrap();
    assert_eq!(
        guest.driver.wait_used(RECEIVE, Duration::from_millis(30)),
        None
    );
    guest.driver.device_mut().resume().unwrap();
    assert_eq!(guest.receive().1, b"later");
}

#[test]
fn connections_beyond_the_limit_are_refused() {
    let directory = tempfile::tempdir().unwrap();
    let listener = listener(&directory, 52);
    let mut guest = Guest::new(&directory);
    let mut streams = Vec::new();
    for port in 0..super::muxer::MAX_CONNECTIONS as u32 {
        let request = Header {
            source_port: port,
            ..Guest::header(Operation::Request, 52)
        };
        guest.send(request, &[]);
        guest.expect(Operation::Response);
        streams.push(listener.accept().unwrap());
    }
    guest.send(Guest::header(Operation::Request, 52), &[]);
    guest.expect(Operation::Reset);
    let mut stream = host_process(&directory);
    assert_eq!(stream.read(&mut [0; 8]).unwrap(), 0);
}

#[test]
fn a_vsock_stops_at_what_no_driver_does_and_works_again_after_a_reset() {
    let directory = tempfile::tempdir().unwrap();
    let mut guest = Guest::new(&directory);
    let free = 0x10_0000;
    let misdeeds: &[(&str, usize, &[RawDescriptor])] = &[
        ("no header", TRANSMIT, &[(free, 43, 0, 0)]),
        (
            "a loop",
            TRANSMIT,
            &[(free, 44, NEXT, 1), (free, 44, NEXT, 0)],
        ),
        ("outside memory", TRANSMIT, &[(MEMORY_BYTES - 8, 44, 0, 0)]),
        ("nothing to read", TRANSMIT, &[(free, 44, WRITE, 0)]),
        ("a small event", EVENT, &[(free, 3, WRITE, 0)]),
    ];
    for (name, queue, descriptors) in misdeeds {
        for (index, (address, len, flags, next)) in (0..).zip(*descriptors) {
            let descriptor = Descriptor::new(*address, *len, *flags, *next);
            guest.driver.write_descriptor(*queue, index, descriptor);
        }
        if *queue == EVENT {
            // Events are looked at only when there is one.
            let body = guest.driver.device().save().unwrap();
            guest.driver.reset();
            guest.driver.device_mut().restore(body).unwrap();
            guest.driver.activate(Start::Working).unwrap();
            let (address, len, flags, next) = descriptors[0];
            let descriptor = Descriptor::new(address, len, flags, next);
            guest.driver.write_descriptor(*queue, 0, descriptor);
        }
        guest.driver.offer(*queue, 0);
        guest.driver.kick(*queue);
        let why = guest.driver.wait_needs_reset(SOON);
        assert!(why.is_some(), "{name} goes unnoticed");
        guest.driver.kick(RECEIVE);
        guest.driver.device_mut().pause().unwrap();
        guest.driver.device_mut().resume().unwrap();
        guest.reset();
        guest.works(&directory);
    }
    // A packet that claims more than it has.
    let lying = Header {
        len: 1,
        ..Guest::header(Operation::Data, 52)
    };
    let bytes = lying.bytes();
    let address = guest.driver.place(&bytes);
    guest
        .driver
        .submit(TRANSMIT, &[Buffer::Readable(address, HEADER_BYTES)]);
    guest.driver.kick(TRANSMIT);
    assert!(guest.driver.wait_needs_reset(SOON).is_some());
    guest.reset();
    guest.works(&directory);
}

#[test]
fn a_vsock_survives_any_packets() {
    let directory = tempfile::tempdir().unwrap();
    let _listener = listener(&directory, 52);
    let mut guest = Guest::new(&directory);
    let packet = (
        0u16..9,
        50u32..54,
        0u32..3,
        any::<u32>(),
        any::<u32>(),
        0usize..2000,
        0u32..4,
    );
    let packets = prop::collection::vec(packet, 1..40);
    let config = ProptestConfig::with_cases(64);
    let rng = proptest::test_runner::TestRng::deterministic_rng(
        proptest::test_runner::RngAlgorithm::ChaCha,
    );
    let guest = std::cell::RefCell::new(&mut guest);
    proptest::test_runner::TestRunner::new_with_rng(config, rng)
        .run(&packets, |packets| {
            let mut guest = guest.borrow_mut();
            for (operation, port, source, buffer_bytes, forwarded, len, flags) in packets {
                let header = Header {
                    operation,
                    source_port: source,
                    buffer_bytes,
                    forwarded,
                    flags,
                    ..Guest::header(Operation::Request, port)
                };
                guest.send(header, &vec![1; len]);
            }
            guest.reset();
            Ok(())
        })
        .unwrap();
    guest.borrow_mut().works(&directory);
}

#[test]
fn a_vsock_that_cannot_be_is_refused_with_the_reason() {
    let directory = tempfile::tempdir().unwrap();
    let at = || directory.path().to_owned();
    assert!(
        Vsock::new(2, at())
            .unwrap_err()
            .to_string()
            .contains("reserved")
    );
    let long = at().join("x".repeat(100));
    assert!(
        Vsock::new(3, long)
            .unwrap_err()
            .to_string()
            .contains("too long")
    );
    let held = Vsock::new(3, at()).unwrap();
    assert!(matches!(Vsock::new(3, at()), Err(DeviceError::Host { .. })));
    drop(held);
    // A socket that a dead process left.
    drop(UnixListener::bind(directory.path().join(SOCKET_NAME)).unwrap());
    let mut vsock = Vsock::new(3, at()).unwrap();
    let saved = |version, cid| super::Saved {
        version,
        cid,
        counters: super::SavedCounters::default(),
    };
    for state in [
        SavedBody::Null,
        SavedBody::serialized(&saved(2, 3)).unwrap(),
        SavedBody::serialized(&saved(1, 4)).unwrap(),
    ] {
        assert!(matches!(
            vsock.restore(state),
            Err(DeviceError::BadState { .. })
        ));
    }
    let good = vsock.save().unwrap();
    vsock.restore(good).unwrap();
    let mut cid = [0xff; 10];
    vsock.read_config(0, &mut cid);
    assert_eq!(cid, [3, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
}

#[test]
fn the_saved_state_of_version_1_is_written_as_ever_and_read() {
    let directory = tempfile::tempdir().unwrap();
    let mut vsock = Vsock::new(CID, directory.path().to_owned()).unwrap();
    vsock.counters.rx_packets.add(1);
    vsock.counters.rx_bytes.add(2);
    vsock.counters.tx_packets.add(3);
    vsock.counters.tx_bytes.add(4);
    vsock.counters.connections.add(5);
    vsock.counters.refused.add(6);
    vsock.counters.resets.add(7);
    let state = vsock.save().unwrap();
    expect_test::expect![[r#"
        {
          "version": 1,
          "cid": 5,
          "counters": {
            "rx_packets": 1,
            "rx_bytes": 2,
            "tx_packets": 3,
            "tx_bytes": 4,
            "connections": 5,
            "refused": 6,
            "resets": 7,
          },
        }
    "#]]
    .assert_eq(&crate::golden::text_of(&state));
    vsock.restore(state.clone()).unwrap();
    assert_eq!(vsock.save().unwrap(), state);
    let older = crate::golden::without(&state, "counters");
    vsock.restore(older).unwrap();
    assert!(vsock.metrics().iter().all(|(_, count)| *count == 0));
    vsock.restore(state.clone()).unwrap();
    assert_eq!(vsock.save().unwrap(), state);
}
