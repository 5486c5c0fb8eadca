//! One direction's rate limit, shared by all queue pairs, and the timer that waits it off.

use crate::limiter::Limiter;
use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create,
    timerfd_settime,
};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// A rate limit, or none.
#[derive(Clone, Debug)]
pub(super) struct Limit(Option<Arc<Mutex<Limiter>>>);

impl Limit {
    pub(super) fn new(bytes_per_s: Option<u64>) -> Self {
        Self(bytes_per_s.map(|rate| Arc::new(Mutex::new(Limiter::new(rate, Instant::now())))))
    }

    /// Whether something may pass now; if not, how long it will be.
    pub(super) fn check(&self) -> Result<(), Duration> {
        self.take(0)
    }

    /// Counts what has passed.
    pub(super) fn passed(&self, bytes: u64) {
        // Checked before; another queue pair may have overdrawn it since, which the next check waits off.
        let _ = self.take(bytes);
    }

    fn take(&self, bytes: u64) -> Result<(), Duration> {
        let Some(limiter) = &self.0 else {
            return Ok(());
        };
        let mut limiter = limiter.lock().unwrap_or_else(PoisonError::into_inner);
        limiter.take(bytes, Instant::now())
    }
}

/// A timer that epoll can wait for.
#[derive(Debug)]
pub(super) struct Timer(OwnedFd);

impl Timer {
    pub(super) fn new() -> io::Result<Self> {
        let flags = TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC;
        Ok(Self(timerfd_create(TimerfdClockId::Monotonic, flags)?))
    }

    /// Rings once after `delay`.
    pub(super) fn ring_after(&self, delay: Duration) -> io::Result<()> {
        // Zero would disarm it.
        self.set(delay.max(Duration::from_nanos(1)))
    }

    /// Does not ring, and forgets having rung.
    pub(super) fn silence(&self) -> io::Result<()> {
        self.set(Duration::ZERO)
    }

    fn set(&self, delay: Duration) -> io::Result<()> {
        let zero = Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        let value = Timespec {
            tv_sec: i64::try_from(delay.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: delay.subsec_nanos().into(),
        };
        let spec = Itimerspec {
            it_interval: zero,
            it_value: value,
        };
        timerfd_settime(&self.0, TimerfdTimerFlags::empty(), &spec)?;
        Ok(())
    }
}

impl AsFd for Timer {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
