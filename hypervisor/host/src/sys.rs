//! The few things that need `unsafe`: the mapped lease page and what a child does between fork and exec.

use godwit_wire::lease::LEASE_PAGE_BYTES;
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};
use rustix::process::Signal;
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
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
