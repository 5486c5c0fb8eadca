//! A virtio device as a PCI function.
//!
//! All of it is in one 32-bit memory BAR:
//!
//! ```text
//! 0x0000 common configuration   0x1000 interrupt status   0x2000 device configuration
//! 0x3000 one doorbell per queue, 4 bytes apart            0x4000 MSI-X table   0x5000 pending bits
//! ```
//!
//! Doorbells are the hypervisor's as long as the device works, wherever the guest has put the BAR; a doorbell that
//! reaches this code all the same is passed on.

use super::common::{COMMON_BYTES, CommonRegisters, Effect, STATUS_DRIVER_OK, STATUS_FEATURES_OK};
use super::config::{BAR0, CONFIG_BYTES, ConfigSpace, Identity};
use super::msix::{CONTROL_WRITABLE, ENTRY_BYTES, Msix};
use super::platform::Platform;
use super::saved::{SAVED_FUNCTION_VERSION, SavedFunction};
use super::signals::Signals;
use crate::device::{
    Activation, ActiveQueue, DeviceError, DeviceEvents, DeviceKind, Interrupt, Start, VirtioDevice,
};
use crate::memory::GuestMemory;
use godwit_wire::id::Epoch;
use godwit_wire::vmm_api::{DeviceInfo, DriverState};
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use virtio_queue::QueueT;
use vmm_sys_util::eventfd::EventFd;

/// Memory of one function.
pub const BAR_BYTES: u32 = 0x8000;
const PART_BYTES: u32 = 0x1000;
const ISR: u32 = 0x1000;
const DEVICE_CONFIG: u32 = 0x2000;
const NOTIFY: u32 = 0x3000;
const NOTIFY_MULTIPLIER: u32 = 4;
const MSIX_TABLE: u32 = 0x4000;
const MSIX_PENDING: u32 = 0x5000;

const VIRTIO_VENDOR: u16 = 0x1af4;
/// Modern devices are numbered from here on.
const VIRTIO_DEVICE: u16 = 0x1040;
const SUBSYSTEM: u16 = 0x1100;
const CAP_VENDOR: u8 = 0x09;
const CAP_MSIX: u8 = 0x11;
/// Offsets within the PCI configuration access capability (virtio 1.2, 4.1.4.9).
const ACCESS_BAR: usize = 4;
const ACCESS_OFFSET: usize = 8;
const ACCESS_LENGTH: usize = 12;
const ACCESS_DATA: usize = 16;

#[derive(Debug)]
struct Doorbell {
    event: EventFd,
    queue: u16,
}

/// A virtio device and its function's registers.
#[derive(Debug)]
pub struct VirtioPci {
    slot: u8,
    device: Box<dyn VirtioDevice>,
    config: ConfigSpace,
    common: CommonRegisters,
    signals: Arc<Signals>,
    platform: Arc<dyn Platform>,
    memory: GuestMemory,
    /// Where the access capability and MSI-X's control register are.
    access: usize,
    msix_control: usize,
    /// One per queue the device works with; empty when it does not work.
    doorbells: Vec<Doorbell>,
    doorbells_at: Option<u64>,
    activity: Activity,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Activity {
    /// No driver works with it.
    Idle,
    /// It was activated.
    Active,
    /// It was activated as a saved device, and interrupts may have been lost on the way.
    Restored,
}

fn class(kind: DeviceKind) -> u32 {
    match kind {
        DeviceKind::Net => 0x02_0000,
        DeviceKind::Block => 0x01_8000,
        DeviceKind::Console => 0x07_8000,
        DeviceKind::Rng | DeviceKind::Balloon => 0x00_ff00,
        DeviceKind::Vsock => 0x02_8000,
    }
}

fn kind_name(kind: DeviceKind) -> &'static str {
    match kind {
        DeviceKind::Net => "net",
        DeviceKind::Block => "block",
        DeviceKind::Console => "console",
        DeviceKind::Rng => "rng",
        DeviceKind::Balloon => "balloon",
        DeviceKind::Vsock => "vsock",
    }
}

