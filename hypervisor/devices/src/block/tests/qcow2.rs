//! Copy-on-write images, good and hostile.

use super::*;
use imago::file::File as ImageFile;
use imago::qcow2::Qcow2;
use imago::{FormatCreateBuilder, Storage, StorageCreateOptions};
use std::process::Command;

pub(super) fn create(path: &Path, size: u64, backing: Option<(&str, &str)>) {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .build()
        .unwrap();
    runtime.block_on(async {
        let options = StorageCreateOptions::new().filename(path).overwrite(true);
        let storage = ImageFile::create_open(options).await.unwrap();
        let mut builder = Qcow2::<ImageFile>::create_builder(storage).size(size);
        if let Some((name, format)) = backing {
            builder = builder.backing(name.to_owned(), format.to_owned());
        }
        builder.create().await.unwrap();
    });
}

pub(super) fn qcow2(path: &Path) -> BlockConfig {
    BlockConfig {
        format: DiskFormat::Qcow2,
        ..config(path)
    }
}

fn refusal(path: &Path) -> String {
    let (events, _heard) = recorded_events();
    Block::open(qcow2(path), events).unwrap_err().to_string()
}

/// Asks QEMU's own tool, where there is one, whether the image is sound.
pub(super) fn check(path: &Path) {
    match Command::new("qemu-img").arg("check").arg(path).output() {
        Ok(output) => assert!(output.status.success(), "{output:?}"),
        Err(_) => crate::skip::skip("no qemu-img (Debian: qemu-utils) to check the image with"),
    }
}

#[test]
fn what_is_written_to_an_image_is_there_after_it_is_opened_again() {
    let directory = TempDir::new().unwrap();
    let path = directory.path().join("disk.qcow2");
    create(&path, DISK, None);
    let bytes = pattern(1, 256 << 10);
    let (mut first, _heard) = driver(qcow2(&path));
    assert_eq!(read(&mut first, 0, 4096), [0; 4096]);
    assert_eq!(write(&mut first, 3, &bytes), STATUS_OK);
    assert_eq!(ask(&mut first, FLUSH, 0, &[], 0).0, STATUS_OK);
    drop(first);
    check(&path);
    let (mut second, _heard) = driver(qcow2(&path));
    assert_eq!(read(&mut second, 3, 256 << 10), bytes);
    assert_eq!(second.device().capacity(), Bytes(DISK));
}

#[test]
fn an_image_that_is_claimed_again_by_who_holds_it_keeps_what_was_written() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("disk.qcow2");
    create(&path, 4 << 20, None);
    let config = BlockConfig {
        lock: Some(path.with_extension("lock")),
        ..qcow2(&path)
    };
    let (mut driver, _heard) = driver(config);
    driver.device_mut().claim(Epoch(1)).unwrap();
    assert_eq!(write(&mut driver, 2048, &pattern(7, 4096)), STATUS_OK);
    driver.pause().unwrap();
    driver.device_mut().claim(Epoch(1)).unwrap();
    driver.device_mut().resume().unwrap();
    assert_eq!(read(&mut driver, 2048, 4096), pattern(7, 4096));
}

#[test]
fn several_requests_on_an_image_are_under_way_at_once() {
    let directory = TempDir::new().unwrap();
    let path = directory.path().join("disk.qcow2");
    create(&path, DISK, None);
    let (mut driver, _heard) = driver(qcow2(&path));
    for nth in 0..64u64 {
        let bytes = pattern(nth as u8, 16 << 10);
        let request = request(&mut driver, OUT, nth * 96, &bytes, 0);
        driver.submit(0, &request.buffers).unwrap();
    }
    driver.kick(0);
    for _ in 0..64 {
        assert!(driver.wait_used(0, LIMIT).is_some());
    }
    for nth in 0..64 {
        assert_eq!(
            read(&mut driver, nth * 96, 16 << 10),
            pattern(nth as u8, 16 << 10)
        );
    }
    let zeroes = range(0, 96, 0);
    assert_eq!(ask(&mut driver, WRITE_ZEROES, 0, &zeroes, 0).0, STATUS_OK);
    assert_eq!(read(&mut driver, 0, 16 << 10), [0; 16 << 10]);
    let discard = range(128, 1024, 0);
    assert_eq!(ask(&mut driver, DISCARD, 0, &discard, 0).0, STATUS_OK);
    assert_eq!(ask(&mut driver, FLUSH, 0, &[], 0).0, STATUS_OK);
    check(&path);
}

