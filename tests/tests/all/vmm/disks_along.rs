//! Disks that only the source has go with the guest, which works with them all the while.

use super::disk_load::{another_round, boot, stop_load_and_verify};
use super::{boot_pilot, endless, verify_guest, verifying};
use godwit_tests::linux::LinuxGuest;
use godwit_tests::migration::{Flight, wait_for_phase};
use godwit_tests::qcow2;
use godwit_tests::test_dir::TestDir;
use godwit_tests::vmm::{self, BOOT_PATIENCE, Vmm, new_vm};
use godwit_tests::{require, skip};
use godwit_wire::devices::{Disk, DiskAccess, DiskFormat, DiskSource};
use godwit_wire::machine::MachineSpec;
use godwit_wire::migration::{MigrationPhase, MigrationPolicy, PostCopy};
use godwit_wire::unit::{Bytes, Mib};
use godwit_wire::vmm_api::{CreateRequest, ResizeDisk, VmmInfo, VmmState};
use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::Instant;

const DISK_BYTES: u64 = 64 << 20;
/// What nobody writes while the guest moves: a part of the disk behind the guest's load.
const STILL: std::ops::Range<u64> = 40 << 20..44 << 20;

fn disk_at(path: &Path, format: DiskFormat) -> Disk {
    Disk {
        name: "root".into(),
        source: DiskSource::File {
            path: path.to_owned(),
            format,
        },
        access: DiskAccess::ReadWrite,
        limits: Default::default(),
        on_error: Default::default(),
    }
}

fn blank(dir: &TestDir, name: &str) -> PathBuf {
    let path = dir.join(name);
    File::create(&path)
        .and_then(|file| file.set_len(DISK_BYTES))
        .expect("a disk image");
    path
}

/// A raw disk with something in it that nobody writes later.
fn source_disk(dir: &TestDir) -> PathBuf {
    let path = blank(dir, "source.img");
    let file = File::options().write(true).open(&path).expect("the disk");
    file.write_all_at(&still_bytes(), STILL.start)
        .expect("it is written");
    path
}

fn still_bytes() -> Vec<u8> {
    (0..STILL.end - STILL.start)
        .map(|at| (at ^ at >> 8 ^ at >> 16) as u8)
        .collect()
}

/// What was there before the guest moved is at the same place of the raw disk at `path`.
fn expect_still(path: &Path) {
    let mut found = vec![0; (STILL.end - STILL.start) as usize];
    let file = File::open(path).expect("the disk");
    file.read_exact_at(&mut found, STILL.start)
        .expect("its content");
    assert!(found == still_bytes(), "{} differs", path.display());
}

fn with_disk(mut spec: MachineSpec, path: &Path, format: DiskFormat) -> CreateRequest {
    spec.devices.disks.push(disk_at(path, format));
    new_vm(spec)
}

/// The same VM where its disk lies elsewhere.
fn moved_to(request: &CreateRequest, path: &Path, format: DiskFormat) -> CreateRequest {
    let mut moved = request.clone();
    moved.spec.devices.disks[0] = disk_at(path, format);
    moved
}

/// A Linux guest that has something in memory and writes the first 16 MiB of a disk that only this host has.
async fn boot_loaded(dir: &TestDir, guest: &LinuxGuest) -> (Vmm, CreateRequest) {
    let spec = vmm::linux(guest, 2, Mib(256));
    let request = with_disk(spec, &source_disk(dir), DiskFormat::Raw);
    let vmm = boot(dir, "source", &request).await;
    let mut shell = vmm.shell().await.expect("shell");
    shell.command("fill 32").await.expect("fill");
    shell.command("disk load /dev/vda 16").await.expect("load");
    another_round(&vmm).await;
    (vmm, request)
}

/// A busy disk may take a moment to become durable.
fn patient() -> MigrationPolicy {
    MigrationPolicy {
        downtime_limit_ms: 5_000,
        ..verifying()
    }
}

