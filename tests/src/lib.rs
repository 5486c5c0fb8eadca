//! What cross-process tests and benches stand on: real processes, real sockets, real guests.
//!
//! Tests start the built `godwit` program, speak to it as its users do (HTTP on sockets, bytes on a serial
//! console), and judge it from outside. A module uses only the modules above it in this list.

pub mod skip;

pub mod program;

pub mod tap;
pub mod test_dir;

pub mod process;

pub mod http;

mod lines;

pub mod serial;

pub mod lease;

pub mod initramfs;

pub mod qcow2;

pub mod linux;

pub mod vmm;

pub mod kept;

pub mod migration;

pub mod succession;

pub mod soak;

pub mod cluster;

pub mod network;

pub mod links;

pub mod relay;

pub mod browser;

pub mod lab;
