//! A disk's content on its way to another host while a driver works with it.

use super::*;
use crate::block::{ArrivingDisk, CLUSTER_BYTES, LeavingDisk};

/// Bytes that a copier reads at a time.
const CHUNK: u64 = 96 << 10;

/// A blank raw disk beside `path`, taken for content that comes.
fn blank_beside(path: &Path) -> (PathBuf, Block, ArrivingDisk) {
    let path = path.with_file_name("copy.raw");
    std::fs::File::create(&path).unwrap().set_len(DISK).unwrap();
    let (block, _heard) = open(locked(&path));
    let arriving = block.content().arrive(Epoch(1)).unwrap();
    (path, block, arriving)
}

fn locked(path: &Path) -> BlockConfig {
    BlockConfig {
        lock: Some(path.with_extension("lock")),
        ..config(path)
    }
}

/// Copies these clusters as a lane does: cleared first, then read, what is no data as zeros.
fn copy(from: &LeavingDisk, to: &ArrivingDisk, clusters: std::ops::Range<u64>) {
    from.clear(clusters.clone());
    let end = (clusters.end * CLUSTER_BYTES).min(from.bytes());
    let mut next = clusters.start * CLUSTER_BYTES;
    while next < end {
        let data = from.next_data(next).unwrap().unwrap_or(end..end);
        let hole = data.start.min(end) - next;
        to.zero(next, hole).unwrap();
        next += hole;
        let stop = data.end.min(end).min(next + CHUNK);
        let mut bytes = vec![0; (stop.max(next) - next) as usize];
        if bytes.is_empty() {
            continue;
        }
        from.read(next, &mut bytes).unwrap();
        if bytes.iter().all(|byte| *byte == 0) {
            to.zero(next, stop - next).unwrap();
        } else {
            to.write(next, &bytes).unwrap();
        }
        next = stop;
    }
}

fn changed(disk: &LeavingDisk) -> Vec<u64> {
    let set = |(index, word): (u64, u64)| {
        (0..64)
            .filter(move |bit| word >> bit & 1 == 1)
            .map(move |bit| index * 64 + bit)
    };
    (0..).zip(disk.changed()).flat_map(set).collect()
}

/// One round over what has changed.
fn round(from: &LeavingDisk, to: &ArrivingDisk) {
    for cluster in changed(from) {
        copy(from, to, cluster..cluster + 1);
    }
}

fn content_of(block: Block) -> Vec<u8> {
    let mut driver = MockDriver::new(block, MEMORY);
    driver.activate(Start::Working).unwrap();
    let mut content = Vec::new();
    for sector in (0..DISK / 512).step_by(1024) {
        content.extend(read(&mut driver, sector, 1024 * 512));
        driver.reset();
        driver.activate(Start::Working).unwrap();
    }
    content
}

#[test]
fn a_disk_that_is_written_all_the_while_arrives_as_it_was_left() {
    for mode in [IoMode::Automatic, IoMode::Threads] {
        let (_directory, path) = raw_disk();
        let (events, _heard) = recorded_events();
        let block = Block::open_with(locked(&path), events, mode).unwrap();
        let mut driver = MockDriver::new(block, MEMORY);
        driver.activate(Start::Working).unwrap();
        driver.device_mut().claim(Epoch(1)).unwrap();
        assert_eq!(write(&mut driver, 4096, &pattern(9, 1 << 20)), STATUS_OK);
        let (copied, _target, arriving) = blank_beside(&path);
        let leaving = driver.device().content().leave().unwrap();
        assert!(changed(&leaving).is_empty());
        let over = std::sync::atomic::AtomicBool::new(false);
        std::thread::scope(|scope| {
            let copier = scope.spawn(|| {
                copy(&leaving, &arriving, 0..leaving.clusters());
                while !over.load(Ordering::Relaxed) {
                    round(&leaving, &arriving);
                }
            });
            for nth in 0..120u64 {
                let sector = nth * 37 % (DISK / 512 - 64);
                let bytes = pattern(nth as u8, 16 << 10);
                assert_eq!(write(&mut driver, sector, &bytes), STATUS_OK);
                let ranges = range(nth * 91 % (DISK / 512 - 64), 40, 0);
                let kind = if nth % 2 == 0 { DISCARD } else { WRITE_ZEROES };
                assert_eq!(ask(&mut driver, kind, 0, &ranges, 0).0, STATUS_OK);
            }
            over.store(true, Ordering::Relaxed);
            copier.join().unwrap();
        });
        driver.pause().unwrap();
        round(&leaving, &arriving);
        assert!(changed(&leaving).is_empty());
        arriving.seal().unwrap();
        assert!(std::fs::read(&path).unwrap() == std::fs::read(&copied).unwrap());
        assert!(leaving.written_bytes() >= 120 * (16 << 10));
    }
}

