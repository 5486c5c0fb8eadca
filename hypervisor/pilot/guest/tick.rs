//! The tick: counted on every vCPU, with the gaps between ticks judged.

use core::sync::atomic::{AtomicU64, Ordering};

use crate::apic;
use crate::clock;
use crate::cpu;
use crate::power;
use crate::pure::constants::TICK_PERIOD_US;
use crate::pure::gap::{self, Gap};
use crate::serial;
use crate::smp::BOOT_VCPU;
use crate::vcpu::{self, Vcpu};

/// The most recent blackout any vCPU saw.
static LAST_BLACKOUT_US: AtomicU64 = AtomicU64::new(0);

/// Received bytes come by interrupt; this finds the ones whose interrupt was lost.
const TICKS_PER_SERIAL_POLL: u64 = 16;

/// The whole guest's counters.
pub struct Totals {
    pub blackouts: u64,
    pub last_blackout_us: u64,
    pub max_blackout_us: u64,
    pub backwards: u64,
    pub tsc_backwards: u64,
}

static PERIOD_NS: AtomicU64 = AtomicU64::new(TICK_PERIOD_US * 1_000);

/// Sets every vCPU's period, before any ticks.
pub fn set_period_us(period_us: u64) {
    PERIOD_NS.store(period_us * 1_000, Ordering::Relaxed);
}

pub fn period_ns() -> u64 {
    PERIOD_NS.load(Ordering::Relaxed)
}

/// Starts ticking on the calling vCPU.
pub fn start(this: &Vcpu) {
    let now = clock::read(this.index());
    this.last_ns.store(now.ns, Ordering::Relaxed);
    this.last_tsc.store(now.tsc, Ordering::Relaxed);
    apic::start_tick();
    cpu::enable_interrupts();
}

/// The interrupt handler. It runs hundreds of times a second on every vCPU, and some KVM
/// backends emulate each instruction: keep it short.
pub extern "C" fn handle() {
    let this = vcpu::current();
    let index = this.index();
    let now = clock::read(index);
    // This handler is the only writer of these three, so a plain load and store will do.
    let ticks = this.ticks.load(Ordering::Relaxed) + 1;
    this.ticks.store(ticks, Ordering::Relaxed);
    let last_ns = this.last_ns.load(Ordering::Relaxed);
    this.last_ns.store(now.ns, Ordering::Relaxed);
    let last_tsc = this.last_tsc.load(Ordering::Relaxed);
    this.last_tsc.store(now.tsc, Ordering::Relaxed);

    match gap::judge(period_ns(), last_ns, now.ns) {
        Gap::Regular => {}
        Gap::Blackout { us } => {
            this.blackouts.fetch_add(1, Ordering::Relaxed);
            this.max_blackout_us.fetch_max(us, Ordering::Relaxed);
            LAST_BLACKOUT_US.store(us, Ordering::Relaxed);
        }
        Gap::Backwards => {
            this.backwards.fetch_add(1, Ordering::Relaxed);
        }
    }
    if now.tsc < last_tsc {
        this.tsc_backwards.fetch_add(1, Ordering::Relaxed);
    }
    if index == BOOT_VCPU && ticks.is_multiple_of(TICKS_PER_SERIAL_POLL) {
        serial::poll();
    }
    apic::end_interrupt();
    if power::STOPPING.load(Ordering::Relaxed) {
        cpu::stop();
    }
}

pub fn totals(vcpus: &[Vcpu]) -> Totals {
    let sum = |counter: fn(&Vcpu) -> &AtomicU64| {
        vcpus
            .iter()
            .fold(0, |sum, vcpu| sum + counter(vcpu).load(Ordering::Relaxed))
    };
    Totals {
        blackouts: sum(|vcpu| &vcpu.blackouts),
        last_blackout_us: LAST_BLACKOUT_US.load(Ordering::Relaxed),
        max_blackout_us: vcpus.iter().fold(0, |max, vcpu| {
            vcpu.max_blackout_us.load(Ordering::Relaxed).max(max)
        }),
        backwards: sum(|vcpu| &vcpu.backwards),
        tsc_backwards: sum(|vcpu| &vcpu.tsc_backwards),
    }
}

/// Forgets everything but the tick counts.
pub fn reset(vcpus: &[Vcpu]) {
    for vcpu in vcpus {
        for counter in [
            &vcpu.blackouts,
            &vcpu.max_blackout_us,
            &vcpu.backwards,
            &vcpu.tsc_backwards,
        ] {
            counter.store(0, Ordering::Relaxed);
        }
    }
    LAST_BLACKOUT_US.store(0, Ordering::Relaxed);
}
