//! Pools in temporary directories; what we make of qcow2 is also judged by qemu-img, where there is one.

use super::pool::Kind;
use super::*;
use godwit_devices::skip::skip;
use godwit_wire::devices::DiskFormat;
use godwit_wire::id::{DiskId, ImageId, MigrationId};
use godwit_wire::storage::{
    CreateDisk, DiskOrigin, DiskReport, GrowDisk, ImageReport, ImportImage, ImportSource, WorkState,
};
use godwit_wire::unit::Bytes;
use rustix::fs::FlockOperation;
use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use uuid::Uuid;

const MIB: u64 = 1 << 20;

struct Fixture {
    root: tempfile::TempDir,
    storage: Arc<Storage>,
    pool: PoolId,
}

fn open(directory: &Path, host: HostId) -> (Arc<Storage>, PoolId) {
    let storage = Storage::new(
        vec![PoolPlace {
            name: "default".into(),
            directory: directory.to_owned(),
            origin: Origin::Ours,
        }],
        host,
    );
    let pool = storage.pools[0].open().unwrap();
    (storage, pool)
}

fn fixture() -> Fixture {
    let root = tempfile::tempdir().unwrap();
    let (storage, pool) = open(&root.path().join("pool"), HostId::fresh());
    Fixture {
        root,
        storage,
        pool,
    }
}

impl Fixture {
    fn path(&self, name: &str) -> PathBuf {
        self.root.path().join(name)
    }

    fn pool_path(&self, name: &str) -> PathBuf {
        self.path("pool").join(name)
    }

    /// A file of `bytes` whose second block is not empty.
    fn source(&self, name: &str, bytes: u64) -> PathBuf {
        let path = self.path(name);
        let file = File::create(&path).unwrap();
        file.set_len(bytes).unwrap();
        file.write_all_at(b"content", 4096).unwrap();
        path
    }

    /// Does something that blocks where blocking is allowed.
    async fn off<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Arc<Storage>, PoolId) -> T + Send + 'static,
    ) -> T {
        let (storage, pool) = (self.storage.clone(), self.pool);
        tokio::task::spawn_blocking(move || work(&storage, pool))
            .await
            .unwrap()
    }

    async fn import(&self, path: &Path) -> ImageReport {
        let image = ImageId::fresh();
        let ask = from_path(path);
        self.off(move |storage, pool| storage.import_image(pool, image, ask))
            .await
            .unwrap();
        self.image_done(image).await
    }

    async fn image_done(&self, image: ImageId) -> ImageReport {
        loop {
            let report = self
                .off(move |storage, pool| storage.image(pool, image))
                .await
                .unwrap();
            if !matches!(report.state, WorkState::Working { .. }) {
                return report;
            }
            tokio::task::yield_now().await;
        }
    }

    async fn create(&self, ask: CreateDisk) -> Result<DiskReport, StorageError> {
        self.create_as(DiskId::fresh(), ask).await
    }

    async fn create_as(&self, disk: DiskId, ask: CreateDisk) -> Result<DiskReport, StorageError> {
        self.off(move |storage, pool| storage.create_disk(pool, disk, &ask))
            .await?;
        loop {
            let report = self
                .off(move |storage, pool| storage.disk(pool, disk))
                .await?;
            if !matches!(report.state, WorkState::Working { .. }) {
                return Ok(report);
            }
            tokio::task::yield_now().await;
        }
    }

    /// Names of all files of a kind.
    fn files(&self, kind: &str) -> Vec<String> {
        let mut names: Vec<String> = fs::read_dir(self.pool_path(kind))
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }
}

fn from_path(path: &Path) -> ImportImage {
    ImportImage {
        source: ImportSource::Path {
            path: path.to_owned(),
        },
        format: None,
        sha256: None,
    }
}

fn blank(format: DiskFormat, bytes: u64) -> CreateDisk {
    CreateDisk {
        bytes: Some(Bytes(bytes)),
        format,
        from: DiskOrigin::Blank,
        made_for: None,
    }
}

