//! The few things that need `unsafe`: the mapped lease page, what a child does between fork and exec, and packet
//! sockets.

use godwit_wire::lease::LEASE_PAGE_BYTES;
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};
use rustix::process::Signal;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// One page of a file, shared with other processes, read and written in whole aligned words.
#[derive(Debug)]
pub(crate) struct SharedPage {
    start: NonNull<u8>,
}

// SAFETY: the mapping belongs to this value until it is dropped, is never moved, and all access to it is atomic.
unsafe impl Send for SharedPage {}
// SAFETY: as above; `&SharedPage` only gives atomic access.
unsafe impl Sync for SharedPage {}

impl SharedPage {
    /// Maps the first page of `file`, which must be at least that long.
    pub(crate) fn map(file: &File) -> io::Result<Self> {
        let length = file.metadata()?.len();
        if length < LEASE_PAGE_BYTES as u64 {
            let detail = format!("it has {length} bytes instead of {LEASE_PAGE_BYTES}");
            return Err(io::Error::new(io::ErrorKind::InvalidData, detail));
        }
        // SAFETY: a fresh shared mapping at an address of the kernel's choice touches nothing that exists.
        let start = unsafe {
            mmap(
                std::ptr::null_mut(),
                LEASE_PAGE_BYTES,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::SHARED,
                file,
                0,
            )?
        };
        let start =
            NonNull::new(start.cast()).ok_or_else(|| io::Error::other("mmap gave address 0"))?;
        Ok(Self { start })
    }

    /// Reads the word at `offset`.
    pub(crate) fn load(&self, offset: usize) -> u64 {
        self.word(offset).load(Ordering::Acquire)
    }

    /// Writes the word at `offset`: readers in any process see the old value or the new one.
    pub(crate) fn store(&self, offset: usize, value: u64) {
        self.word(offset).store(value, Ordering::Release);
    }

    fn word(&self, offset: usize) -> &AtomicU64 {
        assert!(
            offset.is_multiple_of(8) && offset + 8 <= LEASE_PAGE_BYTES,
            "offset {offset} is no word of the page"
        );
        // SAFETY: the mapping is page-aligned and one page long, so the checked offset is an aligned word within
        // it; it lives as long as `self`; every access in every process is atomic.
        unsafe { AtomicU64::from_ptr(self.start.as_ptr().add(offset).cast()) }
    }
}

impl Drop for SharedPage {
    fn drop(&mut self) {
        // SAFETY: the mapping was made by `map` with this length, and nobody can hold a reference into it now.
        let unmapped = unsafe { munmap(self.start.as_ptr().cast(), LEASE_PAGE_BYTES) };
        debug_assert!(unmapped.is_ok(), "the page was mapped: {unmapped:?}");
    }
}

/// What happens to a child process when the agent ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum AfterAgent {
    /// It goes on and is adopted later.
    LivesOn,
    /// The kernel kills it.
    Dies,
}

/// Puts the child in a session of its own, so that no signal meant for the agent's terminal reaches it.
pub(crate) fn detach(command: &mut tokio::process::Command, after_agent: AfterAgent) {
    let prepare = move || {
        rustix::process::setsid()?;
        if after_agent == AfterAgent::Dies {
            // The signal comes when the *thread* that forked ends: commands are spawned on the runtime's own
            // threads, which live as long as the agent.
            rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?;
        }
        Ok(())
    };
    // SAFETY: between fork and exec only system calls happen: no allocation, no lock, nothing of the parent's.
    unsafe {
        command.pre_exec(prepare);
    }
}

/// Watches a file descriptor for readability; must be called inside a tokio runtime.
pub(crate) fn watch_readable(descriptor: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: the owned descriptor is open, names itself always the same, and stays open until it is dropped
    // together with the watch: nobody else can close or replace it.
    Ok(unsafe { AsyncFd::register_with_interest(descriptor, Interest::READABLE) }?)
}

