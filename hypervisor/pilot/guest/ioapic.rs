//! The I/O APIC: routing the serial port's interrupt to the boot vCPU.

use core::ptr;

const ADDRESS: usize = 0xfec0_0000;
const SELECT_OFFSET: usize = 0x00;
const WINDOW_OFFSET: usize = 0x10;
const FIRST_REDIRECTION: u32 = 0x10;

/// Routes an edge-triggered interrupt line to a vector on the vCPU with APIC id 0.
pub fn route_to_boot_vcpu(line: u32, vector: u8) {
    const BOOT_APIC_ID: u32 = 0;
    let low = FIRST_REDIRECTION + 2 * line;
    write(low + 1, BOOT_APIC_ID << 24);
    write(low, vector.into());
}

fn write(register: u32, value: u32) {
    // SAFETY: both registers are mapped, uncached; where there is no I/O APIC, nothing answers.
    unsafe {
        ptr::with_exposed_provenance_mut::<u32>(ADDRESS + SELECT_OFFSET).write_volatile(register);
        ptr::with_exposed_provenance_mut::<u32>(ADDRESS + WINDOW_OFFSET).write_volatile(value);
    }
}
