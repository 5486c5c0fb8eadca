//! userfaultfd: the kernel asks this process for pages of its own memory that are not there
//! (Documentation/admin-guide/mm/userfaultfd.rst). Only what guest memory needs.

use godwit_wire::devices::MemoryBacking;
use godwit_wire::unit::PAGE_BYTES;
use rustix::fd::OwnedFd;
use rustix::mm::UserfaultfdFlags;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

// linux/userfaultfd.h: _IOWR/_IOR(0xaa, nr, size of the struct)
const UFFDIO_API: libc::c_ulong = 0xc018_aa3f;
const UFFDIO_REGISTER: libc::c_ulong = 0xc020_aa00;
const UFFDIO_UNREGISTER: libc::c_ulong = 0x8010_aa01;
const UFFDIO_WAKE: libc::c_ulong = 0x8010_aa02;
const UFFDIO_COPY: libc::c_ulong = 0xc028_aa03;
const UFFDIO_ZEROPAGE: libc::c_ulong = 0xc020_aa04;
const UFFD_API: u64 = 0xaa;
const UFFD_FEATURE_MISSING_HUGETLBFS: u64 = 1 << 4;
const UFFD_FEATURE_MISSING_SHMEM: u64 = 1 << 5;
const UFFDIO_REGISTER_MODE_MISSING: u64 = 1;
const UFFDIO_COPY_MODE_DONTWAKE: u64 = 1;
const UFFD_EVENT_PAGEFAULT: u8 = 0x12;
/// struct uffd_msg: the event first, the address of a page fault behind its flags.
const MESSAGE_BYTES: usize = 32;
const ADDRESS_AT: usize = 16;
/// The kernel asks to try again while it changes the mapping itself.
const MAX_TRIES: u32 = 1000;

#[repr(C)]
struct Api {
    api: u64,
    features: u64,
    ioctls: u64,
}

#[repr(C)]
struct Range {
    start: u64,
    len: u64,
}

#[repr(C)]
struct Register {
    range: Range,
    mode: u64,
    ioctls: u64,
}

#[repr(C)]
struct Copy {
    dst: u64,
    src: u64,
    len: u64,
    mode: u64,
    copied: i64,
}

#[repr(C)]
struct ZeroPage {
    range: Range,
    mode: u64,
    zeroed: i64,
}

const _: () = assert!(
    size_of::<Api>() == 0x18
        && size_of::<Range>() == 0x10
        && size_of::<Register>() == 0x20
        && size_of::<Copy>() == 0x28
        && size_of::<ZeroPage>() == 0x20,
    "the ioctl numbers encode the sizes"
);

/// A userfaultfd for shared memory of this process.
#[derive(Debug)]
pub(super) struct UserFault {
    fd: OwnedFd,
}

/// What filling did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Filled {
    /// So many bytes from the start.
    Bytes(u64),
    /// Nothing: the first page is there already.
    Present,
}

impl UserFault {
    /// One for such memory that also hears of the kernel's own accesses, KVM's above all; that takes the right to
    /// trace processes.
    pub(super) fn new(backing: MemoryBacking) -> io::Result<Self> {
        // SAFETY: a userfaultfd that nothing is registered with changes nothing about this process's memory.
        let fd = unsafe {
            rustix::mm::userfaultfd(UserfaultfdFlags::CLOEXEC | UserfaultfdFlags::NONBLOCK)
        }?;
        let fault = Self { fd };
        let mut api = Api {
            api: UFFD_API,
            features: match backing {
                MemoryBacking::Standard => UFFD_FEATURE_MISSING_SHMEM,
                MemoryBacking::Huge2M => UFFD_FEATURE_MISSING_HUGETLBFS,
            },
            ioctls: 0,
        };
        fault.call(UFFDIO_API, &mut api)?;
        Ok(fault)
    }

    /// From here on whoever touches a page of this range that is not there waits until it is filled. The range is
    /// whole pages of one shared mapping that lives until [`Self::unregister`].
    pub(super) fn register(&self, start: u64, len: u64) -> io::Result<()> {
        let mut register = Register {
            range: Range { start, len },
            mode: UFFDIO_REGISTER_MODE_MISSING,
            ioctls: 0,
        };
        self.call(UFFDIO_REGISTER, &mut register)
    }

