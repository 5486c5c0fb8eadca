//! The host agent: one per host. It starts, adopts and watches one VMM process per VM, keeps the host's lease,
//! samples what host and VMs really use, and carries out what the control plane asks, never twice and never late.
//!
//! ```text
//! deciders (pure)   admission  handover  succession  adoption  backoff
//! on disk           record  lease
//! for VMs           seed  storage  network
//! one VM            vm: the driver task; process: its VMM; kept: its memory after it has moved away
//! the host          facts  api  heartbeat  join  agent
//! ```
//!
//! A module uses only the modules above it in this file.

// A `Problem` is made once per refused request: boxing it would only complicate every handler.
#![allow(clippy::result_large_err)]

mod sys;

mod clock;

mod procfs;

mod backoff;

mod admission;

mod handover;

mod succession;

mod record;

mod adoption;

mod seed;

mod storage;

mod network;

mod lease;

mod process;

mod kept;

mod control;

mod board;

mod vm;

mod args;

mod error;

mod facts;

mod join;

mod api;

mod heartbeat;

mod agent;

pub use agent::run;
pub use args::{HostArgs, OnExit, PortRange, StoragePool};
pub use error::HostError;
