//! The lease page: one page of shared memory in which the host agent writes until when this host's VMs may run,
//! and which every VMM reads by itself (DESIGN: never twice, barrier 2).
//!
//! ```text
//! offset  0  u64  magic        "GODWITLP" little-endian
//! offset  8  u64  version      1
//! offset 16  u64  deadline_ns  CLOCK_BOOTTIME; 0 = never granted; u64::MAX = not under a lease
//! offset 24  [u8;16] boot_id   of the kernel whose clock the deadline is on
//! ```
//!
//! The deadline is written with one aligned 64-bit store, so a reader sees the old or the new value.

use std::time::Duration;

/// Bytes in the lease page.
pub const LEASE_PAGE_BYTES: usize = 4096;
/// First field: tells a lease page from any other file.
pub const LEASE_MAGIC: u64 = u64::from_le_bytes(*b"GODWITLP");
/// Layout described above.
pub const LEASE_VERSION: u64 = 1;
/// Offset of the magic.
pub const MAGIC_OFFSET: usize = 0;
/// Offset of the version.
pub const VERSION_OFFSET: usize = 8;
/// Offset of the deadline.
pub const DEADLINE_OFFSET: usize = 16;
/// Offset of the boot id.
pub const BOOT_ID_OFFSET: usize = 24;

/// How long a host may go on after it last asked for its lease.
pub const LEASE_DURATION: Duration = Duration::from_millis(6_000);
/// How long a VMM may take to stop its vCPUs once the lease is over.
pub const STOP_TIME: Duration = Duration::from_millis(2_000);
/// How far the rates of two hosts' clocks may drift apart over one lease, scheduling included.
pub const CLOCK_MARGIN: Duration = Duration::from_millis(1_000);

/// What a VMM makes of the deadline it read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LeaseState {
    /// vCPUs may run for this long, then look again.
    Held {
        /// Time until the deadline.
        remaining: Duration,
    },
    /// vCPUs must not run.
    Expired,
}

impl LeaseState {
    /// Judges `deadline_ns` at `now_ns`, both on CLOCK_BOOTTIME.
    pub fn at(deadline_ns: u64, now_ns: u64) -> Self {
        match deadline_ns.checked_sub(now_ns) {
            Some(remaining) if remaining > 0 => Self::Held {
                remaining: Duration::from_nanos(remaining),
            },
            _ => Self::Expired,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lease_ends_exactly_at_its_deadline() {
        assert_eq!(
            LeaseState::at(10, 9),
            LeaseState::Held {
                remaining: Duration::from_nanos(1)
            }
        );
        assert_eq!(LeaseState::at(10, 10), LeaseState::Expired);
        assert_eq!(LeaseState::at(0, 0), LeaseState::Expired);
    }
}