/// A vendor capability (virtio 1.2, 4.1.4): type, BAR 0, offset, length.
fn virtio_capability(kind: u8, offset: u32, length: u32, extra: &[u8]) -> Vec<u8> {
    let mut body = vec![(16 + extra.len()) as u8, kind, 0, 0, 0, 0];
    body.extend(offset.to_le_bytes());
    body.extend(length.to_le_bytes());
    body.extend(extra);
    body
}

impl VirtioPci {
    /// A function in `slot` whose memory is at `bar`.
    pub fn new(
        slot: u8,
        bar: u32,
        device: Box<dyn VirtioDevice>,
        memory: GuestMemory,
        platform: Arc<dyn Platform>,
        events: DeviceEvents,
    ) -> Self {
        let kind = device.kind();
        let queues = device.queue_sizes().len();
        let vectors = queues as u16 + 1;
        let mut config = ConfigSpace::new(Identity {
            vendor: VIRTIO_VENDOR,
            device: VIRTIO_DEVICE + kind as u16,
            class: class(kind),
            revision: 1,
            subsystem: SUBSYSTEM,
        });
        config.set_bar0(bar, BAR_BYTES);
        let mut msix = (vectors - 1).to_le_bytes().to_vec();
        msix.extend(MSIX_TABLE.to_le_bytes());
        msix.extend(MSIX_PENDING.to_le_bytes());
        // First, because a guest looks for it most often.
        let msix_control = config.add_capability(CAP_MSIX, &msix) + 2;
        config.allow(msix_control, &CONTROL_WRITABLE.to_le_bytes());
        let notify_bytes = queues as u32 * NOTIFY_MULTIPLIER;
        let multiplier = NOTIFY_MULTIPLIER.to_le_bytes();
        for (kind, offset, length, extra) in [
            (1, 0, COMMON_BYTES as u32, &[][..]),
            (2, NOTIFY, notify_bytes, &multiplier[..]),
            (3, ISR, 4, &[]),
            (4, DEVICE_CONFIG, PART_BYTES, &[]),
        ] {
            config.add_capability(CAP_VENDOR, &virtio_capability(kind, offset, length, extra));
        }
        let access = config.add_capability(CAP_VENDOR, &virtio_capability(5, 0, 0, &[0; 4]));
        config.allow(access + ACCESS_BAR, &[0xff]);
        config.allow(access + ACCESS_OFFSET, &[0xff; 12]);
        let msix = Msix::new(vectors, platform.clone());
        Self {
            slot,
            common: CommonRegisters::new(device.features(), device.queue_sizes(), vectors),
            signals: Arc::new(Signals::new(device.name().to_owned(), queues, msix, events)),
            device,
            config,
            platform,
            memory,
            access,
            msix_control,
            doorbells: Vec::new(),
            doorbells_at: None,
            activity: Activity::Idle,
        }
    }

    /// Where it sits on the bus.
    pub const fn slot(&self) -> u8 {
        self.slot
    }

    /// Guest memory it answers in, if the guest lets it.
    pub fn window(&self) -> Option<Range<u64>> {
        self.config
            .bar0()
            .map(|start| start..start + u64::from(BAR_BYTES))
    }

    /// The guest reads configuration space.
    pub fn read_config(&mut self, offset: u16, data: &mut [u8]) {
        let offset = usize::from(offset);
        if overlaps(offset, data.len(), self.access + ACCESS_DATA, 4)
            && let Some((at, length)) = self.accessed()
        {
            let mut value = [0; 4];
            self.read_bar(at, &mut value[..length]);
            self.config.put(self.access + ACCESS_DATA, &value);
        }
        self.config.read(offset, data);
    }

    /// What reading configuration space gives; nothing when that has effects, through the access capability.
    pub(super) fn plain_config(&self) -> Option<&[u8; CONFIG_BYTES]> {
        self.accessed().is_none().then(|| self.config.bytes())
    }

