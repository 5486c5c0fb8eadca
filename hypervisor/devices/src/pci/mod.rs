//! The PCI bus of a machine and the virtio-pci transport (Virtual I/O Device specification 1.2, section 4.1).
//!
//! ```text
//! platform   what the bus needs of the hypervisor: interrupt lines and doorbells
//! config     configuration space of one function: bytes, and which bits the guest may write
//! msix       MSI-X table and pending bits
//! common     the common configuration structure: features, status, queues (pure)
//! signals    what a device's threads reach of its transport: interrupts and "needs reset"
//! virtio     a virtio device as a PCI function
//! saved      a function as it travels
//! bus        bus 0: ECAM and the functions' memory
//! ```
//!
//! A module uses only the modules above it in this list. Only modern (non-transitional) devices with MSI-X: there
//! are neither I/O ports nor interrupt pins.

mod bus;
mod common;
mod config;
mod msix;
mod platform;
mod saved;
mod signals;
mod virtio;

pub use bus::{PciBus, SLOTS};
pub use common::{MAX_QUEUES, QueueRegisters};
pub use config::CONFIG_BYTES;
pub use platform::{ConfigMirror, InterruptLine, MsiMessage, Platform};
pub use saved::{SAVED_FUNCTION_VERSION, SavedFunction};
pub use virtio::{BAR_BYTES, VirtioPci};
