//! Succession: another process of this host takes the machine over, its memory as it is. The messages are in
//! `godwit_wire::succession`, who may run the guest is decided by [`hand_over`](crate::migration) as in migrations.
//!
//! ```text
//! error         what can go wrong
//! channel       messages with descriptors on a UNIX socket
//! predecessor   the process that the machine runs in
//! successor     the process that it shall run in
//! ```
//!
//! ```text
//! predecessor   prepared ──Take──▶ blackout ──state sent──▶ ready ──▶ killed by the agent
//!                  │ any failure      │ any failure           │ abort: the agent's record names this process
//!                  ▼                  ▼                       ▼
//!               the guest runs here ◀─────────────────────────┘
//!
//! successor     prepared ──take──▶ blackout ──restored──▶ ready ──commit: the record names this process──▶ completed
//!                  │ any failure      │ any failure         │ killed by the agent
//!                  ▼                  ▼                     ▼
//!               nothing of it ever runs
//! ```
//!
//! A predecessor that has sent the state never runs the guest by itself, however long it hears nothing: the guest's
//! memory is the successor's as well, and may be changing.

mod channel;
mod error;
mod predecessor;
mod successor;

#[cfg(test)]
mod tests;

pub use error::SuccessionError;
pub use predecessor::{Handed, Offered, PredecessorMachine, Yielding, yield_machine};
pub use successor::{Arrived, Offering, TakingOver};