    /// The guest writes configuration space.
    pub fn write_config(&mut self, offset: u16, data: &[u8]) {
        let offset = usize::from(offset);
        let before = self.config.bar0();
        self.config.write(offset, data);
        if overlaps(offset, data.len(), self.msix_control, 2) {
            let control = self.config.u16(self.msix_control);
            self.signals.msix().set_control(control);
        }
        if overlaps(offset, data.len(), self.access + ACCESS_DATA, 4)
            && let Some((at, length)) = self.accessed()
        {
            let value = self.config.u32(self.access + ACCESS_DATA).to_le_bytes();
            self.write_bar(at, &value[..length]);
        }
        if offset < BAR0 + 4 && self.config.bar0() != before {
            self.move_doorbells();
        }
    }

    /// What the access capability points at, if that is within the BAR.
    fn accessed(&self) -> Option<(u32, usize)> {
        let bar = self.config.bytes()[self.access + ACCESS_BAR];
        let offset = self.config.u32(self.access + ACCESS_OFFSET);
        let length = self.config.u32(self.access + ACCESS_LENGTH);
        (bar == 0
            && matches!(length, 1 | 2 | 4)
            && offset.is_multiple_of(length)
            && offset < BAR_BYTES)
            .then_some((offset, length as usize))
    }

    /// The guest reads the function's memory.
    pub fn read_bar(&mut self, offset: u32, data: &mut [u8]) {
        data.fill(0);
        let within = (offset % PART_BYTES) as usize;
        match offset - offset % PART_BYTES {
            0 => self.common.read(within, data, self.signals.live()),
            ISR if within == 0 => {
                if let Some(first) = data.first_mut() {
                    *first = self.signals.take_isr();
                }
            }
            DEVICE_CONFIG => self.device.read_config(within as u32, data),
            MSIX_TABLE => self.signals.msix().read_table(within, data),
            MSIX_PENDING => self.signals.msix().read_pending(within, data),
            _ => {}
        }
    }

    /// The guest writes the function's memory.
    pub fn write_bar(&mut self, offset: u32, data: &[u8]) {
        let within = (offset % PART_BYTES) as usize;
        match offset - offset % PART_BYTES {
            0 => {
                let effect = self.common.write(within, data);
                self.act(effect);
            }
            DEVICE_CONFIG => self.device.write_config(within as u32, data),
            NOTIFY => self.ring(within as u32 / NOTIFY_MULTIPLIER),
            MSIX_TABLE => self.signals.msix().write_table(within, data),
            _ => {}
        }
    }

    fn act(&mut self, effect: Effect) {
        match effect {
            Effect::None => {}
            Effect::ConfigVector(vector) => self.signals.set_config_vector(vector),
            Effect::QueueVector(index, vector) => self.signals.set_queue_vector(index, vector),
            Effect::Reset => self.reset(),
            Effect::Activate => {
                if let Err(why) = self.activate(Start::Working) {
                    self.signals.needs_reset(&why);
                }
            }
        }
    }

    /// A doorbell that came here because it is not the hypervisor's.
    fn ring(&self, queue: u32) {
        if let Some(doorbell) = self
            .doorbells
            .iter()
            .find(|doorbell| u32::from(doorbell.queue) == queue)
        {
            // Full means that the device has not looked yet; it will.
            let _ = doorbell.event.write(1);
        }
    }

