//! Counters of a disk.

use super::request::Request;
use crate::device::DeviceMetrics;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// Counters since the disk was opened.
#[derive(Debug, Default)]
pub(crate) struct Counters {
    reads: AtomicU64,
    read_bytes: AtomicU64,
    writes: AtomicU64,
    write_bytes: AtomicU64,
    flushes: AtomicU64,
    discards: AtomicU64,
    errors: AtomicU64,
    rejected: AtomicU64,
    stalls: AtomicU64,
    limited: AtomicU64,
    latency_ns: AtomicU64,
}

fn add(counter: &AtomicU64, number: u64) {
    counter.fetch_add(number, Ordering::Relaxed);
}

impl Counters {
    /// A request is done, so long after it was taken.
    pub(crate) fn done(&self, request: &Request, latency: Duration) {
        match request {
            Request::Read { .. } => {
                add(&self.reads, 1);
                add(&self.read_bytes, request.data_bytes());
            }
            Request::Write { .. } => {
                add(&self.writes, 1);
                add(&self.write_bytes, request.data_bytes());
            }
            Request::Flush => add(&self.flushes, 1),
            Request::Discard(_) | Request::WriteZeroes(_) => add(&self.discards, 1),
            Request::GetId => {}
        }
        let nanos = u64::try_from(latency.as_nanos()).unwrap_or(u64::MAX);
        add(&self.latency_ns, nanos);
    }

    /// The host could not do a request.
    pub(crate) fn error(&self) {
        add(&self.errors, 1);
    }

    /// A request was not one the disk does.
    pub(crate) fn rejected(&self) {
        add(&self.rejected, 1);
    }

    /// The disk reported that it stands still.
    pub(crate) fn stalled(&self) {
        add(&self.stalls, 1);
    }

    /// A request had to wait for the limits.
    pub(crate) fn limited(&self) {
        add(&self.limited, 1);
    }

    /// All of them, by name.
    pub(crate) fn snapshot(&self) -> DeviceMetrics {
        [
            ("reads", &self.reads),
            ("read_bytes", &self.read_bytes),
            ("writes", &self.writes),
            ("write_bytes", &self.write_bytes),
            ("flushes", &self.flushes),
            ("discards", &self.discards),
            ("errors", &self.errors),
            ("rejected_requests", &self.rejected),
            ("stalls", &self.stalls),
            ("limited_requests", &self.limited),
            ("request_ns", &self.latency_ns),
        ]
        .map(|(name, counter)| (name, counter.load(Ordering::Relaxed)))
        .to_vec()
    }
}
