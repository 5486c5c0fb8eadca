//! Token buckets: how much a device may do per second.

use std::time::{Duration, Instant};

/// A bucket that fills at a steady rate and holds one second's worth.
///
/// What is taken may overdraw it once (a request larger than the bucket must pass some time); the debt is then
/// waited off, so the rate holds over time whatever the size of the requests.
#[derive(Clone, Debug)]
pub struct Limiter {
    per_second: u64,
    /// Tokens in billionths, so that slow buckets fill exactly.
    level_nano: i128,
    filled_at: Instant,
}

const NANO: i128 = 1_000_000_000;

impl Limiter {
    /// A full bucket. `per_second` must be at least 1.
    pub fn new(per_second: u64, now: Instant) -> Self {
        let per_second = per_second.max(1);
        Self {
            per_second,
            level_nano: i128::from(per_second) * NANO,
            filled_at: now,
        }
    }

    /// Takes `tokens` if the bucket is not in debt, else says how long it will be.
    pub fn take(&mut self, tokens: u64, now: Instant) -> Result<(), Duration> {
        self.fill(now);
        if self.level_nano < 0 {
            let nanos = self
                .level_nano
                .unsigned_abs()
                .div_ceil(self.per_second.into());
            return Err(Duration::from_nanos(
                u64::try_from(nanos).unwrap_or(u64::MAX),
            ));
        }
        self.level_nano -= i128::from(tokens) * NANO;
        Ok(())
    }

    fn fill(&mut self, now: Instant) {
        let elapsed = now.saturating_duration_since(self.filled_at).as_nanos() as i128;
        self.filled_at = now;
        let full = i128::from(self.per_second) * NANO;
        self.level_nano = (self.level_nano + elapsed * i128::from(self.per_second)).min(full);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_request_larger_than_the_bucket_passes_and_is_waited_off() {
        let start = Instant::now();
        let mut limiter = Limiter::new(100, start);
        assert_eq!(limiter.take(300, start), Ok(()));
        assert_eq!(limiter.take(1, start), Err(Duration::from_secs(2)));
        assert_eq!(limiter.take(1, start + Duration::from_secs(2)), Ok(()));
    }

    proptest! {
        #[test]
        fn the_rate_holds_over_time(
            rate in 1u64..10_000,
            requests in prop::collection::vec((1u64..5_000, 0u64..200), 1..200),
        ) {
            let start = Instant::now();
            let (mut now, mut limiter, mut taken, mut last) = (start, Limiter::new(rate, start), 0, 0);
            for (tokens, gap_ms) in requests {
                now += Duration::from_millis(gap_ms);
                if limiter.take(tokens, now).is_ok() {
                    taken += tokens;
                    last = tokens;
                }
            }
            // One bucket at the start, the rate since, and one overdraft.
            let allowed = rate as f64 * (1.0 + (now - start).as_secs_f64()) + last as f64;
            prop_assert!(taken as f64 <= allowed + 1.0);
        }
    }
}