#[test]
fn pages_that_an_image_was_read_into_are_marked_dirty() {
    let directory = TempDir::new().unwrap();
    let path = directory.path().join("disk.qcow2");
    create(&path, DISK, None);
    let (mut driver, _heard) = driver(qcow2(&path));
    assert_eq!(write(&mut driver, 0, &[7; 4096]), STATUS_OK);
    let head = driver.place(&header(IN, 0));
    let status = driver.allocate(1);
    let buffers = [
        Buffer::Readable(head, 16),
        Buffer::Writable(GuestAddress(0x40_0000), 4096),
        Buffer::Writable(status, 1),
    ];
    assert!(!driver.dirty_pages().contains(&0x400));
    driver.request(0, &buffers, LIMIT).unwrap();
    assert!(driver.dirty_pages().contains(&0x400));
    assert_eq!(driver.bytes(GuestAddress(0x40_0000), 4096), [7; 4096]);
}

#[test]
fn a_thin_copy_shows_its_base_and_leaves_it_alone() {
    let pool = TempDir::new().unwrap();
    std::fs::write(pool.path().join("godwit-pool.json"), "{}").unwrap();
    for name in ["images", "disks"] {
        std::fs::create_dir(pool.path().join(name)).unwrap();
    }
    let base = pool.path().join("images/base.raw");
    let content = pattern(5, 1 << 20);
    std::fs::write(&base, &content).unwrap();
    let middle = pool.path().join("images/middle.qcow2");
    create(&middle, DISK, Some(("base.raw", "raw")));
    let top = pool.path().join("disks/top.qcow2");
    create(&top, DISK, Some(("../images/middle.qcow2", "qcow2")));
    let before = std::fs::read(&middle).unwrap();
    let (mut driver, _heard) = driver(qcow2(&top));
    assert_eq!(read(&mut driver, 0, 1 << 20), content);
    assert_eq!(read(&mut driver, 4096, 512), [0; 512]);
    assert_eq!(write(&mut driver, 1, &[9; 512]), STATUS_OK);
    let mut expected = content.clone();
    expected[512..1024].fill(9);
    assert_eq!(read(&mut driver, 0, 1 << 20), expected);
    assert_eq!(ask(&mut driver, FLUSH, 0, &[], 0).0, STATUS_OK);
    assert_eq!(std::fs::read(&base).unwrap(), content);
    assert_eq!(std::fs::read(&middle).unwrap(), before);
    check(&top);
}

#[test]
fn an_image_that_reaches_outside_its_pool_is_refused() {
    let directory = TempDir::new().unwrap();
    let own = directory.path().join("own");
    std::fs::create_dir(&own).unwrap();
    let secret = directory.path().join("secret.raw");
    std::fs::write(&secret, vec![7; 65536]).unwrap();
    std::os::unix::fs::symlink(&secret, own.join("inside.raw")).unwrap();
    let path = own.join("disk.qcow2");
    for (name, format, reason) in [
        ("../secret.raw", "raw", "is outside"),
        (&*secret.to_string_lossy(), "raw", "is outside"),
        ("inside.raw", "raw", "is outside"),
        ("missing.raw", "raw", "No such file"),
        ("json:{\"file\":\"x\"}", "raw", "only files"),
        ("nbd://host/export", "raw", "only files"),
        ("disk.qcow2", "qcow2", "a circle"),
        ("disk.qcow2", "vmdk", "is not known"),
    ] {
        create(&path, DISK, Some((name, format)));
        let text = refusal(&path);
        assert!(text.contains(reason), "{name}: {text}");
        assert!(text.contains(&*path.to_string_lossy()), "{text}");
    }
}

#[test]
fn an_image_that_hides_the_format_of_its_backing_file_is_refused() {
    let directory = TempDir::new().unwrap();
    let path = directory.path().join("disk.qcow2");
    std::fs::write(directory.path().join("base"), vec![0; 65536]).unwrap();
    create(&path, DISK, Some(("base", "raw")));
    // The header extension with the format becomes one of an unknown type.
    let mut bytes = std::fs::read(&path).unwrap();
    let tag = 0xe279_2acau32.to_be_bytes();
    let at = bytes.windows(4).position(|found| found == tag).unwrap();
    bytes[at..at + 4].copy_from_slice(&[0x11; 4]);
    std::fs::write(&path, bytes).unwrap();
    assert!(refusal(&path).contains("does not say in which format"));
}

#[test]
fn a_damaged_header_is_refused_with_what_is_wrong() {
    let directory = TempDir::new().unwrap();
    let path = directory.path().join("disk.qcow2");
    create(&path, DISK, None);
    let good = std::fs::read(&path).unwrap();
    for (at, bytes, reason) in [
        (0, &b"QFI\xfa"[..], "check the format"),
        (4, &[0, 0, 0, 9], "version 9"),
        (20, &[0, 0, 0, 30], "2^30 bytes"),
        (32, &[0, 0, 0, 1], "encrypted"),
        (79, &[2], "qemu-img check"),
        (79, &[4], "separate data file"),
        (79, &[0x80], "no usable qcow2 image"),
        (24, &[0xff; 8], "disk.qcow2"),
        (36, &[0xff; 4], "disk.qcow2"),
        (40, &[0xff; 8], "disk.qcow2"),
    ] {
        let mut bad = good.clone();
        bad[at..at + bytes.len()].copy_from_slice(bytes);
        std::fs::write(&path, bad).unwrap();
        let text = refusal(&path);
        assert!(text.contains(reason), "at {at}: {text}");
    }
    std::fs::write(&path, &good[..60]).unwrap();
    assert!(refusal(&path).contains("check the format"));
}

