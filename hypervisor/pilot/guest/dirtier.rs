//! Rewriting filled pages in the background at a set rate.
//!
//! ```text
//!   orders change:  hold() ── the worker finishes its page and stands still ── set() ── drop
//! ```
//! The worker is the last vCPU, or the only one, between commands. Whoever else writes or checks
//! pages holds it meanwhile, so that pages always have one writer.

use core::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use crate::clock;
use crate::memory::Memory;
use crate::user_mode;
use crate::vcpu;

/// Pages written between two looks at the clock.
const BATCH_PAGES: u64 = 256;

/// What a worker that fell behind, for want of speed or of a processor, may catch up on.
const BACKLOG_MAX_MS: u64 = 250;

/// What the worker is to do.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Orders {
    pub pages_per_s: u64,
    pub working_set_pages: u64,
}

/// The largest rate. No memory is as fast, and products with it stay within 64 bits.
pub const PAGES_PER_S_MAX: u64 = 1 << 32;

static PAGES_PER_S: AtomicU64 = AtomicU64::new(0);
static WORKING_SET_PAGES: AtomicU64 = AtomicU64::new(0);
/// Counts changes of the two above.
static ORDERS_VERSION: AtomicU64 = AtomicU64::new(0);
static HOLD: AtomicBool = AtomicBool::new(false);
static HELD: AtomicBool = AtomicBool::new(false);

/// While it lives, the worker writes nothing.
pub struct Hold(());

/// Holds the worker, which runs on another vCPU when `vcpus` is more than one. The only vCPU
/// does not work while it is here.
pub fn hold(vcpus: usize) -> Hold {
    if vcpus > 1 {
        HELD.store(false, Ordering::Relaxed);
        HOLD.store(true, Ordering::Release);
        while !HELD.load(Ordering::Acquire) {
            vcpu::idle();
        }
    }
    Hold(())
}

impl Hold {
    pub fn set(&self, orders: Orders) {
        PAGES_PER_S.store(orders.pages_per_s, Ordering::Relaxed);
        WORKING_SET_PAGES.store(orders.working_set_pages, Ordering::Relaxed);
        ORDERS_VERSION.store(
            ORDERS_VERSION.load(Ordering::Relaxed) + 1,
            Ordering::Relaxed,
        );
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        HOLD.store(false, Ordering::Release);
    }
}

/// The worker.
pub struct Dirtier {
    memory: &'static Memory,
    vcpu: usize,
    orders: Orders,
    orders_version: u64,
    next_page: u64,
    /// Since when `written_pages` counts.
    start_ns: u64,
    written_pages: u64,
}

impl Dirtier {
    /// A worker for the vCPU it is created on.
    pub fn new(memory: &'static Memory, vcpu: usize) -> Self {
        Self {
            memory,
            vcpu,
            orders: Orders {
                pages_per_s: 0,
                working_set_pages: 0,
            },
            orders_version: 0,
            next_page: 0,
            start_ns: 0,
            written_pages: 0,
        }
    }

    /// Writes a few pages if any are due. False: nothing to do before the next tick.
    pub fn work(&mut self) -> bool {
        if HOLD.load(Ordering::Acquire) {
            HELD.store(true, Ordering::Release);
            return false;
        }
        self.take_orders();
        if self.orders.pages_per_s == 0 || self.orders.working_set_pages == 0 {
            return false;
        }
        let due = self.due_pages();
        if due > 0 {
            user_mode::run(|| self.write_pages(due.min(BATCH_PAGES)));
        }
        due > 0
    }

    fn write_pages(&mut self, pages: u64) {
        for _ in 0..pages {
            if HOLD.load(Ordering::Acquire) {
                return;
            }
            self.memory.write_page(self.next_page);
            self.written_pages += 1;
            self.next_page += 1;
            if self.next_page >= self.orders.working_set_pages {
                self.next_page = 0;
            }
        }
    }

    fn take_orders(&mut self) {
        let version = ORDERS_VERSION.load(Ordering::Relaxed);
        if version != self.orders_version {
            self.orders_version = version;
            self.orders = Orders {
                pages_per_s: PAGES_PER_S.load(Ordering::Relaxed),
                working_set_pages: WORKING_SET_PAGES.load(Ordering::Relaxed),
            };
            self.next_page = 0;
            self.restart_count();
        }
    }

    fn due_pages(&mut self) -> u64 {
        /// Counting starts anew this often, which keeps the product below in range.
        const RESTART_US: u64 = 60_000_000;

        let elapsed_us = clock::read(self.vcpu).ns.saturating_sub(self.start_ns) / 1_000;
        if elapsed_us > RESTART_US {
            self.restart_count();
            return 0;
        }
        let due = elapsed_us * self.orders.pages_per_s / 1_000_000;
        let backlog = due.saturating_sub(self.written_pages);
        let backlog_max = self.orders.pages_per_s * BACKLOG_MAX_MS / 1_000;
        if backlog > backlog_max.max(BATCH_PAGES) {
            self.restart_count();
            return 0;
        }
        backlog
    }

    fn restart_count(&mut self) {
        self.start_ns = clock::read(self.vcpu).ns;
        self.written_pages = 0;
    }
}
