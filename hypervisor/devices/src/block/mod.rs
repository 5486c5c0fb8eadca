//! The disk (virtio 1.2, 5.2): raw and qcow2 images, one queue, one thread.
//!
//! ```text
//! request   what a chain asks for: pure parsing
//! lock      the lock that keeps a disk from being written by two machines
//! image     raw files; opening                        qcow2   copy-on-write images
//! engine    the kernel's ring and a pool of threads   metrics
//! dirty     what the guest changes while the disk's content is copied to another host
//! shared    what the device, its thread and its handles share
//! service   chains in, statuses back: the device's thread
//! content   what is on the disk, on its way to or from another host
//! ```
//!
//! ```text
//!            open: the file is looked at, nothing is written
//!   closed ──────────────────────────────────────────────────▶ looked at ──claim(epoch)──▶ writable ──release──┐
//!                                                                  ▲                                           │
//!                                                                  └───────────────────────────────────────────┘
//! ```
//!
//! A disk with a lock may write only between claim and release, and opens its image anew when it is claimed: what the
//! machine's last host wrote up to its release is seen then, and nothing that was read before is believed. A disk
//! without a lock (read-only, or a file used by hand) is open for its whole life.

mod content;
mod dirty;
mod engine;
mod image;
mod lock;
mod metrics;
mod qcow2;
mod request;
mod service;
mod shared;
#[cfg(test)]
mod tests;

pub use content::{ArrivingDisk, ContentError, DiskContent, LEAST_WRITE_RATE, LeavingDisk};
pub use dirty::CLUSTER_BYTES;
pub use engine::{IoMode, MAX_POOL_THREADS};
pub use image::ImageError;
pub use lock::{CLAIM_ATTEMPTS, CLAIM_PAUSE, DiskLock, LockError, LockRecord};
pub use request::{
    ID_BYTES, Limits, MAX_DATA_SEGMENTS, MAX_RANGE_SECTORS, MAX_RANGES, NoStatus, Parsed, Range,
    Rejection, Request, SECTOR, STATUS_IOERR, STATUS_OK, STATUS_UNSUPP, parse,
};

use crate::device::{
    Activation, DeviceError, DeviceEvents, DeviceKind, DeviceMetrics, QueuePosition, SavedBody,
    Start, VirtioDevice,
};
use crate::limiter::Limiter;
use crate::sys::guest_io::Durability;
use crate::worker::Worker;
use engine::Engine;
use godwit_wire::devices::{DiskAccess, DiskFormat, DiskLimits, OnIoError};
use godwit_wire::id::{Epoch, VmId};
use godwit_wire::unit::Bytes;
use image::{Image, Opening};
use metrics::{Counters, SavedCounters};
use serde::{Deserialize, Serialize};
use service::{BlockService, Buckets, Parts};
use shared::Shared;
use std::error::Error;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::Instant;
use virtio_queue::QueueT;

/// Size of the request queue.
pub const QUEUE_SIZE: u16 = 256;
/// Version of the saved state.
const SAVED_VERSION: u32 = 1;
/// Longest error text that is passed on.
const MAX_SOURCES: usize = 8;

/// Feature bits (virtio 1.2, 5.2.3).
mod feature {
    pub(super) const SEG_MAX: u64 = 1 << 2;
    pub(super) const RO: u64 = 1 << 5;
    pub(super) const BLK_SIZE: u64 = 1 << 6;
    pub(super) const FLUSH: u64 = 1 << 9;
    pub(super) const TOPOLOGY: u64 = 1 << 10;
    pub(super) const DISCARD: u64 = 1 << 13;
    pub(super) const WRITE_ZEROES: u64 = 1 << 14;
}

