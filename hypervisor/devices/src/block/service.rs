//! The work of a disk on its thread: chains in, requests out to the engine, statuses back.
//!
//! ```text
//!   available ──▶ parsed ──▶ admitted by the limits ──▶ under way ──▶ used
//!                   │                 │                     │
//!                   │                 └ held until there    └ no room, or every error stalls: kept in `stalled`,
//!                   │                   are tokens            tried again on resume
//!                   └ rejected: used at once with a status; without room for one: the device needs a reset
//! ```
//!
//! Chains that are held or stalled are neither lost nor done when the disk is paused: their heads are part of the
//! saved state, since the ring cannot be wound back.

use super::engine::{Done, Engine, Job};
use super::image::is_full;
use super::request::{self, ID_BYTES, Request, STATUS_IOERR, STATUS_OK};
use super::shared::Shared;
use crate::chain::Chain;
use crate::device::{ActiveQueue, DeviceEvent, Interrupt};
use crate::limiter::Limiter;
use crate::memory::GuestMemory;
use crate::sys::guest_io::Durability;
use crate::worker::{Poll, Service, borrow};
use godwit_wire::devices::OnIoError;
use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create,
    timerfd_settime,
};
use std::collections::VecDeque;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};
use virtio_queue::QueueT;
use vm_memory::{Bytes, GuestAddress};

/// How soon a request that is held notices that a limit on writes was changed or lifted.
const WRITE_LIMIT_LOOK: Duration = Duration::from_millis(50);

/// Token of the driver's doorbell.
const KICK: u32 = 0;
/// Token of the timer that ends a wait for tokens.
const TIMER: u32 = 1;
/// Token of the ring.
const RING: u32 = 2;
/// Token of the pool.
const POOL: u32 = 3;

/// A request that was taken from the ring and is not used yet.
#[derive(Debug)]
struct Taken {
    chain: Chain,
    request: Request,
    status: GuestAddress,
    since: Instant,
}

/// Whether the device still follows its driver.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Health {
    Working,
    /// The driver broke the rules: nothing more is done until a reset.
    Broken,
}

/// The limits of a disk, as buckets.
#[derive(Debug, Default)]
pub(crate) struct Buckets {
    pub(crate) requests: Option<Limiter>,
    pub(crate) bytes: Option<Limiter>,
    /// For a guest that writes a disk faster than it can be copied to another host: the rate and its bucket.
    pub(crate) writes: Option<(u64, Limiter)>,
}

impl Buckets {
    /// Takes what `request` costs, or says how long it has to wait for that.
    fn take(&mut self, request: &Request, now: Instant) -> Result<(), Duration> {
        let bytes = request.data_bytes();
        let changes = request.changed_bytes();
        // What is zeroed takes little of the link however much it is, so that it never costs more than a second.
        let (changes, writes) = match (request, &mut self.writes) {
            (Request::Write { .. }, Some((_, bucket))) => (changes, Some(bucket)),
            (_, Some((rate, bucket))) => (changes.min(*rate), Some(bucket)),
            (_, None) => (changes, None),
        };
        let writes = writes.filter(|_| changes > 0);
        let mut costs = [
            (1, self.requests.as_mut()),
            (bytes, self.bytes.as_mut()),
            (changes, writes),
        ];
        // Asked for nothing, a bucket only says whether it is in debt: all must agree before any is charged.
        for (_, bucket) in &mut costs {
            if let Some(bucket) = bucket {
                bucket.take(0, now)?;
            }
        }
        for (cost, bucket) in costs {
            if let Some(bucket) = bucket {
                bucket.take(cost, now)?;
            }
        }
        Ok(())
    }

    /// Holds writes to `bytes_per_s`.
    fn limit_writes(&mut self, bytes_per_s: Option<u64>, now: Instant) {
        let limit = self.writes.as_ref().map(|(rate, _)| *rate);
        if limit != bytes_per_s {
            self.writes = bytes_per_s.map(|rate| (rate, Limiter::new(rate, now)));
        }
    }
}

/// The disk's thread.
#[derive(Debug)]
pub(crate) struct BlockService {
    shared: Arc<Shared>,
    memory: GuestMemory,
    active: ActiveQueue,
    interrupt: Arc<dyn Interrupt>,
    engine: Engine,
    durability: Durability,
    buckets: Buckets,
    timer: OwnedFd,
    /// By head: what is under way.
    under_way: Vec<Option<Taken>>,
    /// Waits for tokens.
    held: Option<Taken>,
    /// Waits for the machine to be resumed.
    stalled: VecDeque<Taken>,
    /// Heads from a saved state that were not looked at yet.
    restored: Vec<u16>,
    stall_reported: bool,
    health: Health,
    /// Whether the lock was looked at for the writes that are being taken now.
    batch_checked: bool,
    done: Vec<Done>,
    used_any: bool,
}

