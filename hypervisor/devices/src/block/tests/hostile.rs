//! Drivers that break the rules: a status or a reset, never a panic, a hang, or a write outside.

use super::*;
use crate::mock::{INDIRECT, NEXT, WRITE};
use proptest::prelude::*;
use virtio_queue::desc::split::Descriptor;
use vm_memory::Bytes as _;

/// The device asks for a reset, and works again after one.
fn is_reset_and_works(driver: &mut MockDriver<Block>, heard: &Receiver<DeviceEvent>) -> String {
    driver.kick(0);
    let why = driver.wait_needs_reset(LIMIT).expect("it asks for a reset");
    assert!(matches!(
        heard.recv_timeout(LIMIT),
        Ok(DeviceEvent::Failed { .. })
    ));
    driver.pause().unwrap();
    driver.reset();
    driver.activate(Start::Working).unwrap();
    assert_eq!(write(driver, 5, &[0x5a; 512]), STATUS_OK);
    assert_eq!(read(driver, 5, 512), [0x5a; 512]);
    why
}

#[test]
fn a_chain_that_loops_stops_the_device_until_a_reset() {
    let (_directory, path) = raw_disk();
    let (mut driver, heard) = driver(config(&path));
    driver.write_descriptor(0, 0, Descriptor::new(0x10_0000, 16, NEXT, 1));
    driver.write_descriptor(0, 1, Descriptor::new(0x10_0000, 16, NEXT, 0));
    driver.offer(0, 0);
    assert!(is_reset_and_works(&mut driver, &heard).contains("loops"));
}

#[test]
fn an_indirect_table_that_contains_itself_stops_the_device() {
    let (_directory, path) = raw_disk();
    let (mut driver, heard) = driver(config(&path));
    let table = driver.allocate(16);
    let descriptor = Descriptor::new(table.0, 16, INDIRECT, 0);
    driver.memory().write_obj(descriptor, table).unwrap();
    driver.write_descriptor(0, 0, descriptor);
    driver.offer(0, 0);
    assert!(is_reset_and_works(&mut driver, &heard).contains("nests"));
}

#[test]
fn an_indirect_table_of_64k_descriptors_stops_the_device() {
    let (_directory, path) = raw_disk();
    let (mut driver, heard) = driver(config(&path));
    let table = driver.allocate(16 * 65536);
    for index in 0..65535u64 {
        let descriptor = Descriptor::new(0x10_0000, 512, NEXT, index as u16 + 1);
        let at = GuestAddress(table.0 + 16 * index);
        driver.memory().write_obj(descriptor, at).unwrap();
    }
    driver.write_descriptor(0, 0, Descriptor::new(table.0, 16 * 65536, INDIRECT, 0));
    driver.offer(0, 0);
    let why = is_reset_and_works(&mut driver, &heard);
    assert!(why.contains("more than 1024 segments"), "{why}");
}

#[test]
fn buffers_outside_memory_stop_the_device() {
    for (address, len) in [
        (MEMORY - 8, 16),
        (MEMORY, 1),
        (u64::MAX, 1),
        (u64::MAX - 15, u32::MAX),
        (0, u32::MAX),
    ] {
        let (_directory, path) = raw_disk();
        let (mut driver, heard) = driver(config(&path));
        driver.write_descriptor(0, 0, Descriptor::new(address, len, WRITE, 0));
        driver.offer(0, 0);
        let why = is_reset_and_works(&mut driver, &heard);
        assert!(why.contains("not guest memory"), "{why}");
    }
}

#[test]
fn heads_and_indices_outside_the_queue_stop_the_device() {
    let (_directory, path) = raw_disk();
    let (mut driver, heard) = driver(config(&path));
    driver.offer(0, QUEUE_SIZE);
    let why = is_reset_and_works(&mut driver, &heard);
    assert!(why.contains("outside its table"), "{why}");
    driver.set_available_index(0, QUEUE_SIZE + 10);
    let why = is_reset_and_works(&mut driver, &heard);
    assert!(why.contains("available index"), "{why}");
}

#[test]
fn a_chain_without_room_for_a_status_stops_the_device() {
    let (_directory, path) = raw_disk();
    let (mut driver, heard) = driver(config(&path));
    let head = driver.place(&header(FLUSH, 0));
    driver.submit(0, &[Buffer::Readable(head, 16)]).unwrap();
    let why = is_reset_and_works(&mut driver, &heard);
    assert!(why.contains("no room for a status"), "{why}");
}

#[test]
fn an_empty_buffer_stops_the_device() {
    let (_directory, path) = raw_disk();
    let (mut driver, heard) = driver(config(&path));
    let head = driver.place(&header(IN, 0));
    let status = driver.allocate(1);
    let buffers = [
        Buffer::Readable(head, 16),
        Buffer::Writable(status, 0),
        Buffer::Writable(status, 1),
    ];
    driver.submit(0, &buffers).unwrap();
    let why = is_reset_and_works(&mut driver, &heard);
    assert!(why.contains("empty segment"), "{why}");
}

