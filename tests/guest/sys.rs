//! The few things an init program asks of the kernel and `std` does not offer.

use std::ffi::{CString, c_char, c_int, c_ulong, c_void};
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
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
    fn ioctl(fd: c_int, request: c_ulong, ...) -> c_int;
    fn socket(family: c_int, kind: c_int, protocol: c_int) -> c_int;
    fn bind(fd: c_int, address: *const VsockAddress, bytes: u32) -> c_int;
    fn connect(fd: c_int, address: *const VsockAddress, bytes: u32) -> c_int;
    fn listen(fd: c_int, backlog: c_int) -> c_int;
    fn accept(fd: c_int, address: *mut c_void, bytes: *mut u32) -> c_int;
}

/// Room for glibc's `struct termios` (60 bytes on x86-64), which is only handed back to glibc.
#[repr(C, align(8))]
struct Termios([u8; 128]);

/// `struct sockaddr_vm` (vsock(7)).
#[repr(C)]
struct VsockAddress {
    family: u16,
    reserved: u16,
    port: u32,
    cid: u32,
    zero: [u8; 4],
}

const CONSOLE: c_int = 0;
const TCSANOW: c_int = 0;
const RB_POWER_OFF: c_int = 0x4321_fedc;
const RB_AUTOBOOT: c_int = 0x0123_4567;
// linux/fs.h: both take an offset and a length in bytes.
const BLKDISCARD: c_ulong = 0x1277;
const BLKZEROOUT: c_ulong = 0x127f;
const AF_VSOCK: u16 = 40;
const SOCK_STREAM: c_int = 1;
const ANY_CID: u32 = u32::MAX;
const HOST_CID: u32 = 2;
const BACKLOG: c_int = 16;

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

/// Tells a block device that `bytes` from `offset` on are not needed any more.
pub(crate) fn discard(device: &File, offset: u64, bytes: u64) -> io::Result<()> {
    on_range(device, BLKDISCARD, [offset, bytes])
}

/// Has a block device make `bytes` from `offset` on read as zeros.
pub(crate) fn write_zeroes(device: &File, offset: u64, bytes: u64) -> io::Result<()> {
    on_range(device, BLKZEROOUT, [offset, bytes])
}

fn on_range(device: &File, request: c_ulong, range: [u64; 2]) -> io::Result<()> {
    // SAFETY: both requests read two 64-bit numbers, which outlive the call.
    checked(unsafe { ioctl(device.as_raw_fd(), request, range.as_ptr()) }).map(drop)
}

/// Listens for stream connections of the host.
pub(crate) struct VsockListener(OwnedFd);

impl VsockListener {
    pub(crate) fn bind(port: u32) -> io::Result<Self> {
        let socket = vsock_socket()?;
        let address = VsockAddress::new(ANY_CID, port);
        // SAFETY: the address is a whole `sockaddr_vm` and outlives the calls.
        unsafe {
            checked(bind(socket.as_raw_fd(), &address, VsockAddress::BYTES))?;
            checked(listen(socket.as_raw_fd(), BACKLOG))?;
        }
        Ok(Self(socket))
    }

    /// Waits for the next connection.
    pub(crate) fn accept(&self) -> io::Result<File> {
        // SAFETY: nobody wants the other end's address; the descriptor that comes is nobody else's.
        unsafe {
            let fd = accept(
                self.0.as_raw_fd(),
                std::ptr::null_mut(),
                std::ptr::null_mut(),
            );
            Ok(OwnedFd::from_raw_fd(checked(fd)?).into())
        }
    }
}

/// A stream connection to whoever listens at the host's `port`.
pub(crate) fn connect_to_host(port: u32) -> io::Result<File> {
    let socket = vsock_socket()?;
    let address = VsockAddress::new(HOST_CID, port);
    // SAFETY: the address is a whole `sockaddr_vm` and outlives the call.
    checked(unsafe { connect(socket.as_raw_fd(), &address, VsockAddress::BYTES) })?;
    Ok(socket.into())
}

fn vsock_socket() -> io::Result<OwnedFd> {
    // SAFETY: it takes no pointers; the descriptor that comes is nobody else's.
    unsafe {
        let fd = socket(AF_VSOCK.into(), SOCK_STREAM, 0);
        Ok(OwnedFd::from_raw_fd(checked(fd)?))
    }
}

impl VsockAddress {
    const BYTES: u32 = size_of::<Self>() as u32;

    const fn new(cid: u32, port: u32) -> Self {
        Self {
            family: AF_VSOCK,
            reserved: 0,
            port,
            cid,
            zero: [0; 4],
        }
    }
}

/// What a call returned, unless it failed.
fn checked(returned: c_int) -> io::Result<c_int> {
    if returned < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(returned)
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
