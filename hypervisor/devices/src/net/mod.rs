//! Network cards: virtio-net (virtio 1.2, 5.1) on a tap device of the host.
//!
//! ```text
//! feature      feature bits, configuration space
//! filter       which frames the card takes                (pure)
//! control      commands of the control queue              (pure)
//! announce     frames of a machine that arrived           (pure)
//! frame_times  when frames passed
//! ring         a virtqueue with batches
//! limit        rate limits
//! shared       what queue pairs share: settings, counters
//! transmit     guest → tap
//! receive      tap → guest
//! pair         one queue pair's thread
//! ```
//!
//! Anti-spoofing is not done here but by the host's packet filter, which frames cannot pass by. A card that is not
//! active, or paused, neither sends nor receives; what arrives meanwhile waits in the tap device, which keeps the
//! newest frames out when it is full. Frames from before activation are thrown away.

pub mod announce;
pub mod control;
pub mod feature;
pub mod filter;
mod frame_times;
mod limit;
mod pair;
mod receive;
mod ring;
mod shared;
mod transmit;

#[cfg(test)]
mod tests;

use crate::device::{
    Activation, ActiveQueue, DeviceError, DeviceKind, DeviceMetrics, Interrupt, Plug,
    QueuePosition, SavedBody, Start, VirtioDevice,
};
use crate::sys::tap::{Attachment, Queueing, Tap, TapError};
use crate::worker::{Worker, WorkerError};
use filter::Filter;
pub use frame_times::FrameTimes;
use godwit_wire::devices::{MAX_QUEUE_PAIRS, MacAddress, NicLimits};
use pair::{Pair, Queues};
use ring::Ring;
use serde::{Deserialize, Serialize};
use shared::{SavedCounters, Shared, pairs_allowed};
use std::net::Ipv4Addr;
use std::os::fd::OwnedFd;
use std::sync::Arc;

/// Entries of a receive or transmit queue.
const DATA_QUEUE_SIZE: u16 = 256;
/// Entries of the control queue.
const CONTROL_QUEUE_SIZE: u16 = 64;
/// Least MTU: every IPv4 host takes packets of this size (RFC 791).
const MIN_MTU: u16 = 68;
/// Version of the saved state.
const SAVED_VERSION: u32 = 1;

/// What a card is made from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NetConfig {
    /// Name in the machine's spec.
    pub name: String,
    /// Its address, until the guest sets another.
    pub mac: MacAddress,
    /// Name of an existing tap device of the host.
    pub tap: String,
    /// Largest packet of the network.
    pub mtu: u16,
    /// Queue pairs. With more than one the tap device must have been made with `multi_queue`.
    pub queue_pairs: u8,
    /// Rate limits.
    pub limits: NicLimits,
    /// IPv4 address of the guest, when it is known, to announce after a migration.
    pub address: Option<Ipv4Addr>,
}

/// Whether the cable is plugged in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Link {
    /// It is.
    Up,
    /// It is not: frames are lost both ways.
    Down,
}

/// How far a turn of work got.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Progress {
    /// There may be more to do.
    More,
    /// Something must happen first.
    Waiting,
}

/// A network card.
#[derive(Debug)]
pub struct Net {
    /// One per queue pair; none while they are to be inherited.
    taps: Vec<Arc<Tap>>,
    plug: Plug,
    shared: Arc<Shared>,
    queue_sizes: Vec<u16>,
    active: Option<Active>,
}

#[derive(Debug)]
struct Active {
    pairs: Vec<Worker<Pair>>,
    features: u64,
    interrupt: Arc<dyn Interrupt>,
}

/// State besides queues: tagged by field names.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Saved {
    version: u32,
    mtu: u16,
    queue_pairs: u8,
    filter: Filter,
    pairs_in_use: u16,
    announce: bool,
    counters: SavedCounters,
}

impl Net {
    /// Opens the tap device; nothing is sent or received before activation.
    pub fn open(config: NetConfig) -> Result<Self, DeviceError> {
        Self::plugged(config, Plug::Opened)
    }

