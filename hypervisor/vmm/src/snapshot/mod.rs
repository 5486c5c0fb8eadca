//! Snapshots: a machine as files in a directory.
//!
//! ```text
//! manifest.json  what the machine is, and size and checksum of the other files; its seal is its own checksum
//! state.cbor     vCPUs, interrupt controllers, devices, as in a migration
//! memory         guest memory, sparse: what the guest never touched takes no room
//! pieces         XXH3-128 of every MiB of memory; zero for one that is all zeros
//! ```
//!
//! A directory is written under another name, flushed to the disk and renamed when it is complete, so one without a
//! manifest is one that was never finished. Checksums find damage and careless edits; they are no defence against
//! someone who can recompute them.
//!
//! A machine goes on before its memory has been read: what it touches is brought in first, the rest behind it (see
//! [`Filler`]). Disks are not part of a snapshot: they must be as they were when it was taken.

mod fill;
mod load;
mod manifest;
mod save;

#[cfg(test)]
mod golden;

pub use fill::{Filler, OnLoss, bring_memory};
pub use load::Snapshot;
pub use manifest::{Manifest, SnapshotError};
pub use save::Writer;
