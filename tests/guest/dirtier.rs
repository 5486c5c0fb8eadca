//! A thread that rewrites a working set over and over at a given rate.

use crate::memory::{Memory, PAGES_PER_MIB};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

/// Pages are written in bursts this far apart, short beside any migration round.
const BURST_PERIOD: Duration = Duration::from_millis(5);

/// Handle of the thread; the rate counts in MiB/s, 0 rests.
pub(crate) struct Dirtier {
    orders: Arc<Orders>,
}

#[derive(Default)]
struct Orders {
    mib_per_s: AtomicU64,
    working_set_mib: AtomicU64,
}

impl Dirtier {
    pub(crate) fn start(memory: Arc<Mutex<Memory>>) -> Self {
        let orders = Arc::new(Orders::default());
        let followed = Arc::clone(&orders);
        thread::spawn(move || run(&followed, &memory));
        Self { orders }
    }

    pub(crate) fn set(&self, mib_per_s: u64, working_set_mib: u64) {
        self.orders
            .working_set_mib
            .store(working_set_mib, Ordering::Relaxed);
        self.orders.mib_per_s.store(mib_per_s, Ordering::Relaxed);
    }
}

fn run(orders: &Orders, memory: &Mutex<Memory>) {
    let mut next_page = 0;
    let mut last_burst = Instant::now();
    loop {
        thread::sleep(BURST_PERIOD);
        let elapsed = last_burst.elapsed();
        last_burst = Instant::now();
        let pages_per_s = orders.mib_per_s.load(Ordering::Relaxed) * PAGES_PER_MIB;
        let working_set = orders.working_set_mib.load(Ordering::Relaxed) * PAGES_PER_MIB;
        // After a blackout the rate goes on as before: what was missed is not made up for.
        let burst = pages_per_s * elapsed.min(2 * BURST_PERIOD).as_micros() as u64 / 1_000_000;
        let mut memory = memory.lock().unwrap_or_else(PoisonError::into_inner);
        let working_set = working_set.min(memory.len_mib() * PAGES_PER_MIB) as usize;
        if working_set == 0 {
            continue;
        }
        for _ in 0..burst {
            next_page = (next_page + 1) % working_set;
            memory.rewrite(next_page);
        }
    }
}
