//! The crate's only unsafe code: kernel interfaces that no safe crate wraps.

pub(crate) mod guarded;
pub(crate) mod guest_io;
pub(crate) mod tap;
pub(crate) mod uring;

use std::os::fd::{AsRawFd, BorrowedFd};
use vmm_sys_util::eventfd::EventFd;

/// An eventfd's descriptor, for calls that take one.
pub(crate) fn borrow_event(event: &EventFd) -> BorrowedFd<'_> {
    // SAFETY: the descriptor belongs to `event`, which outlives the borrow.
    unsafe { BorrowedFd::borrow_raw(event.as_raw_fd()) }
}
