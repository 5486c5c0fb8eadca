//! The guest's three queues.

use crate::chain::{Chain, ChainError};
use crate::device::{ActiveQueue, Interrupt, QueuePosition};
use crate::memory::GuestMemory;
use crate::worker::{self, Poll};
use std::io;
use std::sync::Arc;
use virtio_queue::QueueT;

/// Packets to the guest; also the token under which its doorbell is waited for, as with the others.
pub(super) const RECEIVE: u32 = 0;
/// Packets from the guest.
pub(super) const TRANSMIT: u32 = 1;
/// Events for the guest.
pub(super) const EVENT: u32 = 2;

#[derive(Debug)]
pub(super) struct Rings {
    memory: GuestMemory,
    queues: [ActiveQueue; 3],
    interrupt: Arc<dyn Interrupt>,
    /// Used index of each queue up to which the driver's wish for an interrupt was looked at.
    signalled: [u16; 3],
}

impl Rings {
    pub(super) fn new(
        memory: GuestMemory,
        queues: [ActiveQueue; 3],
        interrupt: Arc<dyn Interrupt>,
    ) -> Self {
        Self {
            signalled: std::array::from_fn(|index| queues[index].queue.next_used()),
            memory,
            queues,
            interrupt,
        }
    }

    pub(super) fn memory(&self) -> &GuestMemory {
        &self.memory
    }

    pub(super) fn positions(&self) -> Vec<QueuePosition> {
        self.queues.iter().map(ActiveQueue::position).collect()
    }

    /// Waits for the doorbells, and rings each: they may have rung before.
    pub(super) fn register(&self, poll: &Poll) -> io::Result<()> {
        for (token, queue) in (RECEIVE..).zip(&self.queues) {
            poll.add(worker::borrow(&queue.kick), token)?;
            queue.kick.write(1)?;
        }
        Ok(())
    }

    /// Forgets that a doorbell rang.
    pub(super) fn hear(&self, index: u32) {
        // Nothing to read means that it was read before.
        let _ = self.queues[index as usize].kick.read();
    }

    /// Rings a doorbell from this side: there is more to do, and others shall have their turn first.
    pub(super) fn come_back(&self, index: u32) {
        // A full counter is readable, which is all that is wanted.
        let _ = self.queues[index as usize].kick.write(1);
    }

    /// The next chain; if there is none, the driver will ring when there is.
    pub(super) fn pop(&mut self, index: u32) -> Result<Option<Chain>, ChainError> {
        loop {
            let queue = &mut self.queues[index as usize].queue;
            if let Some(chain) = Chain::pop(queue, &self.memory)? {
                return Ok(Some(chain));
            }
            let outside = outside_memory(queue.used_ring());
            if !queue
                .enable_notification(&self.memory)
                .map_err(|_| outside)?
            {
                return Ok(None);
            }
        }
    }

    /// Makes the chain taken last untaken.
    pub(super) fn put_back(&mut self, index: u32) {
        let queue = &mut self.queues[index as usize].queue;
        queue.set_next_avail(queue.next_avail().wrapping_sub(1));
    }

    /// Gives a chain back with the bytes written to it.
    pub(super) fn publish(&mut self, index: u32, head: u16, len: u32) -> Result<(), ChainError> {
        let queue = &mut self.queues[index as usize].queue;
        let outside = outside_memory(queue.used_ring());
        queue.add_used(&self.memory, head, len).map_err(|_| outside)
    }

    /// Interrupts the driver if it wants to know of what was published since the last call.
    pub(super) fn signal(&mut self) {
        for (active, signalled) in self.queues.iter_mut().zip(&mut self.signalled) {
            let now = active.queue.next_used();
            let news = std::mem::replace(signalled, now) != now;
            if news
                && active
                    .queue
                    .needs_notification(&self.memory)
                    .unwrap_or(true)
            {
                self.interrupt.queue(active.index);
            }
        }
    }

    pub(super) fn needs_reset(&self, why: &str) {
        self.interrupt.needs_reset(why);
    }
}

fn outside_memory(address: u64) -> ChainError {
    ChainError::RingOutsideMemory { address }
}
