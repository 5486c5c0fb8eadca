//! A virtqueue as a card uses it: several chains are returned at once, and the driver is interrupted once per batch.

use crate::chain::{Chain, ChainError};
use crate::device::{ActiveQueue, Interrupt, QueuePosition};
use crate::memory::GuestMemory;
use crate::worker;
use std::num::Wrapping;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};
use virtio_queue::QueueT;
use vm_memory::{Bytes, GuestAddress};

/// Bytes in front of the entries of both rings: `flags` and `idx`.
const RING_HEADER_BYTES: u64 = 4;
/// Bytes of an entry of the used ring.
const USED_ENTRY_BYTES: u64 = 8;
/// Flag of the available ring: no interrupts, please (2.7.7).
const NO_INTERRUPT: u16 = 1;

#[derive(Debug)]
pub(super) struct Ring {
    active: ActiveQueue,
    memory: GuestMemory,
    interrupt: Arc<dyn Interrupt>,
    /// Used index up to which the driver's wish for an interrupt was looked at.
    signalled: Wrapping<u16>,
}

impl Ring {
    pub(super) fn new(
        active: ActiveQueue,
        memory: GuestMemory,
        interrupt: Arc<dyn Interrupt>,
    ) -> Self {
        let signalled = Wrapping(active.queue.next_used());
        Self {
            active,
            memory,
            interrupt,
            signalled,
        }
    }

    pub(super) fn memory(&self) -> &GuestMemory {
        &self.memory
    }

    pub(super) fn size(&self) -> u16 {
        self.active.queue.size()
    }

    pub(super) fn position(&self) -> QueuePosition {
        self.active.position()
    }

    /// The doorbell, to wait for.
    pub(super) fn doorbell(&self) -> BorrowedFd<'_> {
        worker::borrow(&self.active.kick)
    }

    /// Forgets that the doorbell rang.
    pub(super) fn hear(&self) {
        // Nothing to read means that somebody else has heard it.
        let _ = self.active.kick.read();
    }

    /// Rings the doorbell from this side: there is more to do, and others shall have their turn first.
    pub(super) fn come_back(&self) {
        // A full counter is readable, which is all that is wanted.
        let _ = self.active.kick.write(1);
    }

    pub(super) fn pop(&mut self) -> Result<Option<Chain>, ChainError> {
        Chain::pop(&mut self.active.queue, &self.memory)
    }

    /// Makes the `count` chains taken last untaken.
    pub(super) fn put_back(&mut self, count: u16) {
        let next = self.active.queue.next_avail().wrapping_sub(count);
        self.active.queue.set_next_avail(next);
    }

    /// Whether the driver has made chains available since the last look; if not, it will ring when it does.
    pub(super) fn has_more_or_rings(&mut self) -> Result<bool, ChainError> {
        let outside = self.outside_memory();
        self.active
            .queue
            .enable_notification(&self.memory)
            .map_err(|_| outside)
    }

    /// Tells the driver that ringing is not necessary.
    pub(super) fn needs_no_ringing(&mut self) -> Result<(), ChainError> {
        let outside = self.outside_memory();
        self.active
            .queue
            .disable_notification(&self.memory)
            .map_err(|_| outside)
    }

    /// Gives chains back with the bytes written to each. The driver sees all of them or none: a frame over several
    /// buffers must not be seen in part (5.1.6.4).
    pub(super) fn publish(&mut self, used: &[(u16, u32)]) -> Result<(), ChainError> {
        let outside = self.outside_memory();
        let queue = &mut self.active.queue;
        let Some(((last, last_len), rest)) = used.split_last() else {
            return Ok(());
        };
        let first = queue.next_used();
        for (nth, (head, len)) in (0..).zip(rest) {
            let slot = u64::from(first.wrapping_add(nth) % queue.size());
            let at = queue
                .used_ring()
                .saturating_add(RING_HEADER_BYTES + USED_ENTRY_BYTES * slot);
            let entry = [u32::from(*head).to_le(), len.to_le()];
            self.memory
                .write_obj(entry, GuestAddress(at))
                .map_err(|_| outside)?;
        }
        queue.set_next_used(first.wrapping_add(rest.len() as u16));
        queue
            .add_used(&self.memory, *last, *last_len)
            .map_err(|_| outside)
    }

    /// Interrupts the driver if it wants to know of what was published since the last call.
    pub(super) fn signal(&mut self) {
        let now = Wrapping(self.active.queue.next_used());
        let before = std::mem::replace(&mut self.signalled, now);
        if now == before {
            return;
        }
        // What was published must be visible before the driver's wish is read: it looks at both the other way round.
        fence(Ordering::SeqCst);
        if self.wants_interrupt(before, now) {
            self.interrupt.queue(self.active.index);
        }
    }

    fn wants_interrupt(&self, before: Wrapping<u16>, now: Wrapping<u16>) -> bool {
        let queue = &self.active.queue;
        let load = |offset: u64| -> Option<u16> {
            let address = GuestAddress(queue.avail_ring().checked_add(offset)?);
            self.memory.load(address, Ordering::Relaxed).ok()
        };
        if queue.event_idx_enabled() {
            let event = load(RING_HEADER_BYTES + 2 * u64::from(queue.size()));
            event.is_none_or(|event| now - Wrapping(event) - Wrapping(1) < now - before)
        } else {
            load(0).is_none_or(|flags| flags & NO_INTERRUPT == 0)
        }
    }

    fn outside_memory(&self) -> ChainError {
        ChainError::RingOutsideMemory {
            address: self.active.queue.used_ring(),
        }
    }
}
