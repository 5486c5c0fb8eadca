use super::*;
use crate::device::Start;
use crate::mock::{Buffer, MockDriver, NEXT};
use std::sync::mpsc::{self, Receiver, Sender};
use std::time::Duration;
use virtio_queue::desc::split::Descriptor;
use vm_memory::GuestAddress;

const LONG: Duration = Duration::from_secs(20);
const MEMORY: u64 = 1 << 20;
const RECEIVE: usize = 0;
const TRANSMIT: usize = 1;

struct Heard(Sender<Vec<u8>>);

impl Write for Heard {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.send(bytes.to_vec()).map_err(io::Error::other)?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn console() -> (VirtioConsole, ConsoleInput, Receiver<Vec<u8>>) {
    let (sender, heard) = mpsc::channel();
    let (device, input) = VirtioConsole::new(Box::new(Heard(sender)));
    (device, input, heard)
}

fn driver() -> (MockDriver<VirtioConsole>, ConsoleInput, Receiver<Vec<u8>>) {
    let (device, input, heard) = console();
    let mut driver = MockDriver::new(device, MEMORY);
    driver.activate(Start::Working).unwrap();
    (driver, input, heard)
}

fn say(driver: &mut MockDriver<VirtioConsole>, words: &[u8]) {
    let buffer = driver.place(words);
    let buffers = [Buffer::Readable(buffer, words.len() as u32)];
    assert_eq!(driver.request(TRANSMIT, &buffers, LONG).unwrap().len, 0);
}

fn offer_room(driver: &mut MockDriver<VirtioConsole>, len: u32) -> GuestAddress {
    let buffer = driver.allocate(len);
    let buffers = [Buffer::Writable(buffer, len)];
    driver.submit(RECEIVE, &buffers).unwrap();
    driver.kick(RECEIVE);
    buffer
}

#[test]
fn output_arrives_in_order() {
    let (mut driver, _, heard) = driver();
    let (first, second) = (driver.place(b"hello "), driver.place(b"world"));
    let buffers = [Buffer::Readable(first, 6), Buffer::Readable(second, 5)];
    driver.request(TRANSMIT, &buffers, LONG).unwrap();
    say(&mut driver, b"!");
    let all: Vec<u8> = heard.try_iter().flatten().collect();
    assert_eq!(all, b"hello world!");
    assert!(driver.device().metrics().contains(&("output_bytes", 12)));
}

#[test]
fn input_waits_for_room_and_fills_it() {
    let (mut driver, input, _) = driver();
    input.send(b"abcdef").unwrap();
    let first = offer_room(&mut driver, 4);
    assert_eq!(driver.wait_used(RECEIVE, LONG).unwrap().len, 4);
    assert_eq!(driver.bytes(first, 4), b"abcd");

    let second = offer_room(&mut driver, 64);
    assert_eq!(driver.wait_used(RECEIVE, LONG).unwrap().len, 2);
    assert_eq!(driver.bytes(second, 2), b"ef");

    let third = offer_room(&mut driver, 8);
    input.send(b"g").unwrap();
    assert_eq!(driver.wait_used(RECEIVE, LONG).unwrap().len, 1);
    assert_eq!(driver.bytes(third, 2), b"g\0");
}

#[test]
fn input_beyond_the_buffer_is_refused_whole() {
    let (device, input, _) = console();
    input.send(&vec![b'x'; MAX_INPUT_BYTES - 2]).unwrap();
    let waiting = MAX_INPUT_BYTES - 2;
    assert_eq!(input.send(b"abc"), Err(Full { waiting }));
    input.send(b"yz").unwrap();
    let waiting = MAX_INPUT_BYTES;
    assert_eq!(input.send(b"a"), Err(Full { waiting }));
    assert!(device.metrics().contains(&("refused_input_bytes", 4)));
}

#[test]
fn what_is_typed_before_the_driver_comes_reaches_it() {
    let (device, input, _) = console();
    input.send(b"early").unwrap();
    assert!(!input.is_active());
    let mut driver = MockDriver::new(device, MEMORY);
    let buffer = driver.allocate(16);
    let buffers = [Buffer::Writable(buffer, 16)];
    driver.submit(RECEIVE, &buffers).unwrap();
    driver.activate(Start::Working).unwrap();
    assert!(input.is_active());
    assert_eq!(driver.wait_used(RECEIVE, LONG).unwrap().len, 5);
    assert_eq!(driver.bytes(buffer, 5), b"early");
    driver.reset();
    assert!(!input.is_active());
}

#[test]
fn output_works_again_after_a_reset() {
    let (mut driver, _, heard) = driver();
    say(&mut driver, b"one");
    driver.reset();
    driver.activate(Start::Working).unwrap();
    say(&mut driver, b"two");
    let all: Vec<u8> = heard.try_iter().flatten().collect();
    assert_eq!(all, b"onetwo");
}

#[test]
fn a_console_nobody_reads_does_not_stop_the_guest() {
    let (mut driver, _, heard) = driver();
    drop(heard);
    say(&mut driver, b"lost");
    say(&mut driver, b"too");
    assert!(
        driver
            .device()
            .metrics()
            .contains(&("lost_output_bytes", 7))
    );
}

#[test]
fn unread_input_travels_with_the_machine() {
    let (mut driver, input, _) = driver();
    input.send(b"typed at home").unwrap();
    let buffer = offer_room(&mut driver, 6);
    assert_eq!(driver.wait_used(RECEIVE, LONG).unwrap().len, 6);
    assert_eq!(driver.bytes(buffer, 6), b"typed ");

    let (target, input, _) = console();
    let (mut moved, _old) = driver.move_to(target).unwrap();
    input.send(b"!").unwrap();
    let buffer = offer_room(&mut moved, 64);
    assert_eq!(moved.poll_used(RECEIVE), None);
    moved.device_mut().resume().unwrap();
    assert_eq!(moved.wait_used(RECEIVE, LONG).unwrap().len, 8);
    assert_eq!(moved.bytes(buffer, 8), b"at home!");
}

#[test]
fn drivers_that_break_the_rules_are_told_to_reset() {
    let breaches: [fn(&mut MockDriver<VirtioConsole>); 4] = [
        |driver| {
            driver.write_descriptor(TRANSMIT, 0, Descriptor::new(0x8000, 1, NEXT, 0));
            driver.offer(TRANSMIT, 0);
        },
        |driver| {
            let outside = Descriptor::new(MEMORY - 8, 9, 0, 0);
            driver.write_descriptor(TRANSMIT, 0, outside);
            driver.offer(TRANSMIT, 0);
        },
        |driver| driver.offer(TRANSMIT, QUEUE_SIZES[1]),
        |driver| driver.set_available_index(TRANSMIT, QUEUE_SIZES[1] + 1),
    ];
    for breach in breaches {
        let (mut driver, _input, heard) = driver();
        breach(&mut driver);
        driver.kick(TRANSMIT);
        assert!(driver.wait_needs_reset(LONG).is_some());
        assert_eq!(driver.poll_used(TRANSMIT), None);
        assert!(heard.try_recv().is_err());

        driver.reset();
        driver.activate(Start::Working).unwrap();
        say(&mut driver, b"sorry");
        assert_eq!(heard.try_recv().unwrap(), b"sorry");
    }
}

#[test]
fn room_that_is_no_memory_is_refused_when_there_is_input() {
    let (mut driver, input, _) = driver();
    let outside = Descriptor::new(u64::MAX - 3, 64, crate::mock::WRITE, 0);
    driver.write_descriptor(RECEIVE, 0, outside);
    driver.offer(RECEIVE, 0);
    driver.kick(RECEIVE);
    input.send(b"x").unwrap();
    assert!(driver.wait_needs_reset(LONG).is_some());
}

#[test]
fn a_state_of_another_version_is_refused() {
    let (mut device, _, _) = console();
    for version in [STATE_VERSION - 1, STATE_VERSION + 1] {
        let saved = SavedBody::serialized(&Saved {
            version,
            health: Health::Well,
            input: Vec::new(),
            counters: SavedCounters::default(),
        });
        let refused = device.restore(saved.unwrap());
        assert!(matches!(refused, Err(DeviceError::BadState { .. })));
    }
}

#[test]
fn a_state_with_too_much_input_is_refused() {
    let saved = SavedBody::serialized(&Saved {
        version: STATE_VERSION,
        health: Health::Well,
        input: vec![0; MAX_INPUT_BYTES + 1],
        counters: SavedCounters::default(),
    });
    let (mut device, _, _) = console();
    let refused = device.restore(saved.unwrap());
    assert!(matches!(refused, Err(DeviceError::BadState { .. })));
}

#[test]
fn the_saved_state_of_version_1_is_written_as_ever_and_read() {
    let (mut device, _, _) = console();
    let saved = SavedBody::serialized(&Saved {
        version: STATE_VERSION,
        health: Health::Failed,
        input: b"typed\n".to_vec(),
        counters: SavedCounters::default(),
    });
    device.restore(saved.unwrap()).unwrap();
    let counters = &device.shared.counters;
    counters.input_bytes.add(1);
    counters.refused_input_bytes.add(2);
    counters.output_bytes.add(3);
    counters.lost_output_bytes.add(4);
    let state = device.save().unwrap();
    expect_test::expect![[r#"
        {
          "version": 1,
          "health": "failed",
          "input": [116, 121, 112, 101, 100, 10],
          "counters": {
            "input_bytes": 1,
            "refused_input_bytes": 2,
            "output_bytes": 3,
            "lost_output_bytes": 4,
          },
        }
    "#]]
    .assert_eq(&crate::golden::text_of(&state));
    let (mut target, _, _) = console();
    target.restore(state.clone()).unwrap();
    assert_eq!(target.save().unwrap(), state);
    let older = crate::golden::without(&state, "counters");
    target.restore(older).unwrap();
    assert!(target.metrics().iter().all(|(_, count)| *count == 0));
}
