//! Tap devices: Ethernet frames to and from the host's network (Linux, Documentation/networking/tuntap.rst).
//!
//! Every frame carries the 12-byte header of virtio-net, so that checksums and segments stay the kernel's work, and
//! moves between guest memory and the kernel without a copy of ours.

use crate::chain::Segment;
use crate::memory::GuestMemory;
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::Mutex;
use vm_memory::bitmap::{Bitmap, BitmapSlice};
use vm_memory::{GuestMemory as _, Permissions, VolatileSlice};

/// Bytes of the header in front of every frame: `virtio_net_hdr_v1`.
pub(crate) const HEADER_BYTES: usize = 12;

const CLONE_DEVICE: &str = "/dev/net/tun";
/// Longest name of an interface.
const MAX_NAME_BYTES: usize = libc::IFNAMSIZ - 1;

// Request numbers of linux/if_tun.h.
const TUNSETIFF: libc::c_ulong = 0x4004_54ca;
const TUNGETIFF: libc::c_ulong = 0x8004_54d2;
const TUNSETOFFLOAD: libc::c_ulong = 0x4004_54d0;
const TUNSETVNETHDRSZ: libc::c_ulong = 0x4004_54d8;
const TUNSETQUEUE: libc::c_ulong = 0x4004_54d9;

/// What the kernel may leave undone in frames it hands us (`TUN_F_*`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Offloads(pub(crate) u32);

impl Offloads {
    /// Checksums.
    pub(crate) const CHECKSUM: u32 = 1;
    /// Segmentation of TCP over IPv4.
    pub(crate) const TSO4: u32 = 2;
    /// Segmentation of TCP over IPv6.
    pub(crate) const TSO6: u32 = 4;
    /// Segmentation of TCP with congestion notification.
    pub(crate) const TSO_ECN: u32 = 8;
}

/// How many descriptors a tap device is opened through.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Queueing {
    /// One.
    Single,
    /// One for each queue pair.
    Multiple,
}

/// Why a tap device cannot be used, and what to do about it.
#[derive(Debug, thiserror::Error)]
pub(crate) enum TapError {
    #[error("{name:?} is no name of a network interface: 1 to {MAX_NAME_BYTES} bytes")]
    BadName { name: String },
    #[error(
        "{CLONE_DEVICE} cannot be opened; load the kernel's module tun, and allow this process to use it"
    )]
    NoDriver(#[source] io::Error),
    #[error(
        "there is no interface {name}; make it with `ip tuntap add dev {name} mode tap vnet_hdr{}`",
        queueing.as_ip_option()
    )]
    Missing { name: String, queueing: Queueing },
    #[error(
        "{name} is no tap device {}; make it anew with `ip tuntap add dev {name} mode tap vnet_hdr{}`",
        queueing.described(),
        queueing.as_ip_option()
    )]
    OtherKind { name: String, queueing: Queueing },
    #[error(
        "tap device {name} may not be used by this user; make it with `user` of that user, or run with CAP_NET_ADMIN"
    )]
    NotPermitted { name: String },
    #[error("tap device {name} is in use by another process")]
    Busy { name: String },
    #[error("a descriptor for tap device {name} is of {found:?}")]
    OtherDevice { name: String, found: String },
    #[error("tap device {name}: {request} fails")]
    Refused {
        name: String,
        request: &'static str,
        #[source]
        source: io::Error,
    },
}

impl Queueing {
    fn as_ip_option(self) -> &'static str {
        match self {
            Self::Single => "",
            Self::Multiple => " multi_queue",
        }
    }

    fn described(self) -> &'static str {
        match self {
            Self::Single => "with a single queue, which one queue pair needs",
            Self::Multiple => "with several queues, which several queue pairs need",
        }
    }

    fn flags(self) -> libc::c_int {
        let common = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
        match self {
            Self::Single => common,
            Self::Multiple => common | libc::IFF_MULTI_QUEUE,
        }
    }
}

/// Whether the kernel gives frames to one of a tap device's queues.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Attachment {
    /// It does.
    Attached,
    /// It gives them to the others.
    Detached,
}

/// One queue of a tap device. Never blocks.
#[derive(Debug)]
pub(crate) struct Tap {
    descriptor: OwnedFd,
    name: String,
    queueing: Queueing,
    attachment: Mutex<Attachment>,
}

