//! A disk's content on its way to or from another host, while the machine is moved.
//!
//! ```text
//! source:  working ──leave──▶ tracked: what the guest changes is noted ──end, or dropped──▶ working
//! target:  looked at ──arrive(epoch)──▶ filling ──seal: durable──▶ looked at; then claimed as any other disk
//! ```
//!
//! What leaves is read through the image as the guest reads it, so that copies on write and their bases arrive as one.
//! A leaving disk stays this host's while it is paused for the hand-over ([`release`] gives nothing up): nobody else has
//! the file, and if the machine stays here it goes on with it.
//!
//! A leaving disk keeps nothing of the device open, its lock least of all: the machine may be built anew at any moment,
//! and has to get it. An arriving disk shares its device's image until it is sealed, and the device's lock until it is
//! dropped.
//!
//! [`release`]: crate::device::VirtioDevice::release

use super::dirty::{CLUSTER_BYTES, Dirty};
use super::image::{Image, Opening};
use super::lock::{DiskLock, LockError};
use super::request::{Range, SECTOR};
use super::shared::Shared;
use super::{claim_image, told};
use crate::device::DeviceError;
use godwit_wire::devices::DiskFormat;
use godwit_wire::id::Epoch;
use godwit_wire::unit::Bytes;
use std::io;
use std::path::PathBuf;
use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError, RwLock, Weak};

/// No disk is slowed down below this many bytes per second: its guest would take it for broken.
pub const LEAST_WRITE_RATE: u64 = 256 << 10;

/// The content of a travelling disk cannot be read or written.
#[derive(Debug, thiserror::Error)]
pub enum ContentError {
    /// The machine is gone.
    #[error("disk {disk} is no longer open on this host")]
    Gone {
        /// Name in the machine's spec.
        disk: String,
    },
    /// It was made durable already.
    #[error("content of disk {disk} came after the last round")]
    Sealed {
        /// Name in the machine's spec.
        disk: String,
    },
    /// It is another's by now.
    #[error("disk {disk} may not be written: {source}")]
    Overtaken {
        /// Name in the machine's spec.
        disk: String,
        /// Whose it is.
        source: LockError,
    },
    /// The host said no.
    #[error("disk {disk} cannot be {what} at byte {offset}: {source}")]
    Io {
        /// Name in the machine's spec.
        disk: String,
        /// What was tried.
        what: &'static str,
        /// Where.
        offset: u64,
        /// What the host said.
        source: io::Error,
    },
    /// Its tables or its last bytes may not have reached the disk.
    #[error("disk {disk} cannot be made durable: {reason}")]
    NotDurable {
        /// Name in the machine's spec.
        disk: String,
        /// Why.
        reason: String,
    },
}

/// A way to a disk's content, for whoever moves the machine.
#[derive(Clone, Debug)]
pub struct DiskContent {
    pub(super) path: PathBuf,
    pub(super) format: DiskFormat,
    pub(super) name: String,
    pub(super) shared: Weak<Shared>,
}

impl DiskContent {
    fn shared(&self) -> Result<Arc<Shared>, DeviceError> {
        self.shared
            .upgrade()
            .ok_or_else(|| self.unusable("it is no longer open on this host"))
    }

    fn unusable(&self, reason: impl ToString) -> DeviceError {
        DeviceError::Unusable {
            device: self.name.clone(),
            reason: reason.to_string(),
        }
    }

    /// From here on what the guest changes is noted. A migration that is still ending has no say any more.
    pub fn leave(&self) -> Result<LeavingDisk, DeviceError> {
        let shared = self.shared()?;
        // A disk that is being made larger has its new size or refuses it when this is held.
        let mut slot = shared.dirty.write().unwrap_or_else(PoisonError::into_inner);
        let bytes = shared.capacity.load(Ordering::Relaxed);
        let dirty = Arc::new(Dirty::new(bytes));
        *slot = Some(Arc::clone(&dirty));
        Ok(LeavingDisk {
            name: self.name.clone(),
            bytes,
            dirty,
            shared: self.shared.clone(),
        })
    }

