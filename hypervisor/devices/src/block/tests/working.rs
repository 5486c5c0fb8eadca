//! What a disk does for a driver that keeps the rules.

use super::*;
use crate::mock::TRANSPORT_FEATURES;

#[test]
fn what_is_written_is_read_back_and_in_the_file() {
    for mode in [IoMode::Automatic, IoMode::Threads] {
        let (_directory, path) = raw_disk();
        let (events, _heard) = recorded_events();
        let block = Block::open_with(config(&path), events, mode).unwrap();
        let mut driver = MockDriver::new(block, MEMORY);
        driver.activate(Start::Working).unwrap();
        let bytes = pattern(7, 12 * 512);
        assert_eq!(write(&mut driver, 3, &bytes), STATUS_OK);
        assert_eq!(ask(&mut driver, FLUSH, 0, &[], 0).0, STATUS_OK);
        assert_eq!(read(&mut driver, 3, bytes.len() as u32), bytes);
        let file = std::fs::read(&path).unwrap();
        assert_eq!(file.len() as u64, DISK);
        assert_eq!(&file[3 * 512..15 * 512], &bytes);
        assert_eq!(metric(&driver, "writes"), 1);
        assert_eq!(metric(&driver, "write_bytes"), 12 * 512);
        assert_eq!(metric(&driver, "read_bytes"), 12 * 512);
        assert_eq!(metric(&driver, "flushes"), 1);
        assert_eq!(metric(&driver, "errors"), 0);
    }
}

#[test]
fn data_in_many_segments_is_put_together() {
    let (_directory, path) = raw_disk();
    let (mut driver, _heard) = driver(config(&path));
    let bytes = pattern(9, 5 * 512);
    assert_eq!(write(&mut driver, 0, &bytes), STATUS_OK);
    // The header in two pieces, the data in odd ones, the last with the status byte behind it.
    let header = header(IN, 0);
    let (first, second) = (driver.place(&header[..5]), driver.place(&header[5..]));
    let data: Vec<_> = [1u32, 511, 513, 1535 + 1]
        .map(|len| (driver.allocate(len), len))
        .to_vec();
    let mut buffers = vec![Buffer::Readable(first, 5), Buffer::Readable(second, 11)];
    buffers.extend(data.iter().map(|(at, len)| Buffer::Writable(*at, *len)));
    // 1 + 511 + 513 + 1535 bytes of data, and the status.
    let used = driver.request(0, &buffers, LIMIT).unwrap();
    assert_eq!(used.len, 5 * 512 + 1);
    let mut got: Vec<u8> = Vec::new();
    for (at, len) in &data {
        got.extend(driver.bytes(*at, *len));
    }
    assert_eq!(got.pop(), Some(STATUS_OK));
    assert_eq!(got, bytes);
}

#[test]
fn pages_that_the_kernel_read_into_are_marked_dirty() {
    for mode in [IoMode::Automatic, IoMode::Threads] {
        let (_directory, path) = raw_disk();
        let (events, _heard) = recorded_events();
        let block = Block::open_with(config(&path), events, mode).unwrap();
        let mut driver = MockDriver::new(block, MEMORY);
        driver.activate(Start::Working).unwrap();
        let data = GuestAddress(0x40_0000);
        let head = driver.place(&header(IN, 0));
        let status = driver.allocate(1);
        let before = driver.dirty_pages();
        assert!(!before.iter().any(|page| (0x400..0x404).contains(page)));
        let buffers = [
            Buffer::Readable(head, 16),
            Buffer::Writable(GuestAddress(data.0 + 0x800), 0x2000),
            Buffer::Writable(status, 1),
        ];
        driver.request(0, &buffers, LIMIT).unwrap();
        let after = driver.dirty_pages();
        for page in [0x400, 0x401, 0x402] {
            assert!(after.contains(&page), "page {page:#x} with {mode:?}");
        }
        assert!(!after.contains(&0x403));
    }
}