/// What the disk's thread starts with.
pub(crate) struct Parts {
    pub(crate) shared: Arc<Shared>,
    pub(crate) memory: GuestMemory,
    pub(crate) active: ActiveQueue,
    pub(crate) interrupt: Arc<dyn Interrupt>,
    pub(crate) engine: Engine,
    pub(crate) durability: Durability,
    pub(crate) buckets: Buckets,
    pub(crate) restored: Vec<u16>,
}

impl BlockService {
    pub(crate) fn new(parts: Parts) -> io::Result<Self> {
        let size = usize::from(parts.active.queue.size());
        Ok(Self {
            shared: parts.shared,
            memory: parts.memory,
            active: parts.active,
            interrupt: parts.interrupt,
            engine: parts.engine,
            durability: parts.durability,
            buckets: parts.buckets,
            timer: timerfd_create(
                TimerfdClockId::Monotonic,
                TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC,
            )?,
            under_way: (0..size).map(|_| None).collect(),
            held: None,
            stalled: VecDeque::new(),
            restored: parts.restored,
            stall_reported: false,
            health: Health::Working,
            batch_checked: false,
            done: Vec::new(),
            used_any: false,
        })
    }

    /// Where the disk stands in its queue.
    pub(crate) fn active(&self) -> &ActiveQueue {
        &self.active
    }

    /// Heads of the chains that were taken and are not used; the disk is paused.
    pub(crate) fn pending(&self) -> Vec<u16> {
        // Nothing is under way after a drain; if the ring failed there, its requests are done again.
        let under_way = self.under_way.iter().flatten();
        let taken = self.stalled.iter().chain(&self.held).chain(under_way);
        let mut heads: Vec<u16> = taken.map(|taken| taken.chain.head()).collect();
        heads.extend(&self.restored);
        heads
    }

    /// Takes chains until there are none, the limits say stop, or one round of the queue is done.
    fn take_chains(&mut self) {
        let mut budget = usize::from(self.active.queue.size());
        if let Err(error) = self.active.queue.disable_notification(&self.memory) {
            self.broken(&error.to_string());
        }
        while self.health == Health::Working && self.held.is_none() {
            if budget == 0 {
                // Others want the thread too: ring our own doorbell and come back.
                let _ = self.active.kick.write(1);
                break;
            }
            budget -= 1;
            match Chain::pop(&mut self.active.queue, &self.memory) {
                Ok(Some(chain)) => self.take_chain(chain),
                Ok(None) => match self.active.queue.enable_notification(&self.memory) {
                    Ok(false) => break,
                    Ok(true) => {}
                    Err(error) => self.broken(&error.to_string()),
                },
                Err(error) => self.broken(&error.to_string()),
            }
        }
        self.engine.submit();
    }

    fn take_chain(&mut self, chain: Chain) {
        let head = usize::from(chain.head());
        let twice = self.under_way.get(head).is_none_or(Option::is_some)
            || self
                .stalled
                .iter()
                .any(|taken| taken.chain.head() == chain.head());
        if twice {
            return self.broken(&format!(
                "chain {head} was offered again before it was used"
            ));
        }
        let parsed = match request::parse(&chain, &self.memory, self.shared.limits()) {
            Ok(parsed) => parsed,
            Err(error) => return self.broken(&error.to_string()),
        };
        let status = parsed.status;
        match parsed.request {
            Ok(request) => {
                self.admit(Taken {
                    chain,
                    request,
                    status,
                    since: Instant::now(),
                });
                if self.held.is_some() {
                    self.shared.counters.limited();
                }
            }
            Err(rejection) => {
                tracing::debug!(device = self.shared.name, %rejection, "a request is rejected");
                self.shared.counters.rejected();
                self.use_chain(chain.head(), status, rejection.status(), 0);
            }
        }
    }

    fn admit(&mut self, taken: Taken) {
        let now = Instant::now();
        let write_limit = self
            .shared
            .noted()
            .as_ref()
            .and_then(|dirty| dirty.write_limit());
        self.buckets.limit_writes(write_limit, now);
        match self.buckets.take(&taken.request, now) {
            Ok(()) => self.begin(taken),
            Err(wait) => {
                self.held = Some(taken);
                let most = match write_limit {
                    Some(_) => WRITE_LIMIT_LOOK,
                    None => Duration::MAX,
                };
                self.set_timer(wait.min(most).max(Duration::from_micros(1)));
            }
        }
    }

