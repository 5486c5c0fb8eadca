//! Walking chains through rings and tables that hold anything.

use crate::input::Input;
use godwit_devices::chain::{Chain, MAX_SEGMENTS};
use godwit_devices::memory::GuestMemory;
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress};

const MEMORY_BYTES: usize = 0x1_0000;
const TABLE: u32 = 0x1000;
const AVAILABLE: u32 = 0x1100;
const USED: u32 = 0x1200;
/// The input overwrites memory from the table on, rings included.
const WRITTEN: u64 = TABLE as u64;
const SIZE: u16 = 16;

/// Pops until the ring is empty or broken; every chain lies in memory and says its own lengths.
pub fn run(data: &[u8]) {
    let mut input = Input::new(data);
    let (next, bytes) = (input.u16(), input.rest());
    let memory =
        GuestMemory::from_ranges(&[(GuestAddress(0), MEMORY_BYTES)]).expect("the host has 64 KiB");
    let most = MEMORY_BYTES - WRITTEN as usize;
    memory
        .write_slice(&bytes[..bytes.len().min(most)], GuestAddress(WRITTEN))
        .expect("it fits");
    let mut queue = Queue::new(SIZE).expect("a power of two");
    queue.set_desc_table_address(Some(TABLE), None);
    queue.set_avail_ring_address(Some(AVAILABLE), None);
    queue.set_used_ring_address(Some(USED), None);
    queue.set_next_avail(next);
    queue.set_ready(true);

    let mut popped = 0;
    while let Ok(Some(chain)) = Chain::pop(&mut queue, &memory) {
        check(&chain, &memory);
        popped += 1;
        assert!(popped <= SIZE, "a queue of {SIZE} gave {popped} chains");
    }
}

fn check(chain: &Chain, memory: &GuestMemory) {
    let segments = || chain.readable().iter().chain(chain.writable());
    assert!((1..=MAX_SEGMENTS).contains(&segments().count()));
    for segment in segments() {
        assert!(segment.len > 0);
        assert!(segment.address.0 + u64::from(segment.len) <= MEMORY_BYTES as u64);
    }
    let total = |segments: &[godwit_devices::chain::Segment]| {
        segments
            .iter()
            .map(|segment| u64::from(segment.len))
            .sum::<u64>()
    };
    assert_eq!(total(chain.readable()), u64::from(chain.readable_bytes()));
    assert_eq!(total(chain.writable()), u64::from(chain.writable_bytes()));
    // Chains longer than memory name some of it many times; a prefix of those is enough.
    let mut buffer = vec![0; (chain.readable_bytes() as usize).min(MEMORY_BYTES)];
    assert_eq!(chain.read(memory, 0, &mut buffer), buffer.len());
}
