//! How fast the link carries pages, from the latest rounds (pure).

use godwit_wire::unit::PAGE_BYTES;
use std::time::Duration;

/// Rounds shorter than this say little about the link.
pub(super) const TELLING_ROUND: Duration = Duration::from_millis(50);

/// What one round sent, all lanes together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct SentRound {
    /// Pages sent with their content.
    pub(super) content_pages: u64,
    /// Pages without: they are zero, or the target has them.
    pub(super) bare_pages: u64,
    /// What went on the wire.
    pub(super) wire_bytes: u64,
    /// Until the target had all of it.
    pub(super) took: Duration,
}

/// The rate to reckon with. Bytes are guest memory, so what compression gains is in it.
#[derive(Clone, Copy, Debug)]
pub(super) struct LinkRate {
    limit: Option<u64>,
    bytes_per_s: u64,
}

impl LinkRate {
    /// Nothing is known yet, but that no more than `limit` goes on the wire per second.
    pub(super) const fn new(limit: Option<u64>) -> Self {
        Self {
            limit,
            bytes_per_s: 0,
        }
    }

    /// No more than `limit` goes on the wire per second from now on.
    pub(super) const fn limit_to(&mut self, limit: Option<u64>) {
        self.limit = limit;
    }

    /// Bytes of guest memory per second.
    pub(super) const fn bytes_per_s(&self) -> u64 {
        self.bytes_per_s
    }

    /// The latest round tells the rate if it was long enough and not mostly looking at memory that is all zero or kept. What
    /// any other round showed can be done; it may be done better.
    pub(super) fn observe(&mut self, round: SentRound) {
        let content = round.content_pages * PAGE_BYTES;
        let mut measured = per_second(content, round.took);
        // A short round goes at once from what the limit saves up: faster than it will be in the long run.
        if let Some(limit) = self.limit.filter(|_| round.wire_bytes > 0) {
            let allowed = u128::from(limit) * u128::from(content) / u128::from(round.wire_bytes);
            measured = measured.min(u64::try_from(allowed).unwrap_or(u64::MAX));
        }
        let telling = round.took >= TELLING_ROUND && round.content_pages >= round.bare_pages;
        if telling && content > 0 || measured > self.bytes_per_s {
            self.bytes_per_s = measured;
        }
    }
}

pub(super) fn per_second(bytes: u64, duration: Duration) -> u64 {
    (bytes as f64 / duration.as_secs_f64().max(1e-6)) as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    fn round(content_pages: u64, bare_pages: u64, took_ms: u64) -> SentRound {
        SentRound {
            content_pages,
            bare_pages,
            wire_bytes: content_pages * PAGE_BYTES,
            took: Duration::from_millis(took_ms),
        }
    }

    fn after(limit: Option<u64>, rounds: &[SentRound]) -> u64 {
        let mut rate = LinkRate::new(limit);
        rounds.iter().for_each(|round| rate.observe(*round));
        rate.bytes_per_s() / PAGE_BYTES
    }

    #[test]
    fn the_latest_telling_round_counts_also_when_the_link_became_slow() {
        let rounds = [round(1_000, 0, 100), round(200, 0, 100)];
        assert_eq!(after(None, &rounds), 2_000);
    }

    #[test]
    fn a_short_round_can_only_show_that_more_is_possible() {
        let fast = round(1_000, 0, 100);
        assert_eq!(after(None, &[fast, round(10, 0, 10)]), 10_000);
        assert_eq!(after(None, &[fast, round(200, 0, 10)]), 20_000);
    }

    #[test]
    fn a_round_over_untouched_memory_does_not_make_the_link_slow() {
        assert_eq!(
            after(None, &[round(1_000, 0, 100), round(10, 100_000, 100)]),
            10_000
        );
        assert_eq!(after(None, &[round(10, 100_000, 100)]), 100);
        assert_eq!(
            after(None, &[round(1_000, 0, 100), round(0, 0, 60)]),
            10_000
        );
    }

    #[test]
    fn a_burst_does_not_count_for_more_than_the_limit() {
        let limit = Some(5_000 * PAGE_BYTES);
        assert_eq!(after(limit, &[round(100, 0, 1)]), 5_000);
        // Half of it was saved by compression, so twice as much memory goes over the same wire.
        let packed = SentRound {
            wire_bytes: 50 * PAGE_BYTES,
            ..round(100, 0, 1)
        };
        assert_eq!(after(limit, &[packed]), 10_000);
    }
}
