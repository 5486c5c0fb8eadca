//! Ports with which the guest restarts or ends the machine.
//!
//! Restart: the keyboard controller's command 0xFE (also the FADT's reset register). Power-off: the ACPI sleep
//! control register of a hardware-reduced platform, which sits at the port where QEMU's PC has PM1a control, so
//! that guests without ACPI can use the customary `outw 0x604, 0x2000`.

/// Command port of the keyboard controller.
pub const KEYBOARD_COMMAND_PORT: u16 = 0x64;
/// Command that pulses the reset line.
pub const KEYBOARD_RESET: u8 = 0xfe;
/// ACPI sleep control register.
pub const SLEEP_CONTROL_PORT: u16 = 0x604;
/// SLP_TYP of S5 in the DSDT.
pub const SLEEP_TYPE_S5: u8 = 5;

const SLEEP_ENABLE: u8 = 1 << 5;
const PM1_SLEEP_ENABLE: u16 = 1 << 13;

/// What the guest wants of its machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PowerEvent {
    /// Start again.
    Reset,
    /// Power off.
    Off,
}

/// What a write to `port` means, if it means anything.
pub(super) fn decode(port: u16, data: &[u8]) -> Option<PowerEvent> {
    match (port, data) {
        (KEYBOARD_COMMAND_PORT, [KEYBOARD_RESET]) => Some(PowerEvent::Reset),
        (SLEEP_CONTROL_PORT, [value]) if *value == SLEEP_TYPE_S5 << 2 | SLEEP_ENABLE => {
            Some(PowerEvent::Off)
        }
        (SLEEP_CONTROL_PORT, [low, high])
            if u16::from_le_bytes([*low, *high]) & PM1_SLEEP_ENABLE != 0 =>
        {
            Some(PowerEvent::Off)
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_documented_writes_end_the_machine() {
        assert_eq!(decode(0x64, &[0xfe]), Some(PowerEvent::Reset));
        assert_eq!(decode(0x64, &[0xaa]), None);
        assert_eq!(decode(0x604, &[0x34]), Some(PowerEvent::Off));
        assert_eq!(decode(0x604, &[0x00, 0x20]), Some(PowerEvent::Off));
        assert_eq!(decode(0x604, &[0x01]), None);
        assert_eq!(decode(0x80, &[0xfe]), None);
    }
}
