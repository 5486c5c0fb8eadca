//! Ending the guest.

use core::arch::asm;
use core::sync::atomic::{AtomicBool, Ordering};

use crate::cpu;
use crate::port;

/// Set when every vCPU is to stop at its next tick.
pub static STOPPING: AtomicBool = AtomicBool::new(false);

/// ACPI "soft off" at the address and with the value that virtual chipsets agree on.
pub fn power_off() -> ! {
    const SLEEP_CONTROL_PORT: u16 = 0x604;
    const SLEEP_ENABLE: u16 = 0x2000;
    port::write_u16(SLEEP_CONTROL_PORT, SLEEP_ENABLE);
    stop_all()
}

/// The keyboard controller's reset line, then a triple fault where there is none.
pub fn reset() -> ! {
    const KEYBOARD_CONTROLLER_PORT: u16 = 0x64;
    const PULSE_RESET: u8 = 0xfe;
    port::write_u8(KEYBOARD_CONTROLLER_PORT, PULSE_RESET);

    let empty_table = [0_u64; 2];
    // SAFETY: the point is to leave the processor no handler for the exception that follows.
    unsafe {
        asm!("cli", "lidt [{}]", "ud2", in(reg) &raw const empty_table, options(noreturn));
    }
}

/// Stops this vCPU now and the others at their next tick.
pub fn stop_all() -> ! {
    STOPPING.store(true, Ordering::Relaxed);
    cpu::stop()
}