/// What a disk is made from.
#[derive(Clone, Debug)]
pub struct BlockConfig {
    /// Name in the machine's spec; the guest sees it as serial number.
    pub name: String,
    /// The file.
    pub path: PathBuf,
    /// What is in it. Never guessed.
    pub format: DiskFormat,
    /// Whether the guest may write.
    pub access: DiskAccess,
    /// Rate limits.
    pub limits: DiskLimits,
    /// What an I/O error does.
    pub on_error: OnIoError,
    /// The lock file that a writer must hold; without it the disk may be written at once.
    pub lock: Option<PathBuf>,
    /// The machine, for the lock's record.
    pub vm: VmId,
}

/// A disk.
#[derive(Debug)]
pub struct Block {
    config: BlockConfig,
    io_mode: IoMode,
    shared: Arc<Shared>,
    worker: Option<Worker<BlockService>>,
    paused: bool,
    /// Chains of a restored state, until the device is activated.
    restored: Vec<u16>,
}

/// What a disk saves besides its queue.
#[derive(Debug, Serialize, Deserialize)]
struct Saved {
    version: u32,
    /// Heads of chains that were taken from the queue and are not used yet.
    pending: Vec<u16>,
    #[serde(default)]
    counters: SavedCounters,
}

impl Block {
    /// Looks at the image and takes nothing yet. `events` hears of stalls and broken drivers.
    pub fn open(config: BlockConfig, events: DeviceEvents) -> Result<Self, DeviceError> {
        Self::open_with(config, events, IoMode::Automatic)
    }

    /// As [`Self::open`], with a way to read and write raw files chosen by the caller.
    pub fn open_with(
        config: BlockConfig,
        events: DeviceEvents,
        io_mode: IoMode,
    ) -> Result<Self, DeviceError> {
        let unusable = |error: &dyn Error| DeviceError::Unusable {
            device: config.name.clone(),
            reason: told(error),
        };
        let writable = config.access == DiskAccess::ReadWrite;
        let lock = match (&config.lock, writable) {
            (Some(path), true) => {
                let lock = DiskLock::open(path, config.vm).map_err(|error| unusable(&error))?;
                Some(Arc::new(lock))
            }
            _ => None,
        };
        // A disk with a lock is opened for writing when it is claimed; whether that may work is seen now.
        if writable {
            image::open_file(&config.path, DiskAccess::ReadWrite)
                .map_err(|error| unusable(&error))?;
        }
        let opening = match (&lock, writable) {
            (None, true) => Opening::Writing(None),
            _ => Opening::Reading,
        };
        let image =
            Image::open(&config.path, config.format, &opening).map_err(|error| unusable(&error))?;
        let shared = Arc::new(Shared {
            name: config.name.clone(),
            capacity: AtomicU64::new(image.capacity()),
            writable,
            on_error: config.on_error,
            lock,
            image: Mutex::new(Some(Arc::new(image))),
            dirty: RwLock::new(None),
            interrupt: Mutex::new(None),
            counters: Counters::default(),
            events,
        });
        Ok(Self {
            config,
            io_mode,
            shared,
            worker: None,
            paused: false,
            restored: Vec::new(),
        })
    }

    /// A handle by which the disk is made larger while it works.
    pub fn resize_handle(&self) -> ResizeHandle {
        ResizeHandle {
            path: self.config.path.clone(),
            shared: Arc::clone(&self.shared),
        }
    }

    /// A way to what is on the disk, for whoever moves the machine to another host.
    pub fn content(&self) -> DiskContent {
        DiskContent {
            path: self.config.path.clone(),
            format: self.config.format,
            name: self.config.name.clone(),
            shared: Arc::downgrade(&self.shared),
        }
    }

    /// Size of the disk the guest sees.
    pub fn capacity(&self) -> Bytes {
        Bytes(self.shared.capacity.load(Ordering::Relaxed))
    }

