//! Virtio devices and the PCI bus they sit on, without KVM: what they need of it (interrupts, doorbells) comes in
//! through traits, so that every device can be driven, fuzzed and measured without a virtual machine.
//!
//! ```text
//! memory   guest memory, and which pages devices wrote
//! chain    bounded walks over descriptor chains a hostile guest may have written
//! sys      the only unsafe code: ioctls and rings of the kernel
//! device   what a virtio device is to its transport
//! counters what devices count
//! golden   saved states as text, for tests
//! worker   the thread a device works on
//! device_thread  that thread, from one driver to the next
//! limiter  token buckets for rate limits
//! rng console balloon vsock block net   the devices
//! pci      configuration space, MSI-X, the virtio-pci transport
//! mock     a driver without a guest, for tests, benchmarks and fuzz targets
//! skip     tests that cannot run here
//! ```
//!
//! A module uses only the modules above it in this list, and no device uses another.

mod sys;

pub mod memory;

pub mod device;

mod counters;

#[cfg(test)]
mod golden;

pub mod chain;

pub mod worker;

mod device_thread;

pub mod limiter;

pub mod block;

pub mod pci;

pub mod rng;

pub mod balloon;

pub mod console;

#[cfg(any(test, feature = "test-support"))]
pub mod mock;

#[cfg(any(test, feature = "test-support"))]
pub mod skip;

pub mod net;

pub mod vsock;
