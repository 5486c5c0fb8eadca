//! Entropy source (Virtual I/O Device specification 1.2, 5.4).
//!
//! The host's `getrandom` fills the buffers that the driver offers. One request gets at most [`MAX_REQUEST_BYTES`]
//! (the driver reads how many it got, and asks again), and a guest that asks without end gets [`BYTES_PER_SECOND`].

mod service;

use crate::device::{
    Activation, DeviceError, DeviceKind, DeviceMetrics, QueuePosition, SavedBody, Start,
    VirtioDevice,
};
use crate::worker::{Worker, WorkerError};
use serde::{Deserialize, Serialize};
use service::Service;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// Most bytes that one request gets.
pub const MAX_REQUEST_BYTES: usize = 4096;
/// Bytes that a guest gets per second in the long run. Linux reads 64 bytes every few seconds.
pub const BYTES_PER_SECOND: u64 = 1 << 20;

const NAME: &str = "rng";
const QUEUE_SIZES: [u16; 1] = [64];
const STATE_VERSION: u32 = 1;

/// The device.
#[derive(Debug)]
pub struct Rng {
    counters: Arc<Counters>,
    worker: Option<Worker<Service>>,
    /// Whether a restored state says that the driver broke the rules before it was saved.
    restored: Health,
}

/// Whether the driver has kept the rules.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Health {
    #[default]
    Well,
    /// It has not; nothing is served until a reset.
    Failed,
}

#[derive(Debug, Serialize, Deserialize)]
struct Saved {
    version: u32,
    health: Health,
}

#[derive(Debug, Default)]
struct Counters {
    requests: AtomicU64,
    bytes: AtomicU64,
    throttled: AtomicU64,
}

impl Rng {
    /// A device whose driver has not come yet.
    ///
    /// # Errors
    /// When the host has no entropy to give.
    pub fn new() -> Result<Self, DeviceError> {
        let mut probe = [0; 1];
        service::fill(&mut probe).map_err(|source| host("getrandom", source))?;
        Ok(Self {
            counters: Arc::default(),
            worker: None,
            restored: Health::Well,
        })
    }
}

impl VirtioDevice for Rng {
    fn name(&self) -> &str {
        NAME
    }

    fn kind(&self) -> DeviceKind {
        DeviceKind::Rng
    }

    fn features(&self) -> u64 {
        0
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn read_config(&self, _offset: u32, data: &mut [u8]) {
        data.fill(0);
    }

    fn write_config(&mut self, _offset: u32, _data: &[u8]) {}

    fn activate(&mut self, activation: Activation) -> Result<(), DeviceError> {
        self.worker = None;
        let start = activation.start;
        let Some(service) = Service::new(activation, self.counters.clone(), self.restored)
            .map_err(|source| host("timerfd_create", source))?
        else {
            return Ok(());
        };
        let worker = match start {
            Start::Working => Worker::start(NAME, service),
            Start::Paused => Worker::start_quiesced(NAME, service),
        };
        self.worker = Some(worker.map_err(thread)?);
        Ok(())
    }

    fn pause(&mut self) -> Result<Vec<QueuePosition>, DeviceError> {
        let Some(worker) = &self.worker else {
            return Ok(Vec::new());
        };
        worker.pause().map_err(thread)?;
        let position = worker.call(|service| service.position()).map_err(thread)?;
        Ok(vec![position])
    }

    fn resume(&mut self) -> Result<(), DeviceError> {
        self.worker
            .as_ref()
            .map_or(Ok(()), |worker| worker.resume().map_err(thread))
    }

    fn reset(&mut self) {
        self.worker = None;
        self.restored = Health::Well;
    }

    fn save(&self) -> Result<SavedBody, DeviceError> {
        let health = match &self.worker {
            Some(worker) => worker.call(|service| service.health()).map_err(thread)?,
            None => self.restored,
        };
        SavedBody::serialized(&Saved {
            version: STATE_VERSION,
            health,
        })
        .map_err(bad_state)
    }

    fn restore(&mut self, saved: SavedBody) -> Result<(), DeviceError> {
        let saved: Saved = saved.deserialized().map_err(bad_state)?;
        if saved.version != STATE_VERSION {
            return Err(bad_state(format!("version {} is unknown", saved.version)));
        }
        self.restored = saved.health;
        Ok(())
    }

    fn metrics(&self) -> DeviceMetrics {
        let of = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        vec![
            ("requests", of(&self.counters.requests)),
            ("bytes", of(&self.counters.bytes)),
            ("throttled", of(&self.counters.throttled)),
        ]
    }
}

fn host(what: &str, source: io::Error) -> DeviceError {
    DeviceError::Host {
        device: NAME.into(),
        what: what.into(),
        source,
    }
}

fn thread(error: WorkerError) -> DeviceError {
    host("its thread", io::Error::other(error))
}

fn bad_state(reason: impl ToString) -> DeviceError {
    DeviceError::BadState {
        device: NAME.into(),
        reason: reason.to_string(),
    }
}

#[cfg(test)]
mod tests;
