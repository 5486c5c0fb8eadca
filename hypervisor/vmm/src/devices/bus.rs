//! Port I/O of the machine: whoever is not there reads as all ones and swallows writes, as on a PC.

use super::power::{self, KEYBOARD_COMMAND_PORT, PowerEvent};
use super::serial::{COM1_PORT, SerialPort};

/// All devices behind I/O ports.
#[derive(Clone, Debug)]
pub struct PortBus {
    serial: SerialPort,
}

impl PortBus {
    /// A bus with COM1 and the power ports.
    pub const fn new(serial: SerialPort) -> Self {
        Self { serial }
    }

    /// COM1.
    pub const fn serial(&self) -> &SerialPort {
        &self.serial
    }

    /// The guest reads `data.len()` bytes.
    pub fn read(&self, port: u16, data: &mut [u8]) {
        data.fill(0xff);
        match (port, data) {
            (COM1_PORT..=0x3ff, [value]) => *value = self.serial.read((port - COM1_PORT) as u8),
            // The controller's buffers are empty: a guest that resets through it need not wait.
            (KEYBOARD_COMMAND_PORT, [value]) => *value = 0,
            _ => {}
        }
    }

    /// The guest writes `data`.
    pub fn write(&self, port: u16, data: &[u8]) -> Option<PowerEvent> {
        match (port, data) {
            (COM1_PORT..=0x3ff, [value]) => {
                self.serial.write((port - COM1_PORT) as u8, *value);
                None
            }
            _ => power::decode(port, data),
        }
    }
}
