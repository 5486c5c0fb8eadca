//! When to stop copying a running guest (pure).
//!
//! A guest that dirties memory slower than the link carries it has less to send after every round. Pausing is
//! *allowed* as soon as the rest fits the downtime limit; it is *wise* when another round would not make the rest
//! much smaller. A guest that never gets below the limit within the round limit is left where it is.

use godwit_wire::migration::MigrationPolicy;
use std::time::Duration;

/// A rest this small is sent in less time than the fixed costs take; another round gains nothing.
const SMALL_REST_BYTES: u64 = 256 * 1024;
/// Another round is worth it if it leaves at most this share of the rest.
const WORTHWHILE_SHARE: f64 = 0.7;

/// What one finished round showed.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct RoundOutcome {
    /// Number of the round, from 1.
    pub(super) round: u32,
    /// How long it took.
    pub(super) duration: Duration,
    /// Bytes the guest dirtied meanwhile: the rest.
    pub(super) rest_bytes: u64,
    /// Rest after the round before; all of memory for the first.
    pub(super) previous_rest_bytes: u64,
    /// Rate of the link, from the rounds that were long enough to tell.
    pub(super) bytes_per_s: u64,
    /// Pause, device state and commit, which no round makes shorter.
    pub(super) fixed_cost: Duration,
}

/// What to do next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Decision {
    /// Copy another round.
    AnotherRound,
    /// Pause the guest and send the rest.
    Pause,
    /// It will not fit.
    GiveUp,
}

impl RoundOutcome {
    /// How long the guest would stand still if it were paused now.
    pub(super) fn predicted_blackout(&self) -> Duration {
        let rate = self.bytes_per_s.max(1);
        self.fixed_cost + Duration::from_secs_f64(self.rest_bytes as f64 / rate as f64)
    }

    /// Decides under `policy`.
    pub(super) fn decide(&self, policy: &MigrationPolicy) -> Decision {
        let fits = self.predicted_blackout() <= Duration::from_millis(policy.downtime_limit_ms);
        let shrinking =
            self.rest_bytes as f64 <= self.previous_rest_bytes as f64 * WORTHWHILE_SHARE;
        let last = self.round >= policy.max_rounds;
        match (fits, last) {
            (true, true) => Decision::Pause,
            (true, false) if self.rest_bytes <= SMALL_REST_BYTES || !shrinking => Decision::Pause,
            (_, false) => Decision::AnotherRound,
            (false, true) => Decision::GiveUp,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn round(round: u32, rest_bytes: u64, previous_rest_bytes: u64) -> RoundOutcome {
        RoundOutcome {
            round,
            duration: Duration::from_secs(1),
            rest_bytes,
            previous_rest_bytes,
            bytes_per_s: 100 << 20,
            fixed_cost: Duration::from_millis(5),
        }
    }

    #[test]
    fn an_idle_guest_is_paused_after_the_first_round() {
        assert_eq!(
            round(1, 64 * 1024, 1 << 30).decide(&MigrationPolicy::default()),
            Decision::Pause
        );
    }

    #[test]
    fn a_rest_that_fits_but_shrinks_is_copied_once_more() {
        assert_eq!(
            round(2, 10 << 20, 100 << 20).decide(&MigrationPolicy::default()),
            Decision::AnotherRound
        );
        assert_eq!(
            round(3, 9 << 20, 10 << 20).decide(&MigrationPolicy::default()),
            Decision::Pause
        );
    }

    #[test]
    fn a_guest_that_outruns_the_link_is_given_up_at_the_round_limit() {
        let policy = MigrationPolicy {
            max_rounds: 5,
            ..Default::default()
        };
        assert_eq!(
            round(4, 1 << 30, 1 << 30).decide(&policy),
            Decision::AnotherRound
        );
        assert_eq!(round(5, 1 << 30, 1 << 30).decide(&policy), Decision::GiveUp);
    }

    proptest! {
        #[test]
        fn the_guest_is_never_paused_above_the_limit(
            number in 1u32..40, rest in 0u64..1 << 34, previous in 0u64..1 << 34, rate in 1u64..1 << 34, limit in 1u64..2000
        ) {
            let policy = MigrationPolicy { downtime_limit_ms: limit, ..Default::default() };
            let outcome = RoundOutcome { bytes_per_s: rate, ..round(number, rest, previous) };
            if outcome.decide(&policy) == Decision::Pause {
                prop_assert!(outcome.predicted_blackout() <= Duration::from_millis(limit));
            }
        }

        #[test]
        fn no_migration_goes_on_for_ever(rest in any::<u64>(), previous in any::<u64>()) {
            let policy = MigrationPolicy::default();
            prop_assert_ne!(round(policy.max_rounds, rest >> 20, previous >> 20).decide(&policy), Decision::AnotherRound);
        }
    }
}
