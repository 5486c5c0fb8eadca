//! The common configuration structure (virtio 1.2, section 4.1.4.3) as a pure state machine: what the driver writes
//! changes registers, and now and then asks for something to be done.
//!
//! ```text
//!   0 ── ACKNOWLEDGE, DRIVER ──▶ features ── FEATURES_OK ──▶ queues ── DRIVER_OK ──▶ working
//!   ▲                              (dropped again if the driver took what was not offered)      │
//!   └──────────────────────────────────────── 0 (reset) ────────────────────────────────────────┘
//! ```

use serde::{Deserialize, Serialize};
use virtio_queue::{Queue, QueueT};
use vm_memory::GuestAddress;

/// Most queues of one device: each has a notify address, and with one more for configuration changes a vector.
pub const MAX_QUEUES: usize = 63;
/// The driver has not chosen a vector, or chose one that does not exist.
pub(super) const NO_VECTOR: u16 = 0xffff;
/// Bytes of the structure.
pub(super) const COMMON_BYTES: usize = 0x40;

pub(super) const STATUS_FEATURES_OK: u8 = 8;
pub(super) const STATUS_DRIVER_OK: u8 = 4;
pub(super) const STATUS_NEEDS_RESET: u8 = 64;
/// ACKNOWLEDGE, DRIVER, DRIVER_OK, FEATURES_OK, FAILED.
const STATUS_WRITABLE: u8 = 1 | 2 | 4 | 8 | 128;

/// `VIRTIO_F_INDIRECT_DESC`, `VIRTIO_F_EVENT_IDX`, `VIRTIO_F_VERSION_1`: offered for every device.
pub(super) const TRANSPORT_FEATURES: u64 = 1 << 28 | EVENT_IDX | VERSION_1;
const EVENT_IDX: u64 = 1 << 29;
const VERSION_1: u64 = 1 << 32;

/// What a write asks to be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Effect {
    /// Nothing.
    None,
    /// The driver is ready.
    Activate,
    /// The device goes back to its first state.
    Reset,
    /// Configuration changes are announced through this vector.
    ConfigVector(u16),
    /// Used buffers of this queue are announced through this vector.
    QueueVector(u16, u16),
}

/// Registers of one virtqueue.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct QueueRegisters {
    /// Number of descriptors.
    pub size: u16,
    /// Whether the driver has enabled it.
    pub enabled: bool,
    /// Descriptor table.
    pub descriptors: u64,
    /// Driver area (available ring).
    pub driver: u64,
    /// Device area (used ring).
    pub device: u64,
    /// MSI-X vector.
    pub vector: u16,
    /// Next available entry the device will take.
    pub next_avail: u16,
    /// Next used entry the device will write.
    pub next_used: u16,
}

impl QueueRegisters {
    const fn new(max_size: u16) -> Self {
        Self {
            size: max_size,
            enabled: false,
            descriptors: 0,
            driver: 0,
            device: 0,
            vector: NO_VECTOR,
            next_avail: 0,
            next_used: 0,
        }
    }
}

/// The registers, for saving.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct SavedCommon {
    status: u8,
    device_feature_select: u32,
    driver_feature_select: u32,
    accepted: u64,
    accepted_beyond: bool,
    config_vector: u16,
    queue_select: u16,
    queues: Vec<QueueRegisters>,
}

/// What the registers show that changes without the driver.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Live {
    /// Counts configuration changes.
    pub(super) generation: u8,
    /// The device has given up on its driver.
    pub(super) needs_reset: bool,
}

/// See the module's documentation.
#[derive(Clone, Debug)]
pub(super) struct CommonRegisters {
    offered: u64,
    max_sizes: Vec<u16>,
    vectors: u16,
    state: SavedCommon,
}

impl CommonRegisters {
    /// `vectors` is the size of the MSI-X table.
    pub(super) fn new(device_features: u64, max_sizes: &[u16], vectors: u16) -> Self {
        assert!(max_sizes.len() <= MAX_QUEUES, "a device has few queues");
        assert!(
            max_sizes.iter().all(|size| size.is_power_of_two()),
            "queue sizes are powers of two"
        );
        let mut registers = Self {
            offered: device_features | TRANSPORT_FEATURES,
            max_sizes: max_sizes.to_vec(),
            vectors,
            state: SavedCommon {
                status: 0,
                device_feature_select: 0,
                driver_feature_select: 0,
                accepted: 0,
                accepted_beyond: false,
                config_vector: NO_VECTOR,
                queue_select: 0,
                queues: Vec::new(),
            },
        };
        registers.reset();
        registers
    }

