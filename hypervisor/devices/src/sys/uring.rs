//! A ring of file operations on guest memory (io_uring).
//!
//! The ring owns whatever the kernel works on (the memory, the file, the list of pieces) until the kernel is done, and
//! waits for the kernel when it is dropped. That makes it safe to use.

use super::guest_io::{Direction, fill_iovecs, mark_written};
use crate::chain::Segment;
use crate::memory::GuestMemory;
use io_uring::{IoUring, Probe, opcode, types};
use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::Arc;

/// What the ring does.
#[derive(Debug)]
pub(crate) enum RingOperation {
    /// Bytes between guest memory and the file at `offset`.
    Transfer {
        /// Where in memory.
        segments: Vec<Segment>,
        /// Where in the file.
        offset: u64,
        /// Which way.
        direction: Direction,
    },
    /// What was written before is made durable (`fdatasync`).
    Flush,
}

/// An operation that is done.
#[derive(Debug)]
pub(crate) struct RingDone {
    /// What the caller called it.
    pub(crate) token: u16,
    /// How it went.
    pub(crate) result: io::Result<()>,
}

struct Slot {
    token: u16,
    operation: RingOperation,
    file: Arc<File>,
    memory: GuestMemory,
    iovecs: Vec<libc::iovec>,
    done: u64,
    total: u64,
}

/// A ring for at most so many operations at once.
pub(crate) struct Ring {
    ring: IoUring,
    slots: Vec<Option<Slot>>,
    free: Vec<usize>,
    /// Slots whose entry did not fit into the submission queue, or that the kernel wants once more.
    waiting: VecDeque<usize>,
    spare: Vec<Vec<libc::iovec>>,
    under_way: usize,
}

impl std::fmt::Debug for Ring {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Ring")
            .field("depth", &self.slots.len())
            .field("under_way", &self.under_way)
            .finish()
    }
}

// SAFETY: the raw pointers in the slots' iovecs point into guest memory that each slot keeps alive, from whatever
// thread; everything else is Send.
unsafe impl Send for Ring {}

impl Ring {
    /// A ring for at most `depth` operations at once. Fails where the kernel has no io_uring or forbids it.
    pub(crate) fn new(depth: u16) -> io::Result<Self> {
        let ring = IoUring::new(depth.max(1).into())?;
        let mut probe = Probe::new();
        ring.submitter().register_probe(&mut probe)?;
        let needed = [
            opcode::Readv::CODE,
            opcode::Writev::CODE,
            opcode::Fsync::CODE,
        ];
        if !needed.iter().all(|code| probe.is_supported(*code)) {
            return Err(io::ErrorKind::Unsupported.into());
        }
        Ok(Self {
            ring,
            slots: (0..depth).map(|_| None).collect(),
            free: (0..usize::from(depth)).rev().collect(),
            waiting: VecDeque::new(),
            spare: Vec::new(),
            under_way: 0,
        })
    }

