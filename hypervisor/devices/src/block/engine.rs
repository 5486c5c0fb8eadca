//! Carries requests out beside the device's thread: raw files through a ring of the kernel, everything else on a few
//! threads of its own.
//!
//! The ring takes reads, writes and flushes of raw files. Discards, write-zeroes, qcow2, and hosts that have no
//! io_uring (or forbid it) are served by the pool; its threads start with the first request they are needed for.
//!
//! Raw files are opened without `O_DIRECT`: guests of one host share what they read of a common base, misaligned
//! requests need no bounce buffers, and file systems without direct I/O work. `O_DIRECT` would pay where guests cache
//! well themselves and the host has fast disks of its own.

use super::image::Image;
use super::request::Request;
use crate::memory::GuestMemory;
use crate::sys::guest_io::{Direction, Durability};
use crate::sys::uring::{Ring, RingDone, RingOperation};
use crate::worker::{Poll, borrow};
use std::collections::VecDeque;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use vmm_sys_util::eventfd::EventFd;

/// Most threads of one disk's pool.
pub const MAX_POOL_THREADS: usize = 4;
/// Stack of a pool thread.
const POOL_STACK_BYTES: usize = 1 << 20;

/// How raw files are read and written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum IoMode {
    /// With io_uring where the kernel has it, else with threads.
    #[default]
    Automatic,
    /// With `preadv` and `pwritev` on threads.
    Threads,
}

/// A request to carry out.
#[derive(Debug)]
pub(crate) struct Job {
    /// What the caller calls it; unique among those under way.
    pub(crate) token: u16,
    /// What to do, checked.
    pub(crate) request: Request,
    /// On what.
    pub(crate) image: Arc<Image>,
    /// Whether its writes are to be durable at once.
    pub(crate) durability: Durability,
}

/// A request that was carried out, or failed.
#[derive(Debug)]
pub(crate) struct Done {
    /// What the caller called it.
    pub(crate) token: u16,
    /// How it went.
    pub(crate) result: io::Result<()>,
}

/// Carries out requests of one disk.
#[derive(Debug)]
pub(crate) struct Engine {
    memory: GuestMemory,
    ring: Option<Ring>,
    ring_done: Vec<RingDone>,
    pool: Pool,
    failed: Vec<Done>,
}

impl Engine {
    /// An engine for at most `depth` requests at once.
    pub(crate) fn new(memory: GuestMemory, depth: u16, mode: IoMode) -> io::Result<Self> {
        let ring = match mode {
            IoMode::Automatic => Ring::new(depth)
                .inspect_err(|error| tracing::info!(%error, "no io_uring; disks use threads"))
                .ok(),
            IoMode::Threads => None,
        };
        Ok(Self {
            pool: Pool::new(memory.clone())?,
            memory,
            ring,
            ring_done: Vec::new(),
            failed: Vec::new(),
        })
    }

    /// Waits under these tokens for requests to be done.
    pub(crate) fn register(&self, poll: &Poll, ring: u32, pool: u32) -> io::Result<()> {
        if let Some(found) = &self.ring {
            poll.add(found.descriptor(), ring)?;
        }
        poll.add(borrow(&self.pool.bell), pool)
    }

    /// Takes a request; it begins at the next [`Self::submit`] at the latest.
    pub(crate) fn push(&mut self, job: Job) {
        let Job {
            token,
            request,
            image,
            durability,
        } = job;
        let (Some(ring), Image::Raw(raw)) = (&mut self.ring, &*image) else {
            return self.pool.push(token, request, image, durability);
        };
        let operation = match request {
            Request::Read { offset, data } => RingOperation::Transfer {
                segments: data,
                offset,
                direction: Direction::Read,
            },
            Request::Write { offset, data } => RingOperation::Transfer {
                segments: data,
                offset,
                direction: Direction::Write(durability),
            },
            Request::Flush => RingOperation::Flush,
            other => return self.pool.push(token, other, image, durability),
        };
        if let Err(error) = ring.push(token, operation, raw.file(), &self.memory) {
            self.failed.push(Done {
                token,
                result: Err(error),
            });
        }
    }

    /// Begins everything that was taken.
    pub(crate) fn submit(&mut self) {
        if let Some(ring) = &mut self.ring
            && let Err(error) = ring.submit()
        {
            tracing::error!(%error, "a disk's ring takes nothing more");
        }
    }

