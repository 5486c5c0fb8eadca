//! What hosts and VMs really use, as sampled by the host agent.

use crate::unit::Bytes;
use serde::{Deserialize, Serialize};

/// Share of the last ten seconds in which some task stalled, in percent (`/proc/pressure/*`, `some avg10`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Pressure {
    /// Waiting for a CPU.
    pub cpu_percent: f64,
    /// Waiting for memory.
    pub memory_percent: f64,
    /// Waiting for I/O.
    pub io_percent: f64,
}

/// Use of a host.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct HostUsage {
    /// Busy share of all cores together, 0 to 100.
    pub cpu_percent: f64,
    /// Memory that is not available to new work (`MemTotal − MemAvailable`, less what is kept).
    pub memory_used_bytes: Bytes,
    /// Memory of VMs that have moved away, kept for their return and given up when it is needed.
    pub kept_memory_bytes: Bytes,
    /// Stalls.
    pub pressure: Pressure,
}

/// Use of a VM.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct VmUsage {
    /// CPU time of the VMM process in percent of one core, so up to 100 × vCPUs and a little more.
    pub cpu_percent: f64,
    /// Resident memory of the VMM process.
    pub rss_bytes: Bytes,
    /// Exits from guest mode to the VMM.
    pub exits_per_s: f64,
    /// Guest memory dirtied, from the latest sample.
    pub dirty_bytes_per_s: u64,
}
