//! Listens for the power button, as `acpid` or systemd-logind do on a whole system.
//!
//! A kernel with an input layer reports a key press. The native test kernel has none; what can be seen there is the
//! interrupt of the Generic Event Device, whose only event is the button.

use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::time::Duration;

const INPUT_CLASS: &str = "/sys/class/input";
const INPUT_DEVICES: &str = "/dev/input";
const INTERRUPTS: &str = "/proc/interrupts";
const EVENT_DEVICE_INTERRUPT: &str = "ACPI:Ged";
/// How often a kernel that reports no key press is asked.
const POLL: Duration = Duration::from_millis(20);

// struct input_event of 64-bit Linux: time (16 bytes), type u16, code u16, value i32.
const EVENT_BYTES: usize = 24;
const EV_KEY: u16 = 1;
const KEY_POWER: u16 = 116;
const PRESSED: i32 = 1;

/// Calls `pressed` when the button is pressed, from a thread of its own.
pub(crate) fn watch(pressed: fn() -> !) {
    std::thread::spawn(move || {
        if Path::new(INPUT_CLASS).exists() {
            watch_input(pressed)
        } else {
            watch_interrupt(pressed)
        }
    });
}

/// Reads every input device, one thread each; modules may bring them late.
fn watch_input(pressed: fn() -> !) -> ! {
    let mut known: Vec<PathBuf> = Vec::new();
    loop {
        for path in event_devices() {
            if known.contains(&path) {
                continue;
            }
            let Ok(device) = File::open(&path) else {
                continue;
            };
            known.push(path);
            std::thread::spawn(move || read_keys(device, pressed));
        }
        std::thread::sleep(POLL);
    }
}

fn event_devices() -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(INPUT_DEVICES) else {
        return Vec::new();
    };
    entries
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| path.to_string_lossy().contains("/event"))
        .collect()
}

fn read_keys(mut device: File, pressed: fn() -> !) {
    let mut event = [0; EVENT_BYTES];
    while device.read_exact(&mut event).is_ok() {
        let kind = u16::from_le_bytes([event[16], event[17]]);
        let code = u16::from_le_bytes([event[18], event[19]]);
        let value = i32::from_le_bytes([event[20], event[21], event[22], event[23]]);
        if (kind, code, value) == (EV_KEY, KEY_POWER, PRESSED) {
            pressed();
        }
    }
}

fn watch_interrupt(pressed: fn() -> !) {
    let before = interrupt_count();
    while interrupt_count() == before {
        std::thread::sleep(POLL);
    }
    pressed()
}

/// How often the event device has raised its interrupt, on all CPUs.
fn interrupt_count() -> u64 {
    let interrupts = fs::read_to_string(INTERRUPTS).unwrap_or_default();
    interrupts
        .lines()
        .find(|line| line.contains(EVENT_DEVICE_INTERRUPT))
        .into_iter()
        .flat_map(|line| line.split_whitespace().skip(1))
        .map_while(|count| count.parse::<u64>().ok())
        .sum()
}
