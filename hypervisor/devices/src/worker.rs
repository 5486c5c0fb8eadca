//! The thread a device works on.
//!
//! ```text
//!             pause                      
//!   serving ─────────▶ quiesced ─────────▶ serving      stop, or the worker is dropped: the thread ends
//!           in-flight             resume                and the service comes back
//!           work is finished
//! ```
//!
//! While serving, the thread waits for the service's sources and for orders; while quiesced, for orders only.

use crate::device::{DeviceError, Start};
use rustix::event::epoll::{self, CreateFlags, EventData, EventFlags};
use std::fmt;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, Sender, TryRecvError};
use std::thread::JoinHandle;
use vmm_sys_util::eventfd::EventFd;

/// Most sources that are looked at after one wait.
const EVENTS_PER_WAIT: usize = 32;
/// Token of the eventfd that announces orders.
const ORDERS: u64 = u64::MAX;

/// What a worker does.
pub trait Service: Send + 'static {
    /// Registers the sources to wait for.
    fn register(&mut self, poll: &Poll) -> io::Result<()>;

    /// The source that was registered under `token` is ready. Must not block.
    fn ready(&mut self, token: u32, poll: &Poll);

    /// Finishes what is in flight; no source is served until [`Self::resume`].
    fn quiesce(&mut self, poll: &Poll);

    /// Goes on after [`Self::quiesce`]; looks at everything, because events may have been lost.
    fn resume(&mut self, poll: &Poll);
}

/// The sources a worker waits for.
#[derive(Clone, Debug)]
pub struct Poll(Arc<OwnedFd>);

impl Poll {
    fn new() -> io::Result<Self> {
        Ok(Self(Arc::new(epoll::create(CreateFlags::CLOEXEC)?)))
    }

    /// Waits for `source` to be readable, level-triggered.
    pub fn add(&self, source: impl AsFd, token: u32) -> io::Result<()> {
        self.add_for(source, token, EventFlags::IN)
    }

    /// Waits for `source` to be as `flags` say.
    pub fn add_for(&self, source: impl AsFd, token: u32, flags: EventFlags) -> io::Result<()> {
        Ok(epoll::add(
            &*self.0,
            source,
            EventData::new_u64(token.into()),
            flags,
        )?)
    }

    /// Changes what to wait for; empty flags silence the source.
    pub fn change(&self, source: impl AsFd, token: u32, flags: EventFlags) -> io::Result<()> {
        Ok(epoll::modify(
            &*self.0,
            source,
            EventData::new_u64(token.into()),
            flags,
        )?)
    }

    /// Waits for `source` no more.
    pub fn remove(&self, source: impl AsFd) -> io::Result<()> {
        Ok(epoll::delete(&*self.0, source)?)
    }
}

type Call<S> = Box<dyn FnOnce(&mut S) + Send>;

enum Order<S> {
    Pause(Sender<()>),
    Resume(Sender<()>),
    Call(Call<S>),
    Stop,
}

/// The worker's thread is gone: it could not be started, or the service panicked.
#[derive(Debug, thiserror::Error)]
pub enum WorkerError {
    /// The kernel refused.
    #[error("a device's thread cannot be started")]
    Start(#[source] io::Error),
    /// The thread has ended.
    #[error("a device's thread has ended")]
    Gone,
}

impl WorkerError {
    /// The same as an error of the device called `device`.
    pub(crate) fn of(self, device: &str) -> DeviceError {
        DeviceError::host(device, "its thread does not work", io::Error::other(self))
    }
}

/// A device's thread.
pub struct Worker<S> {
    orders: Sender<Order<S>>,
    wake: EventFd,
    thread: Option<JoinHandle<S>>,
}

impl<S> fmt::Debug for Worker<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Worker")
    }
}

impl<S: Service> Worker<S> {
    /// Starts a thread called `name` (15 bytes are shown) that serves at once, or waits for [`Self::resume`].
    pub fn start(name: &str, mut service: S, start: Start) -> Result<Self, WorkerError> {
        let mode = match start {
            Start::Working => Mode::Serving,
            Start::Paused => Mode::Quiesced,
        };
        let poll = Poll::new().map_err(WorkerError::Start)?;
        let wake =
            EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC).map_err(WorkerError::Start)?;
        let (orders, inbox) = mpsc::channel();
        let theirs = wake.try_clone().map_err(WorkerError::Start)?;
        epoll::add(
            &*poll.0,
            borrow(&wake),
            EventData::new_u64(ORDERS),
            EventFlags::IN,
        )
        .map_err(|error| WorkerError::Start(error.into()))?;
        service.register(&poll).map_err(WorkerError::Start)?;
        let thread = std::thread::Builder::new()
            .name(name.to_owned())
            .spawn(move || serve(service, &poll, &inbox, &theirs, mode))
            .map_err(WorkerError::Start)?;
        Ok(Self {
            orders,
            wake,
            thread: Some(thread),
        })
    }

    /// Returns when nothing is in flight any more.
    pub fn pause(&self) -> Result<(), WorkerError> {
        self.ordered(Order::Pause)
    }

    /// Returns when the service serves again.
    pub fn resume(&self) -> Result<(), WorkerError> {
        self.ordered(Order::Resume)
    }

    /// Lets the thread do `work` between two events and gives its answer, also while it is paused.
    pub fn call<T: Send + 'static>(
        &self,
        work: impl FnOnce(&mut S) -> T + Send + 'static,
    ) -> Result<T, WorkerError> {
        let (answer, answered) = mpsc::channel();
        self.send(Order::Call(Box::new(move |service| {
            let _ = answer.send(work(service));
        })))?;
        answered.recv().map_err(|_| WorkerError::Gone)
    }

    /// Ends the thread and gives the service back, as it stands.
    pub fn stop(mut self) -> Option<S> {
        let _ = self.send(Order::Stop);
        self.thread.take()?.join().ok()
    }

    fn ordered(&self, order: impl FnOnce(Sender<()>) -> Order<S>) -> Result<(), WorkerError> {
        let (answer, answered) = mpsc::channel();
        self.send(order(answer))?;
        answered.recv().map_err(|_| WorkerError::Gone)
    }

    fn send(&self, order: Order<S>) -> Result<(), WorkerError> {
        self.orders.send(order).map_err(|_| WorkerError::Gone)?;
        self.wake.write(1).map_err(|_| WorkerError::Gone)
    }
}