/// What qemu-img says, or `None` where it is not installed.
fn qemu_img(arguments: &[&str], path: &Path) -> Option<String> {
    let output = match Command::new("qemu-img").args(arguments).arg(path).output() {
        Ok(output) => output,
        Err(error) => {
            skip(format!(
                "qemu-img judges nothing here ({error}); install qemu-utils"
            ));
            return None;
        }
    };
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(
        output.status.success(),
        "{said}{}",
        String::from_utf8_lossy(&output.stderr)
    );
    Some(said)
}

#[tokio::test]
async fn a_pool_keeps_its_identity_and_two_hosts_see_the_same_one() {
    let fixture = fixture();
    let (_other, pool) = open(&fixture.path("pool"), HostId::fresh());
    assert_eq!(pool, fixture.pool);
    fixture.storage.sample().await;
    let reports = fixture.storage.reports();
    assert_eq!((reports.len(), reports[0].pool), (1, pool));
    assert!(reports[0].total_bytes >= reports[0].free_bytes && reports[0].free_bytes > Bytes(0));
    assert_eq!(reports[0].trouble, None);
}

#[tokio::test]
async fn a_mark_that_cannot_be_read_is_trouble_and_never_written_over() {
    let fixture = fixture();
    let mark = fixture.pool_path("godwit-pool.json");
    fixture.storage.sample().await;
    fs::write(&mark, "{ not json").unwrap();
    fixture.storage.sample().await;
    let report = &fixture.storage.reports()[0];
    assert_eq!(report.pool, fixture.pool);
    assert!(report.trouble.as_ref().unwrap().contains("cannot be read"));
    assert_eq!(fs::read_to_string(&mark).unwrap(), "{ not json");
    let refused = fixture.create(blank(DiskFormat::Raw, MIB)).await;
    assert!(matches!(refused, Err(StorageError::PoolUnusable { .. })));
}

#[tokio::test]
async fn a_directory_of_the_operators_that_is_not_there_is_not_made() {
    let root = tempfile::tempdir().unwrap();
    let place = PoolPlace {
        name: "shared".into(),
        directory: root.path().join("not-mounted"),
        origin: Origin::Operators,
    };
    let storage = Storage::new(vec![place], HostId::fresh());
    storage.sample().await;
    assert!(storage.reports()[0].trouble.is_some());
    assert_eq!(fs::read_dir(root.path()).unwrap().count(), 0);
}

#[tokio::test]
async fn a_symbolic_link_in_a_pool_is_not_followed() {
    let fixture = fixture();
    let report = fixture.create(blank(DiskFormat::Raw, MIB)).await.unwrap();
    let data = fixture.pool_path(&format!("disks/{}.raw", report.disk));
    fs::rename(&data, fixture.path("elsewhere")).unwrap();
    std::os::unix::fs::symlink(fixture.path("elsewhere"), &data).unwrap();
    let located = fixture
        .off(move |storage, pool| storage.locate(pool, report.disk))
        .await;
    assert!(
        matches!(located, Err(StorageError::Io { .. })),
        "{located:?}"
    );

    let disks = fixture.pool_path("disks");
    fs::rename(&disks, fixture.path("disks")).unwrap();
    std::os::unix::fs::symlink(fixture.path("disks"), &disks).unwrap();
    let refused = fixture.storage.pools[0].open();
    assert!(matches!(refused, Err(StorageError::PoolUnusable { .. })));
}

#[tokio::test]
async fn a_raw_image_is_imported_with_its_digest_and_without_its_zeros() {
    let fixture = fixture();
    let source = fixture.source("source", 8 * MIB + 100);
    let report = fixture.import(&source).await;
    assert_eq!(report.state, WorkState::Ready);
    assert_eq!(
        (report.format, report.virtual_bytes),
        (DiskFormat::Raw, Bytes(8 * MIB + 512))
    );
    let sum = Command::new("sha256sum").arg(&source).output().unwrap();
    assert!(String::from_utf8_lossy(&sum.stdout).starts_with(&report.sha256));
    let kept = fixture.pool_path(&format!("images/{}.raw", report.image));
    let mut content = fs::read(&source).unwrap();
    content.resize(8 * 1024 * 1024 + 512, 0);
    assert!(fs::read(&kept).unwrap() == content);
    assert!(fs::metadata(&kept).unwrap().blocks() * 512 < MIB);
    let names = [
        format!("{}.json", report.image),
        format!("{}.raw", report.image),
    ];
    assert_eq!(fixture.files("images"), names);
    // Again, even with another source: the present report.
    let image = report.image;
    let ask = from_path(Path::new("/dev/zero"));
    let again = fixture
        .off(move |storage, pool| storage.import_image(pool, image, ask))
        .await
        .unwrap();
    assert_eq!(again, report);
}

