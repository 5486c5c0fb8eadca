//! The lock: one writer, and no write by one that was overtaken.

use super::*;

fn locked(path: &Path) -> BlockConfig {
    BlockConfig {
        lock: Some(path.with_extension("lock")),
        ..config(path)
    }
}

fn record(path: &Path) -> LockRecord {
    let bytes = std::fs::read(path.with_extension("lock")).unwrap();
    assert_eq!(bytes.len(), 512);
    serde_json::from_slice(&bytes).unwrap()
}

#[test]
fn an_unclaimed_disk_is_read_and_not_written() {
    let (_directory, path) = raw_disk();
    let (mut driver, heard) = driver(locked(&path));
    assert_eq!(write(&mut driver, 0, &[1; 512]), STATUS_IOERR);
    assert_eq!(read(&mut driver, 0, 512), [0; 512]);
    assert!(matches!(heard.recv(), Ok(DeviceEvent::Stalled { .. })));
    driver.device_mut().claim(Epoch(3)).unwrap();
    assert_eq!(write(&mut driver, 0, &[1; 512]), STATUS_OK);
    let found = record(&path);
    assert_eq!((found.vm, found.epoch), (vm(1), Epoch(3)));
}

#[test]
fn a_disk_that_another_open_holds_is_not_claimed() {
    let (_directory, path) = raw_disk();
    let (mut first, _heard) = open(locked(&path));
    let (mut second, _heard) = open(locked(&path));
    first.claim(Epoch(1)).unwrap();
    let error = second.claim(Epoch(2)).unwrap_err();
    assert!(matches!(error, DeviceError::Held { .. }), "{error:?}");
    assert!(error.to_string().contains("epoch 1"), "{error}");
    // The refused claim left no trace: the holder goes on.
    assert_eq!(record(&path).epoch, Epoch(1));
    first.release().unwrap();
    second.claim(Epoch(2)).unwrap();
    assert_eq!(record(&path).epoch, Epoch(2));
}

#[test]
fn opening_and_closing_the_lock_file_elsewhere_in_the_process_keeps_the_lock() {
    let (_directory, path) = raw_disk();
    let (mut holder, _heard) = open(locked(&path));
    holder.claim(Epoch(1)).unwrap();
    drop(std::fs::File::open(path.with_extension("lock")).unwrap());
    let (mut other, _heard) = open(locked(&path));
    assert!(other.claim(Epoch(2)).is_err());
}

#[test]
fn an_older_epoch_of_the_same_machine_cannot_come_back() {
    let (_directory, path) = raw_disk();
    let (mut newer, _heard) = open(locked(&path));
    newer.claim(Epoch(5)).unwrap();
    newer.release().unwrap();
    let (mut older, _heard) = open(locked(&path));
    let error = older.claim(Epoch(4)).unwrap_err();
    assert!(error.to_string().contains("newer than epoch 4"), "{error}");
    older.claim(Epoch(5)).unwrap();
    older.claim(Epoch(6)).unwrap();
    assert_eq!(record(&path).epoch, Epoch(6));
}

#[test]
fn another_machine_may_take_a_disk_that_was_given_up() {
    let (_directory, path) = raw_disk();
    let (mut first, _heard) = open(locked(&path));
    first.claim(Epoch(9)).unwrap();
    drop(first);
    let (mut second, _heard) = open(BlockConfig {
        vm: vm(2),
        ..locked(&path)
    });
    second.claim(Epoch(1)).unwrap();
    assert_eq!((record(&path).vm, record(&path).epoch), (vm(2), Epoch(1)));
}

/// Gives the disk to epoch `epoch` as another host would whose claim succeeded because the lock of a host that was
/// cut off had lapsed: the record changes under the writer.
fn overtake(path: &Path, epoch: u64) {
    let mut found = record(path);
    found.epoch = Epoch(epoch);
    let mut bytes = serde_json::to_vec(&found).unwrap();
    bytes.resize(512, b' ');
    std::fs::write(path.with_extension("lock"), bytes).unwrap();
}

