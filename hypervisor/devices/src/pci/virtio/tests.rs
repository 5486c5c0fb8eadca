//! A function against drivers that follow the rules, and against guests that follow none.

use super::*;
use crate::device::{DeviceEvent, DeviceMetrics, QueuePosition, SavedBody};
use crate::pci::{InterruptLine, MsiMessage, PciBus};
use proptest::prelude::*;
use std::io;
use std::sync::Mutex;
use vm_memory::GuestAddress;

/// Counts what reaches the hypervisor.
#[derive(Debug, Default)]
pub(in crate::pci) struct FakePlatform {
    seen: Arc<Mutex<Seen>>,
}

#[derive(Debug, Default)]
struct Seen {
    delivered: Vec<u32>,
    routed: usize,
    doorbells: Vec<u64>,
}

#[derive(Debug)]
struct FakeLine {
    seen: Arc<Mutex<Seen>>,
    message: Mutex<Option<MsiMessage>>,
}

impl FakePlatform {
    pub(in crate::pci) fn new() -> Arc<Self> {
        Arc::default()
    }

    pub(in crate::pci) fn delivered(&self) -> Vec<u32> {
        self.seen.lock().unwrap().delivered.clone()
    }

    pub(in crate::pci) fn routed(&self) -> usize {
        self.seen.lock().unwrap().routed
    }

    fn doorbells(&self) -> Vec<u64> {
        self.seen.lock().unwrap().doorbells.clone()
    }
}

impl InterruptLine for FakeLine {
    fn route(&self, message: MsiMessage) -> io::Result<()> {
        *self.message.lock().unwrap() = Some(message);
        self.seen.lock().unwrap().routed += 1;
        Ok(())
    }

    fn signal(&self) {
        let message = self.message.lock().unwrap().expect("routed before use");
        self.seen.lock().unwrap().delivered.push(message.data);
    }
}

impl Platform for FakePlatform {
    fn interrupt_line(&self) -> io::Result<Box<dyn InterruptLine>> {
        Ok(Box::new(FakeLine {
            seen: self.seen.clone(),
            message: Mutex::default(),
        }))
    }

    fn place_doorbell(&self, _: &EventFd, address: u64) -> io::Result<()> {
        self.seen.lock().unwrap().doorbells.push(address);
        Ok(())
    }

    fn remove_doorbell(&self, _: &EventFd, address: u64) -> io::Result<()> {
        let mut seen = self.seen.lock().unwrap();
        let before = seen.doorbells.len();
        seen.doorbells.retain(|placed| *placed != address);
        assert_eq!(seen.doorbells.len() + 1, before, "{address:#x} was placed");
        Ok(())
    }
}

/// A device with two queues that remembers what happened to it.
#[derive(Debug, Default)]
struct FakeDevice {
    log: Arc<Mutex<Vec<String>>>,
    active: Option<Activation>,
    config: [u8; 8],
}

impl FakeDevice {
    fn note(&self, what: impl Into<String>) {
        self.log.lock().unwrap().push(what.into());
    }
}

impl VirtioDevice for FakeDevice {
    fn name(&self) -> &str {
        "fake"
    }
    fn kind(&self) -> DeviceKind {
        DeviceKind::Block
    }
    fn features(&self) -> u64 {
        1 << 9
    }
    fn queue_sizes(&self) -> &[u16] {
        &[256, 64]
    }
    fn read_config(&self, offset: u32, data: &mut [u8]) {
        for (number, byte) in data.iter_mut().enumerate() {
            *byte = self
                .config
                .get(offset as usize + number)
                .copied()
                .unwrap_or(0);
        }
    }
    fn write_config(&mut self, offset: u32, data: &[u8]) {
        for (number, byte) in data.iter().enumerate() {
            if let Some(slot) = self.config.get_mut(offset as usize + number) {
                *slot = *byte;
            }
        }
    }
    fn activate(&mut self, activation: Activation) -> Result<(), DeviceError> {
        assert!(self.active.is_none(), "activated twice");
        let queues: Vec<_> = activation
            .queues
            .iter()
            .map(|queue| (queue.index, queue.queue.size(), queue.queue.next_avail()))
            .collect();
        self.note(format!("activate {queues:?} {:?}", activation.start));
        self.active = Some(activation);
        Ok(())
    }
    fn pause(&mut self) -> Result<Vec<QueuePosition>, DeviceError> {
        self.note("pause");
        let active = self.active.as_ref().expect("only active devices pause");
        Ok(active
            .queues
            .iter()
            .map(|queue| QueuePosition {
                next_avail: 7,
                next_used: 5,
                ..queue.position()
            })
            .collect())
    }
    fn resume(&mut self) -> Result<(), DeviceError> {
        self.note("resume");
        Ok(())
    }
    fn reset(&mut self) {
        self.note("reset");
        self.active = None;
    }
    fn save(&self) -> Result<SavedBody, DeviceError> {
        Ok(ciborium::Value::Integer(42.into()))
    }
    fn restore(&mut self, saved: SavedBody) -> Result<(), DeviceError> {
        self.note(format!("restore {:?}", saved.as_integer()));
        Ok(())
    }
    fn metrics(&self) -> DeviceMetrics {
        vec![("things", 3)]
    }
}

