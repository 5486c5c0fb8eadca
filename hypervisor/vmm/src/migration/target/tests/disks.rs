//! Disks that arrive: from a source that keeps the rules, and from one that does not.

use super::*;
use godwit_devices::block::BlockConfig;
use godwit_wire::devices::{Disk, DiskAccess, DiskFormat, DiskSource};
use godwit_wire::migration::{DISKS_CAPABILITY, SECTOR_BYTES, TravellingDisk};
use std::path::Path;
use tempfile::TempDir;

const DISK: u64 = 4 << 20;

pub(super) fn with_disk(spec: &MachineSpec, path: Option<&Path>) -> MachineSpec {
    let mut spec = spec.clone();
    spec.devices.disks.extend(path.map(|path| Disk {
        name: "root".into(),
        source: DiskSource::File {
            path: path.to_owned(),
            format: DiskFormat::Raw,
        },
        access: DiskAccess::ReadWrite,
        limits: Default::default(),
        on_error: Default::default(),
    }));
    spec
}

pub(super) fn open(path: &Path) -> Block {
    let config = BlockConfig {
        name: "root".into(),
        path: path.to_owned(),
        format: DiskFormat::Raw,
        access: DiskAccess::ReadWrite,
        limits: Default::default(),
        on_error: Default::default(),
        lock: Some(path.with_extension("lock")),
        vm: VmId::fresh(),
    };
    Block::open(config, Arc::new(|_| ())).unwrap()
}

pub(super) fn told(disks: &[ArrivingDisk]) -> Vec<TravellingDisk> {
    let told = |disk: &ArrivingDisk| TravellingDisk {
        name: disk.name().to_owned(),
        bytes: disk.bytes(),
    };
    disks.iter().map(told).collect()
}

/// A target that waits for the content of a disk of sevens.
fn target_with_disk() -> (TempDir, std::path::PathBuf, Fixture) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("root.img");
    std::fs::write(&path, vec![7; DISK as usize]).unwrap();
    let mut target = target_of(TargetMemory::Fresh, |_| (), Some(&path));
    if let ToTarget::Hello { required, .. } = &mut target.hello {
        required.insert(DISKS_CAPABILITY.into());
    }
    (directory, path, target)
}

fn end_of(round: u32, disk_bytes: u64) -> ToTarget {
    ToTarget::EndOfRound {
        round,
        pages: 0,
        disk_bytes,
    }
}

#[test]
fn what_comes_of_a_disk_is_in_its_file_when_the_round_is_received() {
    let (_directory, path, target) = target_with_disk();
    let (mut control, mut lanes) = target.arrive();
    lanes[0]
        .send_frame(FrameHeader::disk_content(1, 0, 512, 2), &[5; 1024])
        .unwrap();
    let packed = lz4_flex::block::compress(&[9; 4096]);
    let header = FrameHeader::disk_content(1, 0, 8192, 8).compressed(packed.len() as u32);
    lanes[1].send_frame(header, &packed).unwrap();
    lanes[1]
        .send_frame(FrameHeader::disk_zero(1, 0, DISK - 1024, 2), &[])
        .unwrap();
    for (lane, bytes) in lanes.iter_mut().zip([1024, 4096 + 1024]) {
        lane.send(&end_of(1, bytes)).unwrap();
    }
    control.send(&end_of(1, 6144)).unwrap();
    let heard = control.receive::<ToSource>().unwrap();
    assert!(
        matches!(heard, ToSource::RoundReceived { round: 1, .. }),
        "{heard:?}"
    );
    let mut expected = vec![7; DISK as usize];
    expected[512..1536].fill(5);
    expected[8192..8192 + 4096].fill(9);
    expected[DISK as usize - 1024..].fill(0);
    assert!(std::fs::read(&path).unwrap() == expected);
    // A round without any takes no time of the disk.
    for (lane, bytes) in lanes.iter_mut().zip([1024, 5120]) {
        lane.send(&end_of(2, bytes)).unwrap();
    }
    control.send(&end_of(2, 6144)).unwrap();
    assert_eq!(control.receive::<ToSource>().unwrap(), received(2));
}