    /// Takes the disk for content that comes under the source's `epoch`. Nothing of it may be in use.
    pub fn arrive(&self, epoch: Epoch) -> Result<ArrivingDisk, DeviceError> {
        let shared = self.shared()?;
        let image = match shared.writable {
            true => {
                claim_image(&shared, (&self.path, self.format), epoch)?;
                shared
                    .image()
                    .ok_or_else(|| self.unusable("it is not open on this host"))?
            }
            // What the guest may only read must be written once all the same.
            false => {
                let opened = Image::open(&self.path, self.format, &Opening::Writing(None));
                Arc::new(opened.map_err(|error| self.unusable(told(&error)))?)
            }
        };
        Ok(ArrivingDisk {
            bytes: shared.capacity.load(Ordering::Relaxed),
            content: self.clone(),
            lock: shared.lock.clone(),
            image: RwLock::new(Some(image)),
        })
    }
}

/// A disk whose content goes to another host while the guest works with it. Dropping it ends that.
#[derive(Debug)]
pub struct LeavingDisk {
    name: String,
    bytes: u64,
    dirty: Arc<Dirty>,
    shared: Weak<Shared>,
}

impl LeavingDisk {
    /// Name in the machine's spec.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Size as the guest sees it; it stays so.
    pub const fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Number of clusters of [`CLUSTER_BYTES`], the last of which may be shorter.
    pub const fn clusters(&self) -> u64 {
        self.bytes.div_ceil(CLUSTER_BYTES)
    }

    /// One bit per cluster that the guest has changed since it was cleared, in words of 64.
    pub fn changed(&self) -> Vec<u64> {
        self.dirty.words()
    }

    /// These clusters are about to be read: what the guest changes from here on is noted anew.
    pub fn clear(&self, clusters: std::ops::Range<u64>) {
        self.dirty.clear(clusters);
    }

    /// What the guest has written or zeroed since it began, in bytes.
    pub fn written_bytes(&self) -> u64 {
        self.dirty.written_bytes()
    }

    /// Holds the guest's writes to this many bytes per second, but not below [`LEAST_WRITE_RATE`].
    pub fn limit_writes(&self, bytes_per_s: u64) {
        self.dirty.limit_writes(bytes_per_s.max(LEAST_WRITE_RATE));
    }

    /// Fills `buffer` with what the guest would read from byte `offset` on. The image is asked for each time: it is
    /// opened anew when the machine goes on after a pause, and what is written from then on only the new one knows.
    pub fn read(&self, offset: u64, buffer: &mut [u8]) -> Result<(), ContentError> {
        self.image()?
            .read_at(buffer, offset)
            .map_err(|source| self.failed(offset, source))
    }

    /// The first stretch from `offset` on that may hold anything but zeros, in whole sectors.
    pub fn next_data(&self, offset: u64) -> Result<Option<std::ops::Range<u64>>, ContentError> {
        let found = self
            .image()?
            .next_data(offset, self.bytes)
            .map_err(|source| self.failed(offset, source))?;
        Ok(found.map(|data| {
            let start = data.start / SECTOR * SECTOR;
            start.max(offset)..data.end.next_multiple_of(SECTOR).min(self.bytes)
        }))
    }

    /// Nothing is noted any more, and no write held back.
    pub fn end(&self) {
        let Some(shared) = self.shared.upgrade() else {
            return;
        };
        let mut slot = shared.dirty.write().unwrap_or_else(PoisonError::into_inner);
        // A later migration's notes are not this one's to end.
        if slot
            .as_ref()
            .is_some_and(|dirty| Arc::ptr_eq(dirty, &self.dirty))
        {
            *slot = None;
        }
    }

    fn image(&self) -> Result<Arc<Image>, ContentError> {
        let shared = self.shared.upgrade();
        shared
            .and_then(|shared| shared.image())
            .ok_or_else(|| ContentError::Gone {
                disk: self.name.clone(),
            })
    }

    fn failed(&self, offset: u64, source: io::Error) -> ContentError {
        ContentError::Io {
            disk: self.name.clone(),
            what: "read",
            offset,
            source,
        }
    }
}

