//! The local APIC: tick timer, end of interrupt, starting other vCPUs.

use core::ptr;
use core::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use crate::clock;
use crate::cpu;
use crate::exceptions::{SPURIOUS_VECTOR, TICK_VECTOR};
use crate::port;
use crate::smp::BOOT_VCPU;
use crate::tick;

/// Register offsets as in the memory-mapped layout; an x2APIC register's number is a sixteenth.
const TASK_PRIORITY: u32 = 0x080;
const END_OF_INTERRUPT: u32 = 0x0b0;
const SPURIOUS: u32 = 0x0f0;
const COMMAND_LOW: u32 = 0x300;
const COMMAND_HIGH: u32 = 0x310;
const TIMER: u32 = 0x320;
const LINE_0: u32 = 0x350;
const TIMER_INITIAL: u32 = 0x380;
const TIMER_CURRENT: u32 = 0x390;
const TIMER_DIVIDE: u32 = 0x3e0;

const SOFTWARE_ENABLE: u32 = 1 << 8;
const MASKED: u32 = 1 << 16;
const PERIODIC: u32 = 1 << 17;
const DIVIDE_BY_1: u32 = 0b1011;

const BASE_MSR: u32 = 0x1b;
const BASE_ENABLE: u64 = 1 << 11;
const BASE_X2APIC: u64 = 1 << 10;
const X2APIC_FIRST_MSR: u32 = 0x800;

static X2APIC: AtomicBool = AtomicBool::new(false);
static MMIO_BASE: AtomicU32 = AtomicU32::new(0);

/// Timer steps in one tick period.
static TICK_STEPS: AtomicU32 = AtomicU32::new(0);

/// Probes the boot vCPU's local APIC and silences the legacy interrupt controller, whose timer
/// firmware may have left running.
pub fn init() {
    const LEGACY_MASK_PORTS: [u16; 2] = [0x21, 0xa1];
    const X2APIC_FEATURE: u32 = 1 << 21;
    for mask_port in LEGACY_MASK_PORTS {
        port::write_u8(mask_port, 0xff);
    }
    X2APIC.store(cpu::cpuid(1).ecx & X2APIC_FEATURE != 0, Ordering::Relaxed);
    init_this();
}

/// Enables the calling vCPU's local APIC.
pub fn init_this() {
    // SAFETY: every x86-64 processor has the register; setting the enable bits changes only how
    // the APIC is reached, which `X2APIC` records.
    unsafe {
        let base = cpu::read_msr(BASE_MSR) | BASE_ENABLE;
        if X2APIC.load(Ordering::Relaxed) {
            cpu::write_msr(BASE_MSR, base);
            cpu::write_msr(BASE_MSR, base | BASE_X2APIC);
        } else {
            cpu::write_msr(BASE_MSR, base);
            MMIO_BASE.store(base as u32 & !0xfff, Ordering::Relaxed);
        }
    }
    write(TASK_PRIORITY, 0);
    write(LINE_0, MASKED);
    write(SPURIOUS, SOFTWARE_ENABLE | u32::from(SPURIOUS_VECTOR));
}

/// Measures how far the timer counts in one tick period.
pub fn calibrate_timer() {
    const CALIBRATION_NS: u64 = 2_000_000;
    write(TIMER, MASKED);
    write(TIMER_DIVIDE, DIVIDE_BY_1);
    write(TIMER_INITIAL, u32::MAX);
    let start_ns = clock::read(BOOT_VCPU).ns;
    let start_count = read(TIMER_CURRENT);
    let elapsed_ns = loop {
        let elapsed_ns = clock::read(BOOT_VCPU).ns - start_ns;
        if elapsed_ns >= CALIBRATION_NS {
            break elapsed_ns;
        }
    };
    let steps = u64::from(start_count - read(TIMER_CURRENT));
    write(TIMER_INITIAL, 0);
    let tick_steps = steps * tick::period_ns() / elapsed_ns;
    TICK_STEPS.store(
        tick_steps.clamp(1, u32::MAX.into()) as u32,
        Ordering::Relaxed,
    );
}

/// Starts the periodic tick on the calling vCPU.
pub fn start_tick() {
    write(TIMER, PERIODIC | u32::from(TICK_VECTOR));
    write(TIMER_DIVIDE, DIVIDE_BY_1);
    write(TIMER_INITIAL, TICK_STEPS.load(Ordering::Relaxed));
}

pub fn end_interrupt() {
    write(END_OF_INTERRUPT, 0);
}

/// Puts another vCPU into its wait-for-start state.
pub fn send_init(apic_id: u32) {
    const INIT: u32 = 0x4500;
    send(apic_id, INIT);
}

/// Starts another vCPU in real mode at a page below 1 MiB.
pub fn send_start(apic_id: u32, page_address: u64) {
    const START: u32 = 0x4600;
    send(apic_id, START | (page_address >> 12) as u32);
}

fn send(apic_id: u32, command: u32) {
    if X2APIC.load(Ordering::Relaxed) {
        let register = X2APIC_FIRST_MSR + COMMAND_LOW / 16;
        // SAFETY: in x2APIC mode the register exists; it only sends the interrupt.
        unsafe { cpu::write_msr(register, u64::from(apic_id) << 32 | u64::from(command)) };
    } else {
        write(COMMAND_HIGH, apic_id << 24);
        write(COMMAND_LOW, command);
    }
}

fn read(register: u32) -> u32 {
    if X2APIC.load(Ordering::Relaxed) {
        // SAFETY: in x2APIC mode the registers named above exist.
        unsafe { cpu::read_msr(X2APIC_FIRST_MSR + register / 16) as u32 }
    } else {
        // SAFETY: the registers are mapped, uncached, where the base register says.
        unsafe { mmio(register).read_volatile() }
    }
}

fn write(register: u32, value: u32) {
    if X2APIC.load(Ordering::Relaxed) {
        // SAFETY: as in `read`; the values written configure this vCPU's interrupts only.
        unsafe { cpu::write_msr(X2APIC_FIRST_MSR + register / 16, value.into()) };
    } else {
        // SAFETY: as in `read`.
        unsafe { mmio(register).write_volatile(value) };
    }
}

fn mmio(register: u32) -> *mut u32 {
    let address = MMIO_BASE.load(Ordering::Relaxed) + register;
    ptr::with_exposed_provenance_mut(address as usize)
}
