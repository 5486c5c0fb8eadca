//! Linux finds the devices of its machine, and its disk goes with it.

use super::disk_load::{another_round, boot, stop_load_and_verify};
use super::{endless, verifying};
use godwit_tests::linux::LinuxGuest;
use godwit_tests::migration::{Flight, migrate};
use godwit_tests::require;
use godwit_tests::skip;
use godwit_tests::succession::Succession;
use godwit_tests::test_dir::TestDir;
use godwit_tests::vmm::{self, BOOT_PATIENCE, Vmm, new_vm};
use godwit_wire::devices::{Disk, DiskAccess, DiskFormat, DiskSource};
use godwit_wire::migration::MigrationPhase;
use godwit_wire::unit::{Bytes, Mib};
use godwit_wire::vmm_api::{
    BalloonRequest, CreateRequest, DriverState, ResizeDisk, VmmInfo, VmmState,
};
use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::time::{Duration, Instant};

const DISK_BYTES: u64 = 64 << 20;
/// Linux reports free pages some seconds after they have become free.
const REPORT_PATIENCE: Duration = Duration::from_secs(60);

fn blank_disk(dir: &TestDir) -> Disk {
    let path = dir.join("disk.img");
    File::create(&path)
        .and_then(|file| file.set_len(DISK_BYTES))
        .expect("a disk image");
    disk_at(&path)
}

fn disk_at(path: &Path) -> Disk {
    Disk {
        name: "root".into(),
        source: DiskSource::File {
            path: path.to_owned(),
            format: DiskFormat::Raw,
        },
        access: DiskAccess::ReadWrite,
        limits: Default::default(),
        on_error: Default::default(),
    }
}

fn with_disk(guest: &LinuxGuest, disk: Disk, vcpus: u8) -> CreateRequest {
    let mut spec = vmm::linux(guest, vcpus, Mib(256));
    spec.devices.disks.push(disk);
    new_vm(spec)
}

#[tokio::test]
async fn linux_finds_every_device_of_its_machine() {
    let guest = require!(LinuxGuest::prepare());
    let dir = TestDir::new();
    let vmm = boot(&dir, "vmm", &with_disk(&guest, blank_disk(&dir), 1)).await;
    let devices = vmm.info().await.expect("info").devices;
    let names: Vec<_> = devices
        .iter()
        .map(|device| (device.name.as_str(), device.driver.clone()))
        .collect();
    assert_eq!(
        names,
        ["rng", "balloon", "root"].map(|name| (name, DriverState::Working))
    );
    let mut shell = vmm.shell().await.expect("shell");
    let size = shell.command("disk size /dev/vda").await.expect("a disk");
    assert_eq!(size.number("bytes"), DISK_BYTES);
}

#[tokio::test]
async fn what_a_guest_writes_is_there_after_stop_and_start() {
    let guest = require!(LinuxGuest::prepare());
    let dir = TestDir::new();
    let disk = blank_disk(&dir);
    let request = with_disk(&guest, disk.clone(), 2);
    let vmm = boot(&dir, "first", &request).await;
    let mut shell = vmm.shell().await.expect("shell");
    shell
        .command("disk write /dev/vda 77 32")
        .await
        .expect("write");
    vmm.serial()
        .await
        .expect("console")
        .send_line("halt")
        .await
        .expect("halt");
    vmm.wait_until_halted(BOOT_PATIENCE)
        .await
        .expect("it powers off");
    let vmm = boot(&dir, "second", &request).await;
    let mut shell = vmm.shell().await.expect("shell");
    shell
        .command("disk verify /dev/vda 77 32")
        .await
        .expect("every block is as it was written");
    shell
        .command("disk verify /dev/vda 78 1")
        .await
        .expect_err("a wrong block is noticed");
}

