//! Block requests: the parser against its own promises, then the whole device on a raw image.

use crate::hostile::{MEMORY_BYTES, drive};
use crate::input::Input;
use godwit_devices::block::{Block, BlockConfig, Limits, MAX_DATA_SEGMENTS, Request, parse};
use godwit_devices::chain::Chain;
use godwit_devices::device::Start;
use godwit_devices::memory::GuestMemory;
use godwit_devices::mock::{MockDriver, NEXT, WRITE};
use godwit_wire::devices::{DiskAccess, DiskFormat, DiskLimits, OnIoError};
use godwit_wire::id::VmId;
use std::sync::Arc;
use tempfile::NamedTempFile;
use virtio_queue::desc::split::Descriptor;
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress};

const CAPACITY: u64 = 64 * 1024;

/// An odd first byte drives a device, an even one only parses.
pub fn run(data: &[u8]) {
    let mut input = Input::new(data);
    if input.u8() & 1 == 0 {
        parse_one(&mut input);
    } else {
        drive_disk(&mut input);
    }
}

fn parse_one(input: &mut Input<'_>) {
    const BUFFERS: u64 = 0x1000;
    let memory =
        GuestMemory::from_ranges(&[(GuestAddress(0), 0x1_0000)]).expect("the host has 64 KiB");
    let mut queue = Queue::new(16).expect("a power of two");
    queue.set_avail_ring_address(Some(0x200), None);
    queue.set_used_ring_address(Some(0x400), None);
    queue.set_ready(true);
    let limits = Limits {
        capacity: u64::from(input.u16()) * 512,
        writable: input.u8() & 1 == 1,
    };
    let count = 1 + u16::from(input.u8() % 15);
    for index in 0..count {
        let len = 1 + u32::from(input.u16()) % 0x1000;
        let flags = if input.u8() & 1 == 1 { WRITE } else { 0 };
        let next = if index + 1 < count { NEXT } else { 0 };
        let at = BUFFERS + 0xc00 * u64::from(index);
        let descriptor = Descriptor::new(at, len, flags | next, index + 1);
        let table = GuestAddress(16 * u64::from(index));
        memory.write_obj(descriptor, table).expect("it fits");
    }
    let _ = memory.write_slice(input.rest(), GuestAddress(BUFFERS));
    let Ok(chain) = Chain::at(&queue, &memory, 0) else {
        return;
    };
    let Ok(parsed) = parse(&chain, &memory, limits) else {
        assert!(chain.writable().is_empty(), "there was room for a status");
        return;
    };
    let inside = |offset: u64, bytes: u64| {
        assert!(
            offset
                .checked_add(bytes)
                .is_some_and(|end| end <= limits.capacity)
        );
    };
    match parsed.request {
        Ok(
            ref
            request @ (Request::Read { offset, ref data } | Request::Write { offset, ref data }),
        ) => {
            inside(offset, request.data_bytes());
            assert!(data.len() <= MAX_DATA_SEGMENTS as usize);
            assert!(limits.writable || matches!(request, Request::Read { .. }));
        }
        Ok(Request::Discard(ranges) | Request::WriteZeroes(ranges)) => {
            assert!(limits.writable);
            for range in ranges {
                inside(range.offset, range.bytes);
            }
        }
        Ok(Request::Flush | Request::GetId) | Err(_) => {}
    }
}

fn drive_disk(input: &mut Input<'_>) {
    thread_local! {
        static IMAGE: NamedTempFile = {
            let image = tempfile::Builder::new().tempfile_in("/dev/shm").expect("the host has room");
            image.as_file().set_len(CAPACITY).expect("the host has room");
            image
        };
    }
    IMAGE.with(|image| {
        let Ok(disk) = open(image.path().to_owned(), DiskFormat::Raw) else {
            panic!("a raw image can always be opened");
        };
        let mut driver = MockDriver::new(disk, MEMORY_BYTES);
        driver
            .activate(Start::Working)
            .expect("it can be activated");
        drive(&mut driver, input);
        let length = image.as_file().metadata().expect("it is there").len();
        assert_eq!(length, CAPACITY, "no request changes an image's size");
    });
}

pub(crate) fn open(
    path: std::path::PathBuf,
    format: DiskFormat,
) -> Result<Block, godwit_devices::device::DeviceError> {
    let config = BlockConfig {
        name: "fuzzed".into(),
        path,
        format,
        access: DiskAccess::ReadWrite,
        limits: DiskLimits::default(),
        on_error: OnIoError::Report,
        lock: None,
        vm: VmId::fresh(),
    };
    Block::open(config, Arc::new(|_| {}))
}
