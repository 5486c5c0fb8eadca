//! Slowing a guest down: its busiest vCPUs are kept from running for a share of their time.
//!
//! KVM's dirty log does not tell which vCPU wrote a page. A vCPU that writes much runs much, so CPU time stands for
//! it; vCPUs that hardly run are left alone.

use super::vcpu::{VcpuStats, thread_cpu_time};
use crate::kvm::Kick;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// A held vCPU runs and stands within each of these.
const PERIOD: Duration = Duration::from_millis(10);
/// How often it is looked at which vCPUs are the busiest.
const LOOK_AGAIN: Duration = Duration::from_millis(250);
/// Those that together have this share of the guest's CPU time are held.
const BUSY_SHARE: f64 = 0.8;
/// A vCPU that would run for less than this share of the time is never held.
const IDLE_SHARE: f64 = 0.05;

/// Where a vCPU waits while it is held.
#[derive(Debug, Default)]
pub(super) struct Hold {
    until: Mutex<Option<Instant>>,
    changed: Condvar,
    /// For how long the vCPU has waited here since it was made, in microseconds.
    waited_us: AtomicU64,
}

impl Hold {
    fn until(&self, time: Instant) {
        *self.until.lock().unwrap_or_else(PoisonError::into_inner) = Some(time);
    }

    fn waited_us(&self) -> u64 {
        self.waited_us.load(Ordering::Relaxed)
    }

    /// Lets the vCPU go on at once.
    pub(super) fn release(&self) {
        *self.until.lock().unwrap_or_else(PoisonError::into_inner) = None;
        self.changed.notify_all();
    }

    /// Waits as long as the vCPU is held and not to stop.
    pub(super) fn wait(&self, stop: &AtomicBool) {
        let began = Instant::now();
        if self.wait_until_released(stop) == Waited::ForAWhile {
            let waited_us = began.elapsed().as_micros() as u64;
            self.waited_us.fetch_add(waited_us, Ordering::Relaxed);
        }
    }

    fn wait_until_released(&self, stop: &AtomicBool) -> Waited {
        let mut waited = Waited::NotAtAll;
        let mut until = self.until.lock().unwrap_or_else(PoisonError::into_inner);
        while let Some(time) = *until {
            let left = time.saturating_duration_since(Instant::now());
            if left.is_zero() || stop.load(Ordering::SeqCst) {
                break;
            }
            waited = Waited::ForAWhile;
            until = self
                .changed
                .wait_timeout(until, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
        waited
    }
}

/// Whether a vCPU that looked had to wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Waited {
    NotAtAll,
    ForAWhile,
}

/// What it takes to hold one vCPU.
#[derive(Clone, Debug)]
pub(super) struct Handle {
    pub(super) hold: Arc<Hold>,
    pub(super) kick: Kick,
    pub(super) stats: Arc<VcpuStats>,
}

/// A guest that can be slowed down.
#[derive(Clone, Debug)]
pub struct Throttle {
    vcpus: Vec<Handle>,
}

/// A guest that is slowed down while this lives.
#[derive(Debug)]
pub struct Throttling {
    shared: Arc<(Mutex<Asked>, Condvar)>,
    thread: Option<JoinHandle<()>>,
    /// The vCPUs' holds, and for how long each had been waited at before.
    holds: Vec<(Arc<Hold>, u64)>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Asked {
    Percent(u8),
    End,
}

impl Throttle {
    pub(super) const fn new(vcpus: Vec<Handle>) -> Self {
        Self { vcpus }
    }
}

impl Throttling {
    /// Slows `throttle` down by nothing yet.
    pub fn start(throttle: Throttle) -> Self {
        let shared = Arc::new((Mutex::new(Asked::Percent(0)), Condvar::new()));
        let theirs = shared.clone();
        let holds = throttle.vcpus.iter();
        let holds = holds.map(|vcpu| (vcpu.hold.clone(), vcpu.hold.waited_us()));
        let holds = holds.collect();
        let thread = std::thread::Builder::new()
            .name("throttle".into())
            .spawn(move || slow_down(&throttle.vcpus, &theirs));
        let thread = thread
            .inspect_err(|error| tracing::warn!(%error, "the guest cannot be slowed down"))
            .ok();
        Self {
            shared,
            thread,
            holds,
        }
    }

    /// For how long each vCPU has been kept from running since this began, in microseconds, by its number.
    pub fn stalled_us(&self) -> Vec<u64> {
        let stalls = self.holds.iter();
        stalls
            .map(|(hold, before)| hold.waited_us().saturating_sub(*before))
            .collect()
    }