#[test]
fn a_chain_offered_again_while_it_is_under_way_stops_the_device() {
    let (_directory, path) = raw_disk();
    // A rate so low that the first request is paid for and the second waits.
    let (mut driver, heard) = driver(BlockConfig {
        on_error: OnIoError::Pause,
        ..config(&path)
    });
    let file = std::fs::OpenOptions::new().write(true).open(&path);
    file.unwrap().set_len(0).unwrap();
    let request = request(&mut driver, IN, 0, &[], 512);
    let head = driver.submit(0, &request.buffers).unwrap();
    driver.kick(0);
    // Reading past the end of the file stalls the request: it stays under way.
    assert!(matches!(
        heard.recv_timeout(LIMIT),
        Ok(DeviceEvent::Stalled { .. })
    ));
    driver.offer(0, head);
    driver.kick(0);
    let why = driver.wait_needs_reset(LIMIT).expect("it asks for a reset");
    assert!(why.contains("offered again"), "{why}");
}

#[test]
fn malformed_requests_with_a_status_byte_get_an_error_there() {
    let (_directory, path) = raw_disk();
    let (mut driver, _heard) = driver(config(&path));
    let last = DISK / 512;
    let ranges = |count: usize| range(0, 1, 0).repeat(count);
    for (kind, sector, out, room, expected) in [
        (IN, last, vec![], 512, STATUS_IOERR),
        (IN, last - 1, vec![], 1024, STATUS_IOERR),
        (IN, u64::MAX, vec![], 512, STATUS_IOERR),
        (IN, u64::MAX / 512 + 1, vec![], 512, STATUS_IOERR),
        (IN, 0, vec![], 511, STATUS_IOERR),
        (IN, 0, vec![], 0, STATUS_IOERR),
        (OUT, last, vec![1; 512], 0, STATUS_IOERR),
        (OUT, 0, vec![1; 513], 0, STATUS_IOERR),
        (OUT, 0, vec![], 0, STATUS_IOERR),
        (GET_ID, 0, vec![], 19, STATUS_IOERR),
        (DISCARD, 0, vec![1; 15], 0, STATUS_IOERR),
        (DISCARD, 0, range(0, 1, 1), 0, STATUS_UNSUPP),
        (DISCARD, 0, range(last, 1, 0), 0, STATUS_IOERR),
        (DISCARD, 0, range(0, u32::MAX, 0), 0, STATUS_IOERR),
        (DISCARD, 0, ranges(33), 0, STATUS_IOERR),
        (WRITE_ZEROES, 0, range(0, 1, 2), 0, STATUS_UNSUPP),
        (WRITE_ZEROES, 0, range(u64::MAX, 1, 0), 0, STATUS_IOERR),
        (77, 0, vec![], 0, STATUS_UNSUPP),
    ] {
        let (status, _, used) = ask(&mut driver, kind, sector, &out, room);
        assert_eq!(status, expected, "type {kind}, sector {sector}, {room}");
        assert_eq!(used.len, 1);
    }
    assert_eq!(std::fs::read(&path).unwrap(), vec![0; DISK as usize]);
    assert_eq!(driver.needs_reset(), None);
}

#[test]
fn a_header_the_device_may_only_write_gets_an_error() {
    let (_directory, path) = raw_disk();
    let (mut driver, _heard) = driver(config(&path));
    let head = driver.place(&header(OUT, 0));
    let status = driver.place(&[0xff]);
    let buffers = [Buffer::Writable(head, 16), Buffer::Writable(status, 1)];
    driver.request(0, &buffers, LIMIT).unwrap();
    assert_eq!(driver.bytes(status, 1), [STATUS_IOERR]);
    assert_eq!(driver.bytes(head, 16), header(OUT, 0));
}

#[test]
fn more_data_segments_than_offered_are_refused() {
    let (_directory, path) = raw_disk();
    let (mut driver, _heard) = driver(config(&path));
    let head = driver.place(&header(IN, 0));
    let table = driver.allocate(16 * 300);
    let data = driver.allocate(512);
    let status = driver.place(&[0xff]);
    let put = |index: u64, descriptor| {
        let at = GuestAddress(table.0 + 16 * index);
        driver.memory().write_obj(descriptor, at).unwrap();
    };
    put(0, Descriptor::new(head.0, 16, NEXT, 1));
    for index in 1..=256 {
        put(
            index,
            Descriptor::new(data.0, 2, NEXT | WRITE, index as u16 + 1),
        );
    }
    put(257, Descriptor::new(status.0, 1, WRITE, 0));
    driver.write_descriptor(0, 0, Descriptor::new(table.0, 16 * 258, INDIRECT, 0));
    driver.offer(0, 0);
    driver.kick(0);
    assert!(driver.wait_used(0, LIMIT).is_some());
    assert_eq!(driver.bytes(status, 1), [STATUS_IOERR]);
}

