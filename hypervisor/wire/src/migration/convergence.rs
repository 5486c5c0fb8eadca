//! When to stop copying a running guest (pure). The source decides by it, and whoever foresees a migration reckons
//! with the same rules.
//!
//! A guest that dirties memory slower than the link carries it has less to send after every round. Pausing is
//! *allowed* as soon as the rest fits the downtime limit; it is *wise* when another round would not make the rest
//! much smaller. A guest whose rest does not shrink goes ahead of it, where post-copy is allowed; else it is slowed
//! down, step by step and as far as the policy allows. One that never gets below the limit within the round limit or
//! the deadline is left where it is.

use super::{MigrationPolicy, PostCopy};
use std::time::Duration;

/// Pause, device state, last acknowledgement and commit, where no earlier migration has shown them.
pub const EXPECTED_FIXED_COST: Duration = Duration::from_millis(10);
/// No blackout is shorter.
pub const LEAST_FIXED_COST: Duration = Duration::from_millis(1);
/// More than this is not reckoned with, whatever earlier migrations showed: a guest that stays under the usual limit
/// otherwise must get the chance to show that the cost has come down again.
pub const MOST_FIXED_COST: Duration = Duration::from_millis(200);

/// From the decision to pause the guest until it stands still, in which it goes on dirtying memory.
const PAUSE_LAG: Duration = Duration::from_millis(2);

/// A rest this small is sent in less time than the fixed costs take; another round gains nothing.
const SMALL_REST_BYTES: u64 = 256 * 1024;
/// Another round is worth it if it leaves at most this share of the rest.
const WORTHWHILE_SHARE: f64 = 0.7;

/// Rounds before a guest is slowed down or goes ahead: the first says little about the rest.
const TELLING_ROUNDS: u32 = 2;
/// How much more it is slowed down each time.
const THROTTLE_STEP_PERCENT: u8 = 25;

/// The cost to reckon with, from what earlier migrations showed. What is beyond the expected counts up to half the limit:
/// one that was slow once must not keep guests with a small limit from ever moving, and so from showing better.
pub fn fixed_cost(learned_us: Option<u64>, downtime_limit_ms: u64) -> Duration {
    let most = EXPECTED_FIXED_COST.max(Duration::from_millis(downtime_limit_ms) / 2);
    learned_us.map_or(EXPECTED_FIXED_COST, |us| {
        Duration::from_micros(us)
            .clamp(LEAST_FIXED_COST, MOST_FIXED_COST)
            .min(most)
    })
}

/// What one finished round showed.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RoundOutcome {
    /// Number of the round, from 1.
    pub round: u32,
    /// Since the migration began.
    pub elapsed: Duration,
    /// The round alone.
    pub took: Duration,
    /// Bytes the guest dirtied meanwhile: the rest.
    pub rest_bytes: u64,
    /// Rest after the round before; all of memory for the first.
    pub previous_rest_bytes: u64,
    /// Rate of the link, from the rounds that were long enough to tell.
    pub bytes_per_s: u64,
    /// Pause, device state and commit, which no round makes shorter.
    pub fixed_cost: Duration,
    /// How much the guest is slowed down already.
    pub throttle_percent: u8,
    /// Whether both ends can and may do post-copy.
    pub post_copy: PostCopy,
}

/// What to do next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decision {
    /// Copy another round.
    AnotherRound,
    /// Copy another round with the guest slowed down to this.
    Throttle {
        /// Share of their time that its busiest vCPUs are kept from running.
        percent: u8,
    },
    /// Pause the guest and send the rest.
    Pause,
    /// Pause the guest and hand it over; the rest follows.
    GoAhead,
    /// It will not fit within the round limit.
    GiveUp,
    /// It does not fit and the deadline is over.
    OutOfTime,
}

impl RoundOutcome {
    /// How long the guest would stand still if it were paused now.
    pub fn predicted_blackout(&self) -> Duration {
        self.fixed_cost + self.predicted_pass()
    }

    /// How long the last pass would take: the rest, and what the guest adds to it until it stands still.
    pub fn predicted_pass(&self) -> Duration {
        let lag = PAUSE_LAG.as_secs_f64();
        let growth = 1.0 + lag / self.took.as_secs_f64().max(lag);
        let rate = self.bytes_per_s.max(1);
        Duration::from_secs_f64(self.rest_bytes as f64 * growth / rate as f64)
    }

    /// Decides under `policy`.
    pub fn decide(&self, policy: &MigrationPolicy) -> Decision {
        let fits = self.predicted_blackout() <= Duration::from_millis(policy.downtime_limit_ms);
        let shrinking =
            self.rest_bytes as f64 <= self.previous_rest_bytes as f64 * WORTHWHILE_SHARE;
        let late = policy
            .deadline_s
            .is_some_and(|limit| self.elapsed >= Duration::from_secs(limit));
        let last = late || self.round >= policy.max_rounds;
        match (fits, last) {
            (true, true) => Decision::Pause,
            (true, false) if self.rest_bytes <= SMALL_REST_BYTES || !shrinking => Decision::Pause,
            (false, true) if self.post_copy == PostCopy::Allowed => Decision::GoAhead,
            (false, true) if late => Decision::OutOfTime,
            (false, true) => Decision::GiveUp,
            (false, false) if !shrinking && self.may_go_ahead() => Decision::GoAhead,
            (false, false) if !shrinking && self.may_slow_down(policy) => Decision::Throttle {
                percent: (self.throttle_percent + THROTTLE_STEP_PERCENT)
                    .min(policy.max_throttle_percent),
            },
            (_, false) => Decision::AnotherRound,
        }
    }

