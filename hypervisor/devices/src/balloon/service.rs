//! What the device's thread does with its queues.

use super::discard::{Deflation, Discarder};
use super::{Counters, DiscardHook, MUST_TELL_HOST, REPORTING, STATS, Shared};
use crate::chain::Chain;
use crate::device::{Activation, ActiveQueue, Interrupt, QueuePosition};
use crate::device_thread::{Health, QueueService};
use crate::memory::GuestMemory;
use crate::worker::{self, Poll};
use std::io;
use std::sync::Arc;
use virtio_queue::QueueT;

/// Requests served from one queue before the thread looks for orders again.
const MAX_REQUESTS_PER_TURN: usize = 32;
/// Most pages one request may name. Linux names 256 at a time.
const MAX_PAGES_PER_REQUEST: usize = 16 * 1024;
const FRAME_BYTES: usize = 4;

pub(super) struct Service {
    lanes: Vec<Lane>,
    memory: GuestMemory,
    interrupt: Arc<dyn Interrupt>,
    shared: Arc<Shared>,
    discarder: Discarder,
    /// The statistics' buffer, which the device keeps until it wants new ones.
    stats_buffer: Option<u16>,
    health: Health,
}

struct Lane {
    role: Role,
    queue: ActiveQueue,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Role {
    Inflate,
    Deflate,
    Stats,
    Report,
}

impl Role {
    /// What a queue is for; see [`super::QUEUE_SIZES`].
    fn of(index: u16, features: u64) -> Option<Self> {
        let when = |feature: u64, role| (features & feature != 0).then_some(role);
        match index {
            0 => Some(Self::Inflate),
            1 => Some(Self::Deflate),
            2 => when(STATS, Self::Stats).or_else(|| when(REPORTING, Self::Report)),
            3 | 4 => when(REPORTING, Self::Report),
            _ => None,
        }
    }
}

impl Service {
    pub(super) fn new(
        activation: Activation,
        shared: Arc<Shared>,
        hook: Option<DiscardHook>,
        health: Health,
    ) -> Self {
        let features = activation.features;
        let lanes = activation.queues.into_iter().filter_map(|queue| {
            let role = Role::of(queue.index, features)?;
            Some(Lane { role, queue })
        });
        let deflation = if features & MUST_TELL_HOST != 0 {
            Deflation::Asked
        } else {
            Deflation::Untold
        };
        Self {
            lanes: lanes.collect(),
            discarder: Discarder::new(activation.memory.clone(), deflation, hook),
            memory: activation.memory,
            interrupt: activation.interrupt,
            shared,
            stats_buffer: None,
            health,
        }
    }

    /// Gives the statistics' buffer back, which asks the driver to fill it again.
    pub(super) fn ask_for_stats(&mut self) {
        if self.health == Health::Failed {
            return;
        }
        if let Err(why) = self.return_stats_buffer() {
            self.fail(&why);
        }
    }

    fn return_stats_buffer(&mut self) -> Result<(), String> {
        let lane = self.lanes.iter_mut().find(|lane| lane.role == Role::Stats);
        let (Some(lane), Some(head)) = (lane, self.stats_buffer.take()) else {
            return Ok(());
        };
        lane.queue
            .queue
            .add_used(&self.memory, head, 0)
            .map_err(refused)?;
        lane.notify(&self.memory, &*self.interrupt)
    }

    fn fail(&mut self, why: &str) {
        self.health = Health::Failed;
        self.stats_buffer = None;
        self.interrupt.needs_reset(why);
    }

    fn serve(&mut self, lane: usize) {
        if self.health == Health::Failed {
            return;
        }
        if let Err(why) = self.turn(lane) {
            self.fail(&why);
        }
    }