#[tokio::test]
async fn what_linux_discards_is_given_back_and_what_it_zeroes_reads_as_zeros() {
    let guest = require!(LinuxGuest::prepare());
    let dir = TestDir::new();
    let request = with_disk(&guest, blank_disk(&dir), 1);
    let vmm = boot(&dir, "vmm", &request).await;
    let mut shell = vmm.shell().await.expect("shell");
    shell
        .command("disk write /dev/vda 77 32")
        .await
        .expect("write");
    let image = File::open(dir.join("disk.img")).expect("the image");
    let taken = || image.metadata().expect("the image's size").blocks() * 512;
    let before = taken();
    shell.command("disk zero /dev/vda 8 8").await.expect("zero");
    shell
        .command("disk discard /dev/vda 24 8")
        .await
        .expect("discard");

    let mut zeroed = vec![1; 8 << 20];
    image
        .read_exact_at(&mut zeroed, 8 << 20)
        .expect("the zeros");
    assert!(zeroed.iter().all(|byte| *byte == 0));
    // Some file systems take a block or two to describe the hole.
    let now = taken();
    assert!(
        now + (7 << 20) <= before,
        "{before} bytes before and {now} now"
    );
    let disk = &vmm.info().await.expect("info").devices[2].counters;
    assert!(disk["discards"] >= 2, "{disk:?}");
    assert_eq!((disk["errors"], disk["rejected_requests"]), (0, 0));
    let wrong = shell
        .command("disk verify /dev/vda 77 24")
        .await
        .expect_err("a third of it are zeros");
    let wrong = format!("{wrong:#}");
    assert!(wrong.contains("wrong_blocks=2048"), "{wrong}");
}

#[tokio::test]
async fn a_guest_that_writes_its_disk_survives_live_migration() {
    let guest = require!(LinuxGuest::prepare());
    let dir = TestDir::new();
    let mut request = with_disk(&guest, blank_disk(&dir), 2);
    let mut here = boot(&dir, "vmm-0", &request).await;
    let mut shell = here.shell().await.expect("shell");
    shell.command("fill 32").await.expect("fill");
    shell.command("disk load /dev/vda 16").await.expect("load");
    for flight in 1..=6 {
        another_round(&here).await;
        let there = Vmm::start(&dir, &format!("vmm-{flight}"))
            .await
            .expect("a target");
        migrate(&here, &there, &mut request, verifying())
            .await
            .unwrap_or_else(|error| panic!("{flight}: {error:#}"));
        here = there;
        another_round(&here).await;
        super::verify(&mut here.shell().await.expect("shell")).await;
    }
    assert!(stop_load_and_verify(&here, 16).await > 8);
}

#[tokio::test]
async fn a_guest_that_writes_its_disk_goes_on_in_another_process() {
    let guest = require!(LinuxGuest::prepare());
    let dir = TestDir::new();
    let request = with_disk(&guest, blank_disk(&dir), 2);
    let mut here = boot(&dir, "vmm-0", &request).await;
    let mut shell = here.shell().await.expect("shell");
    shell.command("fill 32").await.expect("fill");
    shell.command("disk load /dev/vda 16").await.expect("load");
    for number in 1..=4 {
        another_round(&here).await;
        let there = Vmm::start(&dir, &format!("vmm-{number}"))
            .await
            .expect("a successor");
        let status = Succession::of(&dir, &here, &there, &request)
            .complete()
            .await
            .unwrap_or_else(|error| panic!("{number}: {error:#}"));
        println!("{:?}", status.blackout);
        here = there;
        another_round(&here).await;
        super::verify(&mut here.shell().await.expect("shell")).await;
    }
    assert!(stop_load_and_verify(&here, 16).await > 4);
}

#[tokio::test]
async fn a_cancelled_migration_leaves_the_disk_at_work_and_a_later_one_succeeds() {
    let guest = require!(LinuxGuest::prepare());
    let dir = TestDir::new();
    let mut request = with_disk(&guest, blank_disk(&dir), 1);
    let here = boot(&dir, "source", &request).await;
    let mut shell = here.shell().await.expect("shell");
    shell.command("fill 32").await.expect("fill");
    shell.command("dirty 50 16").await.expect("dirty");
    shell.command("disk load /dev/vda 16").await.expect("load");
    let first = Vmm::start(&dir, "first").await.expect("a target");
    let flight = Flight::start(&here, &first, &request, endless())
        .await
        .expect("it starts");
    flight
        .source_reaches(MigrationPhase::PreCopy)
        .await
        .expect("it copies");
    flight.cancel().await.expect("cancel");
    another_round(&here).await;
    let second = Vmm::start(&dir, "second").await.expect("a target");
    migrate(&here, &second, &mut request, verifying())
        .await
        .expect("the second one");
    another_round(&second).await;
    stop_load_and_verify(&second, 16).await;
}