#[test]
fn disk_frames_that_fit_nowhere_end_the_migration_and_change_nothing() {
    let after = |header: FrameHeader, payload: &[u8], why: &str| {
        let (_directory, path, target) = target_with_disk();
        let (_control, mut lanes) = target.arrive();
        lanes[0].send_frame(header, payload).unwrap();
        target.expect_void(why);
        assert!(std::fs::read(&path).unwrap() == vec![7; DISK as usize]);
    };
    let content = [1; 1024];
    let at = |round, disk, offset| FrameHeader::disk_content(round, disk, offset, 2);
    after(at(1, 1, 0), &content, "a frame for disk 1");
    after(at(1, 255, 0), &content, "a frame for disk 255");
    after(
        at(1, 0, DISK - 512),
        &content,
        "disk root came, which is smaller",
    );
    after(at(1, 0, u64::MAX - 511), &content, "which is smaller");
    after(at(2, 0, 0), &content, "round 2 came in round 1");
    after(at(1, 0, 513), &content, "where no sector begins");
    after(
        FrameHeader::disk_zero(1, 0, 0, u32::MAX),
        &[],
        "which is smaller",
    );
    after(at(1, 0, 0).compressed(9), &[0xff; 9], "cannot be unpacked");
}

#[test]
fn disk_frames_in_the_wrong_place_or_number_end_the_migration() {
    let (_directory, _path, on_control) = target_with_disk();
    let (mut control, _lanes) = on_control.arrive();
    control
        .send_frame(FrameHeader::disk_zero(1, 0, 0, 1), &[])
        .unwrap();
    on_control.expect_void("DiskZero frame");

    let unasked = target();
    let (_control, mut lanes) = unasked.arrive();
    lanes[0]
        .send_frame(FrameHeader::disk_zero(1, 0, 0, 1), &[])
        .unwrap();
    unasked.expect_void("a frame for disk 0");

    let (_directory, _path, miscounted) = target_with_disk();
    let (_control, mut lanes) = miscounted.arrive();
    lanes[0].send(&end_of(1, SECTOR_BYTES)).unwrap();
    miscounted.expect_void("0 bytes of disks arrived and the source sent 512");

    let (_directory, _path, lost) = target_with_disk();
    let (mut control, mut lanes) = lost.arrive();
    for lane in &mut lanes {
        lane.send(&end_of(1, 0)).unwrap();
    }
    control.send(&end_of(1, SECTOR_BYTES)).unwrap();
    lost.expect_void("0 bytes of disks arrived and the source sent 512");
}

#[test]
fn a_source_whose_disks_are_not_those_that_are_waited_for_is_refused_before_it_sends_any() {
    let (_directory, _path, target) = target_with_disk();
    let refused = |change: &dyn Fn(&mut Vec<TravellingDisk>, &mut MachineSpec), why: &str| {
        let mut hello = target.hello.clone();
        if let ToTarget::Hello { disks, spec, .. } = &mut hello {
            change(disks, spec);
        }
        let mut stream = target.connect();
        stream.send(&hello).unwrap();
        match stream.receive::<ToSource>().unwrap() {
            ToSource::Refuse { reason } => assert!(reason.contains(why), "{reason}"),
            other => panic!("{other:?}"),
        }
    };
    refused(
        &|disks, _| disks.clear(),
        "disks none, and this end waits for root",
    );
    refused(
        &|disks, _| disks[0].name = "data".into(),
        "disks data, and this end waits for root",
    );
    refused(&|disks, _| disks.push(disks[0].clone()), "disks root, root");
    refused(
        &|disks, _| disks[0].bytes.0 += 512,
        "make one of the same size",
    );
    refused(
        &|_, spec| spec.devices.disks[0].access = DiskAccess::ReadOnly,
        "its disk root differs",
    );
    target.greet();
}
