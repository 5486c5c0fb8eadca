//! Blackouts as the guest sees them: a thread looks at the monotonic clock every millisecond and keeps the gaps.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

const PERIOD: Duration = Duration::from_millis(1);
/// A gap longer than this counts as a blackout; shorter ones are scheduling.
const BLACKOUT_THRESHOLD: Duration = Duration::from_millis(4);

/// What the thread has seen.
#[derive(Default)]
pub(crate) struct Ticks {
    ticks: AtomicU64,
    blackouts: AtomicU64,
    last_blackout_us: AtomicU64,
    max_gap_us: AtomicU64,
    backwards: AtomicU64,
}

impl Ticks {
    pub(crate) fn start() -> Arc<Self> {
        let ticks = Arc::new(Self::default());
        let watched = Arc::clone(&ticks);
        thread::spawn(move || watched.run());
        ticks
    }

    /// Forgets the blackouts; ticks go on counting.
    pub(crate) fn reset(&self) {
        for counter in [&self.blackouts, &self.last_blackout_us, &self.max_gap_us] {
            counter.store(0, Ordering::Relaxed);
        }
    }

    pub(crate) fn report(&self) -> String {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        format!(
            "ok ticks={} uptime_ms={} blackouts={} last_blackout_us={} max_blackout_us={} backwards={} clock={}",
            read(&self.ticks),
            crate::sys::uptime_ms(),
            read(&self.blackouts),
            read(&self.last_blackout_us),
            read(&self.max_gap_us),
            read(&self.backwards),
            crate::sys::clock_source(),
        )
    }

    fn run(&self) {
        let mut before = Instant::now();
        loop {
            thread::sleep(PERIOD);
            let now = Instant::now();
            self.ticks.fetch_add(1, Ordering::Relaxed);
            match now.checked_duration_since(before) {
                Some(gap) => self.note(gap),
                None => _ = self.backwards.fetch_add(1, Ordering::Relaxed),
            }
            before = now;
        }
    }

    fn note(&self, gap: Duration) {
        // The part of the gap that the thread meant to sleep is not lost time.
        let lost_us = gap.saturating_sub(PERIOD).as_micros() as u64;
        self.max_gap_us.fetch_max(lost_us, Ordering::Relaxed);
        if gap > BLACKOUT_THRESHOLD {
            self.blackouts.fetch_add(1, Ordering::Relaxed);
            self.last_blackout_us.store(lost_us, Ordering::Relaxed);
        }
    }
}
