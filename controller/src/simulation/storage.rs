//! Storage pools: directories that one or several hosts see. Work on them takes a moment, survives the server and
//! is shared by the hosts that share the pool.

use godwit_wire::devices::DiskFormat;
use godwit_wire::id::{DiskId, ImageId, PoolId, SnapshotId};
use godwit_wire::problem::Problem;
use godwit_wire::storage::{
    CreateDisk, DiskOrigin, DiskReport, GrowDisk, ImageReport, ImportImage, ImportSource,
    PoolReport, SnapshotReport, WorkState,
};
use godwit_wire::unit::Bytes;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;
use tokio::time::Instant;

/// How long it takes to make anything.
const WORK_TIME: Duration = Duration::from_millis(700);
/// Size of the disk in every image.
pub(super) const IMAGE_BYTES: Bytes = Bytes(1 << 30);

#[derive(Debug)]
struct Content {
    images: BTreeMap<ImageId, (ImageReport, Instant)>,
    disks: BTreeMap<DiskId, (DiskReport, Instant)>,
    snapshots: BTreeMap<SnapshotId, (SnapshotReport, Instant)>,
    /// Disks that something was written to.
    written: BTreeSet<DiskId>,
    /// Why new disks fail, from the second on.
    fails: Option<String>,
    trouble: Option<String>,
}

/// A pool; clones are the same directory.
#[derive(Clone, Debug)]
pub(super) struct SimPool {
    pub(super) id: PoolId,
    name: String,
    content: Arc<Mutex<Content>>,
}

fn working() -> WorkState {
    WorkState::Working {
        done_bytes: Bytes(0),
        total_bytes: Bytes(1),
    }
}

impl SimPool {
    pub(super) fn new(id: PoolId, name: &str) -> Self {
        let content = Content {
            images: BTreeMap::new(),
            disks: BTreeMap::new(),
            snapshots: BTreeMap::new(),
            written: BTreeSet::new(),
            fails: None,
            trouble: None,
        };
        Self {
            id,
            name: name.into(),
            content: Arc::new(Mutex::new(content)),
        }
    }

