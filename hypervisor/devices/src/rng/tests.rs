use super::*;
use crate::device::Start;
use crate::device_thread::QueueService;
use crate::mock::{Buffer, MockDriver, NEXT, WRITE};
use std::time::Duration;
use virtio_queue::desc::split::Descriptor;
use vm_memory::GuestAddress;

const LONG: Duration = Duration::from_secs(20);
const MEMORY: u64 = 1 << 20;

fn driver() -> MockDriver<Rng> {
    let mut driver = MockDriver::new(Rng::new().unwrap(), MEMORY);
    driver.activate(Start::Working).unwrap();
    driver
}

#[test]
fn a_request_is_filled_across_its_buffers_and_nowhere_else() {
    let mut driver = driver();
    let (first, second) = (driver.allocate(100), driver.allocate(200));
    let beside = driver.place(&[7; 16]);
    let used = driver
        .request(
            0,
            &[Buffer::Writable(first, 100), Buffer::Writable(second, 200)],
            LONG,
        )
        .unwrap();
    assert_eq!(used.len, 300);
    // 256 random bits are not all zero.
    assert_ne!(driver.bytes(first, 32), [0; 32]);
    assert_ne!(driver.bytes(GuestAddress(second.0 + 168), 32), [0; 32]);
    assert_eq!(driver.bytes(beside, 16), [7; 16]);
}

#[test]
fn a_large_request_gets_a_bounded_answer() {
    let mut driver = driver();
    let buffer = driver.allocate(0x1_0000);
    let used = driver
        .request(0, &[Buffer::Writable(buffer, 0x1_0000)], LONG)
        .unwrap();
    assert_eq!(used.len as usize, MAX_REQUEST_BYTES);
    let behind = GuestAddress(buffer.0 + u64::from(used.len));
    assert_eq!(driver.bytes(behind, 64), [0; 64]);
}

#[test]
fn a_guest_that_asks_without_end_waits_for_the_rate() {
    let mut driver = driver();
    let buffer = driver.allocate(4096);
    let ask = |driver: &mut MockDriver<Rng>| {
        let used = driver.request(0, &[Buffer::Writable(buffer, 4096)], LONG);
        assert_eq!(used.unwrap().len, 4096);
    };
    // The bucket holds one second's worth and fills while it is emptied, but never as fast.
    let throttled = (0..16 * BYTES_PER_SECOND / 4096).any(|_| {
        ask(&mut driver);
        driver.device().counters.throttled.get() > 0
    });
    assert!(throttled);
    ask(&mut driver);
}

#[test]
fn a_driver_that_breaks_the_rules_is_served_again_only_after_a_reset() {
    let mut driver = driver();
    driver.write_descriptor(0, 0, Descriptor::new(0x8000, 16, NEXT, 0));
    driver.offer(0, 0);
    driver.kick(0);
    assert!(driver.wait_needs_reset(LONG).unwrap().contains("loops"));

    driver.reset();
    driver.activate(Start::Working).unwrap();
    let buffer = driver.allocate(16);
    let used = driver.request(0, &[Buffer::Writable(buffer, 16)], LONG);
    assert_eq!(used.unwrap().len, 16);
}

#[test]
fn a_driver_that_offers_entropy_is_refused() {
    let mut driver = driver();
    let buffer = driver.place(&[1; 16]);
    driver.submit(0, &[Buffer::Readable(buffer, 16)]).unwrap();
    driver.kick(0);
    assert!(driver.wait_needs_reset(LONG).is_some());
    assert_eq!(driver.poll_used(0), None);
}

