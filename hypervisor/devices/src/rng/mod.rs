//! Entropy source (Virtual I/O Device specification 1.2, 5.4).
//!
//! The host's `getrandom` fills the buffers that the driver offers. One request gets at most [`MAX_REQUEST_BYTES`]
//! (the driver reads how many it got, and asks again), and a guest that asks without end gets [`BYTES_PER_SECOND`].

mod service;

use crate::counters::counters;
use crate::device::{
    Activation, DeviceError, DeviceKind, DeviceMetrics, QueuePosition, SavedBody, VirtioDevice,
};
use crate::device_thread::{DeviceThread, Health};
use serde::{Deserialize, Serialize};
use service::Service;
use std::io;
use std::sync::Arc;

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
    thread: DeviceThread<Service>,
}

#[derive(Debug, Serialize, Deserialize)]
struct Saved {
    version: u32,
    health: Health,
    #[serde(default)]
    counters: SavedCounters,
}

counters! {
    /// Requests that were filled.
    requests,
    /// Bytes in them.
    bytes,
    /// How often a request waited for the rate.
    throttled,
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
            thread: DeviceThread::new(NAME),
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
        drop(self.thread.stop());
        let start = activation.start;
        let Some(service) = Service::new(activation, self.counters.clone(), self.thread.restored())
            .map_err(|source| host("timerfd_create", source))?
        else {
            return Ok(());
        };
        self.thread.start(service, start)?;
        Ok(())
    }

    fn pause(&mut self) -> Result<Vec<QueuePosition>, DeviceError> {
        self.thread.pause()
    }

    fn resume(&mut self) -> Result<(), DeviceError> {
        self.thread.resume()
    }

    fn reset(&mut self) {
        self.thread.reset();
    }

    fn save(&self) -> Result<SavedBody, DeviceError> {
        SavedBody::serialized(&Saved {
            version: STATE_VERSION,
            health: self.thread.health()?,
            counters: self.counters.save(),
        })
        .map_err(bad_state)
    }

    fn restore(&mut self, saved: SavedBody) -> Result<(), DeviceError> {
        let saved: Saved = saved.deserialized().map_err(bad_state)?;
        if saved.version != STATE_VERSION {
            return Err(bad_state(format!("version {} is unknown", saved.version)));
        }
        self.thread.restore(saved.health);
        self.counters.restore(&saved.counters);
        Ok(())
    }

    fn metrics(&self) -> DeviceMetrics {
        self.counters.metrics()
    }
}

fn host(what: &str, source: io::Error) -> DeviceError {
    DeviceError::host(NAME, what, source)
}

fn bad_state(reason: impl ToString) -> DeviceError {
    DeviceError::bad_state(NAME, reason)
}

#[cfg(test)]
mod tests;