    /// Back to the first state.
    pub(super) fn reset(&mut self) {
        self.state = SavedCommon {
            status: 0,
            device_feature_select: 0,
            driver_feature_select: 0,
            accepted: 0,
            accepted_beyond: false,
            config_vector: NO_VECTOR,
            queue_select: 0,
            queues: self
                .max_sizes
                .iter()
                .map(|size| QueueRegisters::new(*size))
                .collect(),
        };
    }

    pub(super) const fn status(&self) -> u8 {
        self.state.status
    }

    /// Feature bits the driver accepted.
    pub(super) const fn accepted(&self) -> u64 {
        self.state.accepted
    }

    pub(super) const fn config_vector(&self) -> u16 {
        self.state.config_vector
    }

    pub(super) fn queues(&self) -> &[QueueRegisters] {
        &self.state.queues
    }

    pub(super) fn queue_mut(&mut self, index: u16) -> Option<&mut QueueRegisters> {
        self.state.queues.get_mut(usize::from(index))
    }

    /// The driver reads; any width and alignment.
    pub(super) fn read(&self, offset: usize, data: &mut [u8], live: Live) {
        let image = self.image(live);
        for (number, byte) in data.iter_mut().enumerate() {
            *byte = image.get(offset + number).copied().unwrap_or(0);
        }
    }

    fn image(&self, live: Live) -> [u8; COMMON_BYTES] {
        let state = &self.state;
        let mut image = [0; COMMON_BYTES];
        let mut put = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
        put(0x00, &state.device_feature_select.to_le_bytes());
        put(
            0x04,
            &half(self.offered, state.device_feature_select).to_le_bytes(),
        );
        put(0x08, &state.driver_feature_select.to_le_bytes());
        put(
            0x0c,
            &half(state.accepted, state.driver_feature_select).to_le_bytes(),
        );
        put(0x10, &state.config_vector.to_le_bytes());
        put(0x12, &(state.queues.len() as u16).to_le_bytes());
        let broken = if live.needs_reset {
            STATUS_NEEDS_RESET
        } else {
            0
        };
        put(0x14, &[state.status | broken, live.generation]);
        put(0x16, &state.queue_select.to_le_bytes());
        match state.queues.get(usize::from(state.queue_select)) {
            // A size of 0 says that there is no such queue.
            None => put(0x1a, &NO_VECTOR.to_le_bytes()),
            Some(queue) => {
                put(0x18, &queue.size.to_le_bytes());
                put(0x1a, &queue.vector.to_le_bytes());
                put(0x1c, &u16::from(queue.enabled).to_le_bytes());
                put(0x1e, &state.queue_select.to_le_bytes());
                put(0x20, &queue.descriptors.to_le_bytes());
                put(0x28, &queue.driver.to_le_bytes());
                put(0x30, &queue.device.to_le_bytes());
            }
        }
        image
    }

    /// The driver writes; only the widths the specification names do anything.
    pub(super) fn write(&mut self, offset: usize, data: &[u8]) -> Effect {
        match (offset, data) {
            (0x14, [status]) => return self.write_status(*status),
            (_, &[a, b]) => return self.write_u16(offset, u16::from_le_bytes([a, b])),
            (_, &[a, b, c, d]) => self.write_u32(offset, u32::from_le_bytes([a, b, c, d])),
            (0x20 | 0x28 | 0x30, &[a, b, c, d, e, f, g, h]) => {
                self.write_u32(offset, u32::from_le_bytes([a, b, c, d]));
                self.write_u32(offset + 4, u32::from_le_bytes([e, f, g, h]));
            }
            _ => {}
        }
        Effect::None
    }

    fn write_status(&mut self, value: u8) -> Effect {
        if value == 0 {
            return Effect::Reset;
        }
        let before = self.state.status;
        // Bits are only ever added: a driver takes them back by a reset.
        let mut status = before | value & STATUS_WRITABLE;
        if status & !before & STATUS_FEATURES_OK != 0 && !self.features_fit() {
            status &= !STATUS_FEATURES_OK;
        }
        self.state.status = status;
        if status & !before & STATUS_DRIVER_OK != 0 {
            Effect::Activate
        } else {
            Effect::None
        }
    }

    const fn features_fit(&self) -> bool {
        self.state.accepted & !self.offered == 0
            && !self.state.accepted_beyond
            && self.state.accepted & VERSION_1 != 0
    }