#[tokio::test]
async fn what_is_no_image_or_not_the_expected_one_leaves_nothing() {
    let fixture = fixture();
    let source = fixture.source("source", 2 * MIB);
    let vmdk = fixture.path("vmdk");
    fs::write(&vmdk, [&b"KDMV"[..], &vec![0; 2 << 20]].concat()).unwrap();
    let backed = fixture.path("backed");
    let mut header = vec![0; 1 << 16];
    header[..8].copy_from_slice(b"QFI\xfb\0\0\0\x03");
    header[15] = 200;
    fs::write(&backed, header).unwrap();
    for (ask, reason) in [
        (from_path(&vmdk), "VMDK"),
        (from_path(&backed), "backing file"),
        (
            ImportImage {
                sha256: Some("ab".repeat(32)),
                ..from_path(&source)
            },
            "SHA-256",
        ),
        (
            ImportImage {
                format: Some(DiskFormat::Qcow2),
                ..from_path(&source)
            },
            "no qcow2 file",
        ),
    ] {
        let image = ImageId::fresh();
        fixture
            .off(move |storage, pool| storage.import_image(pool, image, ask))
            .await
            .unwrap();
        let WorkState::Failed { reason: said } = fixture.image_done(image).await.state else {
            panic!("it was imported, and should fail for {reason}")
        };
        assert!(said.contains(reason), "{said}");
        // A failed one can be deleted, and tried anew.
        fixture
            .off(move |storage, pool| storage.delete_image(pool, image))
            .await
            .unwrap();
        let gone = fixture
            .off(move |storage, pool| storage.image(pool, image))
            .await;
        assert!(matches!(gone, Err(StorageError::NoSuchImage(_))));
    }
    assert!(fixture.files("images").is_empty());
}

async fn upload(fixture: &Fixture, image: ImageId, announced: u64, sent: &[u8]) -> ImageReport {
    let ask = ImportImage {
        source: ImportSource::Upload {
            bytes: Bytes(announced),
        },
        format: None,
        sha256: None,
    };
    let report = fixture
        .off(move |storage, pool| storage.import_image(pool, image, ask))
        .await
        .unwrap();
    assert!(matches!(report.state, WorkState::Working { .. }));
    let (sender, pieces) = tokio::sync::mpsc::channel(2);
    fixture
        .storage
        .begin_upload(fixture.pool, image, pieces)
        .unwrap();
    let (_, second) = tokio::sync::mpsc::channel(2);
    let twice = fixture.storage.begin_upload(fixture.pool, image, second);
    assert!(twice.is_err());
    for piece in sent.chunks(70_000) {
        // A receiver that has seen too much goes away.
        if sender.send(piece.to_vec().into()).await.is_err() {
            break;
        }
    }
    drop(sender);
    fixture.image_done(image).await
}

#[tokio::test]
async fn an_upload_is_exactly_as_long_as_announced() {
    let fixture = fixture();
    let content = vec![7; 3 << 20];
    let report = upload(&fixture, ImageId::fresh(), 3 * MIB, &content).await;
    assert_eq!(report.state, WorkState::Ready);
    let (short, long) = (ImageId::fresh(), ImageId::fresh());
    let report = upload(&fixture, short, 4 * MIB, &content).await;
    assert!(matches!(report.state, WorkState::Failed { ref reason } if reason.contains("only")));
    let report = upload(&fixture, long, 2 * MIB, &content).await;
    assert!(matches!(report.state, WorkState::Failed { ref reason } if reason.contains("more")));
    // After a failure the same id is welcome again.
    let report = upload(&fixture, short, 3 * MIB, &content).await;
    assert_eq!(report.state, WorkState::Ready);
    assert_eq!(fixture.files("images").len(), 4);
}