    /// The same, or a card that gets its tap device from [`VirtioDevice::inherit`].
    pub fn plugged(config: NetConfig, plug: Plug) -> Result<Self, DeviceError> {
        let unusable = |reason: String| DeviceError::Unusable {
            device: config.name.clone(),
            reason,
        };
        if config.queue_pairs == 0 || config.queue_pairs > MAX_QUEUE_PAIRS {
            return Err(unusable(format!(
                "{} queue pairs; there may be 1 to {MAX_QUEUE_PAIRS}",
                config.queue_pairs
            )));
        }
        if config.mtu < MIN_MTU {
            return Err(unusable(format!(
                "an MTU of {}; it must be at least {MIN_MTU}",
                config.mtu
            )));
        }
        if !config.mac.is_unicast() {
            return Err(unusable(format!("{} is no address of a card", config.mac)));
        }
        let mut taps = Vec::new();
        if plug == Plug::Opened {
            for _ in 0..config.queue_pairs {
                let tap = Tap::open(&config.tap, queueing(&config))
                    .map_err(|error| tap_failed(&config.name, error))?;
                taps.push(Arc::new(tap));
            }
        }
        let data_queues = 2 * usize::from(config.queue_pairs);
        let mut queue_sizes = vec![DATA_QUEUE_SIZE; data_queues];
        queue_sizes.push(CONTROL_QUEUE_SIZE);
        let name = config.name.clone();
        let shared = Shared::new(config)
            .map_err(|source| DeviceError::host(&name, "an eventfd cannot be made", source))?;
        let net = Self {
            taps,
            plug,
            shared: Arc::new(shared),
            queue_sizes,
            active: None,
        };
        net.detach_all_but_first()?;
        Ok(net)
    }

    /// Plugs the cable in or out; the driver is told.
    pub fn set_link(&mut self, link: Link) {
        self.shared.set_link(link);
        if let Some(active) = &self.active {
            active.interrupt.config();
        }
    }

    /// When frames passed, for whoever measures the silence of a hand-over.
    pub fn frame_times(&self) -> Arc<FrameTimes> {
        Arc::clone(&self.shared.frame_times)
    }

    /// The kernel spreads frames over attached queues, and until the driver says otherwise it looks at one only.
    fn detach_all_but_first(&self) -> Result<(), DeviceError> {
        for (tap, index) in self.taps.iter().zip(0..) {
            let wanted = if index == 0 {
                Attachment::Attached
            } else {
                Attachment::Detached
            };
            tap.attach(wanted)
                .map_err(|error| tap_failed(self.name(), error))?;
        }
        Ok(())
    }

    fn workers(&self) -> &[Worker<Pair>] {
        self.active.as_ref().map_or(&[], |active| &active.pairs)
    }

    fn worker_failed(&self, error: WorkerError) -> DeviceError {
        error.of(self.name())
    }

    fn start_pairs(&self, activation: Activation) -> Result<Vec<Worker<Pair>>, DeviceError> {
        let Activation {
            memory,
            queues,
            features,
            interrupt,
            start,
        } = activation;
        let mut queues: Vec<Option<ActiveQueue>> = spread(queues, self.queue_sizes.len());
        // Without MQ the control queue follows the only pair, whatever the device could offer (5.1.2).
        let pairs = pairs_allowed(self.shared.config.queue_pairs.into(), features);
        let control_index = 2 * usize::from(pairs);
        let mut ring = |index: usize| {
            let queue = queues.get_mut(index)?.take()?;
            Some(Ring::new(queue, memory.clone(), Arc::clone(&interrupt)))
        };
        let mut workers = Vec::new();
        for (tap, index) in self.taps.iter().zip(0..pairs) {
            let rings = Queues {
                receive: ring(2 * usize::from(index)),
                transmit: ring(2 * usize::from(index) + 1),
                control: (index == 0 && features & feature::CTRL_VQ != 0)
                    .then(|| ring(control_index))
                    .flatten(),
            };
            let (shared, signals) = (Arc::clone(&self.shared), Arc::clone(&interrupt));
            let mut pair = Pair::new(index, Arc::clone(tap), rings, shared, features, signals)
                .map_err(|source| {
                    DeviceError::host(self.name(), "a timer cannot be made", source)
                })?;
            let thread = format!("net-{}-{index}", self.name());
            match (self.plug, start) {
                // What came while the machine changed processes is for it.
                (Plug::Inherited, Start::Paused) => pair.want_backlog(),
                (_, Start::Working) => pair.drop_stale_frames(),
                (Plug::Opened, Start::Paused) => {}
            }
            let worker = Worker::start(&thread, pair, start);
            workers.push(worker.map_err(|error| self.worker_failed(error))?);
        }
        Ok(workers)
    }