#[tokio::test]
async fn a_disk_grows_and_the_balloon_takes_memory_while_linux_runs() {
    let guest = require!(LinuxGuest::prepare());
    let dir = TestDir::new();
    let request = with_disk(&guest, blank_disk(&dir), 1);
    let vmm = boot(&dir, "vmm", &request).await;
    let resize = ResizeDisk {
        epoch: request.epoch,
        bytes: Bytes(2 * DISK_BYTES),
    };
    let _: VmmInfo = vmm
        .api
        .post("/v1/disks/root/resize", &resize)
        .await
        .expect("resize");
    let mut shell = vmm.shell().await.expect("shell");
    loop {
        let size = shell.command("disk size /dev/vda").await.expect("a disk");
        if size.number("bytes") == 2 * DISK_BYTES {
            break;
        }
    }
    vmm.api
        .post::<VmmInfo>("/v1/disks/none/resize", &resize)
        .await
        .expect_err("there is no such disk");
    let keep = BalloonRequest {
        epoch: request.epoch,
        keep_mib: Mib(192),
    };
    let _: VmmInfo = vmm.api.post("/v1/balloon", &keep).await.expect("balloon");
    let given = |info: &VmmInfo| info.devices[1].counters["actual_bytes"];
    loop {
        shell.command("uptime").await.expect("the guest lives");
        if given(&vmm.info().await.expect("info")) == 64 << 20 {
            break;
        }
    }
}

/// Resident memory of a process.
fn resident_mib(pid: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).expect("the VMM lives");
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kib = line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok());
    kib.expect("a size") / 1024
}

/// Free-page reporting: nobody asked for it, and the balloon stays empty.
#[tokio::test]
async fn memory_that_linux_frees_goes_back_to_the_host_by_itself() {
    let guest = require!(LinuxGuest::prepare());
    let dir = TestDir::new();
    let request = with_disk(&guest, blank_disk(&dir), 1);
    let vmm = boot(&dir, "vmm", &request).await;
    let mut shell = vmm.shell().await.expect("shell");
    shell.command("fill 128").await.expect("fill");
    let full = resident_mib(vmm.process.pid());
    assert!(full >= 128, "{full} MiB hold what the guest filled");
    // What it filled before is free now.
    shell.command("fill 8").await.expect("fill");
    let deadline = Instant::now() + REPORT_PATIENCE;
    loop {
        shell.command("uptime").await.expect("the guest lives");
        let now = resident_mib(vmm.process.pid());
        if now + 96 <= full {
            break;
        }
        assert!(
            Instant::now() < deadline,
            "{full} MiB before and {now} MiB now"
        );
    }
    let info = vmm.info().await.expect("info");
    let balloon = &info.devices[1].counters;
    assert_eq!(balloon["actual_bytes"], 0);
    assert!(balloon["reported_bytes"] >= 96 << 20, "{balloon:?}");
    shell
        .command("verify")
        .await
        .expect("what it keeps is whole");
}

#[tokio::test]
async fn a_second_vmm_is_refused_a_disk_that_the_first_holds() {
    require!(skip::kvm());
    let dir = TestDir::new();
    let mut spec = vmm::pilot(1, Mib(32));
    spec.devices.disks.push(blank_disk(&dir));
    let (first, second) = (new_vm(spec.clone()), new_vm(spec));
    let holder = Vmm::boot(&dir, "holder", &first).await.expect("boot");
    let other = Vmm::start(&dir, "other").await.expect("a VMM");
    other.create(&second).await.expect("create");
    let refusal = other
        .command("boot", second.epoch)
        .await
        .expect_err("two machines would write one disk");
    let text = format!("{refusal:#}");
    assert!(text.contains("is held by"), "{text}");
    assert!(text.contains(&first.vm.to_string()), "{text}");
    let state = |info: VmmInfo| info.state;
    assert_eq!(
        other.info().await.map(state).expect("info"),
        VmmState::Created
    );
    assert_eq!(
        holder.info().await.map(state).expect("info"),
        VmmState::Running
    );
    holder.command("kill", first.epoch).await.expect("kill");
    other
        .command("boot", second.epoch)
        .await
        .expect("nobody holds it any more");
}
