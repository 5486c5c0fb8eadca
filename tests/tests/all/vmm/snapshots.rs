//! A machine is saved to a directory and goes on from there; what was damaged on the way is refused by name.

use super::{verify, verifying};
use godwit_tests::linux::{AGENT_GREETING, LinuxGuest};
use godwit_tests::migration::migrate;
use godwit_tests::require;
use godwit_tests::skip;
use godwit_tests::test_dir::TestDir;
use godwit_tests::vmm::{self, BOOT_PATIENCE, Vmm, new_vm};
use godwit_wire::machine::MachineSpec;
use godwit_wire::unit::Mib;
use godwit_wire::vmm_api::{
    CreateRequest, PauseReason, RestoreRequest, SnapshotInfo, SnapshotRequest, VerifyMemory,
    VmmInfo, VmmState,
};
use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

const FILES: [&str; 4] = ["manifest.json", "state.cbor", "memory", "pieces"];

async fn boot(dir: &TestDir, spec: MachineSpec) -> (Vmm, CreateRequest) {
    let request = new_vm(spec);
    let vmm = Vmm::boot(dir, "source", &request)
        .await
        .expect("the guest boots");
    vmm.serial()
        .await
        .expect("console")
        .wait_for(vmm::greeting(&request.spec), BOOT_PATIENCE)
        .await
        .expect("the guest is up");
    (vmm, request)
}

async fn save(
    vmm: &Vmm,
    request: &CreateRequest,
    directory: PathBuf,
) -> anyhow::Result<SnapshotInfo> {
    let ask = SnapshotRequest {
        epoch: request.epoch,
        directory,
    };
    vmm.api.post("/v1/snapshot", &ask).await
}

async fn restore(vmm: &Vmm, request: &CreateRequest, directory: &Path) -> anyhow::Result<VmmInfo> {
    restore_verified(vmm, request, directory, VerifyMemory::Changed).await
}

async fn restore_verified(
    vmm: &Vmm,
    request: &CreateRequest,
    directory: &Path,
    verify: VerifyMemory,
) -> anyhow::Result<VmmInfo> {
    let ask = RestoreRequest {
        vm: request.vm,
        epoch: request.epoch,
        lease: None,
        attachments: request.attachments.clone(),
        directory: directory.to_owned(),
        verify,
    };
    vmm.api.put("/v1/restore", &ask).await
}

const PAUSED: VmmState = VmmState::Paused {
    reason: PauseReason::Requested,
};

async fn a_running_guest_is_saved_and_goes_on_in_both_places(dir: &TestDir, spec: MachineSpec) {
    let (source, request) = boot(dir, spec).await;
    let mut shell = source.shell().await.expect("shell");
    shell.command("fill 24").await.expect("fill");
    shell.command("dirty 20 8").await.expect("dirty");
    let saved = save(&source, &request, dir.join("snapshot"))
        .await
        .expect("snapshot");
    assert!(saved.bytes.0 >= 24 << 20, "{saved:?}");
    assert!(
        saved.bytes < request.spec.memory_mib.bytes(),
        "untouched memory takes no room: {saved:?}"
    );
    assert_eq!(source.info().await.expect("info").state, VmmState::Running);
    verify(&mut shell).await;
    source.command("kill", request.epoch).await.expect("kill");

    let target = Vmm::start(dir, "target").await.expect("a VMM");
    let info = restore(&target, &request, &saved.directory)
        .await
        .expect("restore");
    assert_eq!(
        (info.state, info.spec.as_ref()),
        (PAUSED, Some(&request.spec))
    );
    target
        .command("resume", request.epoch)
        .await
        .expect("resume");
    verify(&mut target.shell().await.expect("shell")).await;
}

#[tokio::test]
async fn a_running_pilot_is_saved_and_goes_on_elsewhere() {
    require!(skip::kvm());
    let dir = TestDir::new();
    a_running_guest_is_saved_and_goes_on_in_both_places(&dir, vmm::pilot(2, Mib(64))).await;
}

#[tokio::test]
async fn a_running_linux_guest_is_saved_and_goes_on_elsewhere() {
    let guest = require!(LinuxGuest::prepare());
    let dir = TestDir::new();
    let spec = vmm::linux(&guest, 2, Mib(192));
    assert_eq!(vmm::greeting(&spec), AGENT_GREETING);
    a_running_guest_is_saved_and_goes_on_in_both_places(&dir, spec).await;
}