const MEMORY_BYTES: usize = 1 << 20;
pub(in crate::pci) const SLOT: u8 = 8;
const BAR: u32 = 0xc004_0000;

struct Rig {
    function: VirtioPci,
    platform: Arc<FakePlatform>,
    log: Arc<Mutex<Vec<String>>>,
    events: Arc<Mutex<Vec<DeviceEvent>>>,
}

fn memory() -> GuestMemory {
    GuestMemory::from_ranges(&[(GuestAddress(0), MEMORY_BYTES)]).unwrap()
}

/// A function at work on nothing.
pub(in crate::pci) fn function() -> VirtioPci {
    rig().function
}

fn rig() -> Rig {
    let platform = FakePlatform::new();
    let device = FakeDevice::default();
    let log = device.log.clone();
    let events = Arc::new(Mutex::new(Vec::new()));
    let sink = events.clone();
    let function = VirtioPci::new(
        SLOT,
        BAR,
        Box::new(device),
        memory(),
        platform.clone(),
        Arc::new(move |event| sink.lock().unwrap().push(event)),
    );
    Rig {
        function,
        platform,
        log,
        events,
    }
}

impl Rig {
    fn log(&self) -> Vec<String> {
        std::mem::take(&mut self.log.lock().unwrap())
    }

    fn write(&mut self, offset: u32, data: &[u8]) {
        self.function.write_bar(offset, data);
    }

    fn status(&mut self) -> u8 {
        let mut status = [0];
        self.function.read_bar(0x14, &mut status);
        status[0]
    }

    /// What a driver does up to DRIVER_OK; the queues' rings begin at `rings`.
    fn drive(&mut self, rings: u64) {
        self.function.write_config(4, &6u16.to_le_bytes());
        let control = self.function.msix_control as u16;
        self.function
            .write_config(control, &0x8000u16.to_le_bytes());
        for vector in 0..3u32 {
            let at = MSIX_TABLE + vector * 16;
            self.write(at, &0xfee0_0000u64.to_le_bytes());
            self.write(at + 8, &(0x40 + vector).to_le_bytes());
            self.write(at + 12, &0u32.to_le_bytes());
        }
        self.write(0x14, &[1]);
        self.write(0x14, &[3]);
        self.write(0x08, &1u32.to_le_bytes());
        self.write(0x0c, &1u32.to_le_bytes());
        self.write(0x14, &[11]);
        self.write(0x10, &0u16.to_le_bytes());
        for queue in 0..2u16 {
            self.write(0x16, &queue.to_le_bytes());
            self.write(0x18, &16u16.to_le_bytes());
            self.write(0x1a, &(queue + 1).to_le_bytes());
            let base = rings + u64::from(queue) * 0x3000;
            self.write(0x20, &base.to_le_bytes());
            self.write(0x28, &(base + 0x1000).to_le_bytes());
            self.write(0x30, &(base + 0x2000).to_le_bytes());
            self.write(0x1c, &1u16.to_le_bytes());
        }
        self.write(0x14, &[15]);
    }
}

#[test]
fn a_driver_finds_five_virtio_capabilities_and_msix() {
    let mut rig = rig();
    let mut found = Vec::new();
    let mut next = [0];
    rig.function.read_config(0x34, &mut next);
    while next[0] != 0 {
        let mut header = [0; 4];
        rig.function.read_config(next[0].into(), &mut header);
        found.push((
            header[0],
            if header[0] == CAP_VENDOR {
                header[3]
            } else {
                0
            },
        ));
        next[0] = header[1];
    }
    assert_eq!(found, [(0x11, 0), (9, 1), (9, 2), (9, 3), (9, 4), (9, 5)]);
    let mut id = [0; 4];
    rig.function.read_config(0, &mut id);
    assert_eq!(id, [0xf4, 0x1a, 0x42, 0x10]);
}

#[test]
fn a_driver_brings_the_device_to_work_and_resets_it() {
    let mut rig = rig();
    rig.drive(0x1_0000);
    assert_eq!(rig.status(), 15);
    assert_eq!(rig.log(), ["activate [(0, 16, 0), (1, 16, 0)] Working"]);
    let notify = u64::from(BAR + NOTIFY);
    assert_eq!(rig.platform.doorbells(), [notify, notify + 4]);
    rig.function.signals.queue(1);
    rig.function.signals.config();
    assert_eq!(rig.platform.delivered(), [0x42, 0x40]);
    rig.write(0x14, &[0]);
    assert_eq!((rig.status(), rig.log()), (0, vec!["reset".to_owned()]));
    assert!(rig.platform.doorbells().is_empty());
    rig.function.signals.queue(1);
    assert_eq!(rig.platform.delivered().len(), 2);
    rig.drive(0x2_0000);
    assert_eq!(rig.status(), 15);
}

