//! I/O ports.

use core::arch::asm;

pub fn read_u8(port: u16) -> u8 {
    let value: u8;
    // SAFETY: port input touches no memory; the callers' devices have no side effects on it.
    unsafe { asm!("in al, dx", in("dx") port, out("al") value, options(nomem, nostack)) };
    value
}

pub fn write_u8(port: u16, value: u8) {
    // SAFETY: port output touches no memory; none of the devices the callers name does DMA.
    unsafe { asm!("out dx, al", in("dx") port, in("al") value, options(nomem, nostack)) };
}

pub fn write_u16(port: u16, value: u16) {
    // SAFETY: as in `write_u8`.
    unsafe { asm!("out dx, ax", in("dx") port, in("ax") value, options(nomem, nostack)) };
}