    /// Nobody waits in this range any more; what is not there reads as zeros.
    pub(super) fn unregister(&self, start: u64, len: u64) -> io::Result<()> {
        self.call(UFFDIO_UNREGISTER, &mut Range { start, len })?;
        // The kernel wakes who waits before it stops watching; whoever comes in between would wait for ever.
        self.wake(start, len)
    }

    /// Lets those go on that wait in this range, to look again.
    pub(super) fn wake(&self, start: u64, len: u64) -> io::Result<()> {
        self.call(UFFDIO_WAKE, &mut Range { start, len })
    }

    /// Fills absent pages from `start` on with `content`, up to the first one that is there, and wakes who waits.
    pub(super) fn copy(&self, start: u64, content: &[u8]) -> io::Result<Filled> {
        self.copy_with(start, content, 0)
    }

    /// The same, but whoever waits goes on waiting, for [`Self::wake`].
    pub(super) fn copy_quietly(&self, start: u64, content: &[u8]) -> io::Result<Filled> {
        self.copy_with(start, content, UFFDIO_COPY_MODE_DONTWAKE)
    }

    fn copy_with(&self, start: u64, content: &[u8], mode: u64) -> io::Result<Filled> {
        let mut copy = Copy {
            dst: start,
            src: content.as_ptr() as u64,
            len: content.len() as u64,
            mode,
            copied: 0,
        };
        self.fill(UFFDIO_COPY, &mut copy, |copy| copy.copied)
    }

    /// The same with zeros.
    pub(super) fn zero(&self, start: u64, len: u64) -> io::Result<Filled> {
        let mut zero = ZeroPage {
            range: Range { start, len },
            mode: 0,
            zeroed: 0,
        };
        self.fill(UFFDIO_ZEROPAGE, &mut zero, |zero| zero.zeroed)
    }

    fn fill<T>(
        &self,
        request: libc::c_ulong,
        argument: &mut T,
        done: impl Fn(&T) -> i64,
    ) -> io::Result<Filled> {
        for _ in 0..MAX_TRIES {
            let result = self.call(request, argument);
            // Also an interrupted filling says how far it came.
            if let Ok(bytes @ 1..) = u64::try_from(done(argument)) {
                return Ok(Filled::Bytes(bytes));
            }
            match result {
                Ok(()) => return Ok(Filled::Present),
                Err(error) if error.raw_os_error() == Some(libc::EEXIST) => {
                    return Ok(Filled::Present);
                }
                Err(error) if error.raw_os_error() == Some(libc::EAGAIN) => {}
                Err(error) => return Err(error),
            }
        }
        Err(io::ErrorKind::TimedOut.into())
    }

    /// The next address somebody waits at, if there is one; it is told once.
    pub(super) fn take_fault(&self) -> io::Result<Option<u64>> {
        let mut message = [0; MESSAGE_BYTES];
        loop {
            match rustix::io::read(&self.fd, &mut message) {
                Ok(MESSAGE_BYTES) if message[0] == UFFD_EVENT_PAGEFAULT => {
                    let address = message[ADDRESS_AT..]
                        .first_chunk()
                        .expect("a message is longer than that");
                    return Ok(Some(u64::from_ne_bytes(*address) / PAGE_BYTES * PAGE_BYTES));
                }
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(rustix::io::Errno::AGAIN) => return Ok(None),
                Err(error) => return Err(error.into()),
            }
        }
    }

    fn call<T>(&self, request: libc::c_ulong, argument: &mut T) -> io::Result<()> {
        // SAFETY: the request's number encodes the size of `T`, which each caller pairs with it and is asserted
        // above. Addresses within are of guest memory, to which no references exist, and of a slice that outlives
        // the call and is only read.
        let result = unsafe { libc::ioctl(self.fd.as_raw_fd(), request as _, argument) };
        if result < 0 {
            Err(io::Error::last_os_error())
        } else {
            Ok(())
        }
    }
}

impl AsFd for UserFault {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}
