//! A driver without a guest: fills the rings of any [`VirtioDevice`] and waits for what it uses.
//!
//! Tests, benchmarks and fuzz targets share it (feature `test-support`). It is an honest driver unless told
//! otherwise: [`MockDriver::write_descriptor`] and [`MockDriver::offer`] put anything at all into the rings.
//!
//! ```text
//! new ──▶ activate ──▶ submit, kick, wait_used … ──▶ reset ──▶ activate …
//!                         └─ move_to(another device): pause, release, save, restore, activate paused
//! ```

use crate::device::{
    Activation, ActiveQueue, DeviceError, DeviceEvent, DeviceEvents, Interrupt, QueuePosition,
    Start, VirtioDevice,
};
use crate::memory::GuestMemory;
use std::collections::VecDeque;
use std::sync::atomic::{Ordering, fence};
use std::sync::mpsc::{self, Receiver};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use virtio_queue::desc::split::Descriptor;
use virtio_queue::{Queue, QueueT};
use vm_memory::bitmap::Bitmap;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};
use vmm_sys_util::eventfd::EventFd;

/// Feature bits that the transport adds to each device's own.
pub const TRANSPORT_FEATURES: u64 = (1 << 32) | (1 << 29) | (1 << 28);
/// The transport's feature bit for event indices.
pub const EVENT_IDX: u64 = 1 << 29;

/// Descriptor flag: it has a successor.
pub const NEXT: u16 = 1;
/// Descriptor flag: the device writes it.
pub const WRITE: u16 = 2;
/// Descriptor flag: it points to a table of descriptors.
pub const INDIRECT: u16 = 4;

const PAGE: u64 = 4096;

/// What a chain is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Buffer {
    /// The device may read it.
    Readable(GuestAddress, u32),
    /// The device may write it.
    Writable(GuestAddress, u32),
}

/// A chain the device has used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Used {
    /// Which.
    pub head: u16,
    /// How many bytes the device says it wrote.
    pub len: u32,
}

/// What a device said to its driver.
#[derive(Debug, Default)]
pub struct MockInterrupt {
    said: Mutex<Said>,
    news: Condvar,
}

#[derive(Clone, Debug, Default)]
struct Said {
    queues: u64,
    configs: u64,
    needs_reset: Option<String>,
}

impl MockInterrupt {
    fn said(&self) -> MutexGuard<'_, Said> {
        self.said.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn say(&self, what: impl FnOnce(&mut Said)) {
        what(&mut self.said());
        self.news.notify_all();
    }

    /// Waits until `done` holds, which is looked at whenever the device says something.
    fn wait<T>(&self, limit: Duration, mut done: impl FnMut(&Said) -> Option<T>) -> Option<T> {
        let until = Instant::now() + limit;
        let mut said = self.said();
        loop {
            if let Some(found) = done(&said) {
                return Some(found);
            }
            let left = until.checked_duration_since(Instant::now())?;
            said = self
                .news
                .wait_timeout(said, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }
}

impl Interrupt for MockInterrupt {
    fn queue(&self, _: u16) {
        self.say(|said| said.queues += 1);
    }

    fn config(&self) {
        self.say(|said| said.configs += 1);
    }

    fn needs_reset(&self, why: &str) {
        self.say(|said| {
            said.needs_reset.get_or_insert_with(|| why.to_owned());
        });
    }
}

/// Somewhere for a device to report to, and what it reported.
pub fn recorded_events() -> (DeviceEvents, Receiver<DeviceEvent>) {
    let (sender, events) = mpsc::channel();
    let sender = Mutex::new(sender);
    let report = move |event| {
        let sender = sender.lock().unwrap_or_else(PoisonError::into_inner);
        let _ = sender.send(event);
    };
    (Arc::new(report), events)
}

#[derive(Debug)]
struct Ring {
    size: u16,
    descriptors: u64,
    available: u64,
    used: u64,
    kick: EventFd,
    next_available: u16,
    next_used: u16,
    free: VecDeque<u16>,
    /// The descriptors of each chain that is under way, by its head.
    chains: Vec<Vec<u16>>,
    /// Where the device stands, when it is not at the beginning.
    position: Option<QueuePosition>,
}

impl Ring {
    fn new(size: u16, base: u64) -> Self {
        let mut ring = Self {
            size,
            descriptors: base,
            available: base + 16 * u64::from(size),
            used: (base + 18 * u64::from(size) + 6).next_multiple_of(8),
            kick: EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)
                .expect("the test has descriptors left"),
            next_available: 0,
            next_used: 0,
            free: VecDeque::new(),
            chains: Vec::new(),
            position: None,
        };
        ring.forget();
        ring
    }

    fn end(&self) -> u64 {
        self.used + 6 + 8 * u64::from(self.size)
    }

    fn forget(&mut self) {
        (self.next_available, self.next_used, self.position) = (0, 0, None);
        self.free = (0..self.size).collect();
        self.chains = vec![Vec::new(); self.size.into()];
    }
}

/// A driver for one device, with memory of its own.
#[derive(Debug)]
pub struct MockDriver<D> {
    device: D,
    memory: GuestMemory,
    rings: Vec<Ring>,
    interrupt: Arc<MockInterrupt>,
    heap: u64,
    memory_bytes: u64,
    features: u64,
}

impl<D: VirtioDevice> MockDriver<D> {
    /// A driver with `memory_bytes` of guest memory at address 0 and queues of the device's largest sizes.
    pub fn new(device: D, memory_bytes: u64) -> Self {
        let memory = GuestMemory::from_ranges(&[(GuestAddress(0), memory_bytes as usize)])
            .expect("the test has memory left");
        Self::over(device, memory)
    }

