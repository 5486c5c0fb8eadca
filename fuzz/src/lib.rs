//! What each fuzz target does with its bytes. A body asserts what must hold whatever the bytes are; everything else
//! that can go wrong (a panic, a hang, a bad access) the fuzzer sees by itself.
//!
//! ```text
//! input     takes numbers and bytes off the input
//! hostile   drives a whole device with rings the input wrote
//! ```

pub mod block;
pub mod chain;
pub mod devices;
mod hostile;
mod input;
pub mod migration;
pub mod net;
pub mod pci;
pub mod qcow2;
pub mod vmm_api;
