//! When to stop copying a running guest (pure). The source decides by it, and whoever foresees a migration reckons
//! with the same rules.
//!
//! A guest that dirties memory slower than the link carries it has less to send after every round. Pausing is
//! *allowed* as soon as the rest fits the downtime limit; it is *wise* when another round would not make the rest
//! much smaller. A guest whose rest does not shrink goes ahead of it, where post-copy is allowed; else it is slowed
//! down, step by step and as far as the policy allows. One that never gets below the limit within the round limit or
//! the deadline is left where it is.
//!
//! Disks that travel are part of the rest. No guest goes ahead of them: what is left of them must fit the limit even
//! where memory may follow, and a guest that writes them faster than the link carries has its writes slowed down.

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
const PAUSE_LAG: Duration = Duration::from_micros(500);

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
    /// Bytes of memory the guest dirtied meanwhile: the rest.
    pub rest_bytes: u64,
    /// Rest after the round before; all of memory for the first.
    pub previous_rest_bytes: u64,
    /// The same of disks that travel.
    pub disks: DiskOutcome,
    /// Rate of the link, from the rounds that were long enough to tell.
    pub bytes_per_s: u64,
    /// Pause, device state and commit, which no round makes shorter.
    pub fixed_cost: Duration,
    /// How much the guest is slowed down already.
    pub throttle_percent: u8,
    /// Whether both ends can and may do post-copy.
    pub post_copy: PostCopy,
}