/// Moves the VM with its disk to where `target_request` says; the source's request becomes the target's.
async fn move_along(source: &Vmm, target: &Vmm, request: &mut CreateRequest, to: CreateRequest) {
    let flight = Flight::prepare_with_disks(source, target, &to, &["root"])
        .await
        .expect("a waiting target");
    flight.send(patient()).await.expect("take-off");
    let landed = flight.land().await.expect("the guest lands");
    let progress = landed.progress;
    assert_eq!(progress.disk_bytes, Bytes(DISK_BYTES), "{progress:?}");
    assert_eq!(progress.disk_remaining_bytes, Bytes(0), "{progress:?}");
    assert!(progress.disk_transferred_bytes > Bytes(0), "{progress:?}");
    *request = to;
    request.epoch = request.epoch.next();
}

#[tokio::test]
async fn a_disk_that_is_written_all_the_while_goes_with_its_guest_again_and_again() {
    let guest = require!(LinuxGuest::prepare());
    let dir = TestDir::new();
    let (mut here, mut request) = boot_loaded(&dir, &guest).await;
    for number in 1..=3 {
        let path = blank(&dir, &format!("disk-{number}.img"));
        let there = Vmm::start(&dir, &format!("vmm-{number}"))
            .await
            .expect("a target");
        let to = moved_to(&request, &path, DiskFormat::Raw);
        move_along(&here, &there, &mut request, to).await;
        here = there;
        another_round(&here).await;
        super::verify(&mut here.shell().await.expect("shell")).await;
        expect_still(&path);
        // What nobody wrote takes no room.
        let taken = File::open(&path)
            .and_then(|file| file.metadata())
            .expect("its size")
            .blocks()
            * 512;
        assert!(taken < 40 << 20, "{taken} bytes");
    }
    stop_load_and_verify(&here, 16).await;
}

#[tokio::test]
async fn an_image_with_a_base_arrives_as_one() {
    let guest = require!(LinuxGuest::prepare());
    let dir = TestDir::new();
    let base = blank(&dir, "base.img");
    let spec = vmm::linux(&guest, 2, Mib(256));
    // What is in the base is what the guest's own check knows.
    let maker = with_disk(spec.clone(), &base, DiskFormat::Raw);
    let vmm = boot(&dir, "maker", &maker).await;
    let mut shell = vmm.shell().await.expect("shell");
    let written = shell.command("disk write /dev/vda 77 32").await;
    written.expect("the base is written");
    vmm.command("kill", maker.epoch).await.expect("kill");

    let (top, copy) = (dir.join("top.qcow2"), dir.join("copy.qcow2"));
    qcow2::create(&top, DISK_BYTES, Some("base.img")).expect("an image");
    qcow2::create(&copy, DISK_BYTES, None).expect("a blank image");
    let mut request = with_disk(spec, &top, DiskFormat::Qcow2);
    let source = boot(&dir, "source", &request).await;
    let mut shell = source.shell().await.expect("shell");
    shell
        .command("disk verify /dev/vda 77 32")
        .await
        .expect("the base is seen");
    shell
        .command("disk write /dev/vda 78 8")
        .await
        .expect("write");
    shell.command("disk load /dev/vda 4").await.expect("load");
    another_round(&source).await;
    let target = Vmm::start(&dir, "target").await.expect("a target");
    let to = moved_to(&request, &copy, DiskFormat::Qcow2);
    move_along(&source, &target, &mut request, to).await;
    // Nothing leads back to the base.
    std::fs::remove_file(&base).expect("the base");
    another_round(&target).await;
    stop_load_and_verify(&target, 4).await;
    let mut shell = target.shell().await.expect("shell");
    let wrong = shell
        .command("disk verify /dev/vda 77 32")
        .await
        .expect_err("the first 8 MiB are others");
    let wrong = format!("{wrong:#}");
    assert!(wrong.contains("wrong_blocks=2048"), "{wrong}");
}

/// The source works with its own disk as ever, notes nothing more, and moves with it later.
async fn expect_disk_at_home(dir: &TestDir, source: &Vmm, mut request: CreateRequest) {
    assert_eq!(source.info().await.expect("info").state, VmmState::Running);
    another_round(source).await;
    expect_still(&dir.join("source.img"));
    // Only a disk that is on its way cannot grow; the migration's thread may still be ending.
    let resize = ResizeDisk {
        epoch: request.epoch,
        bytes: Bytes(DISK_BYTES),
    };
    let deadline = Instant::now() + BOOT_PATIENCE;
    while let Err(error) = source
        .api
        .post::<VmmInfo>("/v1/disks/root/resize", &resize)
        .await
    {
        assert!(Instant::now() < deadline, "{error:#}");
    }
    let path = blank(dir, "second.img");
    let second = Vmm::start(dir, "second").await.expect("a target");
    let to = moved_to(&request, &path, DiskFormat::Raw);
    move_along(source, &second, &mut request, to).await;
    another_round(&second).await;
    stop_load_and_verify(&second, 16).await;
    expect_still(&path);
}