    fn content(&self) -> MutexGuard<'_, Content> {
        let mut content = self.content.lock().unwrap();
        let now = Instant::now();
        let finish = |state: &mut WorkState, at: Instant| {
            if matches!(state, WorkState::Working { .. }) && now >= at {
                *state = WorkState::Ready;
            }
        };
        for (report, at) in content.images.values_mut() {
            finish(&mut report.state, *at);
        }
        for (report, at) in content.disks.values_mut() {
            finish(&mut report.state, *at);
        }
        for (report, at) in content.snapshots.values_mut() {
            finish(&mut report.state, *at);
        }
        content
    }

    pub(super) fn report(&self) -> PoolReport {
        PoolReport {
            pool: self.id,
            name: self.name.clone(),
            total_bytes: Bytes(100 << 30),
            free_bytes: Bytes(50 << 30),
            trouble: self.content().trouble.clone(),
        }
    }

    /// From now on a second disk cannot be made.
    pub(super) fn has_room_for_one_disk(&self) {
        self.content().fails = Some("no space left".into());
    }

    pub(super) fn disks(&self) -> BTreeSet<DiskId> {
        self.content().disks.keys().copied().collect()
    }

    pub(super) fn images(&self) -> BTreeSet<ImageId> {
        self.content().images.keys().copied().collect()
    }

    pub(super) fn disk_bytes(&self, disk: DiskId) -> Option<Bytes> {
        Some(self.content().disks.get(&disk)?.0.virtual_bytes)
    }

    pub(super) fn snapshots(&self) -> BTreeSet<SnapshotId> {
        self.content().snapshots.keys().copied().collect()
    }

    pub(super) fn take_snapshot(&self, snapshot: SnapshotId) -> SnapshotReport {
        let report = SnapshotReport {
            snapshot,
            state: working(),
            bytes: Bytes(1 << 20),
            pause_us: 700,
        };
        let entry = (report, Instant::now() + WORK_TIME);
        let mut content = self.content();
        let known = content.snapshots.entry(snapshot).or_insert(entry);
        known.0.clone()
    }

    pub(super) fn snapshot(&self, snapshot: SnapshotId) -> Result<SnapshotReport, Problem> {
        let content = self.content();
        let known = content.snapshots.get(&snapshot);
        known
            .map(|(report, _)| report.clone())
            .ok_or_else(|| Problem::not_found("snapshot", snapshot))
    }

    pub(super) fn delete_snapshot(&self, snapshot: SnapshotId) {
        self.content().snapshots.remove(&snapshot);
    }

    pub(super) fn can_use(&self, disk: DiskId) -> bool {
        let content = self.content();
        let disk = content.disks.get(&disk);
        disk.is_some_and(|(report, _)| report.state == WorkState::Ready)
    }

    pub(super) fn import(
        &self,
        image: ImageId,
        command: &ImportImage,
    ) -> Result<ImageReport, Problem> {
        if let ImportSource::Path { path } = &command.source
            && path.ends_with("missing")
        {
            return Err(Problem::conflict("no-file", "there is no such file"));
        }
        let mut content = self.content();
        let ready = match command.source {
            ImportSource::Path { .. } => Instant::now() + WORK_TIME,
            // Until its bytes come.
            ImportSource::Upload { .. } => Instant::now() + Duration::from_secs(1_000_000),
        };
        let fresh = || {
            let report = ImageReport {
                image,
                state: working(),
                format: command.format.unwrap_or(DiskFormat::Qcow2),
                virtual_bytes: IMAGE_BYTES,
                file_bytes: Bytes(1 << 20),
                sha256: "0".repeat(64),
            };
            (report, ready)
        };
        Ok(content.images.entry(image).or_insert_with(fresh).0.clone())
    }

    pub(super) fn uploaded(&self, image: ImageId) -> Result<ImageReport, Problem> {
        let mut content = self.content();
        let known = content.images.get_mut(&image);
        let (report, at) = known.ok_or_else(|| Problem::not_found("image", image))?;
        *at = Instant::now();
        Ok(report.clone())
    }

    pub(super) fn image(&self, image: ImageId) -> Result<ImageReport, Problem> {
        let content = self.content();
        let known = content.images.get(&image);
        known
            .map(|(report, _)| report.clone())
            .ok_or_else(|| Problem::not_found("image", image))
    }

    pub(super) fn delete_image(&self, image: ImageId) -> Result<(), Problem> {
        let mut content = self.content();
        let based = |(report, _): &(DiskReport, Instant)| report.base == Some(image);
        assert!(
            !content.disks.values().any(based),
            "an image is deleted under a disk"
        );
        content.images.remove(&image);
        Ok(())
    }

    pub(super) fn create_disk(
        &self,
        disk: DiskId,
        command: &CreateDisk,
    ) -> Result<DiskReport, Problem> {
        let mut content = self.content();
        if let Some((known, _)) = content.disks.get(&disk) {
            return Ok(known.clone());
        }
        let base = match command.from {
            DiskOrigin::Image { image } => {
                let (image, _) = content
                    .images
                    .get(&image)
                    .ok_or_else(|| Problem::not_found("image", image))?;
                Some(image.image)
            }
            DiskOrigin::Blank | DiskOrigin::Disk { .. } => None,
        };
        let mut report = DiskReport {
            disk,
            state: working(),
            format: command.format,
            virtual_bytes: command.bytes.unwrap_or(IMAGE_BYTES),
            file_bytes: Bytes(1 << 16),
            base,
            made_for: command.made_for,
        };
        if let Some(reason) = content.fails.clone().filter(|_| !content.disks.is_empty()) {
            report.state = WorkState::Failed { reason };
            return Ok(report);
        }
        let entry = (report.clone(), Instant::now() + WORK_TIME);
        content.disks.insert(disk, entry);
        Ok(report)
    }

    pub(super) fn disk(&self, disk: DiskId) -> Result<DiskReport, Problem> {
        let content = self.content();
        let known = content.disks.get(&disk);
        known
            .map(|(report, _)| report.clone())
            .ok_or_else(|| Problem::not_found("disk", disk))
    }

    pub(super) fn grow(&self, disk: DiskId, command: &GrowDisk) -> Result<DiskReport, Problem> {
        let mut content = self.content();
        let known = content.disks.get_mut(&disk);
        let (report, _) = known.ok_or_else(|| Problem::not_found("disk", disk))?;
        assert!(command.bytes >= report.virtual_bytes, "a disk shrinks");
        report.virtual_bytes = command.bytes;
        Ok(report.clone())
    }

    pub(super) fn delete_disk(&self, disk: DiskId) -> Result<(), Problem> {
        let mut content = self.content();
        content.disks.remove(&disk);
        content.written.remove(&disk);
        Ok(())
    }

    /// Something is written to a disk by a VM.
    pub(super) fn write(&self, disk: DiskId) {
        let mut content = self.content();
        if content.disks.contains_key(&disk) {
            content.written.insert(disk);
        }
    }

    /// Whether a disk is whole by itself and nothing was ever written to it.
    pub(super) fn is_blank(&self, disk: DiskId) -> bool {
        let content = self.content();
        let known = content.disks.get(&disk);
        let alone = known.is_some_and(|(report, _)| report.base.is_none());
        alone && !content.written.contains(&disk)
    }

    /// Whether a disk is there and holds what was written to it.
    pub(super) fn is_written(&self, disk: DiskId) -> bool {
        self.content().written.contains(&disk)
    }
}