#[tokio::test]
async fn a_thin_copy_shows_its_image_and_keeps_it_from_being_deleted() {
    let fixture = fixture();
    let image = fixture
        .import(&fixture.source("source", 4 * MIB))
        .await
        .image;
    let ask = CreateDisk {
        bytes: Some(Bytes(600 * MIB)),
        format: DiskFormat::Qcow2,
        from: DiskOrigin::Image { image },
        made_for: None,
    };
    let disk = DiskId::fresh();
    let report = fixture.create_as(disk, ask.clone()).await.unwrap();
    assert_eq!(
        (report.base, report.virtual_bytes),
        (Some(image), Bytes(600 * MIB))
    );
    assert!(report.file_bytes < Bytes(MIB));
    assert_eq!(fixture.create_as(disk, ask).await.unwrap(), report);
    let path = fixture.pool_path(&format!("disks/{disk}.qcow2"));
    if let Some(info) = qemu_img(&["info", "--output=json"], &path) {
        let info: serde_json::Value = serde_json::from_str(&info).unwrap();
        assert_eq!(info["virtual-size"], 600 * MIB);
        assert_eq!(info["backing-filename"], format!("../images/{image}.raw"));
        assert_eq!(info["backing-filename-format"], "raw");
        qemu_img(&["check"], &path);
        let flat = fixture.path("flat");
        let flat_text = flat.to_str().unwrap();
        let converted = Command::new("qemu-img")
            .args(["convert", "-O", "raw"])
            .arg(&path)
            .arg(flat_text)
            .status();
        assert!(converted.unwrap().success());
        let mut content = [0; 7];
        File::open(&flat)
            .unwrap()
            .read_exact_at(&mut content, 4096)
            .unwrap();
        assert_eq!(&content, b"content");
    }
    let refused = fixture
        .off(move |storage, pool| storage.delete_image(pool, image))
        .await;
    assert!(matches!(refused, Err(StorageError::ImageInUse { child, .. }) if child == disk));
    fixture
        .off(move |storage, pool| storage.delete_disk(pool, disk))
        .await
        .unwrap();
    for _ in 0..2 {
        fixture
            .off(move |storage, pool| storage.delete_image(pool, image))
            .await
            .unwrap();
    }
    assert!(fixture.files("images").is_empty() && fixture.files("disks").is_empty());
}

#[tokio::test]
async fn a_disk_grows_and_never_shrinks() {
    let fixture = fixture();
    for format in [DiskFormat::Raw, DiskFormat::Qcow2] {
        let disk = DiskId::fresh();
        fixture
            .create_as(disk, blank(format, 2 * MIB))
            .await
            .unwrap();
        let grow = move |bytes| {
            move |storage: &Arc<Storage>, pool| {
                storage.grow_disk(
                    pool,
                    disk,
                    GrowDisk {
                        bytes: Bytes(bytes),
                    },
                )
            }
        };
        // Beyond what one page of qcow2's first table reaches.
        let large = 5 << 40;
        let report = fixture.off(grow(large)).await.unwrap();
        assert_eq!(report.virtual_bytes, Bytes(large));
        assert!(report.file_bytes < Bytes(2 * MIB), "{report:?}");
        let shrunk = fixture.off(grow(MIB)).await;
        assert!(matches!(
            shrunk,
            Err(StorageError::Invalid { field: "bytes", .. })
        ));
        if format == DiskFormat::Qcow2 {
            let path = fixture.pool_path(&format!("disks/{disk}.qcow2"));
            qemu_img(&["check"], &path);
        }
    }
}