    fn configuration(&self) -> [u8; 60] {
        let mut space = [0; 60];
        let mut put = |at: usize, bytes: &[u8]| space[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, &(self.capacity().0 / SECTOR).to_le_bytes());
        put(12, &MAX_DATA_SEGMENTS.to_le_bytes());
        put(20, &(SECTOR as u32).to_le_bytes());
        // Eight sectors to a physical block, aligned at 0; a block is also the best size to ask for.
        put(24, &[3, 0]);
        put(26, &1u16.to_le_bytes());
        put(28, &1u32.to_le_bytes());
        put(34, &1u16.to_le_bytes());
        if self.shared.writable {
            put(36, &MAX_RANGE_SECTORS.to_le_bytes());
            put(40, &MAX_RANGES.to_le_bytes());
            put(44, &8u32.to_le_bytes());
            put(48, &MAX_RANGE_SECTORS.to_le_bytes());
            put(52, &MAX_RANGES.to_le_bytes());
            put(56, &[1]);
        }
        space
    }

    fn failed(&self, error: &dyn Error) -> DeviceError {
        DeviceError::Unusable {
            device: self.config.name.clone(),
            reason: told(error),
        }
    }

    fn buckets(&self) -> Buckets {
        let bucket = |limit: Option<u64>| limit.map(|rate| Limiter::new(rate, Instant::now()));
        Buckets {
            requests: bucket(self.config.limits.requests_per_s),
            bytes: bucket(self.config.limits.bytes_per_s),
            writes: None,
        }
    }

    fn set_interrupt(&self, interrupt: Option<Arc<dyn crate::device::Interrupt>>) {
        let slot = &self.shared.interrupt;
        *slot.lock().unwrap_or_else(PoisonError::into_inner) = interrupt;
    }

    fn bad_state(&self, reason: impl ToString) -> DeviceError {
        DeviceError::bad_state(&self.config.name, reason)
    }

    /// Gives the lock up once `settle` has seen to it that the next holder finds everything.
    fn let_go(&self, settle: fn(&Image) -> std::io::Result<()>) -> Result<(), DeviceError> {
        let Some(lock) = &self.shared.lock else {
            return Ok(());
        };
        if let Some(image) = self.shared.image()
            && lock.check().is_ok()
        {
            settle(&image).map_err(|source| DeviceError::Host {
                device: self.config.name.clone(),
                what: format!("cannot flush {}", self.config.path.display()),
                source,
            })?;
        }
        self.shared.set_image(None);
        lock.release().map_err(|error| self.failed(&error))
    }
}

impl VirtioDevice for Block {
    fn name(&self) -> &str {
        &self.config.name
    }

    fn kind(&self) -> DeviceKind {
        DeviceKind::Block
    }