    /// Keeps the busiest vCPUs from running for `percent` of their time.
    pub fn set(&mut self, percent: u8) {
        self.ask(Asked::Percent(percent.min(99)));
    }

    fn ask(&self, asked: Asked) {
        *self.shared.0.lock().unwrap_or_else(PoisonError::into_inner) = asked;
        self.shared.1.notify_all();
    }
}

impl Drop for Throttling {
    fn drop(&mut self) {
        self.ask(Asked::End);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// How busy a vCPU has been, and how much of that time it was held.
struct Watched<'a> {
    vcpu: &'a Handle,
    cpu_time: Duration,
    held: Duration,
    chosen: bool,
}

fn slow_down(vcpus: &[Handle], shared: &(Mutex<Asked>, Condvar)) {
    let mut watched: Vec<_> = vcpus
        .iter()
        .map(|vcpu| Watched {
            vcpu,
            cpu_time: vcpu.cpu_time(),
            held: Duration::ZERO,
            chosen: false,
        })
        .collect();
    let mut looked = Instant::now();
    let mut asked = shared.0.lock().unwrap_or_else(PoisonError::into_inner);
    loop {
        let percent = match *asked {
            Asked::End => break,
            Asked::Percent(percent) => percent,
        };
        let wait = if percent == 0 { LOOK_AGAIN } else { PERIOD };
        if percent > 0 {
            let hold = PERIOD * u32::from(percent) / 100;
            for one in watched.iter_mut().filter(|one| one.chosen) {
                one.vcpu.hold.until(Instant::now() + hold);
                one.vcpu.kick.kick();
                one.held += hold;
            }
        }
        asked = shared
            .1
            .wait_timeout(asked, wait)
            .unwrap_or_else(PoisonError::into_inner)
            .0;
        if looked.elapsed() >= LOOK_AGAIN {
            choose(&mut watched, looked.elapsed());
            looked = Instant::now();
        }
    }
    for vcpu in vcpus {
        vcpu.hold.release();
    }
}

impl Handle {
    fn cpu_time(&self) -> Duration {
        thread_cpu_time(self.stats.thread.load(Ordering::Relaxed))
    }
}

/// Chooses who is held next, by what ran in the last `window`.
fn choose(watched: &mut [Watched<'_>], window: Duration) {
    let demands: Vec<f64> = watched
        .iter_mut()
        .map(|one| {
            let now = one.vcpu.cpu_time();
            let ran = now.saturating_sub(one.cpu_time).as_secs_f64();
            let free = window.saturating_sub(one.held).as_secs_f64().max(1e-3);
            (one.cpu_time, one.held) = (now, Duration::ZERO);
            (ran / free).min(1.0)
        })
        .collect();
    for (one, chosen) in watched.iter_mut().zip(busiest(&demands)) {
        one.chosen = chosen;
    }
}

/// Which of these shares of a CPU make up most of what is used.
fn busiest(demands: &[f64]) -> Vec<bool> {
    let total: f64 = demands.iter().sum();
    let mut order: Vec<usize> = (0..demands.len()).collect();
    order.sort_by(|a, b| demands[*b].total_cmp(&demands[*a]));
    let (mut chosen, mut sum) = (vec![false; demands.len()], 0.0);
    for index in order {
        if sum >= total * BUSY_SHARE || demands[index] < IDLE_SHARE {
            break;
        }
        chosen[index] = true;
        sum += demands[index];
    }
    chosen
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_busiest_are_held() {
        assert_eq!(busiest(&[0.02, 1.0, 0.1, 0.9]), [false, true, false, true]);
        assert_eq!(busiest(&[0.5, 0.5]), [true, true]);
        assert_eq!(busiest(&[0.01, 0.02]), [false, false]);
    }

    #[test]
    fn a_held_vcpu_goes_on_when_it_is_told_to_stop() {
        let hold = Hold::default();
        hold.until(Instant::now() + Duration::from_secs(3600));
        hold.wait(&AtomicBool::new(true));
        hold.release();
        hold.wait(&AtomicBool::new(false));
        assert_eq!(hold.waited_us(), 0);
    }

    #[test]
    fn the_time_for_which_a_vcpu_is_held_is_counted() {
        let hold = Hold::default();
        hold.until(Instant::now() + Duration::from_millis(5));
        hold.wait(&AtomicBool::new(false));
        // It looked at the clock a moment after it was told until when.
        let waited_us = hold.waited_us();
        assert!(waited_us >= 1, "{waited_us}");
        hold.wait(&AtomicBool::new(false));
        assert_eq!(hold.waited_us(), waited_us, "it was not held any more");
    }
}
