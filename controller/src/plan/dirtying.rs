//! How a guest dirties memory: what it has written after how long.

use godwit_wire::unit::Bytes;
use godwit_wire::vmm_api::{DirtyRate, DirtyReading, MAX_DIRTY_READINGS, VcpuBusy};
use serde::Serialize;
use std::time::Duration;

/// What is known of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Dirtying {
    /// Where it is from.
    pub source: DirtySource,
    /// Distinct memory per second, over all of the time it was watched for.
    pub bytes_per_s: u64,
    /// Distinct memory after a time, in order; empty where only the rate is known.
    pub series: Vec<DirtyReading>,
    /// What its vCPUs did meanwhile.
    pub vcpus: Vec<VcpuBusy>,
}

/// Where it is from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum DirtySource {
    /// The guest was watched just now.
    Sampled,
    /// From the host's latest sample, some time ago: only a rate, so the working set is not known.
    LastKnown,
}

impl Dirtying {
    /// From a fresh sample. What a host says is taken as far as it makes sense: nothing becomes clean by itself.
    pub fn sampled(rate: DirtyRate) -> Self {
        let mut series = rate.series;
        series.truncate(usize::from(MAX_DIRTY_READINGS));
        let mut before = DirtyReading {
            after_us: 0,
            bytes: 0,
        };
        series.retain_mut(|reading| {
            let later = reading.after_us > before.after_us;
            if later {
                reading.bytes = reading.bytes.max(before.bytes);
                before = *reading;
            }
            later
        });
        Self {
            source: DirtySource::Sampled,
            bytes_per_s: rate.bytes_per_s,
            series,
            vcpus: rate.vcpus,
        }
    }

    /// From a rate alone.
    pub const fn last_known(bytes_per_s: u64) -> Self {
        Self {
            source: DirtySource::LastKnown,
            bytes_per_s,
            series: Vec::new(),
            vcpus: Vec::new(),
        }
    }

    /// Distinct memory that is dirty after `time`, if all is clean at its beginning. Between readings in proportion;
    /// beyond the last, as fast as between the last two.
    pub fn after(&self, time: Duration) -> Bytes {
        let us = time.as_secs_f64() * 1e6;
        let (mut from, mut slope) = ((0.0, 0.0), self.bytes_per_s as f64 / 1e6);
        for reading in &self.series {
            let to = (reading.after_us as f64, reading.bytes as f64);
            slope = (to.1 - from.1) / (to.0 - from.0);
            if us <= to.0 {
                break;
            }
            from = to;
        }
        // A float beyond what fits becomes the largest number that does.
        Bytes((from.1 + slope * (us - from.0)).max(0.0) as u64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sampled(readings: &[(u64, u64)]) -> Dirtying {
        let series = readings
            .iter()
            .map(|(after_us, bytes)| DirtyReading {
                after_us: *after_us,
                bytes: *bytes,
            })
            .collect();
        Dirtying::sampled(DirtyRate {
            bytes_per_s: 7,
            series,
            vcpus: Vec::new(),
        })
    }

    #[test]
    fn a_rate_alone_goes_on_for_ever() {
        let rate = Dirtying::last_known(1_000);
        assert_eq!(rate.after(Duration::from_millis(500)), Bytes(500));
        assert_eq!(rate.after(Duration::from_secs(60)), Bytes(60_000));
    }

    #[test]
    fn a_working_set_is_told_from_a_rate() {
        let set = sampled(&[(250_000, 1_000), (500_000, 1_500), (1_000_000, 1_500)]);
        assert_eq!(set.after(Duration::from_millis(125)), Bytes(500));
        assert_eq!(set.after(Duration::from_millis(375)), Bytes(1_250));
        assert_eq!(set.after(Duration::from_secs(100)), Bytes(1_500));
    }

    #[test]
    fn beyond_the_last_reading_it_goes_on_as_between_the_last_two() {
        let growing = sampled(&[(500_000, 1_000), (1_000_000, 1_500)]);
        assert_eq!(growing.after(Duration::from_secs(2)), Bytes(2_500));
    }

    #[test]
    fn readings_that_make_no_sense_do_no_harm() {
        let odd = sampled(&[(0, 9), (500_000, 1_000), (400_000, 5), (1_000_000, 10)]);
        assert_eq!(odd.series.len(), 2);
        assert_eq!(odd.after(Duration::from_secs(9)), Bytes(1_000));
        let vast = sampled(&[(1, u64::MAX)]);
        assert_eq!(vast.after(Duration::from_secs(1)), Bytes(u64::MAX));
    }
}