#[test]
fn buffers_that_are_not_all_memory_are_refused_and_nothing_is_written() {
    let misdeeds = [
        ("a buffer outside memory", MEMORY, 64),
        ("a length past the end", MEMORY - 8, 9),
    ];
    for (name, address, len) in misdeeds {
        let mut driver = driver();
        driver.write_descriptor(0, 0, Descriptor::new(address, len, WRITE, 0));
        driver.offer(0, 0);
        driver.kick(0);
        let why = driver.wait_needs_reset(LONG);
        assert!(why.is_some_and(|why| why.contains("memory")), "{name}");
        assert_eq!(driver.poll_used(0), None, "{name}");
        assert_eq!(driver.bytes(GuestAddress(MEMORY - 8), 8), [0; 8], "{name}");

        driver.reset();
        driver.activate(Start::Working).unwrap();
        let buffer = driver.allocate(16);
        let used = driver.request(0, &[Buffer::Writable(buffer, 16)], LONG);
        assert_eq!(used.unwrap().len, 16, "{name}");
    }
}

#[test]
fn an_available_index_beyond_the_queue_is_refused() {
    let mut driver = driver();
    driver.set_available_index(0, QUEUE_SIZES[0] + 1);
    driver.kick(0);
    assert!(driver.wait_needs_reset(LONG).is_some());
}

#[test]
fn requests_made_while_paused_are_served_where_the_machine_goes_on() {
    let mut driver = driver();
    let buffer = driver.allocate(64);
    driver
        .request(0, &[Buffer::Writable(buffer, 64)], LONG)
        .unwrap();
    driver.pause().unwrap();
    driver.submit(0, &[Buffer::Writable(buffer, 32)]).unwrap();
    driver.kick(0);
    assert_eq!(driver.poll_used(0), None);

    let (mut moved, _old) = driver.move_to(Rng::new().unwrap()).unwrap();
    assert_eq!(moved.poll_used(0), None);
    moved.device_mut().resume().unwrap();
    assert_eq!(moved.wait_used(0, LONG).unwrap().len, 32);
    // What was counted here and there, once the thread is done.
    moved.pause().unwrap();
    assert!(moved.device().metrics().contains(&("bytes", 96)));
}

#[test]
fn a_failed_device_stays_failed_when_it_moves() {
    let mut driver = driver();
    driver.set_available_index(0, u16::MAX);
    driver.kick(0);
    driver.wait_needs_reset(LONG).unwrap();
    let (mut moved, _old) = driver.move_to(Rng::new().unwrap()).unwrap();
    let thread = &moved.device().thread;
    assert_eq!(
        thread.call(|service| service.health()).unwrap(),
        Some(Health::Failed)
    );
    moved.reset();
    moved.activate(Start::Working).unwrap();
    let buffer = moved.allocate(8);
    assert!(
        moved
            .request(0, &[Buffer::Writable(buffer, 8)], LONG)
            .is_some()
    );
}

#[test]
fn a_state_of_another_version_is_refused() {
    let saved = SavedBody::serialized(&Saved {
        version: STATE_VERSION + 1,
        health: Health::Well,
        counters: SavedCounters::default(),
    });
    let refused = Rng::new().unwrap().restore(saved.unwrap());
    assert!(matches!(refused, Err(DeviceError::BadState { .. })));
    let refused = Rng::new().unwrap().restore(SavedBody::Null);
    assert!(matches!(refused, Err(DeviceError::BadState { .. })));
}

#[test]
fn the_saved_state_of_version_1_is_written_as_ever_and_read() {
    let rng = Rng::new().unwrap();
    rng.counters.requests.add(1);
    rng.counters.bytes.add(2);
    rng.counters.throttled.add(3);
    let state = rng.save().unwrap();
    expect_test::expect![[r#"
        {
          "version": 1,
          "health": "well",
          "counters": {
            "requests": 1,
            "bytes": 2,
            "throttled": 3,
          },
        }
    "#]]
    .assert_eq(&crate::golden::text_of(&state));
    let mut target = Rng::new().unwrap();
    target.restore(state.clone()).unwrap();
    assert_eq!(target.save().unwrap(), state);
    let older = crate::golden::without(&state, "counters");
    target.restore(older).unwrap();
    assert!(target.metrics().iter().all(|(_, count)| *count == 0));
}