/// What one finished round showed of the disks that travel; nothing where none does.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DiskOutcome {
    /// Bytes of disks the guest changed meanwhile.
    pub rest_bytes: u64,
    /// The same after the round before; all of the disks for the first.
    pub previous_rest_bytes: u64,
    /// How much of its rate of writes the guest has lost already.
    pub throttle_percent: u8,
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
    /// Copy another round with the guest's writes to the disks slowed down to this.
    SlowDisks {
        /// Share of its rate of writes that the guest loses.
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
        self.pass_of(self.whole_rest())
    }

    /// What is left of memory and disks.
    pub const fn whole_rest(&self) -> u64 {
        self.rest_bytes.saturating_add(self.disks.rest_bytes)
    }

    /// How long the guest would stand still if it went ahead of its memory now: what is left of disks goes first.
    pub fn predicted_ahead(&self) -> Duration {
        self.fixed_cost + self.pass_of(self.disks.rest_bytes)
    }

    fn pass_of(&self, rest_bytes: u64) -> Duration {
        let lag = PAUSE_LAG.as_secs_f64();
        let growth = 1.0 + lag / self.took.as_secs_f64().max(lag);
        let rate = self.bytes_per_s.max(1);
        Duration::from_secs_f64(rest_bytes as f64 * growth / rate as f64)
    }

    /// Decides under `policy`.
    pub fn decide(&self, policy: &MigrationPolicy) -> Decision {
        let limit = Duration::from_millis(policy.downtime_limit_ms);
        let fits = self.predicted_blackout() <= limit;
        let (rest, disks) = (self.whole_rest(), self.disks);
        let previous = self
            .previous_rest_bytes
            .saturating_add(disks.previous_rest_bytes);
        let shrinking = rest as f64 <= previous as f64 * WORTHWHILE_SHARE;
        let late = policy
            .deadline_s
            .is_some_and(|limit| self.elapsed >= Duration::from_secs(limit));
        let last = late || self.round >= policy.max_rounds;
        match (fits, last) {
            (true, true) => Decision::Pause,
            (true, false) if rest <= SMALL_REST_BYTES || !shrinking => Decision::Pause,
            (false, true) if self.may_go_ahead(limit) => Decision::GoAhead,
            (false, true) if late => Decision::OutOfTime,
            (false, true) => Decision::GiveUp,
            (false, false) if !shrinking && self.round >= TELLING_ROUNDS => {
                self.step_in(policy, limit)
            }
            (_, false) => Decision::AnotherRound,
        }
    }

    /// Another round alone would not help.
    fn step_in(&self, policy: &MigrationPolicy, limit: Duration) -> Decision {
        if self.may_go_ahead(limit) {
            return Decision::GoAhead;
        }
        let most = policy.max_throttle_percent;
        let more = |percent: u8| (percent.saturating_add(THROTTLE_STEP_PERCENT)).min(most);
        let vcpus = (self.throttle_percent < most).then(|| Decision::Throttle {
            percent: more(self.throttle_percent),
        });
        let slowed = self.disks.throttle_percent;
        let disks = (self.disks.rest_bytes > 0 && slowed < most).then(|| Decision::SlowDisks {
            percent: more(slowed),
        });
        // First what more is left of; memory could follow the guest where that is allowed, disks cannot.
        let disks_first =
            self.disks.rest_bytes > self.rest_bytes || self.post_copy == PostCopy::Allowed;
        let chosen = if disks_first {
            disks.or(vcpus)
        } else {
            vcpus.or(disks)
        };
        chosen.unwrap_or(Decision::AnotherRound)
    }

    /// Whether memory may follow: that is allowed, and what is left of the disks can be sent beforehand.
    fn may_go_ahead(&self, limit: Duration) -> bool {
        self.post_copy == PostCopy::Allowed
            && (self.disks.rest_bytes == 0 || self.predicted_ahead() <= limit)
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
            disks: DiskOutcome::default(),
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

    fn with_disks(number: u32, memory: u64, disks: u64, slowed: u8) -> RoundOutcome {
        RoundOutcome {
            disks: DiskOutcome {
                rest_bytes: disks,
                previous_rest_bytes: disks,
                throttle_percent: slowed,
            },
            ..round(number, memory, memory)
        }
    }

    #[test]
    fn what_is_left_of_disks_counts_towards_the_blackout() {
        let policy = MigrationPolicy::default();
        assert_eq!(
            with_disks(2, 10 << 20, 10 << 20, 0).decide(&policy),
            Decision::Pause
        );
        let much = with_disks(2, 10 << 20, 30 << 20, 0);
        assert!(much.predicted_blackout() > Duration::from_millis(400));
        assert_ne!(much.decide(&policy), Decision::Pause);
    }

    #[test]
    fn a_guest_that_writes_its_disks_faster_than_the_link_has_its_writes_slowed() {
        let policy = MigrationPolicy {
            max_throttle_percent: 40,
            ..Default::default()
        };
        let slowed = |percent| with_disks(2, 1 << 20, 1 << 30, percent).decide(&policy);
        assert_eq!(
            with_disks(1, 1 << 20, 1 << 30, 0).decide(&policy),
            Decision::AnotherRound
        );
        assert_eq!(slowed(0), Decision::SlowDisks { percent: 25 });
        assert_eq!(slowed(25), Decision::SlowDisks { percent: 40 });
        // When that is not enough, what its vCPUs do is slowed too.
        assert_eq!(slowed(40), Decision::Throttle { percent: 25 });
        // Memory is the larger part: its vCPUs come first.
        assert_eq!(
            with_disks(2, 1 << 30, 1 << 20, 0).decide(&policy),
            Decision::Throttle { percent: 25 }
        );
    }

    #[test]
    fn no_guest_goes_ahead_of_its_disks() {
        let policy = MigrationPolicy::default();
        let ahead = |number, disks| {
            RoundOutcome {
                post_copy: PostCopy::Allowed,
                ..with_disks(number, 1 << 30, disks, 0)
            }
            .decide(&policy)
        };
        assert_eq!(ahead(2, 1 << 20), Decision::GoAhead);
        assert_eq!(ahead(2, 100 << 20), Decision::SlowDisks { percent: 25 });
        assert_eq!(ahead(policy.max_rounds, 100 << 20), Decision::GiveUp);
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
            number in 1u32..40, rest in 0u64..1 << 34, previous in 0u64..1 << 34, rate in 1u64..1 << 34, limit in 1u64..2000,
            disks in 0u64..1 << 34
        ) {
            let policy = MigrationPolicy { downtime_limit_ms: limit, ..Default::default() };
            let disks = DiskOutcome { rest_bytes: disks, ..DiskOutcome::default() };
            let outcome = RoundOutcome { bytes_per_s: rate, disks, ..round(number, rest, previous) };
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