    fn may_go_ahead(&self) -> bool {
        self.post_copy == PostCopy::Allowed && self.round >= TELLING_ROUNDS
    }

    fn may_slow_down(&self, policy: &MigrationPolicy) -> bool {
        self.round >= TELLING_ROUNDS && self.throttle_percent < policy.max_throttle_percent
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn round(round: u32, rest_bytes: u64, previous_rest_bytes: u64) -> RoundOutcome {
        RoundOutcome {
            round,
            elapsed: Duration::from_secs(u64::from(round)),
            took: Duration::from_secs(1),
            throttle_percent: 0,
            post_copy: PostCopy::Forbidden,
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
            max_throttle_percent: 0,
            ..Default::default()
        };
        assert_eq!(
            round(4, 1 << 30, 1 << 30).decide(&policy),
            Decision::AnotherRound
        );
        assert_eq!(round(5, 1 << 30, 1 << 30).decide(&policy), Decision::GiveUp);
    }

    #[test]
    fn a_guest_that_outruns_the_link_is_slowed_down_as_far_as_allowed() {
        let policy = MigrationPolicy {
            max_throttle_percent: 40,
            ..Default::default()
        };
        let after = |number, throttle_percent| {
            RoundOutcome {
                throttle_percent,
                ..round(number, 1 << 30, 1 << 30)
            }
            .decide(&policy)
        };
        assert_eq!(after(1, 0), Decision::AnotherRound);
        assert_eq!(after(2, 0), Decision::Throttle { percent: 25 });
        assert_eq!(after(3, 25), Decision::Throttle { percent: 40 });
        assert_eq!(after(4, 40), Decision::AnotherRound);
    }

    #[test]
    fn a_guest_goes_ahead_only_where_that_is_allowed_and_needed() {
        let policy = MigrationPolicy::default();
        let ahead = |number, rest_bytes, previous_rest_bytes| {
            RoundOutcome {
                post_copy: PostCopy::Allowed,
                ..round(number, rest_bytes, previous_rest_bytes)
            }
            .decide(&policy)
        };
        // Pre-copy goes on as long as it helps.
        assert_eq!(ahead(2, 300 << 20, 1 << 30), Decision::AnotherRound);
        assert_eq!(ahead(1, 1 << 30, 1 << 30), Decision::AnotherRound);
        assert_eq!(ahead(2, 300 << 20, 300 << 20), Decision::GoAhead);
        assert_eq!(ahead(2, 1 << 20, 1 << 20), Decision::Pause);
        assert_eq!(
            ahead(policy.max_rounds, 300 << 20, 1 << 30),
            Decision::GoAhead
        );
        let forbidden = round(2, 300 << 20, 300 << 20).decide(&policy);
        assert_eq!(forbidden, Decision::Throttle { percent: 25 });
    }

    #[test]
    fn the_deadline_ends_it_one_way_or_the_other() {
        let policy = MigrationPolicy {
            deadline_s: Some(10),
            ..Default::default()
        };
        assert_eq!(
            round(10, 1 << 30, 1 << 30).decide(&policy),
            Decision::OutOfTime
        );
        assert_eq!(
            round(10, 9 << 20, 100 << 20).decide(&policy),
            Decision::Pause
        );
    }

    #[test]
    fn a_guest_that_dirties_while_it_is_being_paused_stands_still_for_longer() {
        let long = round(3, 10 << 20, 10 << 20);
        let short = RoundOutcome {
            took: Duration::from_millis(4),
            ..long
        };
        assert!(short.predicted_pass() > long.predicted_pass());
        assert!(short.predicted_pass() < long.predicted_pass() * 2);
        assert_eq!(
            round(3, 0, 10 << 20).predicted_blackout(),
            Duration::from_millis(5)
        );
    }

    #[test]
    fn a_learned_cost_is_taken_within_reason() {
        let fixed_cost = |learned_us| fixed_cost(learned_us, 1_000);
        assert_eq!(fixed_cost(None), EXPECTED_FIXED_COST);
        assert_eq!(fixed_cost(Some(25_000)), Duration::from_millis(25));
        assert_eq!(fixed_cost(Some(0)), LEAST_FIXED_COST);
        assert_eq!(fixed_cost(Some(u64::MAX)), MOST_FIXED_COST);
        assert_eq!(
            super::fixed_cost(Some(u64::MAX), 100),
            Duration::from_millis(50)
        );
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
            let decision = round(policy.max_rounds, rest >> 20, previous >> 20).decide(&policy);
            prop_assert!(matches!(decision, Decision::Pause | Decision::GiveUp));
        }
    }
}