impl Drop for LeavingDisk {
    fn drop(&mut self) {
        self.end();
    }
}

/// A disk that is filled with what comes from another host.
#[derive(Debug)]
pub struct ArrivingDisk {
    bytes: u64,
    content: DiskContent,
    lock: Option<Arc<DiskLock>>,
    /// None once it is sealed.
    image: RwLock<Option<Arc<Image>>>,
}

impl ArrivingDisk {
    /// Name in the machine's spec.
    pub fn name(&self) -> &str {
        &self.content.name
    }

    /// Size as the guest will see it.
    pub const fn bytes(&self) -> Bytes {
        Bytes(self.bytes)
    }

    /// Writes `content` at byte `offset`. Several threads may, each elsewhere.
    pub fn write(&self, offset: u64, content: &[u8]) -> Result<(), ContentError> {
        self.with_image(|image| {
            image
                .write_at(content, offset)
                .map_err(|source| self.failed("written", offset, source))
        })
    }

    /// Makes `bytes` bytes from `offset` on read as zeros. What does already is left alone, so that a disk stays as
    /// thin as it was.
    pub fn zero(&self, offset: u64, bytes: u64) -> Result<(), ContentError> {
        let end = offset.saturating_add(bytes).min(self.bytes);
        self.with_image(|image| {
            let mut next = offset;
            while next < end {
                let failed = |source| self.failed("zeroed", next, source);
                let Some(data) = image.next_data(next, end).map_err(failed)? else {
                    break;
                };
                let stop = data.end.min(end);
                let start = data.start.max(next);
                image
                    .make_zero(Range {
                        offset: start,
                        bytes: stop - start,
                    })
                    .map_err(failed)?;
                next = stop;
            }
            Ok(())
        })
    }

    /// Makes durable what has come so far.
    pub fn flush(&self) -> Result<(), ContentError> {
        self.with_image(|image| image.flush().map_err(|error| self.not_durable(&error)))
    }

    /// Makes durable what has come, which was all: nothing is written from here on. Done once it has succeeded, so that
    /// it may be said twice. When it fails, nobody knows what of the content is durable, which trying again does not
    /// change: the migration ends.
    pub fn seal(&self) -> Result<(), ContentError> {
        let mut slot = self.image.write().unwrap_or_else(PoisonError::into_inner);
        let Some(image) = &*slot else {
            return Ok(());
        };
        self.check_lock()?;
        image.flush().map_err(|error| self.not_durable(&error))?;
        *slot = None;
        // A disk that is never claimed was opened when it was blank.
        let DiskContent { path, format, .. } = &self.content;
        if let Some(shared) = self.content.shared.upgrade()
            && !shared.writable
        {
            let opened = Image::open(path, *format, &Opening::Reading);
            let image = opened.map_err(|error| self.not_durable(&error))?;
            shared.set_image(Some(Arc::new(image)));
        }
        Ok(())
    }

    fn with_image(
        &self,
        act: impl FnOnce(&Image) -> Result<(), ContentError>,
    ) -> Result<(), ContentError> {
        let slot = self.image.read().unwrap_or_else(PoisonError::into_inner);
        let Some(image) = &*slot else {
            return Err(ContentError::Sealed {
                disk: self.content.name.clone(),
            });
        };
        self.check_lock()?;
        act(image)
    }

    fn check_lock(&self) -> Result<(), ContentError> {
        let checked = self.lock.as_ref().map_or(Ok(()), |lock| lock.check());
        checked.map_err(|source| ContentError::Overtaken {
            disk: self.content.name.clone(),
            source,
        })
    }

    fn failed(&self, what: &'static str, offset: u64, source: io::Error) -> ContentError {
        ContentError::Io {
            disk: self.content.name.clone(),
            what,
            offset,
            source,
        }
    }

    fn not_durable(&self, error: &dyn std::error::Error) -> ContentError {
        ContentError::NotDurable {
            disk: self.content.name.clone(),
            reason: told(error),
        }
    }
}
