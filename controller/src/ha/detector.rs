//! Judges how a host stands from when it was last heard.
//!
//! ```text
//! up ── 2.5 s ──▶ suspect ── 6 s ──▶ unreachable ── 9 s ──▶ restart allowed
//!  ▲                 │                    │                       │
//!  └──── heartbeat ──┴────────────────────┘      heartbeat, after which orders go out first
//! ```
//! The host counts its lease from when it *sent* a heartbeat, the server its silence from when it *received*
//! it, which is later: the server's wait covers the host's lease whatever the network did.

use crate::model::Liveness;
use godwit_wire::host_api::HEARTBEAT_MS;
use godwit_wire::lease::{CLOCK_MARGIN, LEASE_DURATION, STOP_TIME};
use std::time::Duration;
use tokio::time::Instant;

/// The waits before each judgement.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Waits {
    /// Until a host is suspect.
    pub suspect: Duration,
    /// Until it is unreachable.
    pub unreachable: Duration,
    /// Until its VMs may start elsewhere.
    pub restart: Duration,
}

impl Waits {
    /// Those that the lease constants demand.
    pub const STANDARD: Self = Self {
        suspect: Duration::from_millis(HEARTBEAT_MS * 5 / 2),
        unreachable: LEASE_DURATION,
        restart: LEASE_DURATION
            .saturating_add(STOP_TIME)
            .saturating_add(CLOCK_MARGIN),
    };
}

/// A judgement and when it will change if nothing is heard.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Verdict {
    /// The judgement.
    pub liveness: Liveness,
    /// When to judge again; `None` when silence changes nothing any more.
    pub next: Option<Instant>,
}

/// Judges a host that was last heard at `heard` (or at the server's start, if later).
pub fn judge(heard: Instant, now: Instant, waits: &Waits) -> Verdict {
    let silent = now.saturating_duration_since(heard);
    let (liveness, next) = if silent >= waits.restart {
        (Liveness::RestartAllowed, None)
    } else if silent >= waits.unreachable {
        (Liveness::Unreachable, Some(waits.restart))
    } else if silent >= waits.suspect {
        (Liveness::Suspect, Some(waits.unreachable))
    } else {
        (Liveness::Up, Some(waits.suspect))
    };
    Verdict {
        liveness,
        next: next.map(|wait| heard + wait),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_standard_wait_is_the_lease_the_stop_time_and_the_margin() {
        assert_eq!(Waits::STANDARD.restart, Duration::from_secs(9));
    }

    #[test]
    fn each_judgement_begins_exactly_at_its_wait() {
        let heard = Instant::now();
        let at = |ms| judge(heard, heard + Duration::from_millis(ms), &Waits::STANDARD).liveness;
        assert_eq!(at(2_499), Liveness::Up);
        assert_eq!(at(2_500), Liveness::Suspect);
        assert_eq!(at(6_000), Liveness::Unreachable);
        assert_eq!(at(8_999), Liveness::Unreachable);
        assert_eq!(at(9_000), Liveness::RestartAllowed);
    }

    proptest! {
        #[test]
        fn a_restart_is_never_allowed_before_the_whole_wait(heard_ms in 0u64..100_000, now_ms in 0u64..100_000) {
            let zero = Instant::now();
            let (heard, now) = (zero + Duration::from_millis(heard_ms), zero + Duration::from_millis(now_ms));
            let verdict = judge(heard, now, &Waits::STANDARD);
            if verdict.liveness == Liveness::RestartAllowed {
                prop_assert!(now >= heard + Duration::from_secs(9));
            } else {
                prop_assert!(verdict.next.is_some_and(|next| next > now));
            }
        }
    }
}
