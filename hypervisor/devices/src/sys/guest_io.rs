//! Files read into and written from guest memory, without a copy in between.

use crate::chain::Segment;
use crate::memory::GuestMemory;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use vm_memory::bitmap::Bitmap;
use vm_memory::{GuestMemory as _, Permissions};

/// Most pieces the kernel takes in one call (`IOV_MAX`).
pub(crate) const MAX_IOVECS: usize = 1024;

/// Whether a write is on stable storage when it is done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Durability {
    /// After the next flush.
    AfterFlush,
    /// At once.
    AtOnce,
}

impl Durability {
    pub(crate) fn flags(self) -> libc::c_int {
        match self {
            Self::AfterFlush => 0,
            Self::AtOnce => libc::RWF_DSYNC,
        }
    }
}

/// Which way bytes go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Direction {
    /// From the file to guest memory.
    Read,
    /// From guest memory to the file.
    Write(Durability),
}

/// Puts the host addresses of `segments`, without their first `skip` bytes, into `iovecs`: as many as the kernel
/// takes at once. They are good as long as `memory` lives.
pub(crate) fn fill_iovecs(
    iovecs: &mut Vec<libc::iovec>,
    memory: &GuestMemory,
    segments: &[Segment],
    mut skip: u64,
    direction: Direction,
) -> io::Result<()> {
    let access = match direction {
        Direction::Read => Permissions::Write,
        Direction::Write(_) => Permissions::Read,
    };
    iovecs.clear();
    for segment in segments {
        let skipped = skip.min(segment.len.into());
        skip -= skipped;
        let len = u64::from(segment.len) - skipped;
        if len == 0 {
            continue;
        }
        let address = vm_memory::GuestAddress(segment.address.0 + skipped);
        let fault = |_| io::Error::from_raw_os_error(libc::EFAULT);
        let slices = memory.get_slices(address, len as usize, access);
        for slice in slices.map_err(fault)? {
            let slice = slice.map_err(fault)?;
            if iovecs.len() == MAX_IOVECS {
                return Ok(());
            }
            iovecs.push(libc::iovec {
                iov_base: slice.ptr_guard_mut().as_ptr().cast(),
                iov_len: slice.len(),
            });
        }
    }
    Ok(())
}

/// Notes that the kernel wrote `segments`.
pub(crate) fn mark_written(memory: &GuestMemory, segments: &[Segment]) {
    for segment in segments {
        let slices = memory.get_slices(segment.address, segment.len as usize, Permissions::Write);
        for slice in slices.into_iter().flatten().flatten() {
            slice.bitmap().mark_dirty(0, slice.len());
        }
    }
}

/// Moves all bytes of `segments` between guest memory and the file at `offset`.
pub(crate) fn transfer(
    file: &File,
    memory: &GuestMemory,
    segments: &[Segment],
    offset: u64,
    direction: Direction,
) -> io::Result<()> {
    let total: u64 = segments.iter().map(|segment| u64::from(segment.len)).sum();
    let mut iovecs = Vec::new();
    let mut done = 0;
    let result = loop {
        if done >= total {
            break Ok(());
        }
        if let Err(error) = fill_iovecs(&mut iovecs, memory, segments, done, direction) {
            break Err(error);
        }
        match call(file, &iovecs, offset + done, direction) {
            Ok(0) => break Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(moved) => done += moved,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => break Err(error),
        }
    };
    if direction == Direction::Read {
        mark_written(memory, segments);
    }
    result
}

fn call(file: &File, iovecs: &[libc::iovec], offset: u64, direction: Direction) -> io::Result<u64> {
    let offset =
        libc::off_t::try_from(offset).map_err(|_| io::Error::from_raw_os_error(libc::EOVERFLOW))?;
    let (fd, count) = (file.as_raw_fd(), iovecs.len() as libc::c_int);
    let moved = match direction {
        // SAFETY: the descriptor is open while `file` is borrowed, and the iovecs name guest memory that `transfer`
        // borrows; nobody holds a Rust reference into it.
        Direction::Read => unsafe { libc::preadv(fd, iovecs.as_ptr(), count, offset) },
        // SAFETY: as above, and the kernel only reads.
        Direction::Write(durability) => unsafe {
            libc::pwritev2(fd, iovecs.as_ptr(), count, offset, durability.flags())
        },
    };
    u64::try_from(moved).map_err(|_| io::Error::last_os_error())
}

/// Takes an exclusive lock that belongs to this open file (`F_OFD_SETLK`): it goes when the file is closed, whoever
/// else in this process opens the file. `false` when another holds one.
pub(crate) fn lock_exclusively(file: &File) -> io::Result<bool> {
    set_lock(file, libc::F_WRLCK)
}

/// Gives the lock up.
pub(crate) fn unlock(file: &File) -> io::Result<()> {
    set_lock(file, libc::F_UNLCK).map(|_| ())
}

fn set_lock(file: &File, kind: libc::c_int) -> io::Result<bool> {
    let lock = libc::flock {
        l_type: kind as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: 0,
        l_len: 0,
        l_pid: 0,
    };
    // SAFETY: the descriptor is open while `file` is borrowed, and the kernel only reads `lock`, which outlives the
    // call.
    let result = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &raw const lock) };
    if result == 0 {
        return Ok(true);
    }
    let error = io::Error::last_os_error();
    match error.raw_os_error() {
        Some(libc::EAGAIN | libc::EACCES) => Ok(false),
        _ => Err(error),
    }
}
