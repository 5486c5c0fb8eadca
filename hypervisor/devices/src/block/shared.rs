//! What a disk, its thread and its resize handle share.

use super::dirty::Dirty;
use super::image::Image;
use super::lock::DiskLock;
use super::metrics::Counters;
use super::request::Limits;
use crate::device::{DeviceEvents, Interrupt};
use godwit_wire::devices::OnIoError;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock, RwLockReadGuard};

/// What the device and its thread share.
pub(crate) struct Shared {
    pub(crate) name: String,
    /// Size of the disk, in bytes.
    pub(crate) capacity: AtomicU64,
    pub(crate) writable: bool,
    pub(crate) on_error: OnIoError,
    pub(crate) lock: Option<Arc<DiskLock>>,
    /// The image; none while the disk belongs to another host.
    pub(crate) image: Mutex<Option<Arc<Image>>>,
    /// What the guest has changed, while the disk's content is on its way to another host.
    pub(crate) dirty: RwLock<Option<Arc<Dirty>>>,
    pub(crate) interrupt: Mutex<Option<Arc<dyn Interrupt>>>,
    pub(super) counters: Counters,
    pub(crate) events: DeviceEvents,
}

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Shared")
            .field("name", &self.name)
            .field("capacity", &self.capacity)
            .field("image", &self.image)
            .finish_non_exhaustive()
    }
}

impl Shared {
    pub(crate) fn image(&self) -> Option<Arc<Image>> {
        self.image
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    pub(crate) fn set_image(&self, image: Option<Arc<Image>>) {
        *self.image.lock().unwrap_or_else(PoisonError::into_inner) = image;
    }

    /// What is noted of changes; while it is held, that neither begins nor ends.
    pub(crate) fn noted(&self) -> RwLockReadGuard<'_, Option<Arc<Dirty>>> {
        self.dirty.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// What the driver may ask for.
    pub(crate) fn limits(&self) -> Limits {
        Limits {
            capacity: self.capacity.load(Ordering::Relaxed),
            writable: self.writable,
        }
    }
}