    /// Becomes readable when something is done.
    pub(crate) fn descriptor(&self) -> BorrowedFd<'_> {
        // SAFETY: the descriptor belongs to the ring, which outlives the borrow.
        unsafe { BorrowedFd::borrow_raw(self.ring.as_raw_fd()) }
    }

    /// How many operations are under way.
    pub(crate) fn under_way(&self) -> usize {
        self.under_way
    }

    /// Takes an operation; the kernel sees it at the next [`Self::submit`]. Fails when the ring is full, or when the
    /// segments are not memory.
    pub(crate) fn push(
        &mut self,
        token: u16,
        operation: RingOperation,
        file: &Arc<File>,
        memory: &GuestMemory,
    ) -> io::Result<()> {
        let mut iovecs = self.spare.pop().unwrap_or_default();
        let mut total = 0;
        if let RingOperation::Transfer {
            segments,
            direction,
            ..
        } = &operation
        {
            fill_iovecs(&mut iovecs, memory, segments, 0, *direction)?;
            total = segments.iter().map(|segment| u64::from(segment.len)).sum();
        }
        let Some(index) = self.free.pop() else {
            return Err(io::ErrorKind::ResourceBusy.into());
        };
        self.slots[index] = Some(Slot {
            token,
            operation,
            file: Arc::clone(file),
            memory: memory.clone(),
            iovecs,
            done: 0,
            total,
        });
        self.under_way += 1;
        self.waiting.push_back(index);
        Ok(())
    }

    /// Hands everything taken to the kernel.
    pub(crate) fn submit(&mut self) -> io::Result<()> {
        while !self.waiting.is_empty() {
            self.fill_queue();
            retried(|| self.ring.submit())?;
        }
        Ok(())
    }

    /// Waits until at least one operation is done, if any is under way.
    pub(crate) fn wait(&mut self) -> io::Result<()> {
        if self.under_way == 0 {
            return Ok(());
        }
        self.fill_queue();
        retried(|| self.ring.submit_and_wait(1))
    }

    /// Gives what is done. What the kernel did in part only is continued.
    pub(crate) fn reap(&mut self, done: &mut Vec<RingDone>) -> io::Result<()> {
        loop {
            let Some((index, result)) = self
                .ring
                .completion()
                .next()
                .map(|entry| (entry.user_data() as usize, entry.result()))
            else {
                break;
            };
            self.completed(index, result, done);
        }
        self.submit()
    }

    fn completed(&mut self, index: usize, result: i32, done: &mut Vec<RingDone>) {
        let Some(slot) = self.slots.get_mut(index).and_then(Option::as_mut) else {
            return;
        };
        let result = match result {
            moved if moved > 0 => {
                slot.done += u64::from(moved.unsigned_abs());
                match slot.refill() {
                    Ok(()) if slot.done < slot.total => {
                        self.waiting.push_back(index);
                        return;
                    }
                    refilled => refilled,
                }
            }
            0 if slot.done < slot.total => Err(io::ErrorKind::UnexpectedEof.into()),
            0 => Ok(()),
            error if [libc::EINTR, libc::EAGAIN].contains(&-error) => {
                self.waiting.push_back(index);
                return;
            }
            error => Err(io::Error::from_raw_os_error(-error)),
        };
        if let Some(slot) = self.slots[index].take() {
            if let RingOperation::Transfer {
                segments,
                direction: Direction::Read,
                ..
            } = &slot.operation
            {
                mark_written(&slot.memory, segments);
            }
            done.push(RingDone {
                token: slot.token,
                result,
            });
            self.spare.push(slot.iovecs);
        }
        self.free.push(index);
        self.under_way -= 1;
    }

    fn fill_queue(&mut self) {
        let mut queue = self.ring.submission();
        while let Some(index) = self.waiting.front().copied() {
            let Some(slot) = self.slots.get(index).and_then(Option::as_ref) else {
                self.waiting.pop_front();
                continue;
            };
            let entry = slot.entry().user_data(index as u64);
            // SAFETY: what the entry points to (iovecs, guest memory, the file) belongs to the slot, which stays as
            // it is until the kernel reports the operation done; dropping the ring waits for that.
            if unsafe { queue.push(&entry) }.is_err() {
                break;
            }
            self.waiting.pop_front();
        }
    }
}

impl Slot {
    fn refill(&mut self) -> io::Result<()> {
        match &self.operation {
            RingOperation::Transfer {
                segments,
                direction,
                ..
            } => fill_iovecs(
                &mut self.iovecs,
                &self.memory,
                segments,
                self.done,
                *direction,
            ),
            RingOperation::Flush => Ok(()),
        }
    }

    fn entry(&self) -> io_uring::squeue::Entry {
        let fd = types::Fd(self.file.as_raw_fd());
        let (pieces, count) = (self.iovecs.as_ptr(), self.iovecs.len() as u32);
        match &self.operation {
            RingOperation::Transfer {
                offset, direction, ..
            } => match direction {
                Direction::Read => opcode::Readv::new(fd, pieces, count)
                    .offset(offset + self.done)
                    .build(),
                Direction::Write(durability) => opcode::Writev::new(fd, pieces, count)
                    .offset(offset + self.done)
                    .rw_flags(durability.flags())
                    .build(),
            },
            RingOperation::Flush => opcode::Fsync::new(fd)
                .flags(types::FsyncFlags::DATASYNC)
                .build(),
        }
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        let mut done = Vec::new();
        while self.under_way > 0 {
            if self.wait().is_err() || self.reap(&mut done).is_err() {
                // The kernel may still write: what it writes to must stay, for ever.
                for slot in self.slots.iter_mut().filter_map(Option::take) {
                    std::mem::forget(slot);
                }
                return;
            }
        }
    }
}

fn retried(mut call: impl FnMut() -> io::Result<usize>) -> io::Result<()> {
    loop {
        match call() {
            Ok(_) => return Ok(()),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}
