//! Devices outside KVM: the serial port with its console, and the ports that end or restart the machine.

mod bus;
mod console;
mod input;
mod power;
mod serial;

pub use bus::PortBus;
pub use console::{CONSOLE_RING_BYTES, Console, ConsoleReader};
pub use input::GuestInput;
pub use power::{
    KEYBOARD_COMMAND_PORT, KEYBOARD_RESET, PowerEvent, SLEEP_CONTROL_PORT, SLEEP_TYPE_S5,
};
pub use serial::{COM1_IRQ, COM1_PORT, SavedSerial, SerialError, SerialPort};