    fn begin(&mut self, taken: Taken) {
        let head = taken.chain.head();
        if taken.request == Request::GetId {
            let mut id = [0; ID_BYTES];
            for (to, from) in id.iter_mut().zip(self.shared.name.bytes()) {
                *to = from;
            }
            taken.chain.write(&self.memory, 0, &id);
            return self.use_chain(head, taken.status, STATUS_OK, ID_BYTES as u32);
        }
        if changes(&taken.request)
            && let Err(reason) = self.may_write()
        {
            return self.fenced(taken, reason);
        }
        let Some(image) = self.shared.image() else {
            return self.fenced(taken, "the disk is not open on this host".to_owned());
        };
        let job = Job {
            token: head,
            request: taken.request.clone(),
            image,
            durability: self.durability,
        };
        self.under_way[usize::from(head)] = Some(taken);
        self.engine.push(job);
    }

    /// Looks at the lock once for each batch of writes. A disk that is only read may be flushed, to no effect.
    fn may_write(&mut self) -> Result<(), String> {
        if !self.batch_checked {
            self.check_lock()?;
            self.batch_checked = true;
        }
        Ok(())
    }

    fn check_lock(&self) -> Result<(), String> {
        match &self.shared.lock {
            Some(lock) => lock.check().map_err(|error| error.to_string()),
            None => Ok(()),
        }
    }

    /// The disk belongs to another by now: the guest gets an error, the disk nothing.
    fn fenced(&mut self, taken: Taken, reason: String) {
        self.shared.counters.error();
        self.report_stall(reason);
        self.use_chain(taken.chain.head(), taken.status, STATUS_IOERR, 0);
    }

    fn finish_done(&mut self) {
        let mut done = std::mem::take(&mut self.done);
        self.engine.reap(&mut done);
        for finished in done.drain(..) {
            self.finish(finished);
        }
        self.done = done;
    }

    fn finish(&mut self, finished: Done) {
        let slot = self.under_way.get_mut(usize::from(finished.token));
        let Some(taken) = slot.and_then(Option::take) else {
            return;
        };
        self.note_changes(&taken.request);
        let head = taken.chain.head();
        match finished.result {
            Ok(()) => {
                self.shared
                    .counters
                    .done(&taken.request, taken.since.elapsed());
                let written = match &taken.request {
                    Request::Read { .. } => taken.chain.writable_bytes() - 1,
                    _ => 0,
                };
                self.use_chain(head, taken.status, STATUS_OK, written);
            }
            Err(error) => {
                if changes(&taken.request)
                    && let Err(reason) = self.check_lock()
                {
                    return self.fenced(taken, reason);
                }
                self.shared.counters.error();
                let stalls = match self.shared.on_error {
                    OnIoError::PauseWhenFull => is_full(&error),
                    OnIoError::Pause => true,
                    OnIoError::Report => false,
                };
                if stalls {
                    self.report_stall(error.to_string());
                    self.stalled.push_back(taken);
                } else {
                    tracing::warn!(device = self.shared.name, %error, "a request failed");
                    self.use_chain(head, taken.status, STATUS_IOERR, 0);
                }
            }
        }
    }

    /// What a request changed, or may have changed in part before it failed, is copied again while the disk's content
    /// is on its way to another host.
    fn note_changes(&self, request: &Request) {
        let noted = self.shared.noted();
        let Some(dirty) = &*noted else { return };
        match request {
            Request::Write { offset, .. } => dirty.wrote(*offset, request.data_bytes()),
            Request::Discard(ranges) | Request::WriteZeroes(ranges) => {
                let zeroed = ranges.iter();
                zeroed.for_each(|range| dirty.wrote(range.offset, range.bytes));
            }
            Request::Read { .. } | Request::Flush | Request::GetId => {}
        }
    }

    /// The driver has let go of the disk. Nobody hears any more of what is under way, but it changes the disk.
    pub(crate) fn settle(&mut self) {
        self.engine.drain(&mut Vec::new());
        for taken in self.under_way.iter().flatten() {
            self.note_changes(&taken.request);
        }
    }

    fn report_stall(&mut self, reason: String) {
        if std::mem::replace(&mut self.stall_reported, true) {
            return;
        }
        self.shared.counters.stalled();
        tracing::warn!(device = self.shared.name, reason, "the disk stands still");
        (self.shared.events)(DeviceEvent::Stalled {
            device: self.shared.name.clone(),
            reason,
        });
    }

    /// Answers a chain: `written` bytes of data and the status.
    fn use_chain(&mut self, head: u16, at: GuestAddress, status: u8, written: u32) {
        if self.health == Health::Broken {
            return;
        }
        let used = self
            .memory
            .write_obj(status, at)
            .map_err(|error| error.to_string())
            .and_then(|()| {
                self.active
                    .queue
                    .add_used(&self.memory, head, written + 1)
                    .map_err(|error| error.to_string())
            });
        match used {
            Ok(()) => self.used_any = true,
            Err(error) => self.broken(&error),
        }
    }