#[tokio::test]
async fn a_disk_in_use_is_neither_deleted_nor_grown_nor_copied() {
    let fixture = fixture();
    let report = fixture.create(blank(DiskFormat::Raw, MIB)).await.unwrap();
    let disk = report.disk;
    let located = fixture
        .off(move |storage, pool| storage.locate(pool, disk))
        .await
        .unwrap();
    // As a VMM does it: with a lock of the open file, which other locks of this process run into as well.
    let held = File::create(&located.lock).unwrap();
    crate::sys::lock_open_file(&held).unwrap();
    let deleted = fixture
        .off(move |storage, pool| storage.delete_disk(pool, disk))
        .await;
    assert!(
        matches!(deleted, Err(StorageError::DiskInUse(_))),
        "{deleted:?}"
    );
    let bytes = Bytes(2 * MIB);
    let grown = fixture
        .off(move |storage, pool| storage.grow_disk(pool, disk, GrowDisk { bytes }))
        .await;
    assert!(matches!(grown, Err(StorageError::DiskInUse(_))));
    let copied = fixture
        .create(CreateDisk {
            bytes: None,
            format: DiskFormat::Raw,
            from: DiskOrigin::Disk { disk },
            made_for: None,
        })
        .await;
    assert!(matches!(copied, Err(StorageError::DiskInUse(_))));
    drop(held);
    fixture
        .off(move |storage, pool| storage.delete_disk(pool, disk))
        .await
        .unwrap();
}

#[tokio::test]
async fn what_was_left_of_a_disk_is_erased_and_one_that_has_come_back_is_not() {
    let fixture = fixture();
    let original = fixture.create(blank(DiskFormat::Raw, MIB)).await.unwrap();
    let disk = original.disk;
    assert_eq!(original.made_for, None);
    let erase =
        |made_for| fixture.off(move |storage, pool| storage.erase_copy(pool, disk, made_for));
    // It goes away and comes back twice; each time the erasure that was meant for the one before comes again.
    let mut made_for = None;
    for _ in 0..2 {
        erase(made_for).await.unwrap();
        assert!(fixture.files("disks").is_empty());
        let migration = Some(MigrationId::fresh());
        let ask = CreateDisk {
            made_for: migration,
            ..blank(DiskFormat::Raw, MIB)
        };
        let report = fixture.create_as(disk, ask).await.unwrap();
        assert_eq!(report.made_for, migration);
        let late = erase(made_for).await;
        assert!(
            matches!(late, Err(StorageError::AnotherCopy { made_for, .. }) if made_for == migration),
            "{late:?}"
        );
        // Growing it does not make it another one.
        let bytes = Bytes(2 * MIB);
        let grown = fixture
            .off(move |storage, pool| storage.grow_disk(pool, disk, GrowDisk { bytes }))
            .await
            .unwrap();
        assert_eq!(grown.made_for, migration);
        made_for = migration;
    }
    // Once more of what is gone.
    for _ in 0..2 {
        erase(made_for).await.unwrap();
    }
    assert!(fixture.files("disks").is_empty());
}

#[tokio::test]
async fn a_disk_whose_lock_holds_a_garbled_record_is_deleted_as_any_other() {
    let fixture = fixture();
    let report = fixture.create(blank(DiskFormat::Raw, MIB)).await.unwrap();
    let disk = report.disk;
    fs::write(fixture.pool_path(&format!("disks/{disk}.lock")), "garbled").unwrap();
    fixture
        .off(move |storage, pool| storage.delete_disk(pool, disk))
        .await
        .unwrap();
    assert!(fixture.files("disks").is_empty());
}

#[tokio::test]
async fn a_full_copy_is_a_disk_of_its_own() {
    let fixture = fixture();
    let report = fixture
        .create(blank(DiskFormat::Raw, 64 * MIB))
        .await
        .unwrap();
    let source = fixture.pool_path(&format!("disks/{}.raw", report.disk));
    let file = File::options().write(true).open(&source).unwrap();
    file.write_all_at(b"in the middle", 40 * MIB).unwrap();
    let copy = fixture
        .create(CreateDisk {
            bytes: Some(Bytes(80 * MIB)),
            format: DiskFormat::Raw,
            from: DiskOrigin::Disk { disk: report.disk },
            made_for: None,
        })
        .await
        .unwrap();
    assert_eq!(
        (copy.state, copy.virtual_bytes),
        (WorkState::Ready, Bytes(80 * MIB))
    );
    assert!(copy.file_bytes < Bytes(2 * MIB));
    let mut content = [0; 13];
    File::open(fixture.pool_path(&format!("disks/{}.raw", copy.disk)))
        .unwrap()
        .read_exact_at(&mut content, 40 * MIB)
        .unwrap();
    assert_eq!(&content, b"in the middle");
    // The source can be used again.
    let lock = File::create(fixture.pool_path(&format!("disks/{}.lock", report.disk))).unwrap();
    rustix::fs::fcntl_lock(&lock, FlockOperation::NonBlockingLockExclusive).unwrap();
}

