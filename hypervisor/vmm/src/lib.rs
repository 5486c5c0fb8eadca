//! One virtual machine in one process.
//!
//! ```text
//! kvm        the only ioctls: VM, vCPUs, dirty log, CPU features, saved state
//! memory     guest RAM: layout, resident ranges, hashing; the lease page
//! devices    serial port, power ports, I/O bus
//! machine    boot, vCPU threads, the machine as a whole
//! migration  live migration: pure deciders, source, target
//! succession another process of this host takes the machine over, its memory as it is
//! snapshot   a machine as files: saving, restoring, judging what is found
//! process    the API on a UNIX socket and the driver, the only task that changes a machine's state
//! ```
//!
//! A module uses only the modules above it in this list.

pub mod kvm;

pub mod memory;

pub mod devices;

pub mod machine;

pub mod migration;

pub mod succession;

pub mod snapshot;

pub mod process;

pub use process::{VmmArgs, VmmError, run};