    fn write_u16(&mut self, offset: usize, value: u16) -> Effect {
        let known_vector = if value < self.vectors {
            value
        } else {
            NO_VECTOR
        };
        let selected = self.state.queue_select;
        match offset {
            0x10 => {
                self.state.config_vector = known_vector;
                return Effect::ConfigVector(known_vector);
            }
            0x16 => self.state.queue_select = value,
            0x1a => {
                if let Some(queue) = self.queue_mut(selected) {
                    queue.vector = known_vector;
                    return Effect::QueueVector(selected, known_vector);
                }
            }
            0x18 => {
                if let Some(queue) = self.queue_in_setup() {
                    queue.size = value;
                }
            }
            0x1c if value == 1 => {
                if let Some(queue) = self.queue_in_setup() {
                    queue.enabled = true;
                }
            }
            _ => {}
        }
        Effect::None
    }

    fn write_u32(&mut self, offset: usize, value: u32) {
        let state = &mut self.state;
        match offset {
            0x00 => state.device_feature_select = value,
            0x08 => state.driver_feature_select = value,
            0x0c if state.status & STATUS_FEATURES_OK == 0 => match state.driver_feature_select {
                0 => state.accepted = state.accepted & !0xffff_ffff | u64::from(value),
                1 => state.accepted = state.accepted & 0xffff_ffff | u64::from(value) << 32,
                _ => state.accepted_beyond |= value != 0,
            },
            0x20..0x38 => {
                let Some(queue) = self.queue_in_setup() else {
                    return;
                };
                let area = match offset & !7 {
                    0x20 => &mut queue.descriptors,
                    0x28 => &mut queue.driver,
                    _ => &mut queue.device,
                };
                match offset & 7 {
                    0 => *area = *area & !0xffff_ffff | u64::from(value),
                    4 => *area = *area & 0xffff_ffff | u64::from(value) << 32,
                    _ => {}
                }
            }
            _ => {}
        }
    }

    /// The selected queue, as long as the driver may still set it up.
    fn queue_in_setup(&mut self) -> Option<&mut QueueRegisters> {
        if self.state.status & STATUS_DRIVER_OK != 0 {
            return None;
        }
        self.queue_mut(self.state.queue_select)
            .filter(|queue| !queue.enabled)
    }

    /// The queue as devices use it; the error says what is wrong with it. Whether it lies in guest memory is not
    /// judged here.
    pub(super) fn queue(&self, index: u16) -> Result<Queue, String> {
        let at = usize::from(index);
        let (Some(registers), Some(max_size)) = (self.state.queues.get(at), self.max_sizes.get(at))
        else {
            return Err(format!("queue {index} does not exist"));
        };
        let bad =
            |what: &str, error: virtio_queue::Error| format!("queue {index}: {what}: {error}");
        let mut queue =
            Queue::new(*max_size).map_err(|error| bad("the device's own size", error))?;
        queue
            .try_set_size(registers.size)
            .map_err(|error| bad(&format!("size {}", registers.size), error))?;
        queue
            .try_set_desc_table_address(GuestAddress(registers.descriptors))
            .map_err(|error| bad("descriptor table", error))?;
        queue
            .try_set_avail_ring_address(GuestAddress(registers.driver))
            .map_err(|error| bad("available ring", error))?;
        queue
            .try_set_used_ring_address(GuestAddress(registers.device))
            .map_err(|error| bad("used ring", error))?;
        queue.set_next_avail(registers.next_avail);
        queue.set_next_used(registers.next_used);
        queue.set_event_idx(self.state.accepted & EVENT_IDX != 0);
        queue.set_ready(true);
        Ok(queue)
    }

    /// The registers as they travel.
    pub(super) fn save(&self) -> SavedCommon {
        self.state.clone()
    }

    /// Takes over saved registers; the error says what no driver could have brought about.
    pub(super) fn restore(&mut self, saved: SavedCommon) -> Result<(), String> {
        if saved.queues.len() != self.max_sizes.len() {
            return Err(format!(
                "it has {} queues and this device {}",
                saved.queues.len(),
                self.max_sizes.len()
            ));
        }
        if saved.status & !STATUS_WRITABLE != 0 {
            return Err(format!("its status is {:#x}", saved.status));
        }
        if saved.status & STATUS_FEATURES_OK != 0
            && (saved.accepted & !self.offered != 0
                || saved.accepted_beyond
                || saved.accepted & VERSION_1 == 0)
        {
            return Err(format!(
                "its driver accepted features {:#x} of {:#x}",
                saved.accepted, self.offered
            ));
        }
        let bad_vector = |vector: u16| vector != NO_VECTOR && vector >= self.vectors;
        if bad_vector(saved.config_vector)
            || saved.queues.iter().any(|queue| bad_vector(queue.vector))
        {
            return Err(format!("it uses a vector past its {}", self.vectors));
        }
        self.state = saved;
        Ok(())
    }
}

