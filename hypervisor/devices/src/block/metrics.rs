//! Counters of a disk.

use super::request::Request;
use crate::counters::counters;
use std::time::Duration;

counters! {
    /// Reads that were done.
    reads,
    /// Their bytes.
    read_bytes,
    /// Writes that were done.
    writes,
    /// Their bytes.
    write_bytes,
    /// Flushes that were done.
    flushes,
    /// Ranges given back or zeroed.
    discards,
    /// Requests the host could not do.
    errors,
    /// Requests that were none the disk does.
    rejected_requests,
    /// How often the disk reported that it stands still.
    stalls,
    /// Requests that waited for the limits.
    limited_requests,
    /// Time from taking requests to answering them, in all.
    request_ns,
}

impl Counters {
    /// A request is done, so long after it was taken.
    pub(crate) fn done(&self, request: &Request, latency: Duration) {
        match request {
            Request::Read { .. } => {
                self.reads.add(1);
                self.read_bytes.add(request.data_bytes());
            }
            Request::Write { .. } => {
                self.writes.add(1);
                self.write_bytes.add(request.data_bytes());
            }
            Request::Flush => self.flushes.add(1),
            Request::Discard(_) | Request::WriteZeroes(_) => self.discards.add(1),
            Request::GetId => {}
        }
        let nanos = u64::try_from(latency.as_nanos()).unwrap_or(u64::MAX);
        self.request_ns.add(nanos);
    }

    /// The host could not do a request.
    pub(crate) fn error(&self) {
        self.errors.add(1);
    }

    /// A request was not one the disk does.
    pub(crate) fn rejected(&self) {
        self.rejected_requests.add(1);
    }

    /// The disk reported that it stands still.
    pub(crate) fn stalled(&self) {
        self.stalls.add(1);
    }

    /// A request had to wait for the limits.
    pub(crate) fn limited(&self) {
        self.limited_requests.add(1);
    }
}
