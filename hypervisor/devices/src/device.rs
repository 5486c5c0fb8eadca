//! What a virtio device is to the transport it sits behind (Virtual I/O Device specification 1.2, chapters 2–5).
//!
//! ```text
//!              activate (driver set DRIVER_OK)                 pause: in-flight work is finished
//!   reset ───────────────────────────────────────▶ working ◀──────────────────────────────────▶ paused
//!     ▲                                               │           resume: every queue is looked at    │
//!     └───────────────────────────────────────────────┴────────────────── reset ─────────────────────┘
//! ```
//!
//! A device that meets something no correct driver does (a chain that loops, a length past the end, an address
//! outside memory) stops, and says so through [`Interrupt::needs_reset`]; it never panics, never blocks and never
//! writes where the driver did not ask it to. Its state is lost only by a reset.

use crate::memory::GuestMemory;
use godwit_wire::id::Epoch;
use serde::{Deserialize, Serialize};
use std::fmt::Debug;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use virtio_queue::Queue;
use vmm_sys_util::eventfd::EventFd;

/// Device-specific state, tagged by field name so that later versions can add to it.
pub type SavedBody = ciborium::Value;

/// Kinds of device, with their virtio device ids.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[repr(u16)]
pub enum DeviceKind {
    /// Network card.
    Net = 1,
    /// Disk.
    Block = 2,
    /// Console.
    Console = 3,
    /// Entropy source.
    Rng = 4,
    /// Memory balloon.
    Balloon = 5,
    /// Sockets between guest and host.
    Vsock = 19,
}

/// Why a device cannot do what it was asked by its own side (never by the guest).
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// Something on the host could not be opened or used.
    #[error("{device}: {what}")]
    Host {
        /// Name of the device in the machine's spec.
        device: String,
        /// What was tried, with its operands.
        what: String,
        /// What the host said.
        #[source]
        source: std::io::Error,
    },
    /// A configuration that cannot be.
    #[error("{device}: {reason}")]
    Unusable {
        /// Name of the device in the machine's spec.
        device: String,
        /// What is wrong, and what would be right.
        reason: String,
    },
    /// Another holder has what only one may have, or had it later.
    #[error("{device}: {reason}")]
    Held {
        /// Name of the device in the machine's spec.
        device: String,
        /// Who holds it.
        reason: String,
    },
    /// A saved state that this device cannot have.
    #[error("{device}: the saved state is not usable: {reason}")]
    BadState {
        /// Name of the device in the machine's spec.
        device: String,
        /// What is wrong with it.
        reason: String,
    },
}

impl DeviceError {
    /// Name of the device in the machine's spec.
    pub fn device(&self) -> &str {
        match self {
            Self::Host { device, .. }
            | Self::Unusable { device, .. }
            | Self::Held { device, .. }
            | Self::BadState { device, .. } => device,
        }
    }

    /// Something on the host could not be opened or used.
    pub(crate) fn host(device: &str, what: &str, source: std::io::Error) -> Self {
        Self::Host {
            device: device.to_owned(),
            what: what.to_owned(),
            source,
        }
    }

    /// A saved state that this device cannot have.
    pub(crate) fn bad_state(device: &str, reason: impl ToString) -> Self {
        Self::BadState {
            device: device.to_owned(),
            reason: reason.to_string(),
        }
    }
}

/// How a device speaks to its driver. Implemented by the transport; cheap to call.
pub trait Interrupt: Send + Sync + Debug {
    /// Used buffers are in queue `index`.
    fn queue(&self, index: u16);
    /// The device's configuration has changed.
    fn config(&self);
    /// The driver broke the rules, as `why` says; the device has stopped until it is reset.
    fn needs_reset(&self, why: &str);
}

/// One virtqueue that the driver has set up.
#[derive(Debug)]
pub struct ActiveQueue {
    /// Its number.
    pub index: u16,
    /// The ring, at the position where the device goes on.
    pub queue: Queue,
    /// Signalled when the driver has made buffers available.
    pub kick: EventFd,
}

/// Where a device stopped in a virtqueue.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct QueuePosition {
    /// The queue's number.
    pub index: u16,
    /// Next available entry the device will take.
    pub next_avail: u16,
    /// Next used entry the device will write.
    pub next_used: u16,
}

impl ActiveQueue {
    /// Where the device stands in it.
    pub fn position(&self) -> QueuePosition {
        use virtio_queue::QueueT;
        QueuePosition {
            index: self.index,
            next_avail: self.queue.next_avail(),
            next_used: self.queue.next_used(),
        }
    }
}

/// Whether an activated device works at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Start {
    /// The driver is running: work.
    Working,
    /// The machine was restored: wait for [`VirtioDevice::resume`].
    Paused,
}

/// Where a device has from what a host gives only once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Plug {
    /// It opens it itself.
    Opened,
    /// Another process of this host has it open and lends it: see [`VirtioDevice::inherit`].
    Inherited,
}