/// Sends the VM on its way to a blank disk, `first.img`.
async fn take_off<'a>(
    dir: &TestDir,
    (source, target): (&'a Vmm, &'a Vmm),
    request: &CreateRequest,
    policy: MigrationPolicy,
) -> Flight<'a> {
    let to = moved_to(request, &blank(dir, "first.img"), DiskFormat::Raw);
    let flight = Flight::prepare_with_disks(source, target, &to, &["root"])
        .await
        .expect("a waiting target");
    flight.send(policy).await.expect("take-off");
    flight
}

#[tokio::test]
async fn a_cancelled_migration_leaves_the_disk_with_the_source() {
    let guest = require!(LinuxGuest::prepare());
    let dir = TestDir::new();
    let (source, request) = boot_loaded(&dir, &guest).await;
    let target = Vmm::start(&dir, "target").await.expect("a target");
    let flight = take_off(&dir, (&source, &target), &request, endless()).await;
    flight
        .source_reaches(MigrationPhase::PreCopy)
        .await
        .expect("it copies");
    let refused = source
        .api
        .post::<VmmInfo>(
            "/v1/disks/root/resize",
            &ResizeDisk {
                epoch: request.epoch,
                bytes: Bytes(2 * DISK_BYTES),
            },
        )
        .await
        .expect_err("its size must stay");
    assert!(
        format!("{refused:#}").contains("another host"),
        "{refused:#}"
    );
    flight.cancel().await.expect("cancel");
    expect_disk_at_home(&dir, &source, request).await;
}

#[tokio::test]
async fn a_target_that_dies_takes_nothing_from_the_source() {
    let guest = require!(LinuxGuest::prepare());
    let dir = TestDir::new();
    let (source, request) = boot_loaded(&dir, &guest).await;
    let mut target = Vmm::start(&dir, "target").await.expect("a target");
    let flight = take_off(&dir, (&source, &target), &request, endless()).await;
    flight
        .source_reaches(MigrationPhase::PreCopy)
        .await
        .expect("it copies");
    target.process.kill();
    wait_for_phase(&source, MigrationPhase::Failed)
        .await
        .expect("the source notices");
    expect_disk_at_home(&dir, &source, request).await;
}

#[tokio::test]
async fn a_store_that_voids_the_move_finds_the_disk_where_it_was() {
    let guest = require!(LinuxGuest::prepare());
    let dir = TestDir::new();
    let (source, request) = boot_loaded(&dir, &guest).await;
    let target = Vmm::start(&dir, "target").await.expect("a target");
    let flight = take_off(&dir, (&source, &target), &request, patient()).await;
    flight
        .target_reaches(MigrationPhase::AwaitingCommit)
        .await
        .expect("everything is there");
    expect_still(&dir.join("first.img"));
    flight.abort_source().await.expect("abort");
    expect_disk_at_home(&dir, &source, request).await;
}

/// A pilot with a disk that it leaves alone.
async fn boot_pilot_with_disk(dir: &TestDir) -> (Vmm, CreateRequest) {
    let request = with_disk(vmm::pilot(1, Mib(128)), &source_disk(dir), DiskFormat::Raw);
    let source = Vmm::boot(dir, "source", &request).await.expect("boot");
    let mut serial = source.serial().await.expect("console");
    serial
        .wait_for("pilot ", BOOT_PATIENCE)
        .await
        .expect("the pilot says hello");
    (source, request)
}

