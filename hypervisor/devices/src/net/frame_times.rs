//! When frames passed a card, either way. The last one at the source of a migration and the first one at its target are
//! the ends of the silence that the guest's network saw.

use rustix::time::{ClockId, clock_gettime};
use std::sync::atomic::{AtomicU64, Ordering};

/// No frame has passed: the clock stood at 0 when the host began to boot, long before there were cards.
const NEVER: u64 = 0;

/// When the first and the latest frame passed a card since it was made, on CLOCK_BOOTTIME. What the card itself sends to
/// announce its machine is none of the guest's and does not count.
#[derive(Debug, Default)]
pub struct FrameTimes {
    first_ns: AtomicU64,
    latest_ns: AtomicU64,
}

impl FrameTimes {
    /// Frames have passed just now. Said once for all frames of a turn: it is over in less time than matters, and the
    /// clock need not be read for each of them.
    pub fn note(&self) {
        let now = clock_gettime(ClockId::Boottime);
        let now_ns = now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64;
        // Queue pairs have threads of their own: a slower one does not turn the time back.
        self.latest_ns.fetch_max(now_ns, Ordering::Relaxed);
        if self.first_ns.load(Ordering::Relaxed) == NEVER {
            // Should another pair have been first, its time stands.
            let _ =
                self.first_ns
                    .compare_exchange(NEVER, now_ns, Ordering::Relaxed, Ordering::Relaxed);
        }
    }

    /// When the first frame passed, in nanoseconds; `None` as long as none has.
    pub fn first_ns(&self) -> Option<u64> {
        told(&self.first_ns)
    }

    /// When the latest frame passed, likewise.
    pub fn latest_ns(&self) -> Option<u64> {
        told(&self.latest_ns)
    }
}

fn told(time_ns: &AtomicU64) -> Option<u64> {
    let time_ns = time_ns.load(Ordering::Relaxed);
    (time_ns != NEVER).then_some(time_ns)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_frame_stays_the_first_and_the_latest_moves_on() {
        let times = FrameTimes::default();
        assert_eq!((times.first_ns(), times.latest_ns()), (None, None));
        times.note();
        let first = times.first_ns().unwrap();
        assert_eq!(times.latest_ns(), Some(first));
        while times.latest_ns() == Some(first) {
            times.note();
        }
        assert_eq!(times.first_ns(), Some(first));
        assert!(times.latest_ns().unwrap() > first);
    }
}
