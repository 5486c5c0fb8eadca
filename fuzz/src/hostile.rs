//! A driver that writes anything into the rings of a whole device.

use crate::input::Input;
use godwit_devices::device::{Start, VirtioDevice};
use godwit_devices::mock::MockDriver;
use virtio_queue::desc::split::Descriptor;
use vm_memory::{Bytes, GuestAddress};

/// Guest memory of a driven device.
pub(crate) const MEMORY_BYTES: u64 = 1 << 20;
/// Where buffers are: behind all rings.
const BUFFERS: u64 = 0x4_0000;
const BUFFER_BYTES: u64 = 0x1000;
const MAX_ACTIONS: usize = 64;

/// Drives an active device as the input says, and ends paused: what was asked has been done or refused by then, and a
/// device whose thread has died cannot pause.
pub(crate) fn drive<D: VirtioDevice>(driver: &mut MockDriver<D>, input: &mut Input<'_>) {
    let queues = driver.device().queue_sizes().len();
    for _ in 0..MAX_ACTIONS {
        if input.is_empty() {
            break;
        }
        let (action, queue) = (input.u8(), usize::from(input.u8()) % queues);
        match action % 8 {
            0 => offer_chain(driver, queue, input),
            1 => {
                let descriptor = descriptor(input);
                driver.write_descriptor(queue, u16::from(input.u8()), descriptor);
            }
            2 => driver.offer(queue, input.u16()),
            3 => driver.set_available_index(queue, input.u16()),
            4 => {
                let at = GuestAddress(BUFFERS + u64::from(input.u16()));
                let bytes = input.u8();
                let bytes = input.bytes(bytes.into());
                let _ = driver.memory().write_slice(bytes, at);
            }
            5 => {
                let offset = u32::from(input.u8());
                let bytes = input.bytes(8);
                driver.device_mut().write_config(offset, bytes);
            }
            6 => {
                let mut config = [0; 64];
                let offset = input.u32();
                driver.device().read_config(offset, &mut config);
                let _ = driver.device().metrics();
            }
            _ => {
                driver.pause().expect("the device's thread lives");
                driver
                    .device_mut()
                    .resume()
                    .expect("the device's thread lives");
            }
        }
        driver.kick(queue);
    }
    driver.pause().expect("the device's thread lives");
}

/// One to four descriptors, mostly in order and mostly in memory.
fn offer_chain<D: VirtioDevice>(driver: &mut MockDriver<D>, queue: usize, input: &mut Input<'_>) {
    let shape = input.u8();
    let length = 1 + u16::from(shape % 4);
    let first = u16::from(input.u8() % 8);
    for nth in 0..length {
        let page = u64::from(input.u8() % 64);
        let bytes = input.u8();
        let bytes = input.bytes(bytes.into());
        let at = BUFFERS + page * BUFFER_BYTES;
        let _ = driver.memory().write_slice(bytes, GuestAddress(at));
        // Bits 2 to 5 say what the device may write, the rest how the chain is broken, if it is.
        let write = u16::from(shape >> (2 + nth) & 1) << 1;
        let next = u16::from(nth + 1 < length);
        let len = if shape >> 6 == 3 {
            input.u32()
        } else {
            (bytes.len() as u32).max(1)
        };
        let descriptor = Descriptor::new(at, len, write | next, first + nth + 1);
        driver.write_descriptor(queue, first + nth, descriptor);
    }
    driver.offer(queue, first);
}

fn descriptor(input: &mut Input<'_>) -> Descriptor {
    let address = u64::from_le_bytes(input.array());
    Descriptor::new(address, input.u32(), input.u16(), input.u16())
}

/// Makes a second device of what the first saved, and lets it go on.
pub(crate) fn move_on<D: VirtioDevice>(driver: MockDriver<D>, target: D) {
    let (mut moved, _old) = driver
        .move_to(target)
        .expect("what a device saved, its twin restores");
    moved
        .device_mut()
        .resume()
        .expect("the device's thread lives");
    moved.pause().expect("the device's thread lives");
    moved.reset();
    moved
        .activate(Start::Working)
        .expect("a reset device can be activated");
}