#[test]
fn a_reset_drops_what_was_under_way() {
    let (_directory, path) = raw_disk();
    let (mut driver, _heard) = driver(config(&path));
    for nth in 0..50 {
        let request = request(&mut driver, OUT, nth, &[1; 512], 0);
        driver.submit(0, &request.buffers).unwrap();
    }
    driver.kick(0);
    driver.reset();
    assert_eq!(driver.device_mut().pause().unwrap(), []);
    driver.activate(Start::Working).unwrap();
    assert_eq!(write(&mut driver, 0, &[4; 512]), STATUS_OK);
}

#[test]
fn a_hostile_saved_state_is_refused() {
    let (_directory, path) = raw_disk();
    let (mut block, _heard) = open(config(&path));
    let state = |version: u32, pending: Vec<u16>| {
        let counters = SavedCounters::default();
        SavedBody::serialized(&Saved {
            version,
            pending,
            counters,
        })
        .unwrap()
    };
    for saved in [
        SavedBody::Null,
        SavedBody::Text("pending".into()),
        state(2, vec![]),
        state(1, vec![QUEUE_SIZE]),
        state(1, vec![3, 3]),
        state(1, (0..=QUEUE_SIZE).collect()),
    ] {
        let error = block.restore(saved).unwrap_err();
        assert!(matches!(error, DeviceError::BadState { .. }), "{error:?}");
    }
    block.restore(state(1, vec![0, 255])).unwrap();
}

#[test]
fn an_unfinished_chain_that_is_none_stops_the_device() {
    let (_directory, path) = raw_disk();
    let (mut block, heard) = open(config(&path));
    let saved = Saved {
        version: SAVED_VERSION,
        pending: vec![7],
        counters: SavedCounters::default(),
    };
    block
        .restore(SavedBody::serialized(&saved).unwrap())
        .unwrap();
    let mut driver = MockDriver::new(block, MEMORY);
    driver.activate(Start::Paused).unwrap();
    driver.device_mut().resume().unwrap();
    is_reset_and_works(&mut driver, &heard);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn no_request_panics_or_writes_outside_its_chain(
        kind in prop_oneof![0u32..16, any::<u32>()],
        sector in prop_oneof![0u64..20, any::<u64>()],
        readable in prop::collection::vec(0u8..4, 0..100),
        short in 0u32..17,
        room in 1u32..2000,
    ) {
        let memory = crate::memory::GuestMemory::from_ranges(
            &[(GuestAddress(0), 0x1_0000)],
        ).unwrap();
        let mut bytes = header(kind, sector);
        bytes.extend(&readable);
        bytes.truncate(bytes.len() - short.min(bytes.len() as u32 - 1) as usize);
        memory.write_slice(&bytes, GuestAddress(0x4000)).unwrap();
        let mut queue = virtio_queue::Queue::new(8).unwrap();
        queue.set_desc_table_address(Some(0x1000), None);
        queue.set_ready(true);
        for (index, descriptor) in [
            Descriptor::new(0x4000, bytes.len() as u32, NEXT, 1),
            Descriptor::new(0x8000, room, WRITE, 0),
        ].into_iter().enumerate() {
            memory.write_obj(descriptor, GuestAddress(0x1000 + 16 * index as u64)).unwrap();
        }
        let chain = crate::chain::Chain::at(&queue, &memory, 0).unwrap();
        let limits = Limits { capacity: 8192, writable: true };
        let parsed = parse(&chain, &memory, limits).unwrap();
        prop_assert_eq!(parsed.status.0, 0x8000 + u64::from(room) - 1);
        let inside = |offset: u64, bytes: u64| offset + bytes <= limits.capacity;
        match parsed.request {
            Ok(super::super::Request::Read { offset, data }) => {
                let total: u64 = data.iter().map(|part| u64::from(part.len)).sum();
                prop_assert!(total.is_multiple_of(512) && inside(offset, total));
                prop_assert_eq!(total, u64::from(room) - 1);
            }
            Ok(super::super::Request::Write { offset, data }) => {
                let total: u64 = data.iter().map(|part| u64::from(part.len)).sum();
                prop_assert!(total.is_multiple_of(512) && inside(offset, total));
            }
            Ok(super::super::Request::Discard(ranges) | super::super::Request::WriteZeroes(ranges)) => {
                prop_assert!(ranges.iter().all(|range| inside(range.offset, range.bytes)));
            }
            Ok(super::super::Request::Flush) => prop_assert_eq!(kind, FLUSH),
            Ok(super::super::Request::GetId) => prop_assert_eq!(kind, GET_ID),
            Err(rejection) => prop_assert_ne!(rejection.status(), STATUS_OK),
        }
    }
}