    /// Gives what is done by now.
    pub(crate) fn reap(&mut self, done: &mut Vec<Done>) {
        done.append(&mut self.failed);
        if let Some(ring) = &mut self.ring {
            if let Err(error) = ring.reap(&mut self.ring_done) {
                tracing::error!(%error, "a disk's ring gives nothing more");
            }
            done.extend(self.ring_done.drain(..).map(|done| Done {
                token: done.token,
                result: done.result,
            }));
        }
        let _ = self.pool.bell.read();
        while let Ok(finished) = self.pool.finished.try_recv() {
            self.pool.under_way -= 1;
            done.push(finished);
        }
    }

    /// Waits for everything that is under way.
    pub(crate) fn drain(&mut self, done: &mut Vec<Done>) {
        self.submit();
        self.reap(done);
        while let Some(ring) = self.ring.as_mut().filter(|ring| ring.under_way() > 0) {
            if let Err(error) = ring.wait() {
                tracing::error!(%error, "a disk's ring cannot be waited for");
                break;
            }
            self.reap(done);
        }
        while self.pool.under_way > 0 {
            let Ok(finished) = self.pool.finished.recv() else {
                break;
            };
            self.pool.under_way -= 1;
            done.push(finished);
        }
    }
}

#[derive(Debug)]
struct Work {
    token: u16,
    request: Request,
    image: Arc<Image>,
    durability: Durability,
}

#[derive(Debug, Default)]
struct Queue {
    work: VecDeque<Work>,
    closed: bool,
}

#[derive(Debug, Default)]
struct Shared {
    queue: Mutex<Queue>,
    news: Condvar,
}

impl Shared {
    fn queue(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn next(&self) -> Option<Work> {
        let mut queue = self.queue();
        loop {
            if let Some(work) = queue.work.pop_front() {
                return Some(work);
            }
            if queue.closed {
                return None;
            }
            queue = self
                .news
                .wait(queue)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }
}

/// Threads that carry out requests with blocking calls. Its queue is as long as the virtqueue at most.
#[derive(Debug)]
struct Pool {
    memory: GuestMemory,
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
    finish: Sender<Done>,
    finished: Receiver<Done>,
    bell: EventFd,
    under_way: usize,
}

impl Pool {
    fn new(memory: GuestMemory) -> io::Result<Self> {
        let (finish, finished) = mpsc::channel();
        Ok(Self {
            memory,
            shared: Arc::default(),
            threads: Vec::new(),
            finish,
            finished,
            bell: EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?,
            under_way: 0,
        })
    }

    fn push(&mut self, token: u16, request: Request, image: Arc<Image>, durability: Durability) {
        self.under_way += 1;
        let grown = match self.threads.len() {
            count if count < MAX_POOL_THREADS.min(self.under_way) => self.add_thread(),
            _ => Ok(()),
        };
        if let Err(error) = grown
            && self.threads.is_empty()
        {
            let result = Err(error);
            let _ = self.finish.send(Done { token, result });
            let _ = self.bell.write(1);
            return;
        }
        self.shared.queue().work.push_back(Work {
            token,
            request,
            image,
            durability,
        });
        self.shared.news.notify_one();
    }

    fn add_thread(&mut self) -> io::Result<()> {
        let (shared, memory) = (Arc::clone(&self.shared), self.memory.clone());
        let (finish, bell) = (self.finish.clone(), self.bell.try_clone()?);
        let thread = std::thread::Builder::new()
            .name("disk-io".to_owned())
            .stack_size(POOL_STACK_BYTES)
            .spawn(move || {
                while let Some(work) = shared.next() {
                    let token = work.token;
                    // A damaged image may hit an assertion of its library: that is an error of this request.
                    let carried_out = catch_unwind(AssertUnwindSafe(|| carry_out(&work, &memory)));
                    let result = carried_out
                        .unwrap_or_else(|_| Err(io::Error::other("the image is damaged")));
                    drop(work);
                    let _ = finish.send(Done { token, result });
                    let _ = bell.write(1);
                }
            })?;
        self.threads.push(thread);
        Ok(())
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.queue().closed = true;
        self.shared.news.notify_all();
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

fn carry_out(work: &Work, memory: &GuestMemory) -> io::Result<()> {
    let image = &work.image;
    match &work.request {
        Request::Read { offset, data } => image.read(memory, data, *offset),
        Request::Write { offset, data } => image.write(memory, data, *offset, work.durability),
        Request::Flush => image.flush(),
        Request::Discard(ranges) => ranges.iter().try_for_each(|range| image.discard(*range)),
        Request::WriteZeroes(ranges) => ranges
            .iter()
            .try_for_each(|range| image.write_zeroes(*range)),
        Request::GetId => Ok(()),
    }
}