    /// As [`Self::new`], in memory that begins at address 0.
    pub fn over(device: D, memory: GuestMemory) -> Self {
        let memory_bytes = memory.iter().next().map_or(0, |region| region.len());
        let mut base = PAGE;
        let mut rings = Vec::new();
        for size in device.queue_sizes() {
            let ring = Ring::new(*size, base);
            base = ring.end().next_multiple_of(PAGE);
            rings.push(ring);
        }
        assert!(base < memory_bytes, "{memory_bytes} bytes hold no queues");
        let features = device.features() | TRANSPORT_FEATURES;
        Self {
            device,
            memory,
            rings,
            interrupt: Arc::default(),
            heap: base,
            memory_bytes,
            features,
        }
    }

    /// Accepts only these feature bits from now on, of those that are offered.
    pub fn accept(&mut self, features: u64) {
        self.features = (self.device.features() | TRANSPORT_FEATURES) & features;
    }

    /// Sets DRIVER_OK.
    pub fn activate(&mut self, start: Start) -> Result<(), DeviceError> {
        let queues = (0..self.rings.len())
            .map(|index| self.active_queue(index))
            .collect();
        self.device.activate(Activation {
            memory: self.memory.clone(),
            queues,
            features: self.features,
            interrupt: Arc::clone(&self.interrupt) as Arc<dyn Interrupt>,
            start,
        })
    }

    fn active_queue(&self, index: usize) -> ActiveQueue {
        let ring = &self.rings[index];
        let mut queue = Queue::new(ring.size).expect("devices offer queue sizes that are");
        let halves = |address: u64| (Some(address as u32), Some((address >> 32) as u32));
        let (low, high) = halves(ring.descriptors);
        queue.set_desc_table_address(low, high);
        let (low, high) = halves(ring.available);
        queue.set_avail_ring_address(low, high);
        let (low, high) = halves(ring.used);
        queue.set_used_ring_address(low, high);
        queue.set_event_idx(self.features & EVENT_IDX != 0);
        if let Some(position) = ring.position {
            queue.set_next_avail(position.next_avail);
            queue.set_next_used(position.next_used);
        }
        queue.set_ready(true);
        ActiveQueue {
            index: index as u16,
            queue,
            kick: ring
                .kick
                .try_clone()
                .expect("the test has descriptors left"),
        }
    }

    /// The device.
    pub fn device(&self) -> &D {
        &self.device
    }

    /// The device.
    pub fn device_mut(&mut self) -> &mut D {
        &mut self.device
    }

    /// Guest memory.
    pub fn memory(&self) -> &GuestMemory {
        &self.memory
    }