impl Tap {
    /// Opens a queue of the existing tap device `name`.
    pub(crate) fn open(name: &str, queueing: Queueing) -> Result<Self, TapError> {
        if name.is_empty() || name.len() > MAX_NAME_BYTES || name.contains(['/', '\0', '%']) {
            return Err(TapError::BadName { name: name.into() });
        }
        // TUNSETIFF would make an interface that is not there, and it would vanish with this process.
        if !exists(name) {
            return Err(TapError::Missing {
                name: name.into(),
                queueing,
            });
        }
        let flags = OFlags::RDWR | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let descriptor = rustix::fs::open(CLONE_DEVICE, flags, Mode::empty())
            .map_err(|error| TapError::NoDriver(error.into()))?;
        let tap = Self {
            descriptor,
            name: name.into(),
            queueing,
            attachment: Mutex::new(Attachment::Attached),
        };
        tap.interface_request(TUNSETIFF, queueing.flags())
            .map_err(|error| tap.opening_failed(error))?;
        let header = HEADER_BYTES as libc::c_int;
        // SAFETY: TUNSETVNETHDRSZ reads an int through the pointer, which is to one that lives long enough.
        let done = unsafe {
            libc::ioctl(
                tap.descriptor.as_raw_fd(),
                TUNSETVNETHDRSZ,
                &raw const header,
            )
        };
        tap.checked(done, "TUNSETVNETHDRSZ")?;
        Ok(tap)
    }

    /// A queue of tap device `name` that another process of this host has opened and set up.
    pub(crate) fn inherited(
        descriptor: OwnedFd,
        name: &str,
        queueing: Queueing,
    ) -> Result<Self, TapError> {
        // SAFETY: all-zero bytes are a valid ifreq.
        let mut found: libc::ifreq = unsafe { std::mem::zeroed() };
        // SAFETY: TUNGETIFF writes an ifreq through the pointer, which is to one.
        let done = unsafe { libc::ioctl(descriptor.as_raw_fd(), TUNGETIFF, &raw mut found) };
        if done < 0 {
            return Err(TapError::Refused {
                name: name.into(),
                request: "TUNGETIFF",
                source: io::Error::last_os_error(),
            });
        }
        let letters = found.ifr_name.iter().map(|letter| *letter as u8);
        let found_name: Vec<u8> = letters.take_while(|letter| *letter != 0).collect();
        if found_name != name.as_bytes() {
            return Err(TapError::OtherDevice {
                name: name.into(),
                found: String::from_utf8_lossy(&found_name).into_owned(),
            });
        }
        // SAFETY: after TUNGETIFF the union holds the flags.
        let flags = libc::c_int::from(unsafe { found.ifr_ifru.ifru_flags });
        let attachment = if flags & libc::IFF_DETACH_QUEUE == 0 {
            Attachment::Attached
        } else {
            Attachment::Detached
        };
        Ok(Self {
            descriptor,
            name: name.into(),
            queueing,
            attachment: Mutex::new(attachment),
        })
    }

    /// The same queue once more, for another process of this host.
    pub(crate) fn lend(&self) -> io::Result<OwnedFd> {
        self.descriptor.try_clone()
    }

    /// Name of the interface.
    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// Says what the reader of this device's frames can do by itself. Holds for all queues of the device.
    pub(crate) fn set_offloads(&self, offloads: Offloads) -> Result<(), TapError> {
        let flags = libc::c_ulong::from(offloads.0);
        // SAFETY: TUNSETOFFLOAD takes its flags by value.
        let done = unsafe { libc::ioctl(self.descriptor.as_raw_fd(), TUNSETOFFLOAD, flags) };
        self.checked(done, "TUNSETOFFLOAD")
    }

    /// Gives this queue frames, or none. Without effect on a device with a single queue.
    pub(crate) fn attach(&self, wanted: Attachment) -> Result<(), TapError> {
        let mut now = self
            .attachment
            .lock()
            .unwrap_or_else(|poisoned| poisoned.into_inner());
        if *now == wanted || self.queueing == Queueing::Single {
            return Ok(());
        }
        let flag = match wanted {
            Attachment::Attached => libc::IFF_ATTACH_QUEUE,
            Attachment::Detached => libc::IFF_DETACH_QUEUE,
        };
        self.interface_request(TUNSETQUEUE, flag)
            .map_err(|source| TapError::Refused {
                name: self.name.clone(),
                request: "TUNSETQUEUE",
                source,
            })?;
        *now = wanted;
        Ok(())
    }

    /// Reads one frame with its header into `segments` of guest memory, and what does not fit there into `rest`;
    /// gives its length. What does not fit there either is lost.
    pub(crate) fn receive(
        &self,
        memory: &GuestMemory,
        segments: impl Iterator<Item = Segment>,
        rest: &mut [u8],
    ) -> io::Result<usize> {
        let slices = slices(memory, segments, Permissions::Write)?;
        let mut vectors = vectors(&slices);
        vectors.push(libc::iovec {
            iov_base: rest.as_mut_ptr().cast(),
            iov_len: rest.len(),
        });
        // SAFETY: the vectors are `vectors.len()` valid iovecs. All but the last point into guest memory, which
        // stays mapped while `memory` is borrowed and of which no Rust reference exists; the last is `rest`, borrowed
        // exclusively.
        let read = unsafe {
            libc::readv(
                self.descriptor.as_raw_fd(),
                vectors.as_ptr(),
                vectors.len() as libc::c_int,
            )
        };
        let len = usize::try_from(read).map_err(|_| io::Error::last_os_error())?;
        let mut left = len;
        for slice in &slices {
            let written = left.min(slice.len());
            slice.bitmap().mark_dirty(0, written);
            left -= written;
        }
        Ok(len)
    }

