//! A common limit on what all lanes send; it can be changed while they do.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Time that was not used is not saved up beyond this, so that a pause is not followed by a burst.
const BURST: Duration = Duration::from_millis(20);

/// How soon a lane that waits notices that its round was called off.
const LOOK: Duration = Duration::from_millis(20);

/// No limit; faster than any link.
const UNLIMITED: u64 = u64::MAX;

/// A limit of nothing at all would never end.
fn stored(bytes_per_s: Option<u64>) -> u64 {
    bytes_per_s.map_or(UNLIMITED, |limit| limit.max(1))
}

/// Says when the next bytes may go. Shared by all lanes.
#[derive(Debug)]
pub(super) struct Pace {
    /// Bytes per second; [`UNLIMITED`] when there is no limit.
    bytes_per_s: AtomicU64,
    began: Instant,
    /// When everything granted so far has gone, in nanoseconds since `began`.
    granted_ns: AtomicU64,
}

impl Pace {
    pub(super) fn new(bytes_per_s: Option<u64>) -> Self {
        Self {
            bytes_per_s: AtomicU64::new(stored(bytes_per_s)),
            began: Instant::now(),
            granted_ns: AtomicU64::new(0),
        }
    }

    /// The limit at this instant, in bytes per second.
    pub(super) fn bytes_per_s(&self) -> Option<u64> {
        match self.bytes_per_s.load(Ordering::Relaxed) {
            UNLIMITED => None,
            limit => Some(limit),
        }
    }

    /// Another limit from now on. What has been granted keeps its time: at most a frame for each lane.
    pub(super) fn set(&self, bytes_per_s: Option<u64>) {
        self.bytes_per_s
            .store(stored(bytes_per_s), Ordering::Relaxed);
    }

    /// Waits until `bytes` more may go, or until `stopped` says that they need not.
    pub(super) fn wait(&self, bytes: usize, stopped: impl Fn() -> bool) {
        let Some(wait) = self.grant(bytes, self.began.elapsed()) else {
            return;
        };
        let until = Instant::now() + wait;
        while !stopped() {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            // Time itself is what is waited for.
            std::thread::sleep(left.min(LOOK));
        }
    }

    /// Takes `bytes` from what may go `now` and later; says how long to wait for them.
    fn grant(&self, bytes: usize, now: Duration) -> Option<Duration> {
        let rate = self.bytes_per_s()?;
        let cost_ns = (bytes as u128 * 1_000_000_000 / u128::from(rate)) as u64;
        let now_ns = now.as_nanos() as u64;
        let earliest_ns = now_ns.saturating_sub(BURST.as_nanos() as u64);
        let before = self
            .granted_ns
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |granted| {
                Some(granted.max(earliest_ns) + cost_ns)
            })
            .expect("the update always gives a value");
        let goes_at_ns = before.max(earliest_ns) + cost_ns;
        (goes_at_ns > now_ns).then(|| Duration::from_nanos(goes_at_ns - now_ns))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_a_limit_nothing_waits() {
        assert_eq!(Pace::new(None).grant(usize::MAX, Duration::ZERO), None);
    }

    #[test]
    fn a_second_of_bytes_takes_a_second() {
        let pace = Pace::new(Some(1_000_000));
        let mut now = Duration::ZERO;
        for _ in 0..100 {
            now += pace.grant(10_000, now).unwrap_or_default();
        }
        assert!(
            now >= Duration::from_millis(970) && now <= Duration::from_millis(1_000),
            "{now:?}"
        );
    }

    #[test]
    fn a_limit_that_is_changed_holds_for_what_is_granted_from_then_on() {
        let pace = Pace::new(None);
        let hour = Duration::from_secs(3600);
        assert_eq!(pace.grant(1 << 30, hour), None);
        pace.set(Some(1_000_000));
        assert_eq!(pace.bytes_per_s(), Some(1_000_000));
        // The burst, and no more.
        assert_eq!(pace.grant(20_000, hour), None);
        assert_eq!(pace.grant(10_000, hour), Some(Duration::from_millis(10)));
        pace.set(Some(2_000_000));
        assert_eq!(pace.grant(10_000, hour), Some(Duration::from_millis(15)));
        pace.set(None);
        assert_eq!(pace.grant(1 << 30, hour), None);
        assert_eq!(pace.bytes_per_s(), None);
    }

    #[test]
    fn idle_time_is_not_saved_up() {
        let pace = Pace::new(Some(1_000_000));
        let hour = Duration::from_secs(3600);
        assert_eq!(pace.grant(20_000, hour), None);
        assert_eq!(pace.grant(10_000, hour), Some(Duration::from_millis(10)));
    }
}