    /// Fresh guest memory for buffers. Never given back: [`Self::reset`] gives back all of it.
    pub fn allocate(&mut self, len: u32) -> GuestAddress {
        let address = self.heap;
        self.heap += u64::from(len).next_multiple_of(16);
        assert!(self.heap <= self.memory_bytes, "guest memory is used up");
        GuestAddress(address)
    }

    /// Fresh guest memory with these bytes.
    pub fn place(&mut self, bytes: &[u8]) -> GuestAddress {
        let address = self.allocate(bytes.len() as u32);
        self.memory
            .write_slice(bytes, address)
            .expect("allocated memory is memory");
        address
    }

    /// A copy of guest memory.
    pub fn bytes(&self, address: GuestAddress, len: u32) -> Vec<u8> {
        let mut bytes = vec![0; len as usize];
        self.memory
            .read_slice(&mut bytes, address)
            .expect("the test reads guest memory");
        bytes
    }

    /// Makes a chain available and gives its head; `None` when the queue has no room. Does not kick.
    pub fn submit(&mut self, queue: usize, buffers: &[Buffer]) -> Option<u16> {
        let ring = &mut self.rings[queue];
        if buffers.is_empty() || ring.free.len() < buffers.len() {
            return None;
        }
        let taken: Vec<u16> = ring.free.drain(..buffers.len()).collect();
        for (nth, buffer) in buffers.iter().enumerate() {
            let (address, len, flags) = match *buffer {
                Buffer::Readable(address, len) => (address, len, 0),
                Buffer::Writable(address, len) => (address, len, WRITE),
            };
            let (flags, next) = match taken.get(nth + 1) {
                Some(next) => (flags | NEXT, *next),
                None => (flags, 0),
            };
            let descriptor = Descriptor::new(address.0, len, flags, next);
            let at = ring.descriptors + 16 * u64::from(taken[nth]);
            self.memory
                .write_obj(descriptor, GuestAddress(at))
                .expect("rings are memory");
        }
        let head = taken[0];
        ring.chains[usize::from(head)] = taken;
        self.offer(queue, head);
        Some(head)
    }

    /// Puts any descriptor into a queue's table.
    pub fn write_descriptor(&self, queue: usize, index: u16, descriptor: Descriptor) {
        let at = self.rings[queue].descriptors + 16 * u64::from(index);
        self.memory
            .write_obj(descriptor, GuestAddress(at))
            .expect("rings are memory");
    }

    /// Makes any number available as the head of a chain. Does not kick.
    pub fn offer(&mut self, queue: usize, head: u16) {
        let ring = &mut self.rings[queue];
        let slot = u64::from(ring.next_available % ring.size);
        self.memory
            .write_obj(head, GuestAddress(ring.available + 4 + 2 * slot))
            .expect("rings are memory");
        let next = ring.next_available.wrapping_add(1);
        self.set_available_index(queue, next);
    }

    /// Sets the available index to anything. Does not kick.
    pub fn set_available_index(&mut self, queue: usize, index: u16) {
        let ring = &mut self.rings[queue];
        ring.next_available = index;
        self.memory
            .store(index, GuestAddress(ring.available + 2), Ordering::Release)
            .expect("rings are memory");
    }

    /// Rings the doorbell.
    pub fn kick(&self, queue: usize) {
        self.rings[queue]
            .kick
            .write(1)
            .expect("nobody rings a doorbell 2^64 times");
    }

    /// The next chain the device used, if there is one already.
    pub fn poll_used(&mut self, queue: usize) -> Option<Used> {
        let ring = &mut self.rings[queue];
        let index: u16 = self
            .memory
            .load(GuestAddress(ring.used + 2), Ordering::Acquire)
            .expect("rings are memory");
        if index == ring.next_used {
            return None;
        }
        let at = ring.used + 4 + 8 * u64::from(ring.next_used % ring.size);
        let [head, len]: [u32; 2] = self
            .memory
            .read_obj(GuestAddress(at))
            .expect("rings are memory");
        ring.next_used = ring.next_used.wrapping_add(1);
        let head = head as u16;
        if let Some(chain) = ring.chains.get_mut(usize::from(head)) {
            ring.free.extend(chain.drain(..));
        }
        Some(Used { head, len })
    }

