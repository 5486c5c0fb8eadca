//! Memory balloon (Virtual I/O Device specification 1.2, 5.5): takes memory back that the guest does not need.
//!
//! ```text
//! inflate    the operator asks for memory: the guest gives pages up, and they go back to the host
//! deflate    the guest takes pages again: it may touch them, and the host gives fresh ones
//! report     the guest says what is free at the moment: that goes back too, and nobody has to ask
//! stats      what the guest knows about its memory, asked for when somebody reads the metrics
//! ```
//!
//! Pages go back by punching holes into the file behind guest memory, so they read as zeros when the guest touches
//! them again. Memory without a shared file behind it (a snapshot that is mapped privately) is only counted.
//!
//! # Live migration
//!
//! A punched page was given up by the guest: it holds nothing the guest relies on until the guest writes it again,
//! and that write is in KVM's dirty log. (A guest that relies on free pages keeping their content, because it
//! poisons or zeroes them when they are freed, must not report them unless the device offers
//! `VIRTIO_BALLOON_F_PAGE_POISON` (5.5.6.4), which it does not.) So it would be safe to let the target keep what was
//! sent before the punch. The device nevertheless marks punched pages as written, after they are punched: the source
//! then sends them once more, as zeros, and both sides end up with equal memory, which lets their hashes be compared.
//! A migration's first round sends whatever the file holds at that time, so marks from before it say nothing new.
//! Who remembers which parts of the file are holes is told through [`Balloon::on_discard`]; what is a hole there can
//! have become data again, never the other way round without such a call.
//!
//! Punching and sending may meet: the sender reads the page before, and the mark comes after, so it is sent again;
//! in the last round the device is paused.

mod discard;
mod service;
mod stats;

#[cfg(test)]
mod tests;

use crate::counters::counters;
use crate::device::{
    Activation, DeviceError, DeviceKind, DeviceMetrics, Interrupt, QueuePosition, SavedBody,
    VirtioDevice,
};
use crate::device_thread::{DeviceThread, Health};
use godwit_wire::unit::{Bytes, Mib, PAGE_BYTES};
use serde::{Deserialize, Serialize};
use service::Service;
use stats::Stats;
use std::fmt;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Feature bit: the guest waits for the device's answer before it uses a page of the balloon again.
const MUST_TELL_HOST: u64 = 1 << 0;
/// Feature bit: the guest gives statistics.
const STATS: u64 = 1 << 1;
/// Feature bit: a guest that runs out of memory takes some from the balloon instead of killing processes.
const DEFLATE_ON_OOM: u64 = 1 << 2;
/// Feature bit: the guest reports free pages.
const REPORTING: u64 = 1 << 5;

/// Inflate, deflate, statistics; then reporting. The specification numbers queues by what they are for, so that the
/// reporting queue is 4 although there is no queue 3 (free page hints); Linux counted only the queues it uses until
/// 6.11, so that it was 3, or 2 without statistics. All of these work.
const QUEUE_SIZES: [u16; 5] = [128, 128, 8, 64, 64];
/// `num_pages` and `actual`, each 32 bits; fields of features that are not offered read as zero.
const CONFIG_BYTES: usize = 8;
const ACTUAL_OFFSET: u32 = 4;

const NAME: &str = "balloon";
const STATE_VERSION: u32 = 1;

/// Told about memory that was given back: its guest physical address and its length in bytes.
pub type DiscardHook = Arc<dyn Fn(u64, u64) + Send + Sync>;

/// The device.
pub struct Balloon {
    shared: Arc<Shared>,
    hook: Option<DiscardHook>,
    thread: DeviceThread<Service>,
}

/// The operator's side.
#[derive(Clone, Debug)]
pub struct BalloonControl(Arc<Shared>);

/// What the device, its thread and the operator all see.
#[derive(Debug, Default)]
struct Shared {
    memory_pages: u32,
    /// Pages the guest shall give up.
    target_pages: AtomicU32,
    /// Pages the guest says it has given up.
    actual_pages: AtomicU32,
    driver: Mutex<Option<Arc<dyn Interrupt>>>,
    stats: Mutex<Stats>,
    counters: Counters,
}

counters! {
    /// Pages the guest gave up.
    inflated_pages,
    /// Pages it took again.
    deflated_pages,
    /// Memory it reported as free.
    reported_bytes,
    /// Memory that went back to the host.
    discarded_bytes,
    /// How often the host did not take memory back.
    discard_failures,
    /// Pages the driver named that are no memory.
    foreign_pages,
}

#[derive(Debug, Serialize, Deserialize)]
struct Saved {
    version: u32,
    health: Health,
    target_pages: u32,
    actual_pages: u32,
    #[serde(default)]
    counters: SavedCounters,
}

impl fmt::Debug for Balloon {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Balloon")
            .field("shared", &self.shared)
            .finish_non_exhaustive()
    }
}

impl Balloon {
    /// An empty balloon in a machine with so much memory.
    pub fn new(memory_size: Bytes) -> (Self, BalloonControl) {
        let shared = Arc::new(Shared {
            memory_pages: u32::try_from(memory_size.0 / PAGE_BYTES).unwrap_or(u32::MAX),
            ..Shared::default()
        });
        let device = Self {
            shared: shared.clone(),
            hook: None,
            thread: DeviceThread::new(NAME),
        };
        (device, BalloonControl(shared))
    }

