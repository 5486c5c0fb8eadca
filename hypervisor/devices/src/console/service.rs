//! What the device's thread does: output from the guest, input to it.

use super::{Output, Shared};
use crate::chain::Chain;
use crate::device::{Activation, ActiveQueue, Interrupt, QueuePosition};
use crate::device_thread::{Health, QueueService};
use crate::memory::GuestMemory;
use crate::worker::{self, Poll};
use std::io::{self, Write};
use std::sync::Arc;
use virtio_queue::QueueT;
use vmm_sys_util::eventfd::EventFd;

const RECEIVE: u32 = 0;
const TRANSMIT: u32 = 1;
const BELL: u32 = 2;
/// Chains served before the thread looks for orders again.
const MAX_CHAINS_PER_TURN: usize = 32;
/// Longest output of one chain. Linux sends at most 32 KiB, and what is spliced into a port comes in pages of a pipe.
const MAX_OUTPUT_BYTES: u32 = 16 << 20;
/// Output and input are copied in pieces of this size.
const PIECE_BYTES: usize = 4096;

pub(super) struct Service {
    receive: Option<ActiveQueue>,
    transmit: Option<ActiveQueue>,
    memory: GuestMemory,
    interrupt: Arc<dyn Interrupt>,
    shared: Arc<Shared>,
    output: Output,
    bell: EventFd,
    health: Health,
}

impl Service {
    pub(super) fn new(
        activation: Activation,
        shared: Arc<Shared>,
        output: Output,
        bell: EventFd,
        health: Health,
    ) -> Self {
        let (mut receive, mut transmit) = (None, None);
        for queue in activation.queues {
            match u32::from(queue.index) {
                RECEIVE => receive = Some(queue),
                TRANSMIT => transmit = Some(queue),
                _ => {}
            }
        }
        Self {
            receive,
            transmit,
            memory: activation.memory,
            interrupt: activation.interrupt,
            shared,
            output,
            bell,
            health,
        }
    }

    pub(super) fn into_output(self) -> Output {
        self.output
    }

    fn serve(&mut self, turn: impl FnOnce(&mut Self) -> Result<(), String>) {
        if self.health == Health::Failed {
            return;
        }
        if let Err(why) = turn(self) {
            self.health = Health::Failed;
            self.interrupt.needs_reset(&why);
        }
    }

    /// Takes the guest's output.
    fn transmit(&mut self) -> Result<(), String> {
        let Some(queue) = &mut self.transmit else {
            return Ok(());
        };
        let mut served = 0;
        while let Some(chain) = next(queue, &self.memory)? {
            if chain.readable_bytes() > MAX_OUTPUT_BYTES {
                return Err(format!(
                    "{} bytes of output at once, and {MAX_OUTPUT_BYTES} is the limit",
                    chain.readable_bytes()
                ));
            }
            self.output.take(&chain, &self.memory, &self.shared);
            queue
                .queue
                .add_used(&self.memory, chain.head(), 0)
                .map_err(refused)?;
            served += 1;
            if served == MAX_CHAINS_PER_TURN {
                let _ = queue.kick.write(1);
                break;
            }
        }
        notify(queue, &self.memory, &*self.interrupt, served)
    }

    /// Gives the guest what was typed, as far as it has room.
    fn receive(&mut self) -> Result<(), String> {
        let Some(queue) = &mut self.receive else {
            return Ok(());
        };
        let mut served = 0;
        // Buffers are taken only when there is something to put into them, so the device never keeps one.
        while !self.shared.input().waiting.is_empty() {
            let Some(chain) = next(queue, &self.memory)? else {
                break;
            };
            let given = fill(&chain, &self.memory, &self.shared);
            queue
                .queue
                .add_used(&self.memory, chain.head(), given)
                .map_err(refused)?;
            served += 1;
            if served == MAX_CHAINS_PER_TURN {
                let _ = self.bell.write(1);
                break;
            }
        }
        notify(queue, &self.memory, &*self.interrupt, served)
    }
}

/// The next chain; when there is none, the driver will ring for the next.
fn next(queue: &mut ActiveQueue, memory: &GuestMemory) -> Result<Option<Chain>, String> {
    if let Some(chain) = Chain::pop(&mut queue.queue, memory).map_err(refused)? {
        return Ok(Some(chain));
    }
    if !queue.queue.enable_notification(memory).map_err(refused)? {
        return Ok(None);
    }
    Chain::pop(&mut queue.queue, memory).map_err(refused)
}

/// Moves input into the chain and says how much.
fn fill(chain: &Chain, memory: &GuestMemory, shared: &Shared) -> u32 {
    let mut given = 0;
    let mut input = shared.input();
    while given < chain.writable_bytes() && !input.waiting.is_empty() {
        let (piece, _) = input.waiting.as_slices();
        let piece = &piece[..piece.len().min(PIECE_BYTES)];
        let written = chain.write(memory, given, piece);
        if written == 0 {
            break;
        }
        input.waiting.drain(..written);
        given += written as u32;
    }
    let counter = &shared.counters.input_bytes;
    counter.add(given.into());
    given
}

fn notify(
    queue: &mut ActiveQueue,
    memory: &GuestMemory,
    interrupt: &dyn Interrupt,
    served: usize,
) -> Result<(), String> {
    if served > 0 && queue.queue.needs_notification(memory).map_err(refused)? {
        interrupt.queue(queue.index);
    }
    Ok(())
}

fn refused(error: impl ToString) -> String {
    error.to_string()
}

impl Output {
    fn take(&mut self, chain: &Chain, memory: &GuestMemory, shared: &Shared) {
        let mut piece = [0; PIECE_BYTES];
        let mut taken = 0;
        while taken < chain.readable_bytes() {
            let read = chain.read(memory, taken, &mut piece);
            if read == 0 {
                break;
            }
            taken += read as u32;
            let counter = match self.0.write_all(&piece[..read]) {
                Ok(()) => &shared.counters.output_bytes,
                Err(_) => &shared.counters.lost_output_bytes,
            };
            counter.add(read as u64);
        }
        // An output that cannot flush has been counted, or will be with the next bytes.
        let _ = self.0.flush();
    }
}

impl QueueService for Service {
    fn positions(&self) -> Vec<QueuePosition> {
        let queues = self.receive.iter().chain(&self.transmit);
        queues.map(ActiveQueue::position).collect()
    }

    fn health(&self) -> Health {
        self.health
    }
}

impl worker::Service for Service {
    fn register(&mut self, poll: &Poll) -> io::Result<()> {
        if let Some(queue) = &self.receive {
            poll.add(worker::borrow(&queue.kick), RECEIVE)?;
        }
        if let Some(queue) = &self.transmit {
            poll.add(worker::borrow(&queue.kick), TRANSMIT)?;
        }
        poll.add(worker::borrow(&self.bell), BELL)
    }

    fn ready(&mut self, token: u32, _: &Poll) {
        let rung = match token {
            RECEIVE => self.receive.as_ref().map(|queue| &queue.kick),
            TRANSMIT => self.transmit.as_ref().map(|queue| &queue.kick),
            _ => Some(&self.bell),
        };
        if let Some(bell) = rung {
            let _ = bell.read();
        }
        match token {
            TRANSMIT => self.serve(Self::transmit),
            _ => self.serve(Self::receive),
        }
    }

    fn quiesce(&mut self, _: &Poll) {}

    fn resume(&mut self, _: &Poll) {
        self.serve(Self::transmit);
        self.serve(Self::receive);
    }
}