    fn bad_state(&self, reason: String) -> DeviceError {
        DeviceError::bad_state(self.name(), reason)
    }
}

impl VirtioDevice for Net {
    fn name(&self) -> &str {
        &self.shared.config.name
    }

    fn kind(&self) -> DeviceKind {
        DeviceKind::Net
    }

    fn features(&self) -> u64 {
        feature::offered(self.shared.config.queue_pairs.into())
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn read_config(&self, offset: u32, data: &mut [u8]) {
        self.shared.config_space().read(offset, data);
    }

    /// The address is set through the control queue; writing it here is for drivers before version 1.
    fn write_config(&mut self, _: u32, _: &[u8]) {}

    fn activate(&mut self, activation: Activation) -> Result<(), DeviceError> {
        self.active = None;
        let features = activation.features;
        let Some(first) = self.taps.first() else {
            return Err(self.bad_state("its tap device was not inherited".into()));
        };
        first
            .set_offloads(feature::offloads(features))
            .map_err(|error| tap_failed(self.name(), error))?;
        let interrupt = Arc::clone(&activation.interrupt);
        let pairs = self.start_pairs(activation)?;
        self.active = Some(Active {
            pairs,
            features,
            interrupt,
        });
        Ok(())
    }

    fn pause(&mut self) -> Result<Vec<QueuePosition>, DeviceError> {
        let mut positions = Vec::new();
        for worker in self.workers() {
            worker.pause().map_err(|error| self.worker_failed(error))?;
        }
        for worker in self.workers() {
            let theirs = worker.call(|pair| pair.positions());
            positions.extend(theirs.map_err(|error| self.worker_failed(error))?);
        }
        positions.sort_by_key(|position| position.index);
        Ok(positions)
    }

    fn resume(&mut self) -> Result<(), DeviceError> {
        for worker in self.workers() {
            worker.resume().map_err(|error| self.worker_failed(error))?;
        }
        Ok(())
    }

    fn reset(&mut self) {
        self.active = None;
        self.shared.reset();
        if let Err(error) = self.detach_all_but_first() {
            tracing::warn!(%error, "queues of the tap stay attached");
        }
    }

    fn save(&self) -> Result<SavedBody, DeviceError> {
        let config = &self.shared.config;
        let settings = self.shared.settings().clone();
        let saved = Saved {
            version: SAVED_VERSION,
            mtu: config.mtu,
            queue_pairs: config.queue_pairs,
            filter: Filter::clone(&settings.filter),
            pairs_in_use: settings.pairs,
            announce: settings.announce,
            counters: self.shared.counters.save(),
        };
        SavedBody::serialized(&saved).map_err(|error| self.bad_state(error.to_string()))
    }

    fn restore(&mut self, saved: SavedBody) -> Result<(), DeviceError> {
        let saved: Saved = saved
            .deserialized()
            .map_err(|error| self.bad_state(error.to_string()))?;
        let config = &self.shared.config;
        if saved.version != SAVED_VERSION {
            return Err(self.bad_state(format!(
                "version {}, and only {SAVED_VERSION} is known",
                saved.version
            )));
        }
        if saved.mtu != config.mtu || saved.queue_pairs != config.queue_pairs {
            return Err(self.bad_state(format!(
                "MTU {} and {} queue pairs there, {} and {} here",
                saved.mtu, saved.queue_pairs, config.mtu, config.queue_pairs
            )));
        }
        if saved.pairs_in_use == 0 || saved.pairs_in_use > config.queue_pairs.into() {
            return Err(self.bad_state(format!("{} queue pairs in use", saved.pairs_in_use)));
        }
        let filter = &saved.filter;
        if !filter.mac.is_unicast()
            || !filter.unicast.is_bounded()
            || !filter.multicast.is_bounded()
        {
            return Err(self.bad_state("its receive filter cannot be".into()));
        }
        self.shared.counters.restore(&saved.counters);
        let mut settings = self.shared.settings();
        settings.filter = Arc::new(saved.filter);
        settings.pairs = saved.pairs_in_use;
        settings.announce = saved.announce;
        Ok(())
    }

    fn lend(&self) -> Result<Vec<OwnedFd>, DeviceError> {
        let lent = self.taps.iter().map(|tap| tap.lend());
        lent.collect::<Result<_, _>>()
            .map_err(|source| DeviceError::host(self.name(), "a descriptor is refused", source))
    }

    fn inherit(&mut self, lent: Vec<OwnedFd>) -> Result<(), DeviceError> {
        let config = &self.shared.config;
        if self.plug == Plug::Opened || lent.len() != usize::from(config.queue_pairs) {
            return Err(self.bad_state(format!(
                "{} descriptors for {} queue pairs",
                lent.len(),
                config.queue_pairs
            )));
        }
        let taps = lent.into_iter().map(|descriptor| {
            Tap::inherited(descriptor, &config.tap, queueing(config)).map(Arc::new)
        });
        let taps: Result<Vec<_>, _> = taps.collect();
        self.taps = taps.map_err(|error| tap_failed(self.name(), error))?;
        Ok(())
    }

    fn announce(&mut self) {
        let Some(active) = &self.active else {
            // Nobody drives the card yet, and switches shall know its port all the same.
            let mac = self.shared.config_space().mac;
            for frame in announce::frames(mac, self.shared.config.address) {
                let Some(first) = self.taps.first() else {
                    return;
                };
                if let Err(error) = first.write(&frame) {
                    tracing::debug!(card = self.name(), %error, "announcement lost");
                }
            }
            return;
        };
        if active.features & feature::GUEST_ANNOUNCE != 0 {
            self.shared.settings().announce = true;
            active.interrupt.config();
        }
        if let Some(first) = active.pairs.first()
            && let Err(error) = first.call(Pair::start_announcing)
        {
            tracing::warn!(card = self.name(), %error, "the machine is not announced");
        }
    }

    fn metrics(&self) -> DeviceMetrics {
        self.shared.counters.metrics()
    }
}

/// How the tap device of such a card is opened.
fn queueing(config: &NetConfig) -> Queueing {
    if config.queue_pairs == 1 {
        Queueing::Single
    } else {
        Queueing::Multiple
    }
}

/// Queues by their index.
fn spread(queues: Vec<ActiveQueue>, count: usize) -> Vec<Option<ActiveQueue>> {
    let mut spread: Vec<Option<ActiveQueue>> = (0..count).map(|_| None).collect();
    for queue in queues {
        let index = usize::from(queue.index);
        if let Some(place) = spread.get_mut(index) {
            *place = Some(queue);
        }
    }
    spread
}

fn tap_failed(device: &str, error: TapError) -> DeviceError {
    let device = device.to_owned();
    match error {
        TapError::Busy { .. } => DeviceError::Held {
            device,
            reason: error.to_string(),
        },
        TapError::Refused {
            name,
            request,
            source,
        } => DeviceError::Host {
            device,
            what: format!("tap device {name}: {request} fails"),
            source,
        },
        TapError::NoDriver(source) => DeviceError::Host {
            device,
            what: "/dev/net/tun cannot be opened; load the kernel's module tun, and allow this process to use it"
                .into(),
            source,
        },
        TapError::BadName { .. }
        | TapError::Missing { .. }
        | TapError::OtherKind { .. }
        | TapError::OtherDevice { .. }
        | TapError::NotPermitted { .. } => DeviceError::Unusable {
            device,
            reason: error.to_string(),
        },
    }
}
