//! COM1: a 16550 (vm-superio) whose output goes to the [`Console`] and whose input waits in a bounded queue until
//! the guest has room.

use super::console::Console;
use serde::{Deserialize, Serialize};
use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};
use vm_superio::Trigger;
use vm_superio::serial::{NoEvents, Serial, SerialState};
use vmm_sys_util::eventfd::EventFd;

/// First port of COM1.
pub const COM1_PORT: u16 = 0x3f8;
/// Interrupt line of COM1.
pub const COM1_IRQ: u32 = 4;
/// Input that waits for the guest; more is refused, because the guest does not read.
const MAX_INPUT_BYTES: usize = 64 * 1024;

/// The serial port cannot do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum SerialError {
    /// The guest does not read its input.
    #[error("the guest has left {0} bytes of serial input unread")]
    InputFull(usize),
    /// The saved state does not describe a 16550.
    #[error("the saved serial port is not valid")]
    BadState,
}

/// A serial port as it travels.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SavedSerial {
    registers: [u8; 9],
    fifo: Vec<u8>,
    input: Vec<u8>,
    console: Vec<u8>,
}

/// Raises the port's interrupt.
#[derive(Debug)]
pub(super) struct Irq(EventFd);

impl Trigger for Irq {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.0.write(1)
    }
}

/// vm-superio writes output byte by byte through this.
#[derive(Debug)]
pub(super) struct ToConsole(Console);

impl io::Write for ToConsole {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.write(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

struct Inner {
    uart: Serial<Irq, NoEvents, ToConsole>,
    input: VecDeque<u8>,
    received: u64,
}

/// The port, shared by vCPU threads and console input.
#[derive(Clone)]
pub struct SerialPort {
    inner: Arc<Mutex<Inner>>,
    console: Console,
}

impl std::fmt::Debug for SerialPort {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SerialPort").finish_non_exhaustive()
    }
}

impl SerialPort {
    /// A port that raises `irq` and writes to `console`.
    pub fn new(irq: EventFd, console: Console) -> Self {
        let uart = Serial::new(Irq(irq), ToConsole(console.clone()));
        Self {
            inner: Arc::new(Mutex::new(Inner {
                uart,
                input: VecDeque::new(),
                received: 0,
            })),
            console,
        }
    }

    /// The guest reads a register.
    pub fn read(&self, offset: u8) -> u8 {
        let mut inner = self.lock();
        let value = inner.uart.read(offset);
        inner.refill();
        value
    }

    /// The guest writes a register.
    pub fn write(&self, offset: u8, value: u8) {
        // A failed interrupt eventfd cannot happen short of overflow; the guest then polls.
        let _ = self.lock().uart.write(offset, value);
    }

    /// Input for the guest.
    pub fn send(&self, bytes: &[u8]) -> Result<(), SerialError> {
        let mut inner = self.lock();
        if inner.input.len() + bytes.len() > MAX_INPUT_BYTES {
            return Err(SerialError::InputFull(inner.input.len()));
        }
        inner.received += bytes.len() as u64;
        inner.input.extend(bytes);
        inner.refill();
        Ok(())
    }

    /// Bytes ever sent to the guest.
    pub fn received(&self) -> u64 {
        self.lock().received
    }

    /// The port as it travels. vCPUs must be stopped.
    pub fn save(&self) -> SavedSerial {
        let inner = self.lock();
        let s = inner.uart.state();
        SavedSerial {
            registers: [
                s.baud_divisor_low,
                s.baud_divisor_high,
                s.interrupt_enable,
                s.interrupt_identification,
                s.line_control,
                s.line_status,
                s.modem_control,
                s.modem_status,
                s.scratch,
            ],
            fifo: s.in_buffer,
            input: inner.input.iter().copied().collect(),
            console: self.console.contents(),
        }
    }

    /// Makes this port what was saved; the console's history comes along.
    pub fn restore(&self, saved: &SavedSerial, irq: EventFd) -> Result<(), SerialError> {
        let [dll, dlh, ier, iir, lcr, lsr, mcr, msr, scratch] = saved.registers;
        let state = SerialState {
            baud_divisor_low: dll,
            baud_divisor_high: dlh,
            interrupt_enable: ier,
            interrupt_identification: iir,
            line_control: lcr,
            line_status: lsr,
            modem_control: mcr,
            modem_status: msr,
            scratch,
            in_buffer: saved.fifo.clone(),
        };
        let uart = Serial::from_state(&state, Irq(irq), NoEvents, ToConsole(self.console.clone()))
            .map_err(|_| SerialError::BadState)?;
        if saved.input.len() > MAX_INPUT_BYTES {
            return Err(SerialError::BadState);
        }
        let mut inner = self.lock();
        inner.uart = uart;
        inner.input = saved.input.iter().copied().collect();
        drop(inner);
        self.console.write(&saved.console);
        Ok(())
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inner {
    /// Moves waiting input into the FIFO as far as it has room.
    fn refill(&mut self) {
        let room = self.uart.fifo_capacity().min(self.input.len());
        if room > 0 {
            let bytes: Vec<u8> = self.input.drain(..room).collect();
            let taken = self.uart.enqueue_raw_bytes(&bytes).unwrap_or(bytes.len());
            for &byte in bytes[taken..].iter().rev() {
                self.input.push_front(byte);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn port() -> (SerialPort, Console) {
        let console = Console::default();
        (
            SerialPort::new(EventFd::new(0).unwrap(), console.clone()),
            console,
        )
    }

    #[test]
    fn input_longer_than_the_fifo_arrives_whole_and_in_order() {
        let (port, _) = port();
        let sent: Vec<u8> = (0..200).collect();
        port.send(&sent).unwrap();
        let got: Vec<u8> = sent.iter().map(|_| port.read(0)).collect();
        assert_eq!(got, sent);
    }

    #[test]
    fn a_guest_that_does_not_read_cannot_make_the_queue_grow_without_end() {
        let (port, _) = port();
        port.send(&vec![0; MAX_INPUT_BYTES]).unwrap();
        assert!(matches!(
            port.send(&[0; 4096]),
            Err(SerialError::InputFull(_))
        ));
    }

    #[test]
    fn a_moved_port_keeps_registers_input_and_history() {
        let (source, _) = port();
        source.write(7, 0x5a);
        source.write(0, b'x');
        source.send(b"hello, this line is longer than the sixty-four bytes that the fifo of a 16550 holds").unwrap();
        let saved = source.save();
        let (target, console) = port();
        target.restore(&saved, EventFd::new(0).unwrap()).unwrap();
        assert_eq!(target.save(), saved);
        assert_eq!(target.read(7), 0x5a);
        assert_eq!(console.contents(), b"x");
    }
}
