//! Images of the copy-on-write format that hold anything: opened, read, written.

use crate::block;
use crate::hostile::{MEMORY_BYTES, drive};
use crate::input::Input;
use godwit_devices::device::Start;
use godwit_devices::mock::{Buffer, MockDriver};
use godwit_wire::devices::DiskFormat;
use std::io::Write;
use std::time::Duration;

/// The guest's requests come from the last bytes, the image is what lies before them.
const REQUEST_BYTES: usize = 64;
/// An image of a few bytes answers long before.
const LONG: Duration = Duration::from_secs(8);

/// Opens the image; if that works, reads its beginning and end and drives the device as the input says.
pub fn run(data: &[u8]) {
    let (image, requests) = data.split_at(data.len().saturating_sub(REQUEST_BYTES));
    let mut file = tempfile::Builder::new()
        .tempfile_in("/dev/shm")
        .expect("the host has room");
    file.write_all(image).expect("the host has room");
    let Ok(disk) = block::open(file.path().to_owned(), DiskFormat::Qcow2) else {
        return;
    };
    let capacity = disk.capacity().0;
    let mut driver = MockDriver::new(disk, MEMORY_BYTES);
    driver
        .activate(Start::Working)
        .expect("it can be activated");
    for sector in [0, (capacity / 512).saturating_sub(1), capacity / 1024] {
        let mut header = [0; 16];
        header[8..].copy_from_slice(&sector.to_le_bytes());
        let header = driver.place(&header);
        let (data, status) = (driver.allocate(512), driver.allocate(1));
        let buffers = [
            Buffer::Readable(header, 16),
            Buffer::Writable(data, 512),
            Buffer::Writable(status, 1),
        ];
        let used = driver.request(0, &buffers, LONG);
        assert!(
            used.is_some(),
            "a read of sector {sector} is never answered"
        );
    }
    drive(&mut driver, &mut Input::new(requests));
}
