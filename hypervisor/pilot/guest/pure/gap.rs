//! Judging the time between two ticks of one vCPU.

use super::constants::BLACKOUT_THRESHOLD_PERIODS;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Gap {
    /// The tick came about when it should.
    Regular,
    /// The vCPU did not run for this long beyond the period it would have waited anyway.
    Blackout { us: u64 },
    /// The clock went backwards.
    Backwards,
}

/// Compares this tick's clock reading with the previous tick's.
pub fn judge(period_ns: u64, last_ns: u64, now_ns: u64) -> Gap {
    if now_ns < last_ns {
        return Gap::Backwards;
    }
    let gap_ns = now_ns - last_ns;
    if gap_ns > period_ns * BLACKOUT_THRESHOLD_PERIODS {
        Gap::Blackout {
            us: (gap_ns - period_ns) / 1_000,
        }
    } else {
        Gap::Regular
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PERIOD_NS: u64 = 2_000_000;

    #[test]
    fn up_to_three_periods_are_regular() {
        assert_eq!(judge(PERIOD_NS, 5, 5), Gap::Regular);
        assert_eq!(judge(PERIOD_NS, 1_000, 1_000 + 6_000_000), Gap::Regular);
    }

    #[test]
    fn a_blackout_excludes_the_period_the_vcpu_would_have_waited_anyway() {
        assert_eq!(judge(PERIOD_NS, 0, 6_000_001), Gap::Blackout { us: 4_000 });
        assert_eq!(
            judge(PERIOD_NS, 7, 7 + 302_000_000),
            Gap::Blackout { us: 300_000 }
        );
    }

    #[test]
    fn an_earlier_reading_is_reported_and_not_wrapped() {
        assert_eq!(judge(PERIOD_NS, 6, 5), Gap::Backwards);
        assert_eq!(judge(PERIOD_NS, u64::MAX, 0), Gap::Backwards);
    }
}
