//! Machines that stand still for want of room: they run again by themselves once their pool has some. And disks that
//! grow under a running machine.

use super::Resize;
use super::driver::{Driver, News};
use super::handover::not_running;
use crate::storage::{Room, RoomStep, RoomWatch, Storage, StorageError, room_at};
use godwit_wire::devices::DiskSource;
use godwit_wire::problem::Problem;
use godwit_wire::vmm_api::{PauseReason, ResizeDisk, VmmInfo, VmmState};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::mpsc;
use tokio::time::Instant;
use tokio_util::task::AbortOnDropHandle;

/// First and longest pause between two looks at a pool's room; nothing announces that there is some.
const FIRST_PAUSE: Duration = Duration::from_secs(1);
const LONGEST_PAUSE: Duration = Duration::from_secs(10);
/// A machine that has run for this long since it was resumed is well again.
const WELL_AFTER: Duration = Duration::from_secs(300);

/// What a driver knows of its machine's want of room.
#[derive(Debug, Default)]
pub(super) struct RoomKeeper {
    watch: RoomWatch,
    resumed: Option<Instant>,
    /// Looks at the pool as long as the machine waits.
    looker: Option<AbortOnDropHandle<()>>,
}

impl Driver {
    /// The disk that a paused machine waits for.
    fn stalled_disk(&self) -> Option<&str> {
        let live = self.live()?;
        match &live.state {
            VmmState::Paused {
                reason: PauseReason::Storage { disk, .. },
            } if live.stopping.is_none() && self.handover().is_none() => Some(disk),
            _ => None,
        }
    }

    /// Begins to look for room when the machine waits for it, and ends when it does not.
    pub(super) fn watch_room(&mut self) {
        let Some(disk) = self.stalled_disk() else {
            self.room.looker = None;
            return;
        };
        if self.room.looker.is_some() {
            return;
        }
        let disk = disk.to_owned();
        let spec = self.holding.as_ref().map(|holding| &holding.record.spec);
        let source = spec
            .and_then(|spec| spec.devices.disks.iter().find(|found| found.name == disk))
            .map(|found| found.source.clone());
        let Some(source) = source else { return };
        if self
            .room
            .resumed
            .is_some_and(|at| at.elapsed() >= WELL_AFTER)
        {
            self.room.watch.forget();
        }
        tracing::warn!(vm = %self.vm, disk, "the VM stands still until its disk can be written; looking for room");
        let storage = self.context.storage.clone();
        let looking = keep_looking(storage, source, self.news.clone());
        self.room.looker = Some(AbortOnDropHandle::new(tokio::spawn(looking)));
    }

    pub(super) async fn room_seen(&mut self, room: Room) {
        if self.stalled_disk().is_none() {
            self.room.looker = None;
            return;
        }
        let Some(epoch) = self.holding.as_ref().map(|holding| holding.record.epoch) else {
            return;
        };
        if self.room.watch.look(room) == RoomStep::Wait {
            return;
        }
        self.room.looker = None;
        self.room.resumed = Some(Instant::now());
        match self.post_command(epoch, "/v1/resume").await {
            Ok(()) => {
                tracing::info!(vm = %self.vm, free = %room.free, "the VM runs again: there is room")
            }
            Err(problem) => {
                tracing::warn!(vm = %self.vm, %problem, "the VM could not be resumed although there is room");
            }
        }
    }

    /// Makes a disk of the machine larger; its VMM has the file.
    pub(super) async fn resize(&mut self, ask: Resize) -> Result<(), Problem> {
        self.nothing_moves()?;
        let holding = self.holding.as_ref();
        let epoch = holding.map(|holding| holding.record.epoch);
        let live = self.live().zip(epoch);
        let (live, epoch) = live.ok_or_else(|| not_running(self.vm))?;
        let vmm = live.vmm.clone();
        let request = ResizeDisk {
            epoch,
            bytes: ask.bytes,
        };
        let path = format!("/v1/disks/{}/resize", ask.disk);
        let _: VmmInfo = self.vmm_answer(vmm.post(&path, &request)).await?;
        tracing::info!(vm = %self.vm, disk = ask.disk, size = %ask.bytes, "a disk has grown");
        Ok(())
    }
}

async fn keep_looking(storage: Arc<Storage>, source: DiskSource, news: mpsc::Sender<News>) {
    let mut pause = FIRST_PAUSE;
    loop {
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(LONGEST_PAUSE);
        let (storage, source) = (storage.clone(), source.clone());
        let looked = tokio::task::spawn_blocking(move || room_of(&storage, &source)).await;
        match looked {
            Ok(Ok(room)) => {
                if news.send(News::Room(room)).await.is_err() {
                    return;
                }
            }
            Ok(Err(error)) => tracing::debug!(%error, "the room of a pool cannot be seen"),
            Err(error) => tracing::error!(%error, "the room of a pool cannot be seen"),
        }
    }
}

fn room_of(storage: &Storage, source: &DiskSource) -> Result<Room, StorageError> {
    let at = |path: &Path| {
        room_at(path).map_err(|error| StorageError::io("examine", path, "of the disk", error))
    };
    match source {
        DiskSource::Volume { pool, disk } => at(&storage.locate(*pool, *disk)?.path),
        DiskSource::File { path, .. } => at(path),
    }
}
