//! Console (Virtual I/O Device specification 1.2, 5.3): one port, `/dev/hvc0` in Linux.
//!
//! ```text
//! operator ── ConsoleInput::send ──▶ bounded buffer ──▶ receive queue ──▶ guest
//! operator ◀────────── output ◀────────────────────── transmit queue ◀── guest
//! ```
//!
//! Input waits in the buffer until the guest offers room; what does not fit is refused, all of it, so that the
//! sender knows. It travels with the machine. Output goes to a writer that must not block; what it does not take is
//! lost and counted, because a console nobody reads must not stop the guest.

mod service;

#[cfg(test)]
mod tests;

use crate::counters::counters;
use crate::device::{
    Activation, DeviceError, DeviceKind, DeviceMetrics, QueuePosition, SavedBody, VirtioDevice,
};
use crate::device_thread::{DeviceThread, Health};
use serde::{Deserialize, Serialize};
use service::Service;
use std::collections::VecDeque;
use std::fmt;
use std::io::{self, Write};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use vmm_sys_util::eventfd::EventFd;

/// Most input that waits for the guest.
pub const MAX_INPUT_BYTES: usize = 64 * 1024;

const NAME: &str = "console";
/// Receive, transmit.
const QUEUE_SIZES: [u16; 2] = [64, 64];
const STATE_VERSION: u32 = 1;

/// The device.
pub struct VirtioConsole {
    shared: Arc<Shared>,
    /// Where the guest's output goes; with the thread while there is one.
    output: Option<Output>,
    thread: DeviceThread<Service>,
}

/// Types into the console.
#[derive(Clone, Debug)]
pub struct ConsoleInput(Arc<Shared>);

/// The guest has not read enough of its input to take more.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "the guest has left {waiting} bytes of console input unread, and {MAX_INPUT_BYTES} is the limit"
)]
pub struct Full {
    /// Bytes that wait.
    pub waiting: usize,
}

/// The sink, which is not `Debug`.
struct Output(Box<dyn Write + Send>);

#[derive(Debug, Default)]
struct Shared {
    input: Mutex<Input>,
    counters: Counters,
}

/// Input on its way to the guest.
#[derive(Debug, Default)]
struct Input {
    waiting: VecDeque<u8>,
    /// Wakes the thread; there while the driver is ready.
    bell: Option<EventFd>,
}

counters! {
    /// Input the guest has taken.
    input_bytes,
    /// Input that was refused because too much waited.
    refused_input_bytes,
    /// What the guest said.
    output_bytes,
    /// What it said and nobody took.
    lost_output_bytes,
}

#[derive(Debug, Serialize, Deserialize)]
struct Saved {
    version: u32,
    health: Health,
    /// Input the guest has not taken yet.
    input: Vec<u8>,
    #[serde(default)]
    counters: SavedCounters,
}

impl fmt::Debug for VirtioConsole {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("VirtioConsole")
            .field("shared", &self.shared)
            .finish_non_exhaustive()
    }
}

impl VirtioConsole {
    /// A console whose output goes to `output`, which must not block.
    pub fn new(output: Box<dyn Write + Send>) -> (Self, ConsoleInput) {
        let shared = Arc::<Shared>::default();
        let device = Self {
            shared: shared.clone(),
            output: Some(Output(output)),
            thread: DeviceThread::new(NAME),
        };
        (device, ConsoleInput(shared))
    }

    /// Ends the thread and takes the output back from it.
    fn stop(&mut self) {
        self.shared.input().bell = None;
        if let Some(service) = self.thread.stop() {
            self.output = Some(service.into_output());
        }
    }
}

impl ConsoleInput {
    /// Hands all of `bytes` to the guest, or none of them. Before the guest has a driver they wait for it.
    pub fn send(&self, bytes: &[u8]) -> Result<(), Full> {
        let mut input = self.0.input();
        let waiting = input.waiting.len();
        if bytes.len() > MAX_INPUT_BYTES - waiting {
            let counter = &self.0.counters.refused_input_bytes;
            counter.add(bytes.len() as u64);
            return Err(Full { waiting });
        }
        input.waiting.extend(bytes);
        if let Some(bell) = &input.bell {
            // It fails only when the counter is full, and then the thread is about to wake anyway.
            let _ = bell.write(1);
        }
        Ok(())
    }

    /// Whether the guest has a driver for the console.
    pub fn is_active(&self) -> bool {
        self.0.input().bell.is_some()
    }
}

impl Shared {
    fn input(&self) -> MutexGuard<'_, Input> {
        self.input.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl VirtioDevice for VirtioConsole {
    fn name(&self) -> &str {
        NAME
    }

    fn kind(&self) -> DeviceKind {
        DeviceKind::Console
    }

    fn features(&self) -> u64 {
        0
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    /// Size, number of ports and emergency writes belong to features that are not offered.
    fn read_config(&self, _offset: u32, data: &mut [u8]) {
        data.fill(0);
    }

    fn write_config(&mut self, _offset: u32, _data: &[u8]) {}

    fn activate(&mut self, activation: Activation) -> Result<(), DeviceError> {
        self.stop();
        let bell = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)
            .map_err(|source| host("eventfd", source))?;
        let theirs = bell.try_clone().map_err(|source| host("eventfd", source))?;
        // The output is gone only when its thread has died with it.
        let output = self
            .output
            .take()
            .unwrap_or_else(|| Output(Box::new(io::sink())));
        let start = activation.start;
        let service = Service::new(
            activation,
            self.shared.clone(),
            output,
            theirs,
            self.thread.restored(),
        );
        self.thread.start(service, start)?;
        let mut input = self.shared.input();
        // For what was typed before there was a bell.
        let _ = bell.write(1);
        input.bell = Some(bell);
        Ok(())
    }

    fn pause(&mut self) -> Result<Vec<QueuePosition>, DeviceError> {
        self.thread.pause()
    }

    fn resume(&mut self) -> Result<(), DeviceError> {
        self.thread.resume()
    }

    fn reset(&mut self) {
        self.stop();
        self.thread.reset();
    }

    fn save(&self) -> Result<SavedBody, DeviceError> {
        SavedBody::serialized(&Saved {
            version: STATE_VERSION,
            health: self.thread.health()?,
            input: self.shared.input().waiting.iter().copied().collect(),
            counters: self.shared.counters.save(),
        })
        .map_err(bad_state)
    }

    fn restore(&mut self, saved: SavedBody) -> Result<(), DeviceError> {
        let saved: Saved = saved.deserialized().map_err(bad_state)?;
        if saved.version != STATE_VERSION {
            return Err(bad_state(format!("version {} is unknown", saved.version)));
        }
        if saved.input.len() > MAX_INPUT_BYTES {
            return Err(bad_state(format!(
                "{} bytes of input wait, and {MAX_INPUT_BYTES} is the limit",
                saved.input.len()
            )));
        }
        self.thread.restore(saved.health);
        self.shared.counters.restore(&saved.counters);
        self.shared.input().waiting = saved.input.into();
        Ok(())
    }

    fn metrics(&self) -> DeviceMetrics {
        self.shared.counters.metrics()
    }
}

fn host(what: &str, source: io::Error) -> DeviceError {
    DeviceError::host(NAME, what, source)
}

fn bad_state(reason: impl ToString) -> DeviceError {
    DeviceError::bad_state(NAME, reason)
}