#[test]
fn rings_outside_memory_need_a_reset_and_are_reported_once() {
    let mut rig = rig();
    rig.drive(MEMORY_BYTES as u64 - 0x1000);
    assert_eq!(rig.status(), 15 | 64);
    assert_eq!(rig.log(), Vec::<String>::new());
    assert_eq!(rig.platform.delivered(), [0x40]);
    rig.function.signals.needs_reset("again");
    {
        let events = rig.events.lock().unwrap();
        assert_eq!(events.len(), 1);
        assert!(
            matches!(&events[0], DeviceEvent::Failed { device, reason } if device == "fake" && reason.contains("queue 0"))
        );
    }
    assert!(matches!(
        rig.function.info().driver,
        DriverState::NeedsReset { .. }
    ));
    rig.write(0x14, &[0]);
    assert_eq!(rig.function.info().driver, DriverState::Absent);
}

#[test]
fn doorbells_follow_the_bar() {
    let mut rig = rig();
    rig.drive(0x1_0000);
    rig.function.write_config(0x10, &[0xff; 4]);
    rig.function
        .write_config(0x10, &0xd000_0000u32.to_le_bytes());
    assert_eq!(rig.platform.doorbells(), [0xd000_3000, 0xd000_3004]);
    assert_eq!(rig.function.window(), Some(0xd000_0000..0xd000_8000));
    rig.function.write_config(4, &0u16.to_le_bytes());
    assert!(rig.platform.doorbells().is_empty());
    // Through memory it is reached no more, through the access capability still.
    let access = rig.function.access as u16;
    rig.function
        .write_config(access + 8, &0x14u32.to_le_bytes());
    rig.function.write_config(access + 12, &1u32.to_le_bytes());
    let mut status = [0];
    rig.function.read_config(access + 16, &mut status);
    assert_eq!(status, [15]);
}

#[test]
fn a_moved_function_goes_on_where_it_stopped_and_signals_every_queue() {
    let mut source = rig();
    source.drive(0x1_0000);
    source.function.pause().unwrap();
    let mut bytes = Vec::new();
    ciborium::into_writer(&source.function.save().unwrap(), &mut bytes).unwrap();
    let saved: SavedFunction = ciborium::from_reader(bytes.as_slice()).unwrap();
    let mut target = rig();
    target.function.restore(saved).unwrap();
    assert_eq!(
        target.log(),
        [
            "restore Some(Integer(42))",
            "activate [(0, 16, 7), (1, 16, 7)] Paused"
        ]
    );
    assert_eq!((target.status(), target.platform.delivered()), (15, vec![]));
    target.function.resume().unwrap();
    assert_eq!(target.platform.delivered(), [0x41, 0x42]);
    target.function.resume().unwrap();
    assert_eq!(target.platform.delivered().len(), 2);
    assert_eq!(target.function.info().counters["things"], 3);
}

#[test]
fn a_state_of_another_device_is_refused() {
    let source = rig();
    let good = source.function.save().unwrap();
    let refused = |change: &dyn Fn(&mut SavedFunction), why: &str| {
        let mut saved = good.clone();
        change(&mut saved);
        let error = rig().function.restore(saved).unwrap_err().to_string();
        assert!(error.contains(why), "{error}");
    };
    refused(&|saved| saved.version = 9, "version 9");
    refused(&|saved| saved.slot = 3, "slot 3");
    refused(&|saved| saved.config.truncate(9), "9 bytes");
    refused(&|saved| saved.vectors.truncate(1), "1 vectors");
}

#[derive(Clone, Debug)]
enum Access {
    ReadConfig(u16, usize),
    WriteConfig(u16, Vec<u8>),
    ReadBar(u32, usize),
    WriteBar(u32, Vec<u8>),
    Interrupt(u16),
    Travel,
}