#[test]
fn a_damaged_table_gives_errors_and_no_panic() {
    let directory = TempDir::new().unwrap();
    let path = directory.path().join("disk.qcow2");
    create(&path, DISK, None);
    let (mut first, _heard) = driver(qcow2(&path));
    assert_eq!(write(&mut first, 0, &pattern(1, 256 << 10)), STATUS_OK);
    assert_eq!(ask(&mut first, FLUSH, 0, &[], 0).0, STATUS_OK);
    drop(first);
    let good = std::fs::read(&path).unwrap();
    for at in (65536..good.len().min(5 * 65536)).step_by(65536) {
        let mut bad = good.clone();
        bad[at..at + 64].fill(0xff);
        std::fs::write(&path, bad).unwrap();
        let (events, _heard) = recorded_events();
        let Ok(block) = Block::open(qcow2(&path), events) else {
            continue;
        };
        let mut driver = MockDriver::new(block, MEMORY);
        driver.activate(Start::Working).unwrap();
        // Any status will do; it is the answer that counts.
        ask(&mut driver, IN, 0, &[], 64 << 10);
        ask(&mut driver, OUT, 8, &[3; 4096], 0);
        ask(&mut driver, OUT, 9000, &[3; 4096], 0);
        ask(&mut driver, FLUSH, 0, &[], 0);
    }
}

#[test]
fn an_image_grows_while_it_works() {
    let directory = TempDir::new().unwrap();
    let path = directory.path().join("disk.qcow2");
    create(&path, DISK, None);
    let (mut driver, _heard) = driver(qcow2(&path));
    let handle = driver.device().resize_handle();
    handle.resize(Bytes(4 * DISK)).unwrap();
    assert!(driver.wait_config_interrupts(1, LIMIT));
    assert_eq!(write(&mut driver, 3 * DISK / 512, &[6; 512]), STATUS_OK);
    assert_eq!(ask(&mut driver, FLUSH, 0, &[], 0).0, STATUS_OK);
    check(&path);
    drop(driver);
    let (block, _heard) = open(qcow2(&path));
    assert_eq!(block.capacity(), Bytes(4 * DISK));
}

#[test]
fn a_target_sees_what_the_source_wrote_after_the_target_opened_the_image() {
    let directory = TempDir::new().unwrap();
    let path = directory.path().join("disk.qcow2");
    create(&path, DISK, None);
    let locked = BlockConfig {
        lock: Some(path.with_extension("lock")),
        ..qcow2(&path)
    };
    let (mut driver, _heard) = driver(locked.clone());
    driver.device_mut().claim(Epoch(1)).unwrap();
    let (target, _heard) = open(locked);
    let bytes = pattern(4, 64 << 10);
    // Not flushed by the guest: it must be in the file all the same once the source has let go.
    assert_eq!(write(&mut driver, 0, &bytes), STATUS_OK);
    let (mut driver, mut source) = driver.move_to(target).unwrap();
    driver.device_mut().claim(Epoch(2)).unwrap();
    driver.device_mut().resume().unwrap();
    assert_eq!(read(&mut driver, 0, 64 << 10), bytes);
    assert_eq!(write(&mut driver, 1000, &[8; 512]), STATUS_OK);
    source.reset();
    drop(source);
    assert_eq!(ask(&mut driver, FLUSH, 0, &[], 0).0, STATUS_OK);
    check(&path);
}

#[test]
fn an_overtaken_writer_of_an_image_leaves_the_file_alone() {
    let directory = TempDir::new().unwrap();
    let path = directory.path().join("disk.qcow2");
    create(&path, DISK, None);
    let lock = path.with_extension("lock");
    let (mut driver, heard) = driver(BlockConfig {
        lock: Some(lock.clone()),
        ..qcow2(&path)
    });
    driver.device_mut().claim(Epoch(1)).unwrap();
    assert_eq!(write(&mut driver, 0, &[1; 65536]), STATUS_OK);
    let record = std::fs::read_to_string(&lock).unwrap();
    std::fs::write(&lock, record.replace("\"epoch\":1", "\"epoch\":2")).unwrap();
    let before = std::fs::read(&path).unwrap();
    assert_eq!(write(&mut driver, 512, &[2; 65536]), STATUS_IOERR);
    assert_eq!(ask(&mut driver, FLUSH, 0, &[], 0).0, STATUS_IOERR);
    assert!(matches!(heard.recv(), Ok(DeviceEvent::Stalled { .. })));
    driver.pause().unwrap();
    driver.device_mut().release().unwrap();
    driver.reset();
    drop(driver);
    assert_eq!(std::fs::read(&path).unwrap(), before);
}
