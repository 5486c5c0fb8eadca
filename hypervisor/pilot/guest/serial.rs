//! The 16550 at COM1. Sending waits; receiving is by interrupt, and by polling should one be lost.

use core::sync::atomic::{AtomicBool, AtomicU8, AtomicUsize, Ordering};

use crate::apic;
use crate::exceptions::SERIAL_VECTOR;
use crate::ioapic;
use crate::port;

pub const DATA_PORT: u16 = 0x3f8;
const INTERRUPT_ENABLE_PORT: u16 = DATA_PORT + 1;
const FIFO_PORT: u16 = DATA_PORT + 2;
const LINE_CONTROL_PORT: u16 = DATA_PORT + 3;
const MODEM_CONTROL_PORT: u16 = DATA_PORT + 4;
const LINE_STATUS_PORT: u16 = DATA_PORT + 5;

const DATA_READY: u8 = 0x01;
const TRANSMITTER_EMPTY: u8 = 0x20;
const FIFO_ENABLED: u8 = 0xc0;
const FIFO_BYTES: usize = 16;

static HAS_FIFO: AtomicBool = AtomicBool::new(false);

pub fn init() {
    const EIGHT_BITS_NO_PARITY: u8 = 0x03;
    const READY_AND_INTERRUPT_LINE_ON: u8 = 0x0b;
    const ENABLE_FIFO: u8 = 0x01;
    port::write_u8(LINE_CONTROL_PORT, EIGHT_BITS_NO_PARITY);
    port::write_u8(INTERRUPT_ENABLE_PORT, 0);
    port::write_u8(FIFO_PORT, ENABLE_FIFO);
    port::write_u8(MODEM_CONTROL_PORT, READY_AND_INTERRUPT_LINE_ON);
    let identification = port::read_u8(FIFO_PORT);
    HAS_FIFO.store(
        identification & FIFO_ENABLED == FIFO_ENABLED,
        Ordering::Relaxed,
    );
}

/// Lets received bytes interrupt the boot vCPU.
pub fn enable_interrupt() {
    const LINE: u32 = 4;
    const DATA_AVAILABLE: u8 = 0x01;
    ioapic::route_to_boot_vcpu(LINE, SERIAL_VECTOR);
    port::write_u8(INTERRUPT_ENABLE_PORT, DATA_AVAILABLE);
}

/// The interrupt handler.
pub extern "C" fn handle() {
    poll();
    apic::end_interrupt();
}

pub fn write(bytes: &[u8]) {
    let burst = if HAS_FIFO.load(Ordering::Relaxed) {
        FIFO_BYTES
    } else {
        1
    };
    for chunk in bytes.chunks(burst) {
        while port::read_u8(LINE_STATUS_PORT) & TRANSMITTER_EMPTY == 0 {
            core::hint::spin_loop();
        }
        for &byte in chunk {
            port::write_u8(DATA_PORT, byte);
        }
    }
}

/// What has been received and not yet read. Interrupt handlers on the boot vCPU put bytes in,
/// the shell on the same vCPU takes them out; when it is full, the rest waits in the device.
struct Received {
    bytes: [AtomicU8; RECEIVED_BYTES_MAX],
    put: AtomicUsize,
    taken: AtomicUsize,
}

const RECEIVED_BYTES_MAX: usize = 256;

static RECEIVED: Received = Received {
    bytes: [const { AtomicU8::new(0) }; RECEIVED_BYTES_MAX],
    put: AtomicUsize::new(0),
    taken: AtomicUsize::new(0),
};

/// Moves what the device has received into memory.
pub fn poll() {
    while port::read_u8(LINE_STATUS_PORT) & DATA_READY != 0 {
        let put = RECEIVED.put.load(Ordering::Relaxed);
        if put - RECEIVED.taken.load(Ordering::Relaxed) == RECEIVED_BYTES_MAX {
            return;
        }
        let byte = port::read_u8(DATA_PORT);
        RECEIVED.bytes[put % RECEIVED_BYTES_MAX].store(byte, Ordering::Relaxed);
        RECEIVED.put.store(put + 1, Ordering::Release);
    }
}

pub fn read() -> Option<u8> {
    let taken = RECEIVED.taken.load(Ordering::Relaxed);
    if taken == RECEIVED.put.load(Ordering::Acquire) {
        return None;
    }
    let byte = RECEIVED.bytes[taken % RECEIVED_BYTES_MAX].load(Ordering::Relaxed);
    RECEIVED.taken.store(taken + 1, Ordering::Release);
    Some(byte)
}