/// The lower or upper half of 64 feature bits; there are no more.
const fn half(bits: u64, select: u32) -> u32 {
    match select {
        0 => bits as u32,
        1 => (bits >> 32) as u32,
        _ => 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DEVICE: u64 = 1 << 9;

    fn registers() -> CommonRegisters {
        CommonRegisters::new(DEVICE, &[256, 128], 3)
    }

    fn read_u32(registers: &CommonRegisters, offset: usize) -> u32 {
        let mut data = [0; 4];
        registers.read(offset, &mut data, Live::default());
        u32::from_le_bytes(data)
    }

    fn status(registers: &CommonRegisters) -> u8 {
        read_u32(registers, 0x14) as u8
    }

    fn accept(registers: &mut CommonRegisters, features: u64) {
        for select in 0..2u32 {
            registers.write(0x08, &select.to_le_bytes());
            registers.write(0x0c, &half(features, select).to_le_bytes());
        }
    }

    #[test]
    fn features_that_were_not_offered_are_refused_and_version_1_is_a_must() {
        for (features, taken) in [
            (VERSION_1 | DEVICE, true),
            (VERSION_1, true),
            (DEVICE, false),
            (VERSION_1 | 1 << 40, false),
        ] {
            let mut registers = registers();
            accept(&mut registers, features);
            registers.write(0x14, &[1 | 2 | STATUS_FEATURES_OK]);
            assert_eq!(
                status(&registers) & STATUS_FEATURES_OK != 0,
                taken,
                "{features:#x}"
            );
        }
        let mut registers = registers();
        accept(&mut registers, VERSION_1);
        registers.write(0x08, &2u32.to_le_bytes());
        registers.write(0x0c, &1u32.to_le_bytes());
        registers.write(0x14, &[STATUS_FEATURES_OK]);
        assert_eq!(status(&registers), 0);
    }

    #[test]
    fn accepted_features_cannot_be_changed_afterwards() {
        let mut registers = registers();
        accept(&mut registers, VERSION_1);
        registers.write(0x14, &[STATUS_FEATURES_OK]);
        accept(&mut registers, VERSION_1 | 1 << 50);
        assert_eq!(registers.accepted(), VERSION_1);
    }

    #[test]
    fn a_queue_that_does_not_exist_has_size_0() {
        let mut registers = registers();
        registers.write(0x16, &1u16.to_le_bytes());
        assert_eq!(read_u32(&registers, 0x18) as u16, 128);
        assert_eq!(read_u32(&registers, 0x1c) >> 16, 1);
        registers.write(0x16, &7u16.to_le_bytes());
        assert_eq!(read_u32(&registers, 0x18), u32::from(NO_VECTOR) << 16);
        registers.write(0x1c, &1u16.to_le_bytes());
        assert!(registers.queue(7).is_err());
    }

    #[test]
    fn a_vector_past_the_table_reads_back_as_none() {
        let mut registers = registers();
        assert_eq!(
            registers.write(0x10, &2u16.to_le_bytes()),
            Effect::ConfigVector(2)
        );
        assert_eq!(
            registers.write(0x1a, &3u16.to_le_bytes()),
            Effect::QueueVector(0, NO_VECTOR)
        );
    }

    #[test]
    fn an_enabled_queue_keeps_its_addresses() {
        let mut registers = registers();
        registers.write(0x20, &0x1_0000_4000u64.to_le_bytes());
        registers.write(0x18, &64u16.to_le_bytes());
        registers.write(0x1c, &1u16.to_le_bytes());
        registers.write(0x20, &0x5000u32.to_le_bytes());
        let queue = &registers.queues()[0];
        assert_eq!((queue.size, queue.descriptors), (64, 0x1_0000_4000));
    }

    #[test]
    fn needs_reset_and_generation_are_shown_with_the_status() {
        let mut data = [0; 2];
        let live = Live {
            generation: 7,
            needs_reset: true,
        };
        registers().read(0x14, &mut data, live);
        assert_eq!(data, [STATUS_NEEDS_RESET, 7]);
    }
}
