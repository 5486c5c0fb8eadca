//! The host agent: one per host. It starts, adopts and watches one VMM process per VM, keeps the host's lease,
//! samples what host and VMs really use, and carries out what the control plane asks, never twice and never late.
//!
//! A module uses only the modules above it in this list.

// A `Problem` is made once per refused request: boxing it would only complicate every handler.
#![allow(clippy::result_large_err)]

mod sys;

mod clock;

mod procfs;

mod admission;

mod handover;

mod record;

mod adoption;

mod lease;

mod process;
