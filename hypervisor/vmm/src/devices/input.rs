//! What the operator types: to the virtio console while its driver works, else to COM1.

use super::serial::{SerialError, SerialPort};
use godwit_devices::console::ConsoleInput;

/// The guest's keyboard; cheap to clone.
#[derive(Clone, Debug)]
pub struct GuestInput {
    serial: SerialPort,
    console: Option<ConsoleInput>,
}

impl GuestInput {
    /// Input for a machine with COM1 and perhaps a virtio console.
    pub const fn new(serial: SerialPort, console: Option<ConsoleInput>) -> Self {
        Self { serial, console }
    }

    /// Sends `bytes`, all of them or none.
    pub fn send(&self, bytes: &[u8]) -> Result<(), SerialError> {
        match self.console.as_ref().filter(|console| console.is_active()) {
            Some(console) => console
                .send(bytes)
                .map_err(|full| SerialError::InputFull(full.waiting)),
            None => self.serial.send(bytes),
        }
    }
}
