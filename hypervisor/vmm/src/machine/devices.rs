//! The virtio devices of a machine, on their bus.
//!
//! Slots are fixed, so that a machine is the same wherever it is built: 0 host bridge, 1 rng, 2 balloon, 3 console,
//! 4 vsock, 8 to 23 disks (the seed disk last), 24 to 31 network cards.

use super::attachments;
use super::config_pages::ConfigPages;
use super::layout::MMIO_WINDOW;
use super::{MachineError, MachineEvent, MachineParts};
use crate::kvm::{Interrupts, VmFd};
use crate::memory::GuestRam;
use godwit_devices::balloon::{Balloon, BalloonControl};
use godwit_devices::block::{Block, BlockConfig, DiskContent, ResizeHandle};
use godwit_devices::console::{ConsoleInput, VirtioConsole};
use godwit_devices::device::{DeviceError, DeviceEvents, Plug, VirtioDevice};
use godwit_devices::net::{FrameTimes, Net, NetConfig};
use godwit_devices::pci::{PciBus, Platform, SavedFunction, VirtioPci};
use godwit_devices::rng::Rng;
use godwit_devices::vsock::Vsock;
use godwit_wire::devices::{ConsoleKind, Devices, DiskAccess, DiskLimits, OnIoError};
use godwit_wire::id::Epoch;
use godwit_wire::unit::{Bytes, Mib};
use godwit_wire::vmm_api::DeviceInfo;
use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::sync::Arc;

/// Name of the seed disk.
const SEED_NAME: &str = "seed";
const RNG_SLOT: u8 = 1;
const BALLOON_SLOT: u8 = 2;
const CONSOLE_SLOT: u8 = 3;
const VSOCK_SLOT: u8 = 4;
const DISK_SLOTS: u8 = 8;
const NIC_SLOTS: u8 = 24;

/// The bus and what its devices can be told.
#[derive(Debug)]
pub(super) struct PciDevices {
    bus: Arc<PciBus>,
    balloon: BalloonControl,
    disks: BTreeMap<String, ResizeHandle>,
    contents: BTreeMap<String, DiskContent>,
    frame_times: Vec<Arc<FrameTimes>>,
    console: Option<ConsoleInput>,
}

/// Puts devices into slots.
struct Builder<'a> {
    bus: PciBus,
    ram: &'a GuestRam,
    platform: Arc<dyn Platform>,
    events: DeviceEvents,
}

impl Builder<'_> {
    fn add(&mut self, slot: u8, device: impl VirtioDevice + 'static) {
        let bar = self.bus.bar_of(slot);
        self.bus.insert(VirtioPci::new(
            slot,
            bar,
            Box::new(device),
            self.ram.map().clone(),
            self.platform.clone(),
            self.events.clone(),
        ));
    }
}

/// What the guest knows of a disk besides its content.
struct Drive {
    name: String,
    access: DiskAccess,
    limits: DiskLimits,
    on_error: OnIoError,
}

/// All disks in the guest's order; the seed disk last.
fn drives(devices: &Devices) -> impl Iterator<Item = Drive> {
    let seed = devices.cloud_init.as_ref().map(|_| Drive {
        name: SEED_NAME.into(),
        access: DiskAccess::ReadOnly,
        limits: DiskLimits::default(),
        on_error: OnIoError::Report,
    });
    let disks = devices.disks.iter().map(|disk| Drive {
        name: disk.name.clone(),
        access: disk.access,
        limits: disk.limits,
        on_error: disk.on_error,
    });
    disks.chain(seed)
}

impl PciDevices {
    /// All devices of the machine, none of them at work.
    pub(super) fn build(
        parts: &MachineParts,
        ram: &GuestRam,
        vm: Arc<VmFd>,
        plug: Plug,
    ) -> Result<Self, MachineError> {
        let devices = &parts.spec.devices;
        let sink = parts.events.clone();
        let mut builder = Builder {
            bus: PciBus::new(MMIO_WINDOW.start as u32),
            ram,
            platform: Arc::new(Interrupts::new(vm)),
            events: Arc::new(move |event| sink(MachineEvent::Device(event))),
        };
        builder.add(RNG_SLOT, Rng::new()?);
        let (balloon, balloon_control) = Balloon::new(ram.size());
        builder.add(BALLOON_SLOT, balloon);
        let mut console_input = None;
        if devices.console == ConsoleKind::Virtio {
            let (console, input) = VirtioConsole::new(Box::new(parts.console.clone()));
            builder.add(CONSOLE_SLOT, console);
            console_input = Some(input);
        }
        if let Some((cid, directory)) = attachments::vsock(devices, &parts.attachments)? {
            builder.add(VSOCK_SLOT, Vsock::plugged(cid, directory, plug)?);
        }
        let files = attachments::disks(devices, &parts.attachments)?;
        let (mut disks, mut contents) = (BTreeMap::new(), BTreeMap::new());
        for ((slot, disk), file) in (DISK_SLOTS..).zip(drives(devices)).zip(files) {
            let drive = Block::open(
                BlockConfig {
                    name: disk.name.clone(),
                    path: file.path,
                    format: file.format,
                    access: disk.access,
                    limits: disk.limits,
                    on_error: disk.on_error,
                    lock: file.lock,
                    vm: parts.vm,
                },
                builder.events.clone(),
            )?;
            contents.insert(disk.name.clone(), drive.content());
            disks.insert(disk.name, drive.resize_handle());
            builder.add(slot, drive);
        }
        let taps = attachments::nics(devices, &parts.attachments)?;
        let mut frame_times = Vec::new();
        for ((slot, nic), attachment) in (NIC_SLOTS..).zip(&devices.nics).zip(taps) {
            let config = NetConfig {
                name: nic.name.clone(),
                mac: nic.mac,
                tap: attachment.tap,
                mtu: attachment.mtu,
                queue_pairs: nic.queue_pairs,
                limits: nic.limits,
                address: nic.address,
            };
            let card = Net::plugged(config, plug)?;
            frame_times.push(card.frame_times());
            builder.add(slot, card);
        }
        Ok(Self {
            bus: Arc::new(builder.bus),
            balloon: balloon_control,
            disks,
            contents,
            frame_times,
            console: console_input,
        })
    }