    fn features(&self) -> u64 {
        let common = feature::SEG_MAX | feature::BLK_SIZE | feature::FLUSH | feature::TOPOLOGY;
        match self.config.access {
            DiskAccess::ReadWrite => common | feature::DISCARD | feature::WRITE_ZEROES,
            DiskAccess::ReadOnly => common | feature::RO,
        }
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE]
    }

    fn read_config(&self, offset: u32, data: &mut [u8]) {
        let space = self.configuration();
        for (at, byte) in (offset as usize..).zip(data) {
            *byte = space.get(at).copied().unwrap_or(0);
        }
    }

    fn write_config(&mut self, _: u32, _: &[u8]) {}

    fn activate(&mut self, activation: Activation) -> Result<(), DeviceError> {
        let Activation {
            memory,
            queues,
            features,
            interrupt,
            start,
        } = activation;
        // A driver may leave the only queue out: then there is nothing to do until it comes back with one.
        let Some(active) = queues.into_iter().find(|queue| queue.index == 0) else {
            return Ok(());
        };
        let size = active.queue.size();
        let restored = std::mem::take(&mut self.restored);
        if restored.iter().any(|head| *head >= size) {
            return Err(self.bad_state("an unfinished request is outside the queue"));
        }
        let engine =
            Engine::new(memory.clone(), size, self.io_mode).map_err(|error| self.failed(&error))?;
        self.set_interrupt(Some(Arc::clone(&interrupt)));
        let service = BlockService::new(Parts {
            shared: Arc::clone(&self.shared),
            memory,
            active,
            interrupt,
            engine,
            durability: match features & feature::FLUSH {
                // A driver that cannot flush relies on every write being durable (virtio 1.2, 5.2.6.2).
                0 => Durability::AtOnce,
                _ => Durability::AfterFlush,
            },
            buckets: self.buckets(),
            restored,
        })
        .map_err(|error| self.failed(&error))?;
        let name = format!("disk-{}", self.config.name);
        let worker = Worker::start(&name, service, start);
        self.worker = Some(worker.map_err(|error| self.failed(&error))?);
        self.paused = start == Start::Paused;
        Ok(())
    }

    fn pause(&mut self) -> Result<Vec<QueuePosition>, DeviceError> {
        let Some(worker) = &self.worker else {
            return Ok(Vec::new());
        };
        worker.pause().map_err(|error| self.failed(&error))?;
        let position = worker
            .call(|service| service.active().position())
            .map_err(|error| self.failed(&error))?;
        self.paused = true;
        Ok(vec![position])
    }

    fn resume(&mut self) -> Result<(), DeviceError> {
        if let Some(worker) = &self.worker {
            worker.resume().map_err(|error| self.failed(&error))?;
        }
        self.paused = false;
        Ok(())
    }

    fn reset(&mut self) {
        if let Some(worker) = self.worker.take()
            && let Some(mut service) = worker.stop()
        {
            service.settle();
        }
        self.set_interrupt(None);
        self.paused = false;
        self.restored.clear();
    }

    fn save(&self) -> Result<SavedBody, DeviceError> {
        let pending = match &self.worker {
            Some(worker) => worker
                .call(|service| service.pending())
                .map_err(|error| self.failed(&error))?,
            None => self.restored.clone(),
        };
        // A copy of the file that is taken with the saved machine should hold everything; a disk without room for it
        // is saved all the same.
        if self.shared.writable
            && let Some(image) = self.shared.image()
            && let Err(error) = image.write_back()
        {
            tracing::warn!(device = self.config.name, %error, "an image's tables are not written back");
        }
        let saved = Saved {
            version: SAVED_VERSION,
            pending,
            counters: self.shared.counters.save(),
        };
        SavedBody::serialized(&saved).map_err(|error| self.failed(&error))
    }

    fn restore(&mut self, saved: SavedBody) -> Result<(), DeviceError> {
        let Saved {
            version,
            pending,
            counters,
        } = saved
            .deserialized()
            .map_err(|error| self.bad_state(error))?;
        if version != SAVED_VERSION {
            return Err(self.bad_state(format!(
                "it has version {version}, and this is {SAVED_VERSION}"
            )));
        }
        let mut seen = std::collections::BTreeSet::new();
        if pending.len() > usize::from(QUEUE_SIZE)
            || !pending
                .iter()
                .all(|head| *head < QUEUE_SIZE && seen.insert(*head))
        {
            return Err(self.bad_state("its unfinished requests are not those of one queue"));
        }
        self.restored = pending;
        self.shared.counters.restore(&counters);
        Ok(())
    }

    fn claim(&mut self, epoch: Epoch) -> Result<(), DeviceError> {
        claim_image(&self.shared, (&self.config.path, self.config.format), epoch)
    }

    fn flush(&self) -> Result<(), DeviceError> {
        match self.shared.image() {
            Some(image) if self.shared.writable => {
                image.flush().map_err(|error| self.failed(&error))
            }
            _ => Ok(()),
        }
    }

    fn release(&mut self) -> Result<(), DeviceError> {
        // The next host has a file of its own. This one is given up with the machine, or goes on being used by it.
        if self.shared.noted().is_some() {
            return Ok(());
        }
        // The next host must find everything in the file; what cannot be flushed keeps the machine here.
        self.let_go(Image::flush)
    }

    fn step_aside(&mut self) -> Result<(), DeviceError> {
        // Both processes see the file through the same cache: the guest does not stand still for the disk.
        self.let_go(Image::write_back)
    }

    fn metrics(&self) -> DeviceMetrics {
        self.shared.counters.metrics()
    }
}