#[test]
fn a_writer_that_was_overtaken_gets_an_error_and_the_disk_nothing() {
    let (_directory, path) = raw_disk();
    let (mut driver, heard) = driver(locked(&path));
    driver.device_mut().claim(Epoch(1)).unwrap();
    assert_eq!(write(&mut driver, 0, &[1; 512]), STATUS_OK);
    overtake(&path, 2);
    for _ in 0..2 {
        assert_eq!(write(&mut driver, 0, &[2; 512]), STATUS_IOERR);
        let zeroes = range(0, 1, 0);
        assert_eq!(
            ask(&mut driver, WRITE_ZEROES, 0, &zeroes, 0).0,
            STATUS_IOERR
        );
        assert_eq!(ask(&mut driver, DISCARD, 0, &zeroes, 0).0, STATUS_IOERR);
        assert_eq!(ask(&mut driver, FLUSH, 0, &[], 0).0, STATUS_IOERR);
    }
    assert_eq!(std::fs::read(&path).unwrap()[..512], [1; 512]);
    let event = heard.recv_timeout(LIMIT).unwrap();
    let DeviceEvent::Stalled { device, reason } = event else {
        panic!("{event:?}");
    };
    assert_eq!(device, "root");
    assert!(reason.contains("newer than epoch 1"), "{reason}");
    assert!(heard.try_recv().is_err(), "it is said once");
    // The old record coming back does not bring the writer back: only a claim does.
    overtake(&path, 1);
    assert_eq!(write(&mut driver, 0, &[2; 512]), STATUS_IOERR);
    assert!(
        driver
            .device()
            .resize_handle()
            .resize(Bytes(2 * DISK))
            .is_err()
    );
    driver.device_mut().claim(Epoch(1)).unwrap();
    assert_eq!(write(&mut driver, 0, &[2; 512]), STATUS_OK);
}

#[test]
fn a_record_that_cannot_be_read_stops_writers_and_claims() {
    let (_directory, path) = raw_disk();
    let (mut driver, _heard) = driver(locked(&path));
    driver.device_mut().claim(Epoch(1)).unwrap();
    std::fs::write(path.with_extension("lock"), "not a record").unwrap();
    assert_eq!(write(&mut driver, 0, &[1; 512]), STATUS_IOERR);
    let error = driver.device_mut().claim(Epoch(2)).unwrap_err();
    assert!(error.to_string().contains("remove the file"), "{error}");
}

#[test]
fn a_migrated_disk_is_written_by_the_target_only() {
    let (_directory, path) = raw_disk();
    let (mut driver, _heard) = driver(locked(&path));
    driver.device_mut().claim(Epoch(1)).unwrap();
    assert_eq!(write(&mut driver, 0, &[1; 512]), STATUS_OK);
    let (target, _heard) = open(locked(&path));
    let (mut driver, mut source) = driver.move_to(target).unwrap();
    driver.device_mut().claim(Epoch(2)).unwrap();
    driver.device_mut().resume().unwrap();
    assert_eq!(write(&mut driver, 1, &[2; 512]), STATUS_OK);
    assert_eq!(read(&mut driver, 0, 512), [1; 512]);
    let error = source.claim(Epoch(1)).unwrap_err();
    assert!(matches!(error, DeviceError::Held { .. }), "{error:?}");
}

#[test]
fn a_source_whose_migration_failed_claims_its_own_epoch_again() {
    let (_directory, path) = raw_disk();
    let (mut driver, _heard) = driver(locked(&path));
    driver.device_mut().claim(Epoch(1)).unwrap();
    driver.pause().unwrap();
    driver.device_mut().release().unwrap();
    driver.device_mut().claim(Epoch(1)).unwrap();
    driver.device_mut().resume().unwrap();
    assert_eq!(write(&mut driver, 0, &[3; 512]), STATUS_OK);
}