#[test]
fn many_requests_are_under_way_at_once_and_all_are_used_once() {
    let (_directory, path) = raw_disk();
    let (mut driver, _heard) = driver(config(&path));
    let mut heads = std::collections::BTreeSet::new();
    let mut requests = Vec::new();
    for nth in 0..80u64 {
        let bytes = pattern(nth as u8, 4096);
        let request = request(&mut driver, OUT, nth * 8, &bytes, 0);
        let head = driver.submit(0, &request.buffers).unwrap();
        assert!(heads.insert(head));
        requests.push(request);
    }
    driver.kick(0);
    while !heads.is_empty() {
        let used = driver.wait_used(0, LIMIT).expect("the disk answers");
        assert!(heads.remove(&used.head));
    }
    for (nth, request) in requests.iter().enumerate() {
        assert_eq!(driver.bytes(request.status, 1), [STATUS_OK]);
        assert_eq!(
            read(&mut driver, nth as u64 * 8, 4096),
            pattern(nth as u8, 4096)
        );
    }
    // Completions come in batches: fewer interrupts than requests.
    assert!(driver.queue_interrupts() <= 160);
}

#[test]
fn discarded_and_zeroed_ranges_read_as_zeros() {
    let (_directory, path) = raw_disk();
    let (mut driver, _heard) = driver(config(&path));
    let bytes = pattern(3, 1 << 20);
    assert_eq!(write(&mut driver, 0, &bytes), STATUS_OK);
    let ranges = [range(0, 8, 0), range(64, 16, 0)].concat();
    assert_eq!(ask(&mut driver, DISCARD, 0, &ranges, 0).0, STATUS_OK);
    let ranges = [range(129, 3, 0), range(1000, 1, 1)].concat();
    assert_eq!(ask(&mut driver, WRITE_ZEROES, 0, &ranges, 0).0, STATUS_OK);
    let mut expected = bytes;
    for (sector, sectors) in [(0, 8), (64, 16), (129, 3), (1000, 1)] {
        expected[sector * 512..(sector + sectors) * 512].fill(0);
    }
    assert_eq!(read(&mut driver, 0, 1 << 20), expected);
    assert_eq!(metric(&driver, "discards"), 2);
}

#[test]
fn the_serial_number_is_the_name() {
    let (_directory, path) = raw_disk();
    let (mut driver, _heard) = driver(config(&path));
    let (status, id, _) = ask(&mut driver, GET_ID, 0, &[], 20);
    assert_eq!(status, STATUS_OK);
    assert_eq!(id, b"root\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0");
}

#[test]
fn a_read_only_disk_says_so_and_is_not_written() {
    let (_directory, path) = raw_disk();
    let (mut driver, _heard) = driver(BlockConfig {
        access: DiskAccess::ReadOnly,
        ..config(&path)
    });
    assert_eq!(driver.device().features() & (1 << 5), 1 << 5);
    assert_eq!(write(&mut driver, 0, &[1; 512]), STATUS_IOERR);
    let zeroes = range(0, 1, 0);
    assert_eq!(
        ask(&mut driver, WRITE_ZEROES, 0, &zeroes, 0).0,
        STATUS_IOERR
    );
    assert_eq!(read(&mut driver, 0, 512), vec![0; 512]);
    assert_eq!(metric(&driver, "rejected_requests"), 2);
}

#[test]
fn the_configuration_space_tells_the_size() {
    let (_directory, path) = raw_disk();
    let (block, _heard) = open(config(&path));
    let mut bytes = [0xff; 64];
    block.read_config(0, &mut bytes);
    assert_eq!(bytes[..8], (DISK / 512).to_le_bytes());
    assert_eq!(bytes[12..16], 254u32.to_le_bytes());
    assert_eq!(bytes[20..24], 512u32.to_le_bytes());
    assert_eq!(bytes[60..], [0; 4]);
    let mut beyond = [0xff; 4];
    block.read_config(u32::MAX - 1, &mut beyond);
    assert_eq!(beyond, [0; 4]);
}

#[test]
fn a_driver_without_flush_gets_durable_writes() {
    let (_directory, path) = raw_disk();
    for mode in [IoMode::Automatic, IoMode::Threads] {
        let (events, _heard) = recorded_events();
        let block = Block::open_with(config(&path), events, mode).unwrap();
        let mut driver = MockDriver::new(block, MEMORY);
        driver.accept(TRANSPORT_FEATURES);
        driver.activate(Start::Working).unwrap();
        assert_eq!(write(&mut driver, 0, &[5; 512]), STATUS_OK);
        assert_eq!(read(&mut driver, 0, 512), [5; 512]);
    }
}