#[test]
fn a_copy_on_write_image_arrives_as_one_with_its_base() {
    let (directory, base) = raw_disk();
    let under = pattern(3, 2 << 20);
    std::fs::write(&base, {
        let mut all = vec![0; DISK as usize];
        all[1 << 20..3 << 20].copy_from_slice(&under);
        all
    })
    .unwrap();
    let path = directory.path().join("top.qcow2");
    super::qcow2::create(&path, DISK, Some(("disk.raw", "raw")));
    let (mut driver, _heard) = driver(super::qcow2::qcow2(&path));
    assert_eq!(write(&mut driver, 2048, &pattern(7, 4096)), STATUS_OK);
    let copied = directory.path().join("copy.qcow2");
    super::qcow2::create(&copied, DISK, None);
    let (target, _heard) = open(super::qcow2::qcow2(&copied));
    let arriving = target.content().arrive(Epoch(1)).unwrap();
    let leaving = driver.device().content().leave().unwrap();
    copy(&leaving, &arriving, 0..leaving.clusters());
    assert_eq!(write(&mut driver, 5000, &pattern(8, 8192)), STATUS_OK);
    driver.pause().unwrap();
    assert_eq!(changed(&leaving), [39]);
    round(&leaving, &arriving);
    arriving.seal().unwrap();
    drop((target, arriving));
    // It stands alone, and what nobody wrote takes no room.
    std::fs::remove_file(&base).unwrap();
    assert!(std::fs::metadata(&copied).unwrap().len() < 4 << 20);
    super::qcow2::check(&copied);
    let mut expected = vec![0; DISK as usize];
    expected[1 << 20..3 << 20].copy_from_slice(&under);
    expected[2048 * 512..2048 * 512 + 4096].copy_from_slice(&pattern(7, 4096));
    expected[5000 * 512..5000 * 512 + 8192].copy_from_slice(&pattern(8, 8192));
    let (arrived, _heard) = open(super::qcow2::qcow2(&copied));
    assert!(content_of(arrived) == expected);
}

#[test]
fn every_kind_of_change_is_noted_also_when_it_fails_or_its_driver_has_gone() {
    let (_directory, path) = raw_disk();
    let (mut driver, _heard) = driver(BlockConfig {
        on_error: OnIoError::Report,
        ..config(&path)
    });
    let leaving = driver.device().content().leave().unwrap();
    let sectors = CLUSTER_BYTES / 512;
    // Across the end of a cluster.
    assert_eq!(write(&mut driver, sectors - 1, &[1; 1024]), STATUS_OK);
    assert_eq!(changed(&leaving), [0, 1]);
    let ranges = [
        range(3 * sectors, 1, 0),
        range(5 * sectors, 2 * sectors as u32, 0),
    ]
    .concat();
    assert_eq!(ask(&mut driver, DISCARD, 0, &ranges, 0).0, STATUS_OK);
    let ranges = range(9 * sectors, 1, 0);
    assert_eq!(ask(&mut driver, WRITE_ZEROES, 0, &ranges, 0).0, STATUS_OK);
    assert_eq!(changed(&leaving), [0, 1, 3, 5, 6, 9]);
    // Reading and flushing change nothing.
    leaving.clear(0..leaving.clusters());
    read(&mut driver, 0, 512);
    assert_eq!(ask(&mut driver, FLUSH, 0, &[], 0).0, STATUS_OK);
    assert!(changed(&leaving).is_empty());
    // A driver that lets go while its requests are under way.
    for nth in 0..8 {
        let request = request(&mut driver, OUT, nth * sectors, &[2; 4096], 0);
        driver.submit(0, &request.buffers).unwrap();
    }
    driver.kick(0);
    driver.wait_used(0, LIMIT).unwrap();
    driver.reset();
    let file = std::fs::read(&path).unwrap();
    for cluster in 0..8 {
        let written = file[(cluster * CLUSTER_BYTES) as usize] == 2;
        assert!(
            !written || changed(&leaving).contains(&cluster),
            "{cluster}"
        );
    }
}

