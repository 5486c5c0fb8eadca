//! Disks as a driver sees them.

mod claims;
mod content;
mod hostile;
mod qcow2;
mod stalls;
mod working;

use super::*;
use crate::device::DeviceEvent;
use crate::mock::{Buffer, MockDriver, Used, recorded_events};
use std::path::Path;
use std::sync::mpsc::Receiver;
use std::time::Duration;
use tempfile::TempDir;
use uuid::Uuid;
use vm_memory::GuestAddress;

/// How long anything may take before the test has failed.
const LIMIT: Duration = Duration::from_secs(20);
const MEMORY: u64 = 16 << 20;
const DISK: u64 = 8 << 20;

const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const GET_ID: u32 = 8;
const DISCARD: u32 = 11;
const WRITE_ZEROES: u32 = 13;

fn vm(number: u128) -> VmId {
    serde_json::from_value(Uuid::from_u128(number).to_string().into()).unwrap()
}

fn config(path: &Path) -> BlockConfig {
    BlockConfig {
        name: "root".into(),
        path: path.to_owned(),
        format: DiskFormat::Raw,
        access: DiskAccess::ReadWrite,
        limits: DiskLimits::default(),
        on_error: OnIoError::default(),
        lock: None,
        vm: vm(1),
    }
}

/// A directory with a raw disk of zeros in it.
fn raw_disk() -> (TempDir, PathBuf) {
    let directory = TempDir::new().unwrap();
    let path = directory.path().join("disk.raw");
    std::fs::File::create(&path).unwrap().set_len(DISK).unwrap();
    (directory, path)
}

fn open(config: BlockConfig) -> (Block, Receiver<DeviceEvent>) {
    let (events, heard) = recorded_events();
    (Block::open(config, events).unwrap(), heard)
}

/// A driver of an active disk.
fn driver(config: BlockConfig) -> (MockDriver<Block>, Receiver<DeviceEvent>) {
    let (block, heard) = open(config);
    let mut driver = MockDriver::new(block, MEMORY);
    driver.activate(Start::Working).unwrap();
    (driver, heard)
}

fn header(kind: u32, sector: u64) -> Vec<u8> {
    let mut bytes = kind.to_le_bytes().to_vec();
    bytes.extend([0; 4]);
    bytes.extend(sector.to_le_bytes());
    bytes
}

fn range(sector: u64, sectors: u32, flags: u32) -> Vec<u8> {
    let mut bytes = sector.to_le_bytes().to_vec();
    bytes.extend(sectors.to_le_bytes());
    bytes.extend(flags.to_le_bytes());
    bytes
}

/// A request in guest memory, ready to be submitted.
struct Request {
    buffers: Vec<Buffer>,
    data: GuestAddress,
    len: u32,
    status: GuestAddress,
}

fn request(
    driver: &mut MockDriver<Block>,
    kind: u32,
    sector: u64,
    out: &[u8],
    room: u32,
) -> Request {
    let head = driver.place(&header(kind, sector));
    let mut buffers = vec![Buffer::Readable(head, 16)];
    let data = match (out.len(), room) {
        (0, 0) => head,
        (0, room) => {
            let data = driver.allocate(room);
            buffers.push(Buffer::Writable(data, room));
            data
        }
        (len, _) => {
            let data = driver.place(out);
            buffers.push(Buffer::Readable(data, len as u32));
            data
        }
    };
    let status = driver.place(&[0xff]);
    buffers.push(Buffer::Writable(status, 1));
    Request {
        buffers,
        data,
        len: room,
        status,
    }
}

/// Does one request and gives its status, what was read, and what the used ring said.
fn ask(
    driver: &mut MockDriver<Block>,
    kind: u32,
    sector: u64,
    out: &[u8],
    room: u32,
) -> (u8, Vec<u8>, Used) {
    let request = request(driver, kind, sector, out, room);
    let used = driver
        .request(0, &request.buffers, LIMIT)
        .expect("the disk answers");
    (
        driver.bytes(request.status, 1)[0],
        driver.bytes(request.data, request.len),
        used,
    )
}

fn write(driver: &mut MockDriver<Block>, sector: u64, bytes: &[u8]) -> u8 {
    ask(driver, OUT, sector, bytes, 0).0
}

fn read(driver: &mut MockDriver<Block>, sector: u64, len: u32) -> Vec<u8> {
    let (status, bytes, used) = ask(driver, IN, sector, &[], len);
    assert_eq!((status, used.len), (STATUS_OK, len + 1));
    bytes
}

fn metric(driver: &MockDriver<Block>, name: &str) -> u64 {
    let metrics = driver.device().metrics();
    let found = metrics.iter().find(|(found, _)| *found == name);
    found.expect("the disk counts that").1
}

fn pattern(seed: u8, len: usize) -> Vec<u8> {
    (0..len)
        .map(|at| (at as u8) ^ (at >> 8) as u8 ^ seed)
        .collect()
}