/// A socket for whole frames of one interface, to which only UDP packets for `port` come; non-blocking.
pub(crate) fn udp_frames_of(interface: u32, port: u16) -> io::Result<OwnedFd> {
    use rustix::net::{AddressFamily, SocketFlags, SocketType};
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    // With protocol 0 nothing comes before the filter is in place; binding chooses the protocol.
    let socket = rustix::net::socket_with(AddressFamily::PACKET, SocketType::RAW, flags, None)?;
    attach_filter(&socket, &udp_filter(port))?;
    let mut address = libc::sockaddr_ll {
        sll_family: libc::AF_PACKET as u16,
        sll_protocol: (libc::ETH_P_IP as u16).to_be(),
        sll_ifindex: i32::try_from(interface).map_err(|_| io::ErrorKind::InvalidInput)?,
        sll_hatype: 0,
        sll_pkttype: 0,
        sll_halen: 0,
        sll_addr: [0; 8],
    };
    // SAFETY: the address is a whole `sockaddr_ll` and its true size is given; the kernel copies it.
    let bound = unsafe {
        libc::bind(
            socket.as_raw_fd(),
            (&raw mut address).cast(),
            size_of::<libc::sockaddr_ll>() as libc::socklen_t,
        )
    };
    if bound != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(socket)
}

/// IPv4 without options or fragments, UDP, to `port`: offsets as in an Ethernet frame.
fn udp_filter(port: u16) -> [libc::sock_filter; 10] {
    const LOAD_HALF: u32 = libc::BPF_LD | libc::BPF_H | libc::BPF_ABS;
    const LOAD_BYTE: u32 = libc::BPF_LD | libc::BPF_B | libc::BPF_ABS;
    const IF_EQUAL: u32 = libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K;
    const IF_ANY_BIT: u32 = libc::BPF_JMP | libc::BPF_JSET | libc::BPF_K;
    const RETURN: u32 = libc::BPF_RET | libc::BPF_K;
    let op = |code: u32, jt: u8, jf: u8, k: u32| libc::sock_filter {
        code: code as u16,
        jt,
        jf,
        k,
    };
    [
        op(LOAD_BYTE, 0, 0, 14),
        op(IF_EQUAL, 0, 7, 0x45),
        op(LOAD_BYTE, 0, 0, 23),
        op(IF_EQUAL, 0, 5, libc::IPPROTO_UDP as u32),
        op(LOAD_HALF, 0, 0, 20),
        op(IF_ANY_BIT, 3, 0, 0x3fff),
        op(LOAD_HALF, 0, 0, 36),
        op(IF_EQUAL, 0, 1, u32::from(port)),
        op(RETURN, 0, 0, u32::MAX),
        op(RETURN, 0, 0, 0),
    ]
}

fn attach_filter(socket: &OwnedFd, filter: &[libc::sock_filter]) -> io::Result<()> {
    let program = libc::sock_fprog {
        len: u16::try_from(filter.len()).map_err(|_| io::ErrorKind::InvalidInput)?,
        filter: filter.as_ptr().cast_mut(),
    };
    // SAFETY: the program points to `filter`, which has the stated length and lives through the call; the kernel
    // copies it and writes to none of it.
    let attached = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_ATTACH_FILTER,
            (&raw const program).cast(),
            size_of::<libc::sock_fprog>() as libc::socklen_t,
        )
    };
    if attached != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Locks a file as a VMM locks its disk: the lock belongs to the open file.
#[cfg(test)]
pub(crate) fn lock_open_file(file: &File) -> io::Result<()> {
    let lock = libc::flock {
        l_type: libc::F_WRLCK as i16,
        l_whence: libc::SEEK_SET as i16,
        l_start: 0,
        l_len: 0,
        l_pid: 0,
    };
    // SAFETY: the kernel reads one whole `flock` and writes nothing.
    if unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &raw const lock) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// The guest's end of a tap with one queue, with a virtio header of 10 bytes before each frame; non-blocking.
#[cfg(test)]
pub(crate) fn open_tap(name: &str) -> io::Result<File> {
    use std::os::unix::fs::OpenOptionsExt;
    const TUNSETIFF: libc::c_ulong = 0x4004_54ca;
    let file = File::options()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK)
        .open("/dev/net/tun")?;
    // A `struct ifreq`: the name, then the flags, then nothing that matters.
    let mut request = [0_u8; 40];
    request[..name.len()].copy_from_slice(name.as_bytes());
    let flags = (libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR) as u16;
    request[16..18].copy_from_slice(&flags.to_ne_bytes());
    // SAFETY: the request is as long as a `struct ifreq`, which the kernel reads and writes.
    if unsafe { libc::ioctl(file.as_raw_fd(), TUNSETIFF, request.as_mut_ptr()) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(file)
}