    /// The bus, for vCPUs.
    pub(super) fn bus(&self) -> Arc<PciBus> {
        self.bus.clone()
    }

    /// Input of the virtio console, if there is one.
    pub(super) fn console(&self) -> Option<ConsoleInput> {
        self.console.clone()
    }

    /// Finishes what is in flight; nothing is touched until [`Self::resume`].
    pub(super) fn pause(&self) -> Result<(), DeviceError> {
        self.each(VirtioPci::pause)
    }

    /// Goes on; every device looks at its queues.
    pub(super) fn resume(&self) -> Result<(), DeviceError> {
        self.each(VirtioPci::resume)
    }

    /// Takes what only one machine may hold.
    pub(super) fn claim(&self, epoch: Epoch) -> Result<(), DeviceError> {
        self.each(|function| function.claim(epoch))
    }

    /// Makes sure that everything written outlives a power cut of the host.
    pub(super) fn flush(&self) -> Result<(), DeviceError> {
        self.each(VirtioPci::flush)
    }

    /// Gives up what [`Self::claim`] took.
    pub(super) fn release(&self) -> Result<(), DeviceError> {
        self.each(VirtioPci::release)
    }

    /// The same for a machine that goes on in another process of this host.
    pub(super) fn step_aside(&self) -> Result<(), DeviceError> {
        self.each(VirtioPci::step_aside)
    }

    /// What every function lends to the process that takes the machine over.
    pub(super) fn lend(&self) -> Result<Vec<Vec<OwnedFd>>, DeviceError> {
        self.bus
            .functions()
            .map(|function| function.lend())
            .collect()
    }

    /// Gives every function what it was lent.
    pub(super) fn inherit(&self, lent: Vec<Vec<OwnedFd>>) -> Result<(), MachineError> {
        let mut functions: Vec<_> = self.bus.functions().collect();
        if functions.len() != lent.len() {
            return Err(MachineError::BadState(format!(
                "{} devices lend something and this machine has {}",
                lent.len(),
                functions.len()
            )));
        }
        for (function, lent) in functions.iter_mut().zip(lent) {
            function.inherit(lent)?;
        }
        Ok(())
    }

    /// Tells guest and network that the machine has arrived.
    pub(super) fn announce(&self) {
        for mut function in self.bus.functions() {
            function.announce();
        }
    }

    /// All functions as they travel.
    pub(super) fn save(&self) -> Result<Vec<SavedFunction>, DeviceError> {
        self.bus
            .functions()
            .map(|function| function.save())
            .collect()
    }

    /// Shows configuration space in pages that the guest reads without leaving. For a guest that boots, which reads it all
    /// the time: one that arrives hardly ever does, and is left with as few kinds of memory as can be.
    pub(super) fn show_configuration(&self, vm: Arc<VmFd>) {
        if let Some(pages) = ConfigPages::new(vm) {
            self.bus.mirror_to(Box::new(pages));
        }
    }

    /// Makes all functions what was saved.
    pub(super) fn restore(&self, saved: Vec<SavedFunction>) -> Result<(), MachineError> {
        let mut functions: Vec<_> = self.bus.functions().collect();
        if functions.len() != saved.len() {
            return Err(MachineError::BadState(format!(
                "it has {} devices and this machine {}",
                saved.len(),
                functions.len()
            )));
        }
        for (function, saved) in functions.iter_mut().zip(saved) {
            function.restore(saved)?;
        }
        Ok(())
    }

    /// What every device tells of itself.
    pub(super) fn info(&self) -> Vec<DeviceInfo> {
        self.bus
            .functions()
            .map(|function| function.info())
            .collect()
    }

    /// Makes a disk larger; `false` if there is none of that name.
    pub(super) fn resize_disk(&self, name: &str, bytes: Bytes) -> Result<bool, DeviceError> {
        self.disks
            .get(name)
            .map_or(Ok(false), |disk| disk.resize(bytes).map(|()| true))
    }

    /// A way to what is on a disk, if there is one of that name.
    pub(super) fn disk_content(&self, name: &str) -> Option<DiskContent> {
        self.contents.get(name).cloned()
    }

    /// When frames passed each network card.
    pub(super) fn frame_times(&self) -> Vec<Arc<FrameTimes>> {
        self.frame_times.clone()
    }

    /// Asks the guest to live with so much memory.
    pub(super) fn keep_memory(&self, memory: Mib) {
        self.balloon.keep(memory);
    }

    /// Does `step` with every function; all of them get it, and the first failure is told.
    fn each(
        &self,
        mut step: impl FnMut(&mut VirtioPci) -> Result<(), DeviceError>,
    ) -> Result<(), DeviceError> {
        let mut done = Ok(());
        for mut function in self.bus.functions() {
            done = done.and(step(&mut function));
        }
        done
    }
}