#[tokio::test]
async fn a_paused_machine_is_saved_and_stays_paused() {
    require!(skip::kvm());
    let dir = TestDir::new();
    let (source, request) = boot(&dir, vmm::pilot(1, Mib(32))).await;
    source.command("pause", request.epoch).await.expect("pause");
    let place = dir.join("snapshot");
    save(&source, &request, place.clone())
        .await
        .expect("snapshot");
    assert_eq!(source.info().await.expect("info").state, PAUSED);
    for file in FILES {
        let mode = fs::metadata(place.join(file)).expect(file).mode();
        assert_eq!(mode & 0o777, 0o600, "{file} holds what the guest keeps");
    }
    let again = save(&source, &request, place).await.expect_err("taken");
    assert!(
        format!("{again:#}").contains("not an empty directory"),
        "{again:#}"
    );
}

/// Every file, cut by one byte and with one bit turned, makes a restore fail with its name; nothing of the machine is
/// left, so that the sound snapshot can be restored by the same VMM afterwards.
#[tokio::test]
async fn a_damaged_snapshot_is_refused_with_the_reason() {
    require!(skip::kvm());
    let dir = TestDir::new();
    let (source, request) = boot(&dir, vmm::pilot(1, Mib(32))).await;
    let sound = dir.join("snapshot");
    save(&source, &request, sound.clone())
        .await
        .expect("snapshot");
    source.command("kill", request.epoch).await.expect("kill");

    let target = Vmm::start(&dir, "target").await.expect("a VMM");
    for file in FILES {
        for damage in [cut, flip] {
            let copy = dir.join("copy");
            fs::create_dir(&copy).expect("directory");
            for name in FILES {
                fs::copy(sound.join(name), copy.join(name)).expect("copy");
            }
            damage(&copy.join(file));
            let refusal = restore(&target, &request, &copy).await.expect_err(file);
            let text = format!("{refusal:#}");
            assert!(
                text.contains(file) && text.contains("damaged"),
                "{file}: {text}"
            );
            assert_eq!(target.info().await.expect("info").state, VmmState::Empty);
            fs::remove_dir_all(&copy).expect("clean up");
        }
    }
    let unfinished = dir.join("unfinished");
    fs::create_dir(&unfinished).expect("directory");
    fs::copy(sound.join("memory"), unfinished.join("memory")).expect("copy");
    let refusal = restore(&target, &request, &unfinished)
        .await
        .expect_err("no manifest");
    assert!(
        format!("{refusal:#}").contains("never finished"),
        "{refusal:#}"
    );
    restore(&target, &request, &sound)
        .await
        .expect("the sound one");
}

fn cut(path: &Path) {
    let file = File::options().write(true).open(path).expect("open");
    let length = file.metadata().expect("metadata").len();
    file.set_len(length - 1).expect("cut");
}

fn flip(path: &Path) {
    let file = File::options()
        .read(true)
        .write(true)
        .open(path)
        .expect("open");
    let middle = file.metadata().expect("metadata").len() / 2;
    let mut byte = [0];
    file.read_exact_at(&mut byte, middle).expect("read");
    byte[0] ^= 1;
    file.write_all_at(&byte, middle).expect("write");
}

/// Turns one bit of guest memory and makes the manifest believe that the file is as it was left: what decays on a disk
/// leaves no trace either.
fn decay(directory: &Path) {
    let memory = directory.join("memory");
    // Somewhere in what the guest has filled.
    let file = File::options().read(true).write(true).open(&memory);
    let file = file.expect("open");
    let page = (0..).map(|page| page << 12);
    let mut content = [0; 4096];
    let used = page
        .skip(2048)
        .find(|offset| {
            file.read_exact_at(&mut content, *offset).expect("read");
            content.iter().any(|byte| *byte != 0)
        })
        .expect("something is filled");
    content[7] ^= 1;
    file.write_all_at(&content, used).expect("write");
    file.sync_all().expect("flush");
    let found = fs::metadata(&memory).expect("metadata");
    let path = directory.join("manifest.json");
    let text = fs::read_to_string(&path).expect("the manifest");
    let sealed: serde_json::Value = serde_json::from_str(&text).expect("JSON");
    let identity = serde_json::json!({
        "inode": found.ino(),
        "changed_unix_ns": found.ctime() as u64 * 1_000_000_000 + found.ctime_nsec() as u64,
    });
    let mut manifest = sealed["manifest"].clone();
    assert_ne!(manifest["memory_file"], identity, "the change was noticed");
    manifest["memory_file"] = identity;
    let inner = manifest.to_string();
    let seal = format!("{:032x}", xxhash_rust::xxh3::xxh3_128(inner.as_bytes()));
    fs::write(
        &path,
        format!("{{\"manifest\":{inner},\"seal\":\"{seal}\"}}"),
    )
    .expect("write");
}