#[test]
fn a_disk_whose_copy_was_called_off_is_noted_no_more_and_may_grow_again() {
    let (_directory, path) = raw_disk();
    let (mut driver, _heard) = driver(locked(&path));
    driver.device_mut().claim(Epoch(1)).unwrap();
    let handle = driver.device().resize_handle();
    let leaving = driver.device().content().leave().unwrap();
    let error = handle.resize(Bytes(2 * DISK)).unwrap_err();
    assert!(error.to_string().contains("another host"), "{error}");
    // Paused for the hand-over it stays this host's, and can still be read.
    driver.pause().unwrap();
    driver.device_mut().release().unwrap();
    leaving.read(0, &mut [0; 512]).unwrap();
    let (mut other, _heard) = open(locked(&path));
    assert!(other.claim(Epoch(2)).is_err(), "the lock is held");
    // A later copy is not ended by the earlier one.
    let second = driver.device().content().leave().unwrap();
    drop(leaving);
    driver.device_mut().claim(Epoch(1)).unwrap();
    driver.device_mut().resume().unwrap();
    assert_eq!(write(&mut driver, 0, &[1; 512]), STATUS_OK);
    assert_eq!(changed(&second), [0]);
    second.end();
    assert_eq!(write(&mut driver, 4096, &[1; 512]), STATUS_OK);
    assert_eq!(changed(&second), [0]);
    handle.resize(Bytes(2 * DISK)).unwrap();
}

#[test]
fn a_limit_on_writes_holds_them_back_until_it_is_lifted() {
    let (_directory, path) = raw_disk();
    let (mut driver, _heard) = driver(config(&path));
    let leaving = driver.device().content().leave().unwrap();
    leaving.limit_writes(0);
    // The first overdraws the bucket, the second waits that off and overdraws it again, the third would wait longer.
    for sector in [0, 1024, 2048] {
        let request = request(&mut driver, OUT, sector, &[1; 512 << 10], 0);
        driver.submit(0, &request.buffers).unwrap();
    }
    driver.kick(0);
    let started = Instant::now();
    for _ in 0..2 {
        assert!(driver.wait_used(0, LIMIT).is_some());
    }
    assert!(metric(&driver, "limited_requests") > 0);
    drop(leaving);
    assert!(driver.wait_used(0, LIMIT).is_some());
    assert!(started.elapsed() < LIMIT);
}

#[test]
fn an_arriving_disk_is_filled_once_and_by_its_holder_only() {
    let (_directory, path) = raw_disk();
    let (mut target, _heard) = open(locked(&path));
    let arriving = target.content().arrive(Epoch(4)).unwrap();
    assert_eq!(arriving.bytes(), Bytes(DISK));
    let (other, _heard) = open(locked(&path));
    assert!(other.content().arrive(Epoch(4)).is_err(), "it is held");
    arriving.write(512, &[7; 512]).unwrap();
    arriving.zero(0, 512).unwrap();
    arriving.seal().unwrap();
    arriving.seal().unwrap();
    let error = arriving.write(0, &[8; 512]).unwrap_err();
    assert!(
        error.to_string().contains("after the last round"),
        "{error}"
    );
    assert!(arriving.zero(0, 512).is_err());
    // The commit's epoch takes it over, and the machine works with it.
    target.claim(Epoch(5)).unwrap();
    let mut driver = MockDriver::new(target, MEMORY);
    driver.activate(Start::Working).unwrap();
    assert_eq!(read(&mut driver, 0, 1024)[510..514], [0, 0, 7, 7]);
    assert_eq!(write(&mut driver, 0, &[9; 512]), STATUS_OK);
}

#[test]
fn what_was_not_blank_is_zero_where_the_source_is() {
    let (_directory, path) = raw_disk();
    std::fs::write(&path, vec![5; DISK as usize]).unwrap();
    let (target, _heard) = open(config(&path));
    let arriving = target.content().arrive(Epoch(1)).unwrap();
    arriving.zero(4096, 1 << 20).unwrap();
    arriving.seal().unwrap();
    let file = std::fs::read(&path).unwrap();
    assert!(file[..4096].iter().all(|byte| *byte == 5));
    assert!(file[4096..4096 + (1 << 20)].iter().all(|byte| *byte == 0));
    assert_eq!(file[4096 + (1 << 20)], 5);
}

#[test]
fn a_disk_that_the_guest_only_reads_arrives_too() {
    let (_directory, path) = raw_disk();
    let read_only = BlockConfig {
        access: DiskAccess::ReadOnly,
        ..config(&path)
    };
    let (target, _heard) = open(read_only);
    let arriving = target.content().arrive(Epoch(1)).unwrap();
    arriving.write(0, &[3; 512]).unwrap();
    arriving.seal().unwrap();
    let mut driver = MockDriver::new(target, MEMORY);
    driver.activate(Start::Working).unwrap();
    assert_eq!(read(&mut driver, 0, 512), [3; 512]);
}