#[test]
fn a_paused_disk_takes_nothing_and_looks_again_on_resume() {
    let (_directory, path) = raw_disk();
    let (mut driver, _heard) = driver(config(&path));
    assert_eq!(write(&mut driver, 0, &[1; 512]), STATUS_OK);
    driver.pause().unwrap();
    let request = request(&mut driver, OUT, 0, &[2; 512], 0);
    driver.submit(0, &request.buffers).unwrap();
    driver.kick(0);
    driver.pause().unwrap();
    assert_eq!(driver.poll_used(0), None);
    assert_eq!(std::fs::read(&path).unwrap()[0], 1);
    driver.device_mut().resume().unwrap();
    assert!(driver.wait_used(0, LIMIT).is_some());
    assert_eq!(std::fs::read(&path).unwrap()[0], 2);
}

#[test]
fn a_limit_holds_requests_back_and_loses_none() {
    let (_directory, path) = raw_disk();
    let (mut driver, _heard) = driver(BlockConfig {
        limits: DiskLimits {
            requests_per_s: Some(20),
            bytes_per_s: None,
        },
        ..config(&path)
    });
    let started = Instant::now();
    let count = 26;
    for nth in 0..count {
        let request = request(&mut driver, OUT, nth, &[nth as u8; 512], 0);
        driver.submit(0, &request.buffers).unwrap();
    }
    driver.kick(0);
    for _ in 0..count {
        assert!(driver.wait_used(0, LIMIT).is_some());
    }
    // One bucket at once and one overdraft; the rest at the rate.
    let least = Duration::from_millis((count - 21 - 1) * 50);
    assert!(started.elapsed() >= least, "{:?}", started.elapsed());
    assert!(metric(&driver, "limited_requests") > 0);
}

#[test]
fn a_request_held_by_a_limit_survives_a_move() {
    let (_directory, path) = raw_disk();
    let slow = BlockConfig {
        limits: DiskLimits {
            requests_per_s: None,
            bytes_per_s: Some(1024),
        },
        ..config(&path)
    };
    let (mut driver, _heard) = driver(slow);
    for nth in 0..2 {
        let request = request(&mut driver, OUT, nth, &[9; 512 * 100], 0);
        driver.submit(0, &request.buffers).unwrap();
    }
    driver.kick(0);
    assert!(driver.wait_used(0, LIMIT).is_some());
    let (target, _heard) = open(config(&path));
    let (mut driver, _source) = driver.move_to(target).unwrap();
    assert_eq!(driver.poll_used(0), None);
    driver.device_mut().resume().unwrap();
    assert!(driver.wait_used(0, LIMIT).is_some());
    assert_eq!(read(&mut driver, 100, 512), [9; 512]);
}

#[test]
fn a_grown_disk_tells_the_driver() {
    let (_directory, path) = raw_disk();
    let (mut driver, _heard) = driver(config(&path));
    let handle = driver.device().resize_handle();
    assert_eq!(write(&mut driver, DISK / 512, &[1; 512]), STATUS_IOERR);
    handle.resize(Bytes(2 * DISK)).unwrap();
    assert!(driver.wait_config_interrupts(1, LIMIT));
    assert_eq!(std::fs::metadata(&path).unwrap().len(), 2 * DISK);
    assert_eq!(driver.device().capacity(), Bytes(2 * DISK));
    assert_eq!(write(&mut driver, DISK / 512, &[1; 512]), STATUS_OK);
    // Somebody else grew the file: it is noticed.
    let file = std::fs::OpenOptions::new().write(true).open(&path);
    file.unwrap().set_len(3 * DISK).unwrap();
    handle.resize(Bytes(3 * DISK)).unwrap();
    assert!(driver.wait_config_interrupts(2, LIMIT));
    let error = handle.resize(Bytes(DISK)).unwrap_err();
    assert!(error.to_string().contains("cannot shrink"), "{error}");
    assert!(handle.resize(Bytes(4 * DISK + 1)).is_err());
}