/// What nobody could notice before the start is noticed when it is brought in: the guest never sees it.
#[tokio::test]
async fn a_guest_whose_memory_decayed_on_the_disk_stops_with_the_reason() {
    require!(skip::kvm());
    let dir = TestDir::new();
    let (source, request) = boot(&dir, vmm::pilot(1, Mib(64))).await;
    let mut shell = source.shell().await.expect("shell");
    shell.command("fill 24").await.expect("fill");
    let place = dir.join("snapshot");
    save(&source, &request, place.clone())
        .await
        .expect("snapshot");
    source.command("kill", request.epoch).await.expect("kill");
    decay(&place);

    let careful = Vmm::start(&dir, "careful").await.expect("a VMM");
    let refusal = restore_verified(&careful, &request, &place, VerifyMemory::Full)
        .await
        .expect_err("all of it is read first");
    assert!(format!("{refusal:#}").contains("damaged"), "{refusal:#}");

    let target = Vmm::start(&dir, "target").await.expect("a VMM");
    // It may be found while the machine is still being put together.
    let _ = restore(&target, &request, &place).await;
    let is_fault = |state: &VmmState| {
        matches!(state, VmmState::Paused { reason: PauseReason::Fault { detail } }
            if detail.contains("of its file memory is damaged"))
    };
    let info = target
        .wait_for_state(BOOT_PATIENCE, is_fault)
        .await
        .expect("it stands still and says why");
    assert!(is_fault(&info.state));
    target
        .command("resume", request.epoch)
        .await
        .expect_err("it cannot go on");
    target.command("kill", request.epoch).await.expect("kill");
}

/// The machine that was restored moves on, is saved again, and its snapshot stays as it was.
#[tokio::test]
async fn a_restored_guest_moves_and_is_saved_before_all_of_it_has_come() {
    require!(skip::kvm());
    let dir = TestDir::new();
    let (source, mut request) = boot(&dir, vmm::pilot(2, Mib(256))).await;
    let mut shell = source.shell().await.expect("shell");
    shell.command("fill 160").await.expect("fill");
    shell.command("dirty 5 4").await.expect("dirty");
    let place = dir.join("snapshot");
    save(&source, &request, place.clone())
        .await
        .expect("snapshot");
    source.command("kill", request.epoch).await.expect("kill");
    let digest = |path: &Path| {
        let memory = fs::read(path.join("memory")).expect("memory");
        xxhash_rust::xxh3::xxh3_128(&memory)
    };
    let before = digest(&place);

    let here = Vmm::start(&dir, "here").await.expect("a VMM");
    restore(&here, &request, &place).await.expect("restore");
    here.command("resume", request.epoch).await.expect("resume");
    let again = dir.join("again");
    save(&here, &request, again.clone())
        .await
        .expect("a snapshot of it");
    let there = Vmm::start(&dir, "there").await.expect("a target");
    migrate(&here, &there, &mut request, verifying())
        .await
        .expect("it moves");
    verify(&mut there.shell().await.expect("shell")).await;
    there.command("kill", request.epoch).await.expect("kill");
    assert_eq!(digest(&place), before, "a guest never writes its snapshot");

    let last = Vmm::start(&dir, "last").await.expect("a VMM");
    restore(&last, &request, &again)
        .await
        .expect("the snapshot of a restored guest");
    last.command("resume", request.epoch).await.expect("resume");
    verify(&mut last.shell().await.expect("shell")).await;
}

#[tokio::test]
async fn a_snapshot_needs_the_present_epoch_and_a_machine_that_has_booted() {
    require!(skip::kvm());
    let dir = TestDir::new();
    let request = new_vm(vmm::pilot(1, Mib(32)));
    let vmm = Vmm::start(&dir, "vmm").await.expect("a VMM");
    vmm.create(&request).await.expect("create");
    let refusal = save(&vmm, &request, dir.join("a"))
        .await
        .expect_err("created");
    assert!(
        format!("{refusal:#}").contains("has not been booted"),
        "{refusal:#}"
    );
    let stale = CreateRequest {
        epoch: godwit_wire::id::Epoch(0),
        ..request
    };
    let refusal = save(&vmm, &stale, dir.join("a")).await.expect_err("stale");
    assert!(format!("{refusal:#}").contains("epoch"), "{refusal:#}");
    assert!(!dir.join("a").exists());
}
