//! Random tests: a few seeds in every run of the tests, thousands of them by `tests/run sim`.

use std::num::NonZero;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

/// How many seeds; `tests/run sim` sets it.
const COUNT_ENV: &str = "GODWIT_SIM_SEEDS";
/// The first of them, to repeat one that has found something.
const FIRST_ENV: &str = "GODWIT_SIM_FIRST_SEED";
/// Seeds between two lines of progress.
const REPORT_INTERVAL: u64 = 1_000;

/// Runs `run` for `usual` seeds, each in a simulated time of its own; or for as many as the environment names, then on
/// all CPUs and with a line at the end.
pub(super) fn for_each_seed<F>(name: &str, usual: u64, run: impl Fn(u64) -> F + Sync)
where
    F: Future<Output = ()>,
{
    let asked = number(COUNT_ENV);
    let (first, count) = (number(FIRST_ENV).unwrap_or(1), asked.unwrap_or(usual));
    let workers = match asked {
        Some(_) => std::thread::available_parallelism().map_or(1, NonZero::get),
        // The runner of the tests has others for the other CPUs.
        None => 1,
    };
    let (begun, next) = (Instant::now(), AtomicU64::new(0));
    std::thread::scope(|scope| {
        for _ in 0..workers {
            scope.spawn(|| {
                loop {
                    let done = next.fetch_add(1, Ordering::Relaxed);
                    if done >= count {
                        return;
                    }
                    if asked.is_some() && done > 0 && done.is_multiple_of(REPORT_INTERVAL) {
                        println!(
                            "sim: {name}: {done} of {count} seeds, {:?}",
                            begun.elapsed()
                        );
                    }
                    let _named = Named(first + done);
                    in_simulated_time(run(first + done));
                }
            });
        }
    });
    if asked.is_some() {
        let last = first + count - 1;
        println!(
            "sim: {name}: {count} seeds ({first} to {last}) passed in {:?}",
            begun.elapsed()
        );
    }
}

fn number(variable: &str) -> Option<u64> {
    let text = std::env::var(variable).ok()?;
    let number = text.parse().ok().filter(|number| *number > 0);
    Some(number.unwrap_or_else(|| panic!("{variable}={text:?} is not a number above 0")))
}

/// A runtime that ends with what runs in it: what one seed leaves behind costs the next nothing.
fn in_simulated_time(run: impl Future<Output = ()>) {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .start_paused(true)
        .build()
        .expect("a runtime")
        .block_on(run);
}

/// Says which seed it was when a test fails.
struct Named(u64);

impl Drop for Named {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!(
                "this was seed {}: {FIRST_ENV}={} repeats it",
                self.0, self.0
            );
        }
    }
}

/// Small and repeatable; quality does not matter here.
pub(super) struct Dice(u64);

impl Dice {
    pub(super) fn new(seed: u64) -> Self {
        Self(u64::wrapping_mul(seed, 0x9e37_79b9_7f4a_7c15))
    }

    pub(super) fn roll(&mut self, sides: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % sides
    }
}