impl<S> Drop for Worker<S> {
    fn drop(&mut self) {
        let Some(thread) = self.thread.take() else {
            return;
        };
        let _ = self.orders.send(Order::Stop);
        let _ = self.wake.write(1);
        let _ = thread.join();
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Mode {
    Serving,
    Quiesced,
}

fn serve<S: Service>(
    mut service: S,
    poll: &Poll,
    orders: &Receiver<Order<S>>,
    wake: &EventFd,
    mut mode: Mode,
) -> S {
    let mut events = Vec::with_capacity(EVENTS_PER_WAIT);
    loop {
        if mode == Mode::Serving {
            match epoll::wait(&*poll.0, rustix::buffer::spare_capacity(&mut events), None) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(error) => {
                    tracing::error!(%error, "a device's thread cannot wait");
                    return service;
                }
            }
            for event in events.drain(..) {
                match event.data.u64() {
                    ORDERS => {
                        let _ = wake.read();
                    }
                    token => service.ready(token as u32, poll),
                }
            }
        }
        loop {
            let order = match mode {
                Mode::Serving => match orders.try_recv() {
                    Ok(order) => order,
                    Err(TryRecvError::Empty) => break,
                    Err(TryRecvError::Disconnected) => return service,
                },
                Mode::Quiesced => match orders.recv() {
                    Ok(order) => order,
                    Err(_) => return service,
                },
            };
            match order {
                Order::Pause(done) => {
                    if mode == Mode::Serving {
                        service.quiesce(poll);
                        mode = Mode::Quiesced;
                    }
                    let _ = done.send(());
                }
                Order::Resume(done) => {
                    if mode == Mode::Quiesced {
                        mode = Mode::Serving;
                        service.resume(poll);
                    }
                    let _ = done.send(());
                }
                Order::Call(work) => work(&mut service),
                Order::Stop => return service,
            }
        }
    }
}

/// An eventfd as something epoll takes.
pub fn borrow(event: &EventFd) -> BorrowedFd<'_> {
    crate::sys::borrow_event(event)
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Counting {
        bell: EventFd,
        rung: Sender<u64>,
        quiesced: u32,
        resumed: u32,
    }

    impl Service for Counting {
        fn register(&mut self, poll: &Poll) -> io::Result<()> {
            poll.add(borrow(&self.bell), 7)
        }

        fn ready(&mut self, token: u32, _: &Poll) {
            assert_eq!(token, 7);
            let _ = self.rung.send(self.bell.read().unwrap_or(0));
        }

        fn quiesce(&mut self, _: &Poll) {
            self.quiesced += 1;
        }

        fn resume(&mut self, _: &Poll) {
            self.resumed += 1;
        }
    }

    fn counting() -> (Worker<Counting>, EventFd, Receiver<u64>) {
        let bell = EventFd::new(libc::EFD_NONBLOCK).unwrap();
        let (rung, heard) = mpsc::channel();
        let service = Counting {
            bell: bell.try_clone().unwrap(),
            rung,
            quiesced: 0,
            resumed: 0,
        };
        (
            Worker::start("counting", service, Start::Working).unwrap(),
            bell,
            heard,
        )
    }

    #[test]
    fn a_paused_worker_serves_nothing_until_it_resumes() {
        let (worker, bell, heard) = counting();
        worker.pause().unwrap();
        worker.pause().unwrap();
        bell.write(3).unwrap();
        assert_eq!(worker.call(|service| service.quiesced).unwrap(), 1);
        assert!(heard.try_recv().is_err());
        worker.resume().unwrap();
        assert_eq!(heard.recv().unwrap(), 3);
    }

    #[test]
    fn a_stopped_worker_gives_its_service_back() {
        let (worker, _bell, _heard) = counting();
        worker.pause().unwrap();
        worker.resume().unwrap();
        let service = worker.stop().unwrap();
        assert_eq!((service.quiesced, service.resumed), (1, 1));
    }
}