    fn activate(&mut self, start: Start) -> Result<(), String> {
        if self.activity != Activity::Idle {
            return Err("the driver is ready twice".into());
        }
        if self.common.status() & STATUS_FEATURES_OK == 0 {
            return Err("the driver is ready before its features were accepted".into());
        }
        let mut queues = Vec::new();
        let mut doorbells = Vec::new();
        for (index, registers) in (0..).zip(self.common.queues()) {
            if !registers.enabled {
                continue;
            }
            let queue = self.common.queue(index)?;
            if !queue.is_valid(&self.memory) {
                return Err(format!("queue {index} does not lie in guest memory"));
            }
            let host = |error: std::io::Error| format!("an eventfd cannot be had: {error}");
            let event = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC).map_err(host)?;
            queues.push(ActiveQueue {
                index,
                queue,
                kick: event.try_clone().map_err(host)?,
            });
            doorbells.push(Doorbell {
                event,
                queue: index,
            });
        }
        self.device
            .activate(Activation {
                memory: self.memory.clone(),
                queues,
                features: self.common.accepted(),
                interrupt: self.signals.clone(),
                start,
            })
            .map_err(|error| with_sources(&error))?;
        self.doorbells = doorbells;
        self.move_doorbells();
        self.activity = match start {
            Start::Working => Activity::Active,
            Start::Paused => Activity::Restored,
        };
        Ok(())
    }

    fn reset(&mut self) {
        self.remove_doorbells();
        self.doorbells.clear();
        if self.activity != Activity::Idle {
            self.device.reset();
            self.activity = Activity::Idle;
        }
        self.common.reset();
        self.signals.reset();
    }

    /// Puts the doorbells where the BAR is now.
    fn move_doorbells(&mut self) {
        let target = self.config.bar0();
        if target == self.doorbells_at {
            return;
        }
        self.remove_doorbells();
        let (Some(bar), false) = (target, self.doorbells.is_empty()) else {
            return;
        };
        self.doorbells_at = target;
        for doorbell in &self.doorbells {
            // Where it fails, the guest's write comes to `ring` instead.
            if let Err(error) = self
                .platform
                .place_doorbell(&doorbell.event, doorbell_address(bar, doorbell.queue))
            {
                tracing::warn!(device = self.device.name(), queue = doorbell.queue, %error, "a doorbell cannot be placed");
            }
        }
    }

    fn remove_doorbells(&mut self) {
        let Some(bar) = self.doorbells_at.take() else {
            return;
        };
        for doorbell in &self.doorbells {
            if let Err(error) = self
                .platform
                .remove_doorbell(&doorbell.event, doorbell_address(bar, doorbell.queue))
            {
                tracing::debug!(device = self.device.name(), queue = doorbell.queue, %error, "a doorbell cannot be removed");
            }
        }
    }

    /// Stops all work; see [`VirtioDevice::pause`].
    pub fn pause(&mut self) -> Result<(), DeviceError> {
        if self.activity == Activity::Idle {
            return Ok(());
        }
        for position in self.device.pause()? {
            if let Some(queue) = self.common.queue_mut(position.index) {
                queue.next_avail = position.next_avail;
                queue.next_used = position.next_used;
            }
        }
        Ok(())
    }

    /// Goes on after [`Self::pause`] or [`Self::restore`].
    pub fn resume(&mut self) -> Result<(), DeviceError> {
        match self.activity {
            Activity::Idle => return Ok(()),
            Activity::Active => self.device.resume()?,
            Activity::Restored => {
                self.device.resume()?;
                self.activity = Activity::Active;
                // An interrupt may have been on its way when the state was taken; one too many does no harm.
                for doorbell in &self.doorbells {
                    self.signals.queue(doorbell.queue);
                }
            }
        }
        Ok(())
    }

    /// See [`VirtioDevice::claim`].
    pub fn claim(&mut self, epoch: Epoch) -> Result<(), DeviceError> {
        self.device.claim(epoch)
    }

    /// See [`VirtioDevice::flush`].
    pub fn flush(&mut self) -> Result<(), DeviceError> {
        self.device.flush()
    }

    /// See [`VirtioDevice::release`].
    pub fn release(&mut self) -> Result<(), DeviceError> {
        self.device.release()
    }

    /// See [`VirtioDevice::step_aside`].
    pub fn step_aside(&mut self) -> Result<(), DeviceError> {
        self.device.step_aside()
    }

    /// See [`VirtioDevice::lend`].
    pub fn lend(&self) -> Result<Vec<OwnedFd>, DeviceError> {
        self.device.lend()
    }

    /// See [`VirtioDevice::inherit`].
    pub fn inherit(&mut self, lent: Vec<OwnedFd>) -> Result<(), DeviceError> {
        self.device.inherit(lent)
    }

    /// See [`VirtioDevice::announce`].
    pub fn announce(&mut self) {
        if self.activity != Activity::Idle {
            self.device.announce();
        }
    }

    /// The function as it travels. It is paused.
    pub fn save(&self) -> Result<SavedFunction, DeviceError> {
        let (generation, isr, broken) = self.signals.save();
        let msix = self.signals.msix();
        let (vectors, pending) = msix.entries();
        Ok(SavedFunction {
            version: SAVED_FUNCTION_VERSION,
            slot: self.slot,
            name: self.device.name().to_owned(),
            kind: self.device.kind(),
            config: self.config.bytes().to_vec(),
            vectors: vectors.to_vec(),
            pending,
            common: self.common.save(),
            generation,
            isr,
            broken,
            device: self.device.save()?,
        })
    }

    /// Makes this function, which no driver has used yet, what was saved; it works after [`Self::resume`].
    pub fn restore(&mut self, saved: SavedFunction) -> Result<(), DeviceError> {
        let name = self.device.name().to_owned();
        let bad = |reason: String| DeviceError::BadState {
            device: name.clone(),
            reason,
        };
        if saved.version != SAVED_FUNCTION_VERSION {
            return Err(bad(format!(
                "it has version {} and this program knows {SAVED_FUNCTION_VERSION}",
                saved.version
            )));
        }
        if (saved.slot, &saved.name, saved.kind) != (self.slot, &name, self.device.kind()) {
            return Err(bad(format!(
                "it is {} in slot {} and this is slot {}",
                saved.name, saved.slot, self.slot
            )));
        }
        if saved.config.len() != CONFIG_BYTES {
            return Err(bad(format!(
                "its configuration space has {} bytes",
                saved.config.len()
            )));
        }
        self.config.write(0, &saved.config);
        self.common.restore(saved.common).map_err(&bad)?;
        self.signals.set_config_vector(self.common.config_vector());
        for (index, queue) in (0..).zip(self.common.queues()) {
            self.signals.set_queue_vector(index, queue.vector);
        }
        self.signals
            .restore(saved.generation, saved.isr, saved.broken);
        {
            let mut msix = self.signals.msix();
            msix.set_control(self.config.u16(self.msix_control));
            if !msix.restore(&saved.vectors, saved.pending) {
                return Err(bad(format!(
                    "it has {} vectors and this function {}",
                    saved.vectors.len(),
                    msix.vectors()
                )));
            }
        }
        self.device.restore(saved.device)?;
        let works = self.common.status() & STATUS_DRIVER_OK != 0 && self.signals.broken().is_none();
        if works {
            self.activate(Start::Paused).map_err(&bad)?;
        }
        Ok(())
    }

    /// Name, kind, driver and counters.
    pub fn info(&self) -> DeviceInfo {
        let driver = match (&*self.signals.broken(), self.activity) {
            (Some(reason), _) => DriverState::NeedsReset {
                reason: reason.clone(),
            },
            (None, Activity::Idle) => DriverState::Absent,
            (None, _) => DriverState::Working,
        };
        DeviceInfo {
            name: self.device.name().to_owned(),
            kind: kind_name(self.device.kind()).to_owned(),
            driver,
            counters: self
                .device
                .metrics()
                .into_iter()
                .map(|(name, value)| (name.to_owned(), value))
                .collect(),
        }
    }
}

impl Drop for VirtioPci {
    fn drop(&mut self) {
        self.remove_doorbells();
    }
}

fn doorbell_address(bar: u64, queue: u16) -> u64 {
    bar + u64::from(NOTIFY) + u64::from(queue) * u64::from(NOTIFY_MULTIPLIER)
}

const fn overlaps(offset: usize, length: usize, start: usize, bytes: usize) -> bool {
    offset < start + bytes && start < offset + length
}

fn with_sources(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(source) = next {
        text = format!("{text}: {source}");
        next = source.source();
    }
    text
}

// Only sizes that have room in their parts of the BAR.
const _: () = assert!(super::common::MAX_QUEUES * 4 <= PART_BYTES as usize);
const _: () = assert!(super::msix::MAX_VECTORS as usize * ENTRY_BYTES <= PART_BYTES as usize);

#[cfg(test)]
pub(super) mod tests;