    /// One interrupt for everything that was used, if the driver wants one.
    fn notify(&mut self) {
        if !std::mem::take(&mut self.used_any) || self.health == Health::Broken {
            return;
        }
        match self.active.queue.needs_notification(&self.memory) {
            Ok(true) => self.interrupt.queue(self.active.index),
            Ok(false) => {}
            Err(error) => self.broken(&error.to_string()),
        }
    }

    fn broken(&mut self, why: &str) {
        if self.health == Health::Broken {
            return;
        }
        self.health = Health::Broken;
        tracing::warn!(device = self.shared.name, why, "the driver broke the rules");
        self.interrupt.needs_reset(why);
        (self.shared.events)(DeviceEvent::Failed {
            device: self.shared.name.clone(),
            reason: why.to_owned(),
        });
    }

    fn set_timer(&self, wait: Duration) {
        let spec = Itimerspec {
            it_interval: Timespec {
                tv_sec: 0,
                tv_nsec: 0,
            },
            it_value: Timespec {
                tv_sec: wait.as_secs() as i64,
                tv_nsec: i64::from(wait.subsec_nanos()),
            },
        };
        if let Err(error) = timerfd_settime(&self.timer, TimerfdTimerFlags::empty(), &spec) {
            tracing::error!(%error, "a disk's timer cannot be set");
        }
    }

    /// The held request gets its tokens, or waits on.
    fn retry_held(&mut self) {
        if let Some(taken) = self.held.take() {
            self.admit(taken);
        }
    }

    fn retry_unfinished(&mut self) {
        self.stall_reported = false;
        self.batch_checked = false;
        for taken in std::mem::take(&mut self.stalled) {
            self.begin(taken);
        }
        for head in std::mem::take(&mut self.restored) {
            match Chain::at(&self.active.queue, &self.memory, head) {
                Ok(chain) if self.health == Health::Working => self.take_restored(chain),
                Ok(_) => {}
                Err(error) => self.broken(&error.to_string()),
            }
        }
    }

    /// A chain of a saved state was within the limits when it was taken: it does not wait again.
    fn take_restored(&mut self, chain: Chain) {
        let buckets = std::mem::take(&mut self.buckets);
        self.take_chain(chain);
        self.buckets = buckets;
    }

    fn look_at_everything(&mut self) {
        self.batch_checked = false;
        self.finish_done();
        self.retry_held();
        self.take_chains();
        // What the page cache had is done by now.
        self.finish_done();
        self.notify();
    }
}

/// Whether a request changes what is on the disk. A flush does too: images keep metadata back until then.
fn changes(request: &Request) -> bool {
    match request {
        Request::Read { .. } | Request::GetId => false,
        Request::Write { .. } | Request::Flush | Request::Discard(_) | Request::WriteZeroes(_) => {
            true
        }
    }
}

impl Service for BlockService {
    fn register(&mut self, poll: &Poll) -> io::Result<()> {
        poll.add(borrow(&self.active.kick), KICK)?;
        poll.add(&self.timer, TIMER)?;
        self.engine.register(poll, RING, POOL)
    }

    fn ready(&mut self, token: u32, _: &Poll) {
        match token {
            KICK => {
                let _ = self.active.kick.read();
            }
            TIMER => {
                let mut expirations = [0; 8];
                let _ = rustix::io::read(&self.timer, &mut expirations);
            }
            _ => {}
        }
        self.look_at_everything();
    }

    fn quiesce(&mut self, _: &Poll) {
        let mut done = std::mem::take(&mut self.done);
        self.engine.drain(&mut done);
        for finished in done.drain(..) {
            self.finish(finished);
        }
        self.done = done;
        self.notify();
    }

    fn resume(&mut self, _: &Poll) {
        self.retry_unfinished();
        self.look_at_everything();
        // The first look may have been before the driver's last doorbell.
        let _ = self.active.kick.write(1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::block::request::Range;

    #[test]
    fn what_is_zeroed_counts_as_written_but_never_for_more_than_a_second() {
        let now = Instant::now();
        let mut buckets = Buckets::default();
        buckets.limit_writes(Some(1 << 20), now);
        let range = Range {
            offset: 0,
            bytes: 1 << 40,
        };
        let zeroes = [
            Request::Discard(vec![range]),
            Request::WriteZeroes(vec![range]),
        ];
        // The first takes all there is, the second overdraws.
        for request in &zeroes {
            buckets.take(request, now).unwrap();
        }
        let wait = buckets.take(&zeroes[0], now).unwrap_err();
        assert_eq!(wait, Duration::from_secs(1));
        // What changes nothing does not wait for it.
        buckets.take(&Request::Flush, now).unwrap();
    }
}