    /// Writes one frame with its header from `segments` of guest memory.
    pub(crate) fn send(
        &self,
        memory: &GuestMemory,
        segments: impl Iterator<Item = Segment>,
    ) -> io::Result<usize> {
        let slices = slices(memory, segments, Permissions::Read)?;
        let vectors = vectors(&slices);
        // SAFETY: the vectors are `vectors.len()` valid iovecs into guest memory, which stays mapped while `memory`
        // is borrowed; the kernel reads them once and copies what it checks.
        let written = unsafe {
            libc::writev(
                self.descriptor.as_raw_fd(),
                vectors.as_ptr(),
                vectors.len() as libc::c_int,
            )
        };
        usize::try_from(written).map_err(|_| io::Error::last_os_error())
    }

    /// Reads one frame with its header; what does not fit is lost.
    pub(crate) fn read(&self, frame: &mut [u8]) -> io::Result<usize> {
        Ok(rustix::io::read(&self.descriptor, frame)?)
    }

    /// Writes one frame with its header.
    pub(crate) fn write(&self, frame: &[u8]) -> io::Result<usize> {
        Ok(rustix::io::write(&self.descriptor, frame)?)
    }

    fn interface_request(&self, request: libc::c_ulong, flags: libc::c_int) -> io::Result<()> {
        // SAFETY: all-zero bytes are a valid ifreq.
        let mut wanted: libc::ifreq = unsafe { std::mem::zeroed() };
        for (to, from) in wanted.ifr_name.iter_mut().zip(self.name.bytes()) {
            *to = from as libc::c_char;
        }
        wanted.ifr_ifru.ifru_flags = flags as libc::c_short;
        // SAFETY: both requests made here read and write an ifreq through the pointer, which is to one.
        let done = unsafe { libc::ioctl(self.descriptor.as_raw_fd(), request, &raw mut wanted) };
        if done < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    }

    fn opening_failed(&self, error: io::Error) -> TapError {
        let name = self.name.clone();
        match Errno::from_io_error(&error) {
            Some(Errno::PERM | Errno::ACCESS) => TapError::NotPermitted { name },
            Some(Errno::BUSY | Errno::TOOBIG) => TapError::Busy { name },
            Some(Errno::INVAL) => TapError::OtherKind {
                name,
                queueing: self.queueing,
            },
            _ => TapError::Refused {
                name,
                request: "TUNSETIFF",
                source: error,
            },
        }
    }

    fn checked(&self, done: libc::c_int, request: &'static str) -> Result<(), TapError> {
        if done < 0 {
            return Err(TapError::Refused {
                name: self.name.clone(),
                request,
                source: io::Error::last_os_error(),
            });
        }
        Ok(())
    }
}

impl AsFd for Tap {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.descriptor.as_fd()
    }
}

fn exists(name: &str) -> bool {
    let socket = rustix::net::socket_with(
        AddressFamily::UNIX,
        SocketType::DGRAM,
        SocketFlags::CLOEXEC,
        None,
    );
    socket.is_ok_and(|socket| rustix::net::netdevice::name_to_index(socket, name).is_ok())
}

fn slices<'a>(
    memory: &'a GuestMemory,
    segments: impl Iterator<Item = Segment>,
    access: Permissions,
) -> io::Result<Vec<VolatileSlice<'a, impl BitmapSlice + 'a>>> {
    let mut slices = Vec::with_capacity(8);
    for segment in segments {
        let found = memory
            .get_slices(segment.address, segment.len as usize, access)
            .map_err(io::Error::other)?;
        for slice in found {
            slices.push(slice.map_err(io::Error::other)?);
        }
    }
    Ok(slices)
}

fn vectors<B: BitmapSlice>(slices: &[VolatileSlice<'_, B>]) -> Vec<libc::iovec> {
    let mut vectors = Vec::with_capacity(slices.len() + 1);
    vectors.extend(slices.iter().map(|slice| libc::iovec {
        iov_base: slice.ptr_guard_mut().as_ptr().cast(),
        iov_len: slice.len(),
    }));
    vectors
}

/// Puts the calling thread, and all threads and processes it starts, into a network namespace of their own, which
/// vanishes with them.
#[cfg(test)]
pub(crate) fn enter_fresh_network_namespace() -> io::Result<()> {
    // SAFETY: CLONE_NEWNET changes no memory and no descriptors; it only chooses which network is seen.
    Ok(unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::NEWNET) }?)
}