/// Takes the lock of a disk, if it has one, under `epoch`, and opens its image anew.
fn claim_image(
    shared: &Shared,
    (path, format): (&Path, DiskFormat),
    epoch: Epoch,
) -> Result<(), DeviceError> {
    let Some(lock) = shared.lock.clone() else {
        return Ok(());
    };
    let failed = |error: &dyn Error| DeviceError::Unusable {
        device: shared.name.clone(),
        reason: told(error),
    };
    // Held all along: what is only in this process must be in the file before that is read anew. A lock that was
    // lost, or not taken yet, fails the check.
    if lock.check().is_ok()
        && let Some(image) = shared.image()
    {
        image.write_back().map_err(|error| failed(&error))?;
    }
    lock.claim(epoch).map_err(|error| DeviceError::Held {
        device: shared.name.clone(),
        reason: told(&error),
    })?;
    let opening = Opening::Writing(Some(Arc::clone(&lock)));
    match Image::open(path, format, &opening) {
        Ok(image) => {
            shared.capacity.store(image.capacity(), Ordering::Relaxed);
            shared.set_image(Some(Arc::new(image)));
            Ok(())
        }
        Err(error) => {
            let _ = lock.release();
            Err(failed(&error))
        }
    }
}

/// Makes a disk larger while it works.
#[derive(Clone, Debug)]
pub struct ResizeHandle {
    path: PathBuf,
    shared: Arc<Shared>,
}

impl ResizeHandle {
    /// Makes the disk `size` large, which must be a whole number of sectors, and tells the guest. A file that was
    /// grown already is taken as it is. Never makes it smaller.
    pub fn resize(&self, size: Bytes) -> Result<(), DeviceError> {
        let unusable = |reason: String| DeviceError::Unusable {
            device: self.shared.name.clone(),
            reason,
        };
        // Held to the end: no copy of the disk begins while its size changes.
        let noted = self.shared.noted();
        if noted.is_some() {
            return Err(unusable(
                "its content is on its way to another host; repeat this when the migration is over"
                    .to_owned(),
            ));
        }
        let capacity = self.shared.capacity.load(Ordering::Relaxed);
        if !size.0.is_multiple_of(SECTOR) {
            return Err(unusable(format!(
                "{} bytes are no whole number of 512-byte sectors; round up",
                size.0
            )));
        }
        if size.0 < capacity {
            return Err(unusable(format!(
                "a disk of {capacity} bytes cannot shrink to {} bytes: make a new one and copy",
                size.0
            )));
        }
        if size > godwit_wire::storage::MAX_DISK {
            return Err(unusable(format!(
                "{} bytes are more than a disk has",
                size.0
            )));
        }
        let Some(image) = self.shared.image() else {
            return Err(unusable("the disk is not open on this host".to_owned()));
        };
        if self.shared.writable {
            if let Some(lock) = &self.shared.lock {
                lock.check().map_err(|error| DeviceError::Held {
                    device: self.shared.name.clone(),
                    reason: told(&error),
                })?;
            }
            image
                .grow(&self.path, size.0)
                .map_err(|error| unusable(told(&error)))?;
        }
        let grown = image.capacity();
        if grown < size.0 {
            return Err(unusable(format!(
                "{} has {grown} bytes; grow it to {} first",
                self.path.display(),
                size.0
            )));
        }
        self.shared.capacity.store(grown, Ordering::Relaxed);
        let slot = self.shared.interrupt.lock();
        let interrupt = slot.unwrap_or_else(PoisonError::into_inner).clone();
        if let Some(interrupt) = interrupt
            && grown != capacity
        {
            interrupt.config();
        }
        Ok(())
    }
}

/// An error with what lies under it, in one line.
fn told(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    for _ in 0..MAX_SOURCES {
        let Some(found) = source else { break };
        text.push_str(": ");
        text.push_str(&found.to_string());
        source = found.source();
    }
    text
}