fn access() -> impl Strategy<Value = Access> {
    let width = prop_oneof![Just(1usize), Just(2), Just(4), Just(8)];
    let data = width
        .clone()
        .prop_flat_map(|width| prop::collection::vec(any::<u8>(), width));
    // Mostly where there are registers, sometimes anywhere.
    let config = prop_oneof![0u16..0x100, any::<u16>()];
    let bar = prop_oneof![
        4 => 0u32..0x40,
        1 => 0x1000u32..0x1004,
        1 => 0x2000u32..0x2010,
        1 => 0x3000u32..0x3010,
        2 => 0x4000u32..0x4040,
        1 => 0x5000u32..0x5010,
        1 => 0u32..BAR_BYTES,
    ];
    let status = prop::sample::select(vec![0u8, 1, 3, 11, 15, 0x8f, 0xff]);
    prop_oneof![
        1 => (config.clone(), width.clone()).prop_map(|(at, width)| Access::ReadConfig(at, width)),
        1 => (config, data.clone()).prop_map(|(at, data)| Access::WriteConfig(at, data)),
        1 => (bar.clone(), width).prop_map(|(at, width)| Access::ReadBar(at, width)),
        3 => (bar, data).prop_map(|(at, data)| Access::WriteBar(at, data)),
        1 => status.prop_map(|status| Access::WriteBar(0x14, vec![status])),
        1 => any::<u16>().prop_map(|index| Access::Interrupt(index % 4)),
        1 => Just(Access::Travel),
    ]
}

proptest! {
    #[test]
    fn no_sequence_of_accesses_breaks_a_function(accesses in prop::collection::vec(access(), 1..120), driven in any::<bool>()) {
        let mut rig = rig();
        if driven {
            rig.drive(0x1_0000);
        }
        for access in accesses {
            match access {
                Access::ReadConfig(at, width) => rig.function.read_config(at, &mut vec![0; width]),
                Access::WriteConfig(at, data) => rig.function.write_config(at, &data),
                Access::ReadBar(at, width) => rig.function.read_bar(at, &mut vec![0; width]),
                Access::WriteBar(at, data) => rig.function.write_bar(at, &data),
                Access::Interrupt(index) => rig.function.signals.queue(index),
                Access::Travel => {
                    rig.function.pause().unwrap();
                    let saved = rig.function.save().unwrap();
                    let mut next = self::rig();
                    next.function.restore(saved).unwrap();
                    prop_assert_eq!(next.function.info().driver, rig.function.info().driver);
                    next.function.resume().unwrap();
                    rig = next;
                }
            }
        }
    }

    #[test]
    fn a_hostile_state_is_refused_or_taken_but_never_breaks_the_function(
        status in any::<u8>(),
        size in any::<u16>(),
        ring in any::<u64>(),
        vector in any::<u16>(),
        positions in any::<(u16, u16)>(),
        config in prop::collection::vec(any::<u8>(), 256),
    ) {
        let mut source = rig();
        source.drive(0x1_0000);
        source.function.pause().unwrap();
        let mut saved = source.function.save().unwrap();
        saved.config = config;
        let mut hostile = CommonRegisters::new(1 << 9, &[256, 64], 3);
        hostile.restore(saved.common.clone()).unwrap();
        let queue = hostile.queue_mut(0).unwrap();
        (queue.size, queue.descriptors, queue.vector) = (size, ring, vector);
        (queue.next_avail, queue.next_used) = positions;
        hostile.write(0x14, &[status | 1]);
        saved.common = hostile.save();
        let mut target = rig();
        if target.function.restore(saved).is_ok() {
            target.function.resume().unwrap();
            target.function.pause().unwrap();
            target.function.save().unwrap();
        }
    }
}

#[test]
fn a_bus_answers_with_ones_where_nothing_is() {
    let mut bus = PciBus::new(0xc000_0000);
    let rig = rig();
    assert_eq!(bus.bar_of(SLOT), BAR);
    bus.insert(rig.function);
    let mut data = [0; 4];
    bus.read_config(0, &mut data);
    assert_eq!(data, [0x36, 0x1b, 0x08, 0x00]);
    bus.read_config(u64::from(SLOT) << 15, &mut data);
    assert_eq!(data, [0xf4, 0x1a, 0x42, 0x10]);
    for nothing in [1 << 15, (u64::from(SLOT) << 15) + 4096, 1 << 20, u64::MAX] {
        bus.read_config(nothing, &mut data);
        assert_eq!(data, [0xff; 4], "{nothing:#x}");
        bus.write_config(nothing, &[1]);
    }
    // Memory is off until the guest allows it.
    bus.read(u64::from(BAR) + 0x12, &mut data);
    assert_eq!(data, [0xff; 4]);
    bus.write_config((u64::from(SLOT) << 15) + 4, &2u16.to_le_bytes());
    let mut queues = [0; 2];
    bus.read(u64::from(BAR) + 0x12, &mut queues);
    assert_eq!(queues, [2, 0]);
    bus.write_config(
        (u64::from(SLOT) << 15) + 0x10,
        &0xd000_0000u32.to_le_bytes(),
    );
    bus.read(0xd000_0012, &mut queues);
    assert_eq!(queues, [2, 0]);
    bus.read(u64::from(BAR) + 0x12, &mut queues);
    assert_eq!(queues, [0xff; 2]);
}
