//! Time: KVM's paravirtual clock where it is offered, the calibrated time stamp counter elsewhere.

use core::cell::UnsafeCell;
use core::sync::atomic::{AtomicU64, Ordering, compiler_fence};

use crate::cpu;
use crate::port;
use crate::pure::constants::VCPUS_MAX;

/// One reading of both clocks.
#[derive(Clone, Copy)]
pub struct Reading {
    /// Nanoseconds since some moment before the guest started.
    pub ns: u64,
    pub tsc: u64,
}

/// `struct pvclock_vcpu_time_info` (Documentation/virt/kvm/x86/msr.rst), alone on its page: KVM
/// writes it, and a shared page would be dirtied on every vCPU's behalf.
#[repr(C, align(4096))]
struct ClockPage(UnsafeCell<ClockInfo>);

// SAFETY: KVM writes a page for the vCPU that reads it; all accesses are volatile.
unsafe impl Sync for ClockPage {}

#[repr(C)]
#[derive(Clone, Copy)]
struct ClockInfo {
    version: u32,
    padding: u32,
    tsc_timestamp: u64,
    system_time_ns: u64,
    tsc_to_system_multiplier: u32,
    tsc_shift: i8,
    flags: u8,
    padding_end: [u8; 2],
}

const NO_INFO: ClockInfo = ClockInfo {
    version: 0,
    padding: 0,
    tsc_timestamp: 0,
    system_time_ns: 0,
    tsc_to_system_multiplier: 0,
    tsc_shift: 0,
    flags: 0,
    padding_end: [0; 2],
};

#[unsafe(link_section = ".bss.uninitialized")]
static PAGES: [ClockPage; VCPUS_MAX] = [const { ClockPage(UnsafeCell::new(NO_INFO)) }; VCPUS_MAX];

/// Without the paravirtual clock: nanoseconds per counter step, as a fraction of 2^32. Zero when
/// the paravirtual clock is used.
static TSC_MULTIPLIER: AtomicU64 = AtomicU64::new(0);

/// Chooses the clock and starts it on the boot vCPU.
pub fn init() {
    if !has_kvmclock() {
        TSC_MULTIPLIER.store((1_000_000 << 32) / tsc_khz_by_pit(), Ordering::Relaxed);
    }
    init_this(crate::smp::BOOT_VCPU);
}

/// Starts the chosen clock on the calling vCPU.
pub fn init_this(index: usize) {
    const KVM_SYSTEM_TIME_MSR: u32 = 0x4b56_4d01;
    const ENABLE: u64 = 1;
    if uses_kvmclock() {
        let page = PAGES[index].0.get();
        // SAFETY: the page is this vCPU's and lives for ever; the MSR exists, see
        // `has_kvmclock`.
        unsafe {
            page.write_volatile(NO_INFO);
            cpu::write_msr(
                KVM_SYSTEM_TIME_MSR,
                page.expose_provenance() as u64 | ENABLE,
            );
        }
    }
}

pub fn uses_kvmclock() -> bool {
    TSC_MULTIPLIER.load(Ordering::Relaxed) == 0
}

/// Reads the clock of the vCPU `index`, which must be the calling one.
pub fn read(index: usize) -> Reading {
    match TSC_MULTIPLIER.load(Ordering::Relaxed) {
        0 => read_kvmclock(PAGES[index].0.get()),
        multiplier => {
            let tsc = cpu::read_tsc();
            Reading {
                ns: scale(tsc, multiplier),
                tsc,
            }
        }
    }
}

/// The fields a reading needs. Copying the whole page would cost loads in every tick.
struct Sample {
    tsc_timestamp: u64,
    system_time_ns: u64,
    multiplier: u32,
    shift: i8,
}

fn read_kvmclock(page: *const ClockInfo) -> Reading {
    loop {
        // SAFETY: `page` is an element of `PAGES`.
        let (before, info, tsc, after) = unsafe {
            let before = (&raw const (*page).version).read_volatile();
            compiler_fence(Ordering::SeqCst);
            let info = Sample {
                tsc_timestamp: (&raw const (*page).tsc_timestamp).read_volatile(),
                system_time_ns: (&raw const (*page).system_time_ns).read_volatile(),
                multiplier: (&raw const (*page).tsc_to_system_multiplier).read_volatile(),
                shift: (&raw const (*page).tsc_shift).read_volatile(),
            };
            let tsc = cpu::read_tsc();
            compiler_fence(Ordering::SeqCst);
            let after = (&raw const (*page).version).read_volatile();
            (before, info, tsc, after)
        };
        // An odd version is an update under way, another version one that happened meanwhile.
        if before & 1 == 0 && before == after {
            let mut steps = tsc.wrapping_sub(info.tsc_timestamp);
            if info.shift >= 0 {
                steps <<= info.shift;
            } else {
                steps >>= -info.shift;
            }
            let elapsed_ns = scale(steps, info.multiplier.into());
            return Reading {
                ns: info.system_time_ns.wrapping_add(elapsed_ns),
                tsc,
            };
        }
    }
}

fn scale(steps: u64, multiplier: u64) -> u64 {
    ((u128::from(steps) * u128::from(multiplier)) >> 32) as u64
}

fn has_kvmclock() -> bool {
    const SIGNATURE_LEAF: u32 = 0x4000_0000;
    const FEATURES_LEAF: u32 = 0x4000_0001;
    const CLOCK_SOURCE_2: u32 = 1 << 3;
    const KVM_SIGNATURE: [u32; 3] = [
        u32::from_le_bytes(*b"KVMK"),
        u32::from_le_bytes(*b"VMKV"),
        u32::from_le_bytes(*b"M\0\0\0"),
    ];
    let signature = cpu::cpuid(SIGNATURE_LEAF);
    [signature.ebx, signature.ecx, signature.edx] == KVM_SIGNATURE
        && cpu::cpuid(FEATURES_LEAF).eax & CLOCK_SOURCE_2 != 0
}

/// Counts time stamp steps while the interval timer counts 10 ms.
fn tsc_khz_by_pit() -> u64 {
    const PIT_HZ: u64 = 1_193_182;
    const CALIBRATION_MS: u64 = 10;
    const COUNT: u64 = PIT_HZ * CALIBRATION_MS / 1_000;
    const CHANNEL_2_PORT: u16 = 0x42;
    const COMMAND_PORT: u16 = 0x43;
    const GATE_PORT: u16 = 0x61;
    const CHANNEL_2_ONE_SHOT: u8 = 0xb0;
    const GATE_ON_SPEAKER_OFF: u8 = 0x01;
    const OUTPUT_HIGH: u8 = 0x20;
    // No machine is this slow; the bound only keeps a missing timer from hanging the guest.
    const POLLS_MAX: u32 = 10_000_000;

    port::write_u8(GATE_PORT, GATE_ON_SPEAKER_OFF);
    port::write_u8(COMMAND_PORT, CHANNEL_2_ONE_SHOT);
    port::write_u8(CHANNEL_2_PORT, COUNT as u8);
    port::write_u8(CHANNEL_2_PORT, (COUNT >> 8) as u8);
    let start = cpu::read_tsc();
    let mut polls = 0;
    while port::read_u8(GATE_PORT) & OUTPUT_HIGH == 0 && polls < POLLS_MAX {
        polls += 1;
    }
    ((cpu::read_tsc() - start) / CALIBRATION_MS).max(1)
}