#[test]
fn a_file_that_is_no_disk_is_refused_with_the_reason() {
    let directory = TempDir::new().unwrap();
    let refused = |path: &Path, format| {
        let (events, _heard) = recorded_events();
        let config = BlockConfig {
            format,
            ..config(path)
        };
        Block::open(config, events).unwrap_err().to_string()
    };
    let missing = directory.path().join("missing");
    let torn = directory.path().join("torn");
    std::fs::write(&torn, vec![0; 1000]).unwrap();
    let empty = directory.path().join("empty");
    std::fs::write(&empty, []).unwrap();
    let zeros = directory.path().join("zeros");
    std::fs::write(&zeros, vec![0; 65536]).unwrap();
    for (path, format, reason) in [
        (&*missing, DiskFormat::Raw, "No such file"),
        (directory.path(), DiskFormat::Raw, "is no file"),
        (Path::new("/dev/null"), DiskFormat::Raw, "is no file"),
        (&*torn, DiskFormat::Raw, "truncate --size=%512"),
        (&*empty, DiskFormat::Raw, "0 bytes"),
        (&*zeros, DiskFormat::Qcow2, "no usable qcow2 image"),
    ] {
        let text = refused(path, format);
        assert!(text.contains(reason), "{text}");
        assert!(text.contains(&*path.to_string_lossy()), "{text}");
        assert!(text.starts_with("root: "), "{text}");
    }
}

#[test]
fn a_disk_that_shrank_under_its_machine_gives_errors() {
    let (_directory, path) = raw_disk();
    let (mut driver, _heard) = driver(config(&path));
    let file = std::fs::OpenOptions::new().write(true).open(&path);
    file.unwrap().set_len(4096).unwrap();
    let (status, _, _) = ask(&mut driver, IN, 64, &[], 512);
    assert_eq!(status, STATUS_IOERR);
    assert_eq!(metric(&driver, "errors"), 1);
}

#[test]
fn what_a_disk_has_done_moves_with_the_machine() {
    let (_directory, path) = raw_disk();
    let (mut driver, _heard) = driver(config(&path));
    assert_eq!(write(&mut driver, 0, &[5; 1024]), STATUS_OK);
    assert_eq!(read(&mut driver, 0, 512), [5; 512]);
    let (target, _heard) = open(config(&path));
    let (mut moved, _source) = driver.move_to(target).unwrap();
    moved.device_mut().resume().unwrap();
    assert_eq!(read(&mut moved, 0, 512), [5; 512]);
    assert_eq!(metric(&moved, "writes"), 1);
    assert_eq!(metric(&moved, "write_bytes"), 1024);
    assert_eq!(metric(&moved, "reads"), 2);
    assert_eq!(metric(&moved, "read_bytes"), 1024);
}

#[test]
fn the_saved_state_of_version_1_is_written_as_ever_and_read() {
    let (_directory, path) = raw_disk();
    let (block, _heard) = open(config(&path));
    let counters = &block.shared.counters;
    counters.reads.add(1);
    counters.read_bytes.add(2);
    counters.writes.add(3);
    counters.write_bytes.add(4);
    counters.flushes.add(5);
    counters.discards.add(6);
    counters.errors.add(7);
    counters.rejected_requests.add(8);
    counters.stalls.add(9);
    counters.limited_requests.add(10);
    counters.request_ns.add(11);
    let state = block.save().unwrap();
    expect_test::expect![[r#"
        {
          "version": 1,
          "pending": [],
          "counters": {
            "reads": 1,
            "read_bytes": 2,
            "writes": 3,
            "write_bytes": 4,
            "flushes": 5,
            "discards": 6,
            "errors": 7,
            "rejected_requests": 8,
            "stalls": 9,
            "limited_requests": 10,
            "request_ns": 11,
          },
        }
    "#]]
    .assert_eq(&crate::golden::text_of(&state));
    let (mut target, _heard) = open(config(&path));
    target.restore(state.clone()).unwrap();
    assert_eq!(target.save().unwrap(), state);
    let older = crate::golden::without(&state, "counters");
    target.restore(older).unwrap();
    assert!(target.metrics().iter().all(|(_, count)| *count == 0));
}
