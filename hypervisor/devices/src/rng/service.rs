//! What the device's thread does: take requests, fill them, give them back.

use super::{BYTES_PER_SECOND, Counters, MAX_REQUEST_BYTES};
use crate::chain::Chain;
use crate::device::{Activation, ActiveQueue, Interrupt, QueuePosition};
use crate::device_thread::{Health, QueueService};
use crate::limiter::Limiter;
use crate::memory::GuestMemory;
use crate::worker::{self, Poll};
use rustix::rand::GetRandomFlags;
use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create,
    timerfd_settime,
};
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};
use virtio_queue::QueueT;

const KICK: u32 = 0;
const REFILLED: u32 = 1;
/// Requests served before the thread looks for orders again.
const MAX_REQUESTS_PER_TURN: usize = 64;

#[derive(Debug)]
pub(super) struct Service {
    queue: ActiveQueue,
    memory: GuestMemory,
    interrupt: Arc<dyn Interrupt>,
    counters: Arc<Counters>,
    limiter: Limiter,
    refilled: OwnedFd,
    health: Health,
}

/// Why a turn ended.
enum Turn {
    /// The driver waits for nothing; it will ring.
    Idle,
    /// There may be more.
    Spent,
    /// The rate is exceeded for so long.
    Throttled(Duration),
}

impl Service {
    /// `None` when the driver has set up no queue.
    pub(super) fn new(
        activation: Activation,
        counters: Arc<Counters>,
        health: Health,
    ) -> io::Result<Option<Self>> {
        let Some(queue) = activation.queues.into_iter().find(|queue| queue.index == 0) else {
            return Ok(None);
        };
        Ok(Some(Self {
            queue,
            memory: activation.memory,
            interrupt: activation.interrupt,
            counters,
            limiter: Limiter::new(BYTES_PER_SECOND, Instant::now()),
            refilled: timerfd_create(
                TimerfdClockId::Monotonic,
                TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC,
            )?,
            health,
        }))
    }

    fn serve(&mut self) {
        if self.health == Health::Failed {
            return;
        }
        match self.turn() {
            Ok(Turn::Idle) => {}
            Ok(Turn::Spent) => {
                // The eventfd's counter cannot overflow: it is read before every turn.
                let _ = self.queue.kick.write(1);
            }
            Ok(Turn::Throttled(wait)) => {
                self.counters.throttled.add(1);
                self.call_back(wait);
            }
            Err(why) => {
                self.health = Health::Failed;
                self.interrupt.needs_reset(&why);
            }
        }
    }

    fn turn(&mut self) -> Result<Turn, String> {
        let mut served = 0;
        let turn = loop {
            if served == MAX_REQUESTS_PER_TURN {
                break Turn::Spent;
            }
            if let Err(wait) = self.limiter.take(0, Instant::now()) {
                break Turn::Throttled(wait);
            }
            if self.one_request()? {
                served += 1;
                continue;
            }
            if !self
                .queue
                .queue
                .enable_notification(&self.memory)
                .map_err(refused)?
            {
                break Turn::Idle;
            }
        };
        if served > 0
            && self
                .queue
                .queue
                .needs_notification(&self.memory)
                .map_err(refused)?
        {
            self.interrupt.queue(self.queue.index);
        }
        Ok(turn)
    }

    /// Serves the next request; false when there is none.
    fn one_request(&mut self) -> Result<bool, String> {
        let Some(chain) = Chain::pop(&mut self.queue.queue, &self.memory).map_err(refused)? else {
            return Ok(false);
        };
        if chain.readable_bytes() > 0 {
            return Err("the driver offers entropy instead of asking for it".into());
        }
        let mut entropy = [0; MAX_REQUEST_BYTES];
        let wanted = (chain.writable_bytes() as usize).min(MAX_REQUEST_BYTES);
        fill(&mut entropy[..wanted])
            .map_err(|error| format!("the host has no entropy: {error}"))?;
        let given = chain.write(&self.memory, 0, &entropy[..wanted]);
        self.queue
            .queue
            .add_used(&self.memory, chain.head(), given as u32)
            .map_err(refused)?;
        // Every request costs something, however small.
        let _ = self.limiter.take(given.max(1) as u64, Instant::now());
        self.counters.requests.add(1);
        self.counters.bytes.add(given as u64);
        Ok(true)
    }

    fn call_back(&self, wait: Duration) {
        let wait = wait.max(Duration::from_millis(1));
        let zero = Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        let timer = Itimerspec {
            it_interval: zero,
            it_value: Timespec {
                tv_sec: wait.as_secs().min(60) as i64,
                tv_nsec: wait.subsec_nanos().into(),
            },
        };
        if let Err(error) = timerfd_settime(&self.refilled, TimerfdTimerFlags::empty(), &timer) {
            tracing::error!(%error, "the entropy source cannot set its timer");
        }
    }
}

impl QueueService for Service {
    fn positions(&self) -> Vec<QueuePosition> {
        vec![self.queue.position()]
    }

    fn health(&self) -> Health {
        self.health
    }
}

impl worker::Service for Service {
    fn register(&mut self, poll: &Poll) -> io::Result<()> {
        poll.add(worker::borrow(&self.queue.kick), KICK)?;
        poll.add(&self.refilled, REFILLED)
    }

    fn ready(&mut self, token: u32, _: &Poll) {
        match token {
            KICK => {
                let _ = self.queue.kick.read();
            }
            _ => {
                let _ = rustix::io::read(&self.refilled, &mut [0; 8]);
            }
        }
        self.serve();
    }

    fn quiesce(&mut self, _: &Poll) {}

    fn resume(&mut self, _: &Poll) {
        self.serve();
    }
}

fn refused(error: impl ToString) -> String {
    error.to_string()
}

/// Fills `buffer` with the host's entropy.
pub(super) fn fill(buffer: &mut [u8]) -> io::Result<()> {
    let mut filled = 0;
    while filled < buffer.len() {
        match rustix::rand::getrandom(&mut buffer[filled..], GetRandomFlags::empty()) {
            Ok(more) => filled += more,
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}