    /// Waits for an interrupt and the next used chain; `None` when there is none in time.
    pub fn wait_used(&mut self, queue: usize, limit: Duration) -> Option<Used> {
        if let Some(used) = self.poll_used(queue) {
            return Some(used);
        }
        let interrupt = Arc::clone(&self.interrupt);
        self.want_interrupt(queue);
        interrupt.wait(limit, |_| self.poll_used(queue))
    }

    /// Asks for an interrupt at the next used chain (`used_event`).
    fn want_interrupt(&self, queue: usize) {
        let ring = &self.rings[queue];
        let at = ring.available + 4 + 2 * u64::from(ring.size);
        self.memory
            .store(ring.next_used, GuestAddress(at), Ordering::Release)
            .expect("rings are memory");
        fence(Ordering::SeqCst);
    }

    /// Submits one chain, kicks, and waits for it to be used.
    pub fn request(&mut self, queue: usize, buffers: &[Buffer], limit: Duration) -> Option<Used> {
        let head = self.submit(queue, buffers)?;
        self.kick(queue);
        let used = self.wait_used(queue, limit)?;
        assert_eq!(used.head, head, "another chain was used");
        Some(used)
    }

    /// Waits for the device to ask for a reset; says why it did.
    pub fn wait_needs_reset(&self, limit: Duration) -> Option<String> {
        self.interrupt.wait(limit, |said| said.needs_reset.clone())
    }

    /// Why the device asked for a reset, if it has.
    pub fn needs_reset(&self) -> Option<String> {
        self.interrupt.said().needs_reset.clone()
    }

    /// Waits until there were at least this many configuration interrupts.
    pub fn wait_config_interrupts(&self, count: u64, limit: Duration) -> bool {
        let seen = |said: &Said| (said.configs >= count).then_some(());
        self.interrupt.wait(limit, seen).is_some()
    }

    /// How many queue interrupts there were.
    pub fn queue_interrupts(&self) -> u64 {
        self.interrupt.said().queues
    }

    /// Resets the device and forgets everything the rings held.
    pub fn reset(&mut self) {
        self.device.reset();
        self.interrupt = Arc::default();
        self.heap = PAGE;
        for ring in &mut self.rings {
            let zeros = vec![0; (ring.end() - ring.descriptors) as usize];
            self.memory
                .write_slice(&zeros, GuestAddress(ring.descriptors))
                .expect("rings are memory");
            ring.forget();
            self.heap = ring.end().next_multiple_of(PAGE);
        }
    }

    /// Pauses the device and notes where it stands.
    pub fn pause(&mut self) -> Result<(), DeviceError> {
        for position in self.device.pause()? {
            self.rings[usize::from(position.index)].position = Some(position);
        }
        Ok(())
    }

    /// Moves to another device as a migration does: it is active and paused, the caller claims and resumes it. Gives
    /// the old device too, paused and released.
    pub fn move_to<E: VirtioDevice>(
        mut self,
        mut target: E,
    ) -> Result<(MockDriver<E>, D), DeviceError> {
        self.pause()?;
        self.device.release()?;
        target.restore(self.device.save()?)?;
        let mut moved = MockDriver {
            device: target,
            memory: self.memory,
            rings: self.rings,
            interrupt: Arc::default(),
            heap: self.heap,
            memory_bytes: self.memory_bytes,
            features: self.features,
        };
        moved.activate(Start::Paused)?;
        Ok((moved, self.device))
    }

    /// The pages that were written through guest memory (by the device, or by this driver), by number.
    pub fn dirty_pages(&self) -> Vec<u64> {
        let mut pages = Vec::new();
        for region in self.memory.iter() {
            let bitmap = region.bitmap();
            let first = region.start_addr().0 / PAGE;
            let count = region.len().div_ceil(PAGE);
            pages.extend(
                (0..count)
                    .filter(|page| bitmap.dirty_at((page * PAGE) as usize))
                    .map(|page| first + page),
            );
        }
        pages
    }
}