    fn turn(&mut self, lane: usize) -> Result<(), String> {
        let Some(Lane { role, queue }) = self.lanes.get_mut(lane) else {
            return Ok(());
        };
        let (role, mut served) = (*role, 0);
        loop {
            if served == MAX_REQUESTS_PER_TURN {
                // The eventfd's counter cannot overflow: it is read before every turn.
                let _ = queue.kick.write(1);
                break;
            }
            let Some(chain) = Chain::pop(&mut queue.queue, &self.memory).map_err(refused)? else {
                if queue
                    .queue
                    .enable_notification(&self.memory)
                    .map_err(refused)?
                {
                    continue;
                }
                break;
            };
            served += 1;
            match role {
                Role::Inflate => {
                    let mut frames = frames(&chain, &self.memory)?;
                    self.shared.counters.inflated_pages.add(frames.len() as u64);
                    self.discarder.inflate(&mut frames, &self.shared.counters);
                }
                Role::Deflate => {
                    let frames = frames(&chain, &self.memory)?;
                    self.shared.counters.deflated_pages.add(frames.len() as u64);
                    self.discarder.deflate(&frames);
                }
                Role::Report => report(&chain, &mut self.discarder, &self.shared.counters),
                Role::Stats => {
                    if self.stats_buffer.replace(chain.head()).is_some() {
                        return Err("the driver offers two buffers for statistics".into());
                    }
                    self.shared.stats().read(&chain, &self.memory);
                    continue;
                }
            }
            queue
                .queue
                .add_used(&self.memory, chain.head(), 0)
                .map_err(refused)?;
        }
        if served > 0 && role != Role::Stats {
            self.lanes[lane].notify(&self.memory, &*self.interrupt)?;
        }
        Ok(())
    }
}

impl Lane {
    fn notify(&mut self, memory: &GuestMemory, interrupt: &dyn Interrupt) -> Result<(), String> {
        if self
            .queue
            .queue
            .needs_notification(memory)
            .map_err(refused)?
        {
            interrupt.queue(self.queue.index);
        }
        Ok(())
    }
}

/// The page frame numbers in a request.
fn frames(chain: &Chain, memory: &GuestMemory) -> Result<Vec<u32>, String> {
    let bytes = chain.readable_bytes() as usize;
    if bytes > MAX_PAGES_PER_REQUEST * FRAME_BYTES {
        return Err(format!(
            "a request names {} pages, and {MAX_PAGES_PER_REQUEST} is the limit",
            bytes / FRAME_BYTES
        ));
    }
    let mut buffer = vec![0; bytes];
    let read = chain.read(memory, 0, &mut buffer);
    let frame = |bytes: &[u8]| Some(u32::from_le_bytes(bytes.try_into().ok()?));
    Ok(buffer[..read]
        .chunks_exact(FRAME_BYTES)
        .filter_map(frame)
        .collect())
}

/// The segments themselves are the free memory.
fn report(chain: &Chain, discarder: &mut Discarder, counters: &Counters) {
    for segment in chain.readable().iter().chain(chain.writable()) {
        let (start, len) = (segment.address.0, u64::from(segment.len));
        counters.reported_bytes.add(len);
        discarder.discard(start..start + len, counters);
    }
}

fn refused(error: impl ToString) -> String {
    error.to_string()
}

impl QueueService for Service {
    fn positions(&self) -> Vec<QueuePosition> {
        self.lanes
            .iter()
            .map(|lane| lane.queue.position())
            .collect()
    }

    fn health(&self) -> Health {
        self.health
    }
}

impl worker::Service for Service {
    fn register(&mut self, poll: &Poll) -> io::Result<()> {
        for (token, lane) in (0..).zip(&self.lanes) {
            poll.add(worker::borrow(&lane.queue.kick), token)?;
        }
        Ok(())
    }

    fn ready(&mut self, token: u32, _: &Poll) {
        if let Some(lane) = self.lanes.get(token as usize) {
            let _ = lane.queue.kick.read();
        }
        self.serve(token as usize);
    }

    /// The buffer for statistics goes back: then the rings hold nothing of the device's, and the driver brings the
    /// buffer again when it runs.
    fn quiesce(&mut self, _: &Poll) {
        self.ask_for_stats();
    }

    fn resume(&mut self, _: &Poll) {
        for lane in 0..self.lanes.len() {
            self.serve(lane);
        }
    }
}