#[tokio::test]
async fn disks_are_whole_before_a_guest_goes_ahead_of_its_memory() {
    require!(skip::kvm());
    let dir = TestDir::new();
    let (source, request) = boot_pilot_with_disk(&dir).await;
    let mut shell = source.shell().await.expect("shell");
    shell.command("fill 64").await.expect("fill");
    shell.command("dirty 90 48").await.expect("dirty");
    let target = Vmm::start(&dir, "target").await.expect("a target");
    let path = blank(&dir, "target.img");
    let to = moved_to(&request, &path, DiskFormat::Raw);
    let flight = Flight::prepare_with_disks(&source, &target, &to, &["root"])
        .await
        .expect("a waiting target");
    let policy = MigrationPolicy {
        downtime_limit_ms: 100,
        max_bandwidth_bytes_per_s: Some(24 << 20),
        post_copy: PostCopy::Allowed,
        ..MigrationPolicy::default()
    };
    flight.send(policy).await.expect("take-off");
    flight
        .target_reaches(MigrationPhase::AwaitingCommit)
        .await
        .expect("all but memory arrived");
    expect_still(&path);
    flight.commit().await.expect("commit");
    wait_for_phase(&source, MigrationPhase::Completed)
        .await
        .expect("memory has followed");
    verify_guest(&target).await;
}

/// Why a move does not begin for which the two ends were told other disks, or disks that differ.
async fn refusal(
    dir: &TestDir,
    (source, moved): (&Vmm, &CreateRequest),
    arriving: &[&str],
    leaving: &[&str],
) -> String {
    let name = format!("target-{}-{}", arriving.len(), leaving.len());
    let target = Vmm::start(dir, &name).await.expect("a target");
    let mut flight = Flight::prepare_with_disks(source, &target, moved, arriving)
        .await
        .expect("a waiting target");
    flight.leaving_disks = leaving.iter().map(|name| (*name).to_owned()).collect();
    flight.send(verifying()).await.expect("take-off");
    let failed = flight
        .source_reaches(MigrationPhase::Failed)
        .await
        .expect("it is refused");
    assert_eq!(failed.progress.round, 0, "nothing was copied");
    let state = source.info().await.expect("info").state;
    assert_eq!(state, VmmState::Running);
    failed.reason.expect("a reason")
}

#[tokio::test]
async fn disks_that_do_not_match_are_refused_while_the_guest_runs() {
    require!(skip::kvm());
    let dir = TestDir::new();
    let (source, request) = boot_pilot_with_disk(&dir).await;
    let small = dir.join("small.img");
    File::create(&small)
        .and_then(|file| file.set_len(DISK_BYTES / 2))
        .expect("a disk image");
    let moved = moved_to(&request, &small, DiskFormat::Raw);
    let size = refusal(&dir, (&source, &moved), &["root"], &["root"]).await;
    assert!(size.contains("make one of the same size"), "{size}");
    let unsent = refusal(&dir, (&source, &moved), &["root"], &[]).await;
    assert!(
        unsent.contains("disks none, and this end waits for root"),
        "{unsent}"
    );
    let elsewhere = refusal(&dir, (&source, &moved), &[], &["root"]).await;
    assert!(elsewhere.contains("where its disk root is"), "{elsewhere}");
}

#[tokio::test]
async fn disks_that_a_machine_does_not_have_are_refused_at_once() {
    require!(skip::kvm());
    let dir = TestDir::new();
    let (source, request) = boot_pilot(&dir, "source", 1, Mib(32)).await;
    let target = Vmm::start(&dir, "target").await.expect("a target");
    let refused = Flight::prepare_with_disks(&source, &target, &request, &["data"])
        .await
        .expect_err("the target has none");
    assert!(
        format!("{refused:#}").contains("no disk called data"),
        "{refused:#}"
    );
    let mut flight = Flight::prepare(&source, &target, &request)
        .await
        .expect("a waiting target");
    flight.leaving_disks = ["data".to_owned()].into();
    let refused = flight
        .send(verifying())
        .await
        .expect_err("nor has the source");
    assert!(
        format!("{refused:#}").contains("no disk called data"),
        "{refused:#}"
    );
    assert_eq!(source.info().await.expect("info").state, VmmState::Running);
}

/// The disk of a machine that waits for a migration is nobody else's.
#[tokio::test]
async fn a_target_is_refused_the_disk_that_the_source_works_with() {
    require!(skip::kvm());
    let dir = TestDir::new();
    let (source, request) = boot_pilot_with_disk(&dir).await;
    let target = Vmm::start(&dir, "target").await.expect("a target");
    let refused = Flight::prepare_with_disks(&source, &target, &request, &["root"])
        .await
        .expect_err("it would be overwritten with itself");
    assert!(format!("{refused:#}").contains("is held by"), "{refused:#}");
    expect_still(&dir.join("source.img"));
}
