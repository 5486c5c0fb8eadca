//! Lines on the serial port.

use crate::pure::text::Text;
use crate::serial;

pub fn print_line(line: &Text) {
    serial::write(line.as_bytes());
    serial::write(b"\n");
}
