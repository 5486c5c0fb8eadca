//! The few things an init program asks of the kernel and `std` does not offer.

use std::ffi::{CString, c_char, c_int, c_ulong, c_void};
use std::fs;
use std::time::Duration;

unsafe extern "C" {
    fn mount(
        source: *const c_char,
        target: *const c_char,
        kind: *const c_char,
        flags: c_ulong,
        data: *const c_void,
    ) -> c_int;
    fn reboot(command: c_int) -> c_int;
    fn tcdrain(fd: c_int) -> c_int;
    fn tcgetattr(fd: c_int, termios: *mut Termios) -> c_int;
    fn tcsetattr(fd: c_int, actions: c_int, termios: *const Termios) -> c_int;
    fn cfmakeraw(termios: *mut Termios);
}

/// Room for glibc's `struct termios` (60 bytes on x86-64), which is only handed back to glibc.
#[repr(C, align(8))]
struct Termios([u8; 128]);

const CONSOLE: c_int = 0;
const TCSANOW: c_int = 0;
const RB_POWER_OFF: c_int = 0x4321_fedc;
const RB_AUTOBOOT: c_int = 0x0123_4567;

/// Mounts /proc and /sys, from which this program reads facts about the guest, and /dev, where input devices are.
pub(crate) fn mount_kernel_filesystems() {
    for (kind, target) in [("proc", "/proc"), ("sysfs", "/sys"), ("devtmpfs", "/dev")] {
        let [kind, target] =
            [kind, target].map(|text| CString::new(text).expect("constants hold no NUL"));
        // SAFETY: all strings are NUL-terminated and outlive the call; no data is passed.
        let failed = unsafe {
            mount(
                kind.as_ptr(),
                target.as_ptr(),
                kind.as_ptr(),
                0,
                std::ptr::null(),
            )
        };
        if failed != 0 {
            println!(
                "guest-agent: cannot mount {target:?}: {}",
                std::io::Error::last_os_error()
            );
        }
    }
}

/// No echo, no line editing, no translation: the other end is a program.
pub(crate) fn make_console_raw() {
    let mut termios = Termios([0; 128]);
    // SAFETY: the buffer is larger than `struct termios`, and glibc alone reads and writes it.
    unsafe {
        if tcgetattr(CONSOLE, &mut termios) == 0 {
            cfmakeraw(&mut termios);
            tcsetattr(CONSOLE, TCSANOW, &termios);
        }
    }
}

/// Powers the guest off; a machine without a power button is reset instead.
pub(crate) fn power_off() -> ! {
    end(RB_POWER_OFF)
}

/// Restarts the guest.
pub(crate) fn restart() -> ! {
    end(RB_AUTOBOOT)
}

fn end(command: c_int) -> ! {
    // SAFETY: neither takes pointers, and a guest without disks has nothing to lose. What was said on the console
    // reaches the serial port first.
    unsafe {
        tcdrain(CONSOLE);
        reboot(command);
    }
    // The kernel has halted us if the machine could not be told; init must never return.
    loop {
        std::thread::sleep(Duration::from_secs(3600));
    }
}

pub(crate) fn uptime_ms() -> u64 {
    let text = read("/proc/uptime");
    let seconds: f64 = text
        .split_whitespace()
        .next()
        .and_then(|word| word.parse().ok())
        .unwrap_or(0.0);
    (seconds * 1000.0) as u64
}

/// One line of /proc/meminfo, in MiB.
pub(crate) fn meminfo_mib(name: &str) -> u64 {
    let text = read("/proc/meminfo");
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
    let kib: u64 = line
        .and_then(|rest| rest.split_whitespace().next()?.parse().ok())
        .unwrap_or(0);
    kib / 1024
}

pub(crate) fn online_cpus() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

pub(crate) fn clock_source() -> String {
    read("/sys/devices/system/clocksource/clocksource0/current_clocksource")
        .trim()
        .to_owned()
}

fn read(path: &str) -> String {
    fs::read_to_string(path).unwrap_or_default()
}
