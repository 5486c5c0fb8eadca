//! What a device's own threads reach of its transport. It has locks of its own, held for a few instructions each, so
//! that a device may speak while its transport waits for it.

use super::common::{Live, NO_VECTOR};
use super::msix::Msix;
use crate::device::{DeviceEvent, DeviceEvents, Interrupt};
use std::fmt;
use std::sync::atomic::{AtomicU8, AtomicU16, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

const ISR_QUEUE: u8 = 1;
const ISR_CONFIG: u8 = 2;

/// Interrupts of one function, and whether its device has given up on the driver.
pub(super) struct Signals {
    device: String,
    events: DeviceEvents,
    msix: Mutex<Msix>,
    queue_vectors: Box<[AtomicU16]>,
    config_vector: AtomicU16,
    generation: AtomicU8,
    isr: AtomicU8,
    broken: Mutex<Option<String>>,
}

impl fmt::Debug for Signals {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Signals")
            .field("device", &self.device)
            .finish_non_exhaustive()
    }
}

impl Signals {
    pub(super) fn new(device: String, queues: usize, msix: Msix, events: DeviceEvents) -> Self {
        Self {
            device,
            events,
            msix: Mutex::new(msix),
            queue_vectors: (0..queues).map(|_| AtomicU16::new(NO_VECTOR)).collect(),
            config_vector: AtomicU16::new(NO_VECTOR),
            generation: AtomicU8::new(0),
            isr: AtomicU8::new(0),
            broken: Mutex::new(None),
        }
    }

    pub(super) fn msix(&self) -> MutexGuard<'_, Msix> {
        self.msix.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn set_queue_vector(&self, index: u16, vector: u16) {
        if let Some(slot) = self.queue_vectors.get(usize::from(index)) {
            slot.store(vector, Ordering::SeqCst);
        }
    }

    pub(super) fn set_config_vector(&self, vector: u16) {
        self.config_vector.store(vector, Ordering::SeqCst);
    }

    /// Reading the interrupt status clears it (virtio 1.2, 4.1.4.5).
    pub(super) fn take_isr(&self) -> u8 {
        self.isr.swap(0, Ordering::SeqCst)
    }

    pub(super) fn live(&self) -> Live {
        Live {
            generation: self.generation.load(Ordering::SeqCst),
            needs_reset: self.broken().is_some(),
        }
    }

    /// Why the device has given up on its driver.
    pub(super) fn broken(&self) -> MutexGuard<'_, Option<String>> {
        self.broken.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The state that a driver's reset leaves; the MSI-X table belongs to the bus and stays.
    pub(super) fn reset(&self) {
        for vector in &self.queue_vectors {
            vector.store(NO_VECTOR, Ordering::SeqCst);
        }
        self.set_config_vector(NO_VECTOR);
        self.isr.store(0, Ordering::SeqCst);
        *self.broken() = None;
    }

    /// Generation, interrupt status and what is broken, for saving.
    pub(super) fn save(&self) -> (u8, u8, Option<String>) {
        (
            self.generation.load(Ordering::SeqCst),
            self.isr.load(Ordering::SeqCst),
            self.broken().clone(),
        )
    }

    pub(super) fn restore(&self, generation: u8, isr: u8, broken: Option<String>) {
        self.generation.store(generation, Ordering::SeqCst);
        self.isr
            .store(isr & (ISR_QUEUE | ISR_CONFIG), Ordering::SeqCst);
        *self.broken() = broken;
    }

    fn raise(&self, vector: u16, isr: u8) {
        self.isr.fetch_or(isr, Ordering::SeqCst);
        if vector != NO_VECTOR {
            self.msix().signal(vector);
        }
    }
}

impl Interrupt for Signals {
    fn queue(&self, index: u16) {
        if let Some(vector) = self.queue_vectors.get(usize::from(index)) {
            self.raise(vector.load(Ordering::SeqCst), ISR_QUEUE);
        }
    }

    fn config(&self) {
        self.generation.fetch_add(1, Ordering::SeqCst);
        self.raise(self.config_vector.load(Ordering::SeqCst), ISR_CONFIG);
    }

    fn needs_reset(&self, why: &str) {
        {
            let mut broken = self.broken();
            if broken.is_some() {
                return;
            }
            *broken = Some(why.to_owned());
        }
        // The driver learns it as a change of configuration (virtio 1.2, 2.1.2).
        self.config();
        (self.events)(DeviceEvent::Failed {
            device: self.device.clone(),
            reason: why.to_owned(),
        });
    }
}
