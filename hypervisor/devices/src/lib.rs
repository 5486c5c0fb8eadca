//! Virtio devices and the PCI bus they sit on, without KVM: what they need of it (interrupts, doorbells) comes in
//! through traits, so that every device can be driven, fuzzed and measured without a virtual machine.
//!
//! ```text
//! sys      the only unsafe code: ioctls and rings of the kernel
//! memory   guest memory, and which pages devices wrote
//! device   what a virtio device is to its transport
//! chain    bounded walks over descriptor chains a hostile guest may have written
//! worker   the thread a device works on
//! limiter  token buckets for rate limits
//! rng console balloon vsock block net   the devices
//! pci      configuration space, MSI-X, the virtio-pci transport
//! ```
//!
//! A module uses only the modules above it in this list, and no device uses another.

mod sys;

pub mod memory;

pub mod device;

pub mod worker;

pub mod limiter;
