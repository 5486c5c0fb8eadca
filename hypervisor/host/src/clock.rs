//! The clock leases are on: CLOCK_BOOTTIME goes on while the host sleeps and is the same for all its processes.

use rustix::time::{ClockId, clock_gettime};

/// Nanoseconds since boot, time asleep included.
pub(crate) fn boottime_ns() -> u64 {
    let now = clock_gettime(ClockId::Boottime);
    let (seconds, nanoseconds) = (now.tv_sec.unsigned_abs(), now.tv_nsec.unsigned_abs());
    seconds * 1_000_000_000 + nanoseconds
}
