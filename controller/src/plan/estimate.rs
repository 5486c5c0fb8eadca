//! How long a migration will take, from sizes and measured rates.

use crate::view::View;
use godwit_wire::migration::MigrationProgress;
use godwit_wire::unit::{Bytes, Mib};

/// Transfer rate assumed before any migration has been measured.
pub const ASSUMED_BYTES_PER_S: u64 = 100 << 20;
/// Share of the memory that changes anyway while a guest does nothing in particular.
const FIXED_BLACKOUT_MS: f64 = 10.0;
/// Connecting, building the machine, handing over.
const FIXED_S: f64 = 0.5;
/// Stopping a guest and booting it again.
const RESTART_S: f64 = 10.0;
/// Migrations looked at for the measured rate.
const MEASURED: usize = 16;
/// Rounds a prediction follows.
const MAX_ROUNDS: u32 = 30;

/// What a move costs.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Estimate {
    /// Time from start to end.
    pub seconds: f64,
    /// Memory on the wire.
    pub mib: Mib,
    /// Time the guest stands still.
    pub blackout_ms: u64,
}

/// Transfer rate to expect: the median of the latest completed migrations, or what is assumed.
pub fn bandwidth(view: &View) -> u64 {
    let rate = |progress: &MigrationProgress| {
        let average =
            progress.transferred_bytes.0.saturating_mul(1_000) / progress.elapsed_ms.max(1);
        Some(if progress.rate_bytes_per_s > 0 {
            progress.rate_bytes_per_s
        } else {
            average
        })
        .filter(|rate| *rate > 0)
    };
    let mut rates: Vec<u64> = view
        .migrations
        .values()
        .rev()
        .filter_map(|migration| rate(migration.progress.as_ref()?))
        .take(MEASURED)
        .collect();
    rates.sort_unstable();
    rates
        .get(rates.len() / 2)
        .copied()
        .unwrap_or(ASSUMED_BYTES_PER_S)
}

/// A live migration of `resident` bytes by a guest that dirties `dirty_per_s`, over `bandwidth`.
///
/// Each round sends what the round before left dirty; the blackout sends what is left once that fits the limit.
pub fn live(resident: Bytes, dirty_per_s: u64, bandwidth: u64, downtime_limit_ms: u64) -> Estimate {
    let bandwidth = bandwidth.max(1) as f64;
    let limit_s = downtime_limit_ms as f64 / 1_000.0;
    let (mut left, mut sent, mut seconds) = (resident.0 as f64, 0.0, FIXED_S);
    for round in 0..MAX_ROUNDS {
        if round > 0 && left / bandwidth <= limit_s {
            break;
        }
        let round_s = left / bandwidth;
        sent += left;
        seconds += round_s;
        left = (dirty_per_s as f64 * round_s).min(resident.0 as f64);
    }
    let blackout_s = left / bandwidth;
    Estimate {
        seconds: seconds + blackout_s,
        mib: Mib(((sent + left) / f64::from(1 << 20)).ceil() as u64),
        blackout_ms: (blackout_s * 1_000.0 + FIXED_BLACKOUT_MS).ceil() as u64,
    }
}

/// Stopping a guest and booting it again.
pub fn restart() -> Estimate {
    Estimate {
        seconds: RESTART_S,
        mib: Mib(0),
        blackout_ms: (RESTART_S * 1_000.0) as u64,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_idle_guest_is_sent_once_and_a_dirtying_one_more() {
        let idle = live(Mib(1024).bytes(), 0, 100 << 20, 300);
        assert_eq!((idle.mib, idle.blackout_ms), (Mib(1024), 10));
        let dirtying = live(Mib(1024).bytes(), 50 << 20, 100 << 20, 300);
        assert!(dirtying.mib > idle.mib && dirtying.seconds > idle.seconds);
        assert!(dirtying.blackout_ms <= 310);
    }

    #[test]
    fn a_guest_that_dirties_faster_than_the_wire_is_predicted_to_stand_still_for_long() {
        let hopeless = live(Mib(1024).bytes(), 200 << 20, 100 << 20, 300);
        assert!(hopeless.blackout_ms > 5_000);
    }
}