/// What a device gets when its driver is ready.
#[derive(Debug)]
pub struct Activation {
    /// Guest memory.
    pub memory: GuestMemory,
    /// The queues the driver enabled, by ascending index.
    pub queues: Vec<ActiveQueue>,
    /// Feature bits the driver accepted.
    pub features: u64,
    /// Speaks to the driver.
    pub interrupt: Arc<dyn Interrupt>,
    /// Whether to work at once.
    pub start: Start,
}

/// Counters of one device, by metric name (`read_bytes`, `rx_packets`, …).
pub type DeviceMetrics = Vec<(&'static str, u64)>;

/// A virtio device.
///
/// The transport offers `VIRTIO_F_VERSION_1`, `VIRTIO_F_RING_EVENT_IDX` and `VIRTIO_F_INDIRECT_DESC` for every
/// device and calls the methods from one thread at a time.
pub trait VirtioDevice: Send + Debug {
    /// Name in the machine's spec: `rng`, or what the operator called the disk.
    fn name(&self) -> &str;

    /// What it is.
    fn kind(&self) -> DeviceKind;

    /// Feature bits of its own that it offers. The same on every host for the same spec.
    fn features(&self) -> u64;

    /// Largest size of each of its queues: powers of two.
    fn queue_sizes(&self) -> &[u16];

    /// Reads its configuration space; what lies past its end reads as zero.
    fn read_config(&self, offset: u32, data: &mut [u8]);

    /// The driver writes its configuration space; what cannot be written is ignored.
    fn write_config(&mut self, offset: u32, data: &[u8]);

    /// The driver is ready.
    fn activate(&mut self, activation: Activation) -> Result<(), DeviceError>;

    /// Stops all work: when it returns, nothing is in flight, and neither guest memory nor anything on the host is
    /// touched until [`Self::resume`]. Gives the positions of all queues. Pausing twice is pausing once, and a
    /// device that is not active gives no positions.
    fn pause(&mut self) -> Result<Vec<QueuePosition>, DeviceError>;

    /// Goes on after [`Self::pause`], and looks at every queue: doorbells may have been lost.
    fn resume(&mut self) -> Result<(), DeviceError>;

    /// Back to the state before [`Self::activate`]; whatever was in flight is finished or dropped.
    fn reset(&mut self);

    /// State besides queues and registers, with its version. The device is paused.
    fn save(&self) -> Result<SavedBody, DeviceError>;

    /// Takes over a saved state, before [`Self::activate`]. It may come from a hostile sender.
    fn restore(&mut self, saved: SavedBody) -> Result<(), DeviceError>;

    /// Takes what only one machine may hold (a disk's lock) under this epoch. Called before the machine runs, also
    /// after [`Self::release`].
    fn claim(&mut self, epoch: Epoch) -> Result<(), DeviceError> {
        let _ = epoch;
        Ok(())
    }

    /// Makes sure that what the driver was told is written outlives a power cut of the host. The device is paused.
    fn flush(&self) -> Result<(), DeviceError> {
        Ok(())
    }

    /// Gives up what [`Self::claim`] took: the machine is paused and may go on elsewhere.
    fn release(&mut self) -> Result<(), DeviceError> {
        Ok(())
    }

    /// As [`Self::release`], but the machine goes on in another process of this host: that one must find everything
    /// in the host's files, which need not be on their disk for it.
    fn step_aside(&mut self) -> Result<(), DeviceError> {
        self.release()
    }

    /// Descriptors of what a host gives only once (a tap's queues, a listening socket), for the process that takes the
    /// machine over on this host. The device is paused, and goes on as it was if nothing comes of it.
    fn lend(&self) -> Result<Vec<OwnedFd>, DeviceError> {
        Ok(Vec::new())
    }

    /// Takes what the same device of the machine's former process has lent, before [`Self::restore`].
    fn inherit(&mut self, lent: Vec<OwnedFd>) -> Result<(), DeviceError> {
        match lent.len() {
            0 => Ok(()),
            count => Err(DeviceError::bad_state(
                self.name(),
                format!("it has no use for {count} descriptors"),
            )),
        }
    }

    /// The machine has arrived on another host and runs: tell the network, and the guest.
    fn announce(&mut self) {}

    /// Counters since the device was made, wherever its machine has been since.
    fn metrics(&self) -> DeviceMetrics;
}

/// What a device reports to the machine by itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DeviceEvent {
    /// It cannot go on without losing the guest's data (the pool is full, say); the machine must stand still. The
    /// requests are kept and tried again on resume.
    Stalled {
        /// Name of the device.
        device: String,
        /// What stands in the way.
        reason: String,
    },
    /// The driver broke the rules and the device has stopped.
    Failed {
        /// Name of the device.
        device: String,
        /// What it did.
        reason: String,
    },
}

/// Where devices report to.
pub type DeviceEvents = Arc<dyn Fn(DeviceEvent) + Send + Sync>;
