//! Errors of the host: reported, or kept until the machine goes on.

use super::*;
use std::process::Command;

/// A file system with room for one mebibyte; gone when dropped.
struct SmallDisk(TempDir);

impl SmallDisk {
    /// `None`, loudly, where mounting is not allowed.
    fn mount() -> Option<Self> {
        let directory = TempDir::new().unwrap();
        let mounted = Command::new("mount")
            .args(["-t", "tmpfs", "-o", "size=1m", "tmpfs"])
            .arg(directory.path())
            .status();
        if mounted.is_ok_and(|status| status.success()) {
            return Some(Self(directory));
        }
        crate::skip::skip("no tmpfs can be mounted here, so there is no full disk to test with");
        None
    }

    /// A sparse raw disk that is larger than the file system, which is full but for a little.
    fn full(&self) -> PathBuf {
        let path = self.0.path().join("disk.raw");
        let file = std::fs::File::create(&path).unwrap();
        file.set_len(DISK).unwrap();
        std::fs::write(self.0.path().join("filler"), vec![1; 1000 << 10]).unwrap();
        path
    }

    fn make_room(&self) {
        std::fs::remove_file(self.0.path().join("filler")).unwrap();
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(self.0.path()).status();
    }
}

fn is_stall(heard: &Receiver<DeviceEvent>) {
    let event = heard.recv_timeout(LIMIT).unwrap();
    assert!(matches!(event, DeviceEvent::Stalled { .. }), "{event:?}");
}

#[test]
fn a_write_to_a_full_pool_is_kept_and_done_after_there_is_room() {
    let Some(small) = SmallDisk::mount() else {
        return;
    };
    let (mut driver, heard) = driver(config(&small.full()));
    let bytes = pattern(1, 128 << 10);
    let mut requests = Vec::new();
    for nth in 0..3 {
        let request = request(&mut driver, OUT, nth * 256, &bytes, 0);
        driver.submit(0, &request.buffers).unwrap();
        requests.push(request);
    }
    driver.kick(0);
    is_stall(&heard);
    driver.pause().unwrap();
    assert!(heard.try_recv().is_err(), "it is said once");
    assert_eq!(driver.poll_used(0), None);
    small.make_room();
    driver.device_mut().resume().unwrap();
    for _ in 0..3 {
        assert!(driver.wait_used(0, LIMIT).is_some());
    }
    for (nth, request) in requests.iter().enumerate() {
        assert_eq!(driver.bytes(request.status, 1), [STATUS_OK]);
        assert_eq!(read(&mut driver, nth as u64 * 256, 128 << 10), bytes);
    }
}

#[test]
fn a_pool_that_is_still_full_stalls_again() {
    let Some(small) = SmallDisk::mount() else {
        return;
    };
    let (mut driver, heard) = driver(config(&small.full()));
    let request = request(&mut driver, OUT, 0, &[1; 128 << 10], 0);
    driver.submit(0, &request.buffers).unwrap();
    driver.kick(0);
    for _ in 0..3 {
        is_stall(&heard);
        driver.pause().unwrap();
        driver.device_mut().resume().unwrap();
    }
    is_stall(&heard);
    assert_eq!(driver.poll_used(0), None);
}

#[test]
fn a_stalled_write_moves_with_the_machine_and_is_done_there() {
    let Some(small) = SmallDisk::mount() else {
        return;
    };
    let path = small.full();
    let (mut driver, heard) = driver(config(&path));
    let bytes = pattern(2, 128 << 10);
    for nth in 0..2 {
        let request = request(&mut driver, OUT, nth * 256, &bytes, 0);
        driver.submit(0, &request.buffers).unwrap();
    }
    driver.kick(0);
    is_stall(&heard);
    let (target, _heard) = open(config(&path));
    let (mut driver, source) = driver.move_to(target).unwrap();
    drop(source);
    small.make_room();
    assert_eq!(driver.poll_used(0), None);
    driver.device_mut().resume().unwrap();
    let mut heads = std::collections::BTreeSet::new();
    for _ in 0..2 {
        heads.insert(driver.wait_used(0, LIMIT).unwrap().head);
    }
    assert_eq!(heads.len(), 2);
    assert_eq!(read(&mut driver, 256, 128 << 10), bytes);
}

#[test]
fn a_full_pool_is_reported_to_a_guest_that_wants_it_so() {
    let Some(small) = SmallDisk::mount() else {
        return;
    };
    let (mut driver, heard) = driver(BlockConfig {
        on_error: OnIoError::Report,
        ..config(&small.full())
    });
    assert_eq!(write(&mut driver, 0, &[1; 128 << 10]), STATUS_IOERR);
    assert!(heard.try_recv().is_err());
    assert_eq!(metric(&driver, "errors"), 1);
}

#[test]
fn a_disk_whose_errors_pause_the_machine_keeps_the_request() {
    let (_directory, path) = raw_disk();
    let (mut driver, heard) = driver(BlockConfig {
        on_error: OnIoError::Pause,
        ..config(&path)
    });
    let file = std::fs::OpenOptions::new().write(true).open(&path).unwrap();
    file.set_len(0).unwrap();
    let request = request(&mut driver, IN, 8, &[], 512);
    driver.submit(0, &request.buffers).unwrap();
    driver.kick(0);
    is_stall(&heard);
    driver.pause().unwrap();
    driver.pause().unwrap();
    file.set_len(DISK).unwrap();
    driver.device_mut().resume().unwrap();
    assert!(driver.wait_used(0, LIMIT).is_some());
    assert_eq!(driver.bytes(request.status, 1), [STATUS_OK]);
}
