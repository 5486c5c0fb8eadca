//! Processor instructions that Rust has no safe form for.

use core::arch::asm;

pub fn read_tsc() -> u64 {
    let (low, high): (u32, u32);
    // SAFETY: `rdtsc` only reads a counter.
    unsafe { asm!("rdtsc", out("eax") low, out("edx") high, options(nomem, nostack)) };
    u64::from(high) << 32 | u64::from(low)
}

pub fn cpuid(leaf: u32) -> core::arch::x86_64::CpuidResult {
    core::arch::x86_64::__cpuid(leaf)
}

pub fn read_cr2() -> u64 {
    let address: u64;
    // SAFETY: reading CR2 has no side effect.
    unsafe { asm!("mov {}, cr2", out(reg) address, options(nomem, nostack)) };
    address
}

pub fn enable_interrupts() {
    // SAFETY: called after the interrupt table and stacks are in place.
    unsafe { asm!("sti", options(nostack)) };
}

/// Stops this vCPU for good.
pub fn stop() -> ! {
    loop {
        // SAFETY: with interrupts off, `hlt` waits; whatever wakes it finds it again.
        unsafe { asm!("cli", "hlt", options(nomem, nostack)) };
    }
}

/// # Safety
/// The register must exist.
pub unsafe fn read_msr(register: u32) -> u64 {
    let (low, high): (u32, u32);
    // SAFETY: the caller vouches for the register; reading it touches no memory.
    unsafe {
        asm!("rdmsr", in("ecx") register, out("eax") low, out("edx") high, options(nomem, nostack));
    }
    u64::from(high) << 32 | u64::from(low)
}

/// # Safety
/// The register must exist, and the value must leave the machine in a state the image expects.
pub unsafe fn write_msr(register: u32, value: u64) {
    // SAFETY: the caller vouches for register and value.
    unsafe {
        asm!(
            "wrmsr",
            in("ecx") register, in("eax") value as u32, in("edx") (value >> 32) as u32,
            options(nostack)
        );
    }
}
