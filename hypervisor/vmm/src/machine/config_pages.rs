//! PCI configuration space as memory that the guest only reads: a read costs nothing then, where it otherwise leaves the
//! guest, and a booting kernel reads a function's registers hundreds of times. Writes leave the guest as ever.

use super::layout::ECAM_START;
use crate::kvm::{self, VmFd};
use godwit_devices::pci::{CONFIG_BYTES, ConfigMirror, SLOTS};
use godwit_wire::unit::PAGE_BYTES;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use vm_memory::{Bytes as _, MmapRegion, VolatileMemory};

/// KVM's slots for them, behind those of RAM.
const FIRST_SLOT: u32 = 16;
/// From one device's function 0 to the next one's in ECAM.
const DEVICE_BYTES: u64 = 8 * PAGE_BYTES;

/// Whether the guest sees a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Page {
    /// Not yet.
    Hidden,
    Shown,
    /// Not any more.
    Withdrawn,
}

/// A page for every device of bus 0, of which the guest sees those that are shown.
#[derive(Debug)]
pub(super) struct ConfigPages {
    vm: Arc<VmFd>,
    pages: Mutex<[Page; SLOTS]>,
    region: MmapRegion,
}

impl ConfigPages {
    /// Pages that nobody sees yet; `None` when there is no memory for them, which only makes guests slower.
    pub(super) fn new(vm: Arc<VmFd>) -> Option<Self> {
        Some(Self {
            vm,
            pages: Mutex::new([Page::Hidden; SLOTS]),
            region: MmapRegion::new(SLOTS * PAGE_BYTES as usize).ok()?,
        })
    }

    fn pages(&self) -> MutexGuard<'_, [Page; SLOTS]> {
        self.pages.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self, slot: u8, registers: &[u8; CONFIG_BYTES]) {
        let start = usize::from(slot) * PAGE_BYTES as usize;
        let (words, _) = registers.as_chunks::<4>();
        for (number, word) in words.iter().enumerate() {
            // By words, because a guest that reads one on another vCPU must not see half of it.
            self.region
                .as_volatile_slice()
                .store(
                    u32::from_ne_bytes(*word),
                    start + 4 * number,
                    std::sync::atomic::Ordering::Relaxed,
                )
                .expect("a slot's page lies within the region");
        }
    }

    fn map(&self, slot: u8) -> Result<(), kvm::KvmError> {
        let host = self.region.as_ptr().addr() as u64;
        kvm::map_read_only(
            &self.vm,
            FIRST_SLOT + u32::from(slot),
            ECAM_START + u64::from(slot) * DEVICE_BYTES,
            host + u64::from(slot) * PAGE_BYTES,
            PAGE_BYTES,
        )
    }

    fn unmap(&self, slot: u8) {
        if let Err(error) = kvm::unmap(&self.vm, FIRST_SLOT + u32::from(slot)) {
            tracing::error!(slot, %error, "a page of configuration space stays in the guest");
        }
    }
}

impl ConfigMirror for ConfigPages {
    fn show(&self, slot: u8, registers: &[u8; CONFIG_BYTES]) {
        let mut pages = self.pages();
        let page = &mut pages[usize::from(slot)];
        if *page == Page::Withdrawn {
            return;
        }
        self.write(slot, registers);
        if *page == Page::Hidden {
            *page = match self.map(slot) {
                Ok(()) => Page::Shown,
                Err(error) => {
                    tracing::debug!(slot, %error, "reads of configuration space leave the guest");
                    Page::Withdrawn
                }
            };
        }
    }

    fn withdraw(&self, slot: u8) {
        let page = std::mem::replace(&mut self.pages()[usize::from(slot)], Page::Withdrawn);
        if page == Page::Shown {
            self.unmap(slot);
        }
    }
}

impl Drop for ConfigPages {
    /// The guest must not see what this process puts at these addresses next.
    fn drop(&mut self) {
        let pages = *self.pages();
        for (slot, page) in (0..).zip(pages) {
            if page == Page::Shown {
                self.unmap(slot);
            }
        }
    }
}