#[tokio::test]
async fn what_a_former_agent_left_unfinished_is_removed_and_what_another_host_does_is_not() {
    let root = tempfile::tempdir().unwrap();
    let (host, other) = (HostId::fresh(), HostId::fresh());
    let directory = root.path().join("pool");
    let (storage, pool) = open(&directory, host);
    let kept = DiskId::fresh();
    {
        let storage = storage.clone();
        tokio::task::spawn_blocking(move || {
            storage.create_disk(pool, kept, &blank(DiskFormat::Raw, MIB))
        })
        .await
        .unwrap()
        .unwrap();
    }
    let disks = directory.join("disks");
    let unrecorded = Uuid::new_v4();
    let ours = |id: Uuid| disks.join(format!(".{id}.0.part-{host}"));
    fs::write(ours(unrecorded), "half").unwrap();
    fs::write(disks.join(format!("{unrecorded}.qcow2")), "never recorded").unwrap();
    // Recorded, and the agent died before the unfinished name was gone.
    fs::hard_link(disks.join(format!("{kept}.raw")), ours(kept.0)).unwrap();
    let theirs = format!(".{}.0.part-{other}", Uuid::new_v4());
    fs::write(disks.join(&theirs), "their work").unwrap();
    open(&directory, host);
    let mut names: Vec<_> = fs::read_dir(&disks)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    assert_eq!(
        names,
        [theirs, format!("{kept}.json"), format!("{kept}.raw")]
    );
}

/// A file system of its own that is soon full; skipped where mounting is not allowed.
struct SmallFileSystem(tempfile::TempDir);

impl SmallFileSystem {
    fn mount() -> Option<Self> {
        let root = tempfile::tempdir().unwrap();
        let mounted = Command::new("mount")
            .args(["-t", "tmpfs", "-o", "size=4m", "godwit-test"])
            .arg(root.path())
            .status();
        if mounted.is_ok_and(|status| status.success()) {
            return Some(Self(root));
        }
        skip("a full pool cannot be made here (mounting a tmpfs needs root)");
        None
    }
}

impl Drop for SmallFileSystem {
    fn drop(&mut self) {
        let unmounted = Command::new("umount").arg(self.0.path()).status();
        assert!(unmounted.unwrap().success());
    }
}

#[tokio::test]
async fn an_import_into_a_full_pool_fails_with_the_reason_and_leaves_nothing() {
    let Some(small) = SmallFileSystem::mount() else {
        return;
    };
    let (storage, pool) = open(&small.0.path().join("pool"), HostId::fresh());
    let fixture = Fixture {
        root: tempfile::tempdir().unwrap(),
        storage,
        pool,
    };
    let source = fixture.path("source");
    fs::write(&source, vec![1; 6 << 20]).unwrap();
    let report = fixture.import(&source).await;
    assert!(
        matches!(report.state, WorkState::Failed { ref reason } if reason.contains("pool default is full")),
        "{report:?}"
    );
    let images = small.0.path().join("pool/images");
    assert_eq!(fs::read_dir(images).unwrap().count(), 0);
    // There is room for something smaller.
    fs::write(&source, vec![1; 2 << 20]).unwrap();
    assert_eq!(fixture.import(&source).await.state, WorkState::Ready);
    drop(fixture);
}

#[test]
fn a_path_comes_from_an_id_and_nothing_else() {
    let root = tempfile::tempdir().unwrap();
    let (storage, _) = open(root.path(), HostId::fresh());
    let id = Uuid::new_v4();
    let path = storage.pools[0].data(Kind::Disk, id, DiskFormat::Qcow2);
    assert_eq!(path, root.path().join(format!("disks/{id}.qcow2")));
}
