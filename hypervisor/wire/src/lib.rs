//! The words Godwit's processes exchange, and nothing else: no I/O happens here.
//!
//! A module uses only the modules above it in this list.

pub mod unit;

pub mod id;

pub mod problem;

pub mod devices;

pub mod machine;

pub mod cpu;

pub mod storage;

pub mod network;

pub mod lease;

pub mod migration;

pub mod usage;

pub mod succession;

pub mod vmm_api;

pub mod host_api;