    /// Calls `hook` after memory was given back, from the device's thread. Set before the driver comes.
    pub fn on_discard(&mut self, hook: DiscardHook) {
        self.hook = Some(hook);
    }
}

impl BalloonControl {
    /// Asks the guest to live with so much memory; its full size empties the balloon. The guest gives what it can
    /// spare, in its own time.
    pub fn keep(&self, memory: Mib) {
        let kept = u32::try_from(memory.bytes().0 / PAGE_BYTES).unwrap_or(u32::MAX);
        let target = self.0.memory_pages.saturating_sub(kept);
        self.0.target_pages.store(target, Ordering::Release);
        if let Some(driver) = self.0.driver().as_ref() {
            driver.config();
        }
    }

    /// Memory the guest has at the moment.
    pub fn actual(&self) -> Mib {
        let given = self.0.actual_pages.load(Ordering::Acquire);
        let left = self.0.memory_pages.saturating_sub(given);
        Bytes(u64::from(left) * PAGE_BYTES).mib()
    }
}

impl Shared {
    fn driver(&self) -> MutexGuard<'_, Option<Arc<dyn Interrupt>>> {
        self.driver.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn stats(&self) -> MutexGuard<'_, Stats> {
        self.stats.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn config(&self) -> [u8; CONFIG_BYTES] {
        let mut config = [0; CONFIG_BYTES];
        let (target, actual) = config.split_at_mut(ACTUAL_OFFSET as usize);
        target.copy_from_slice(&self.target_pages.load(Ordering::Acquire).to_le_bytes());
        actual.copy_from_slice(&self.actual_pages.load(Ordering::Acquire).to_le_bytes());
        config
    }
}

impl VirtioDevice for Balloon {
    fn name(&self) -> &str {
        NAME
    }

    fn kind(&self) -> DeviceKind {
        DeviceKind::Balloon
    }

    fn features(&self) -> u64 {
        MUST_TELL_HOST | STATS | DEFLATE_ON_OOM | REPORTING
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn read_config(&self, offset: u32, data: &mut [u8]) {
        let config = self.shared.config();
        for (byte, at) in data.iter_mut().zip(offset as usize..) {
            *byte = config.get(at).copied().unwrap_or(0);
        }
    }

    fn write_config(&mut self, offset: u32, data: &[u8]) {
        // The driver may write only `actual`, and writes it whole.
        if let (ACTUAL_OFFSET, Ok(bytes)) = (offset, data.try_into()) {
            let actual = u32::from_le_bytes(bytes).min(self.shared.memory_pages);
            self.shared.actual_pages.store(actual, Ordering::Release);
        }
    }

    fn activate(&mut self, activation: Activation) -> Result<(), DeviceError> {
        drop(self.thread.stop());
        let start = activation.start;
        let interrupt = activation.interrupt.clone();
        let service = Service::new(
            activation,
            self.shared.clone(),
            self.hook.clone(),
            self.thread.restored(),
        );
        self.thread.start(service, start)?;
        *self.shared.driver() = Some(interrupt);
        Ok(())
    }

    fn pause(&mut self) -> Result<Vec<QueuePosition>, DeviceError> {
        self.thread.pause()
    }

    fn resume(&mut self) -> Result<(), DeviceError> {
        self.thread.resume()
    }

    fn reset(&mut self) {
        *self.shared.driver() = None;
        self.thread.reset();
        *self.shared.stats() = Stats::default();
        // The guest that comes next uses all of its memory until it gives some up itself.
        self.shared.actual_pages.store(0, Ordering::Release);
    }

    fn save(&self) -> Result<SavedBody, DeviceError> {
        SavedBody::serialized(&Saved {
            version: STATE_VERSION,
            health: self.thread.health()?,
            target_pages: self.shared.target_pages.load(Ordering::Acquire),
            actual_pages: self.shared.actual_pages.load(Ordering::Acquire),
            counters: self.shared.counters.save(),
        })
        .map_err(bad_state)
    }

    fn restore(&mut self, saved: SavedBody) -> Result<(), DeviceError> {
        let saved: Saved = saved.deserialized().map_err(bad_state)?;
        if saved.version != STATE_VERSION {
            return Err(bad_state(format!("version {} is unknown", saved.version)));
        }
        let most = self.shared.memory_pages;
        for (what, pages) in [
            ("be given up", saved.target_pages),
            ("have been given up", saved.actual_pages),
        ] {
            if pages > most {
                return Err(bad_state(format!(
                    "{pages} pages shall {what} of a machine's {most}"
                )));
            }
        }
        self.thread.restore(saved.health);
        self.shared.counters.restore(&saved.counters);
        self.shared
            .target_pages
            .store(saved.target_pages, Ordering::Release);
        self.shared
            .actual_pages
            .store(saved.actual_pages, Ordering::Release);
        Ok(())
    }

    fn metrics(&self) -> DeviceMetrics {
        let pages = |counter: &AtomicU32| u64::from(counter.load(Ordering::Acquire)) * PAGE_BYTES;
        let mut metrics = vec![
            ("target_bytes", pages(&self.shared.target_pages)),
            ("actual_bytes", pages(&self.shared.actual_pages)),
        ];
        metrics.extend(self.shared.counters.metrics());
        metrics.extend(self.shared.stats().metrics());
        // What the guest answers is there the next time; a thread that has ended cannot ask.
        let _ = self.thread.call(|service| service.ask_for_stats());
        metrics
    }
}

fn bad_state(reason: impl ToString) -> DeviceError {
    DeviceError::bad_state(NAME, reason)
}
