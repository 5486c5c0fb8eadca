//! MSI-X (PCI Local Bus specification 3.0, section 6.8.2): one table entry and one pending bit per vector.
//!
//! An interrupt line of the hypervisor is taken when a vector is first used, and routed anew only when the driver has
//! changed its message: routing is slow, and most devices use fewer vectors than they have.

use super::platform::{InterruptLine, MsiMessage, Platform};
use serde::{Deserialize, Serialize};
use std::sync::Arc;

/// Most vectors of one function: the pending bits are one word.
pub(super) const MAX_VECTORS: u16 = 64;
/// Bytes of one table entry.
pub(super) const ENTRY_BYTES: usize = 16;

const CONTROL_ENABLE: u16 = 1 << 15;
const CONTROL_MASK_ALL: u16 = 1 << 14;
/// Bits of the control register that the guest may write.
pub(super) const CONTROL_WRITABLE: u16 = CONTROL_ENABLE | CONTROL_MASK_ALL;
const ENTRY_MASKED: u32 = 1;

/// One table entry as the guest sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Entry {
    address: u64,
    data: u32,
    control: u32,
}

impl Default for Entry {
    fn default() -> Self {
        Self {
            address: 0,
            data: 0,
            control: ENTRY_MASKED,
        }
    }
}

#[derive(Debug)]
struct Line {
    line: Box<dyn InterruptLine>,
    routed: Option<MsiMessage>,
}

/// The MSI-X state of one function.
#[derive(Debug)]
pub(super) struct Msix {
    platform: Arc<dyn Platform>,
    control: u16,
    entries: Vec<Entry>,
    pending: u64,
    lines: Vec<Option<Line>>,
}

impl Msix {
    pub(super) fn new(vectors: u16, platform: Arc<dyn Platform>) -> Self {
        assert!(
            (1..=MAX_VECTORS).contains(&vectors),
            "{vectors} vectors have no room in the pending bits"
        );
        Self {
            platform,
            control: 0,
            entries: vec![Entry::default(); vectors.into()],
            pending: 0,
            lines: (0..vectors).map(|_| None).collect(),
        }
    }

    /// Number of vectors.
    pub(super) const fn vectors(&self) -> u16 {
        self.entries.len() as u16
    }

    /// The guest has written the control register.
    pub(super) fn set_control(&mut self, control: u16) {
        let control = control & CONTROL_WRITABLE;
        if control != self.control {
            self.control = control;
            self.refresh_all();
        }
    }

    /// The guest reads the table.
    pub(super) fn read_table(&self, offset: usize, data: &mut [u8]) {
        let mut bytes = [0; ENTRY_BYTES];
        for (number, byte) in data.iter_mut().enumerate() {
            let at = offset + number;
            let Some(entry) = self.entries.get(at / ENTRY_BYTES) else {
                return;
            };
            bytes[..8].copy_from_slice(&entry.address.to_le_bytes());
            bytes[8..12].copy_from_slice(&entry.data.to_le_bytes());
            bytes[12..].copy_from_slice(&entry.control.to_le_bytes());
            *byte = bytes[at % ENTRY_BYTES];
        }
    }

    /// The guest writes the table; only aligned accesses of 4 and 8 bytes are defined, others are ignored.
    pub(super) fn write_table(&mut self, offset: usize, data: &[u8]) {
        match data.len() {
            4 if offset.is_multiple_of(4) => {
                let value = u32::from_le_bytes([data[0], data[1], data[2], data[3]]);
                self.write_word(offset, value);
            }
            8 if offset.is_multiple_of(8) => {
                let (low, high) = data.split_at(4);
                self.write_table(offset, low);
                self.write_table(offset + 4, high);
            }
            _ => {}
        }
    }

    fn write_word(&mut self, offset: usize, value: u32) {
        let number = offset / ENTRY_BYTES;
        let Some(entry) = self.entries.get_mut(number) else {
            return;
        };
        let before = *entry;
        match offset % ENTRY_BYTES {
            0 => entry.address = entry.address & !0xffff_ffff | u64::from(value),
            4 => entry.address = entry.address & 0xffff_ffff | u64::from(value) << 32,
            8 => entry.data = value,
            _ => entry.control = value & ENTRY_MASKED,
        }
        if *entry != before {
            self.refresh(number);
        }
    }

    /// The guest reads the pending bits.
    pub(super) fn read_pending(&self, offset: usize, data: &mut [u8]) {
        let bytes = self.pending.to_le_bytes();
        for (number, byte) in data.iter_mut().enumerate() {
            *byte = bytes.get(offset + number).copied().unwrap_or(0);
        }
    }

    /// Raises `vector`, or notes that it is pending while it is masked.
    pub(super) fn signal(&mut self, vector: u16) {
        let number = usize::from(vector);
        if number >= self.entries.len() || self.control & CONTROL_ENABLE == 0 {
            return;
        }
        if !self.is_open(number) {
            self.pending |= 1 << number;
        } else if let Some(line) = &self.lines[number] {
            line.line.signal();
        }
    }

    /// The registers, for saving.
    pub(super) fn entries(&self) -> (&[Entry], u64) {
        (&self.entries, self.pending)
    }

    /// Takes over saved registers; the control register follows with [`Self::set_control`]. `false` if there are not
    /// as many as this function has.
    pub(super) fn restore(&mut self, entries: &[Entry], pending: u64) -> bool {
        if entries.len() != self.entries.len() {
            return false;
        }
        self.entries.copy_from_slice(entries);
        for entry in &mut self.entries {
            entry.control &= ENTRY_MASKED;
        }
        let known = u64::MAX >> (64 - self.entries.len());
        self.pending = pending & known;
        self.refresh_all();
        true
    }

    fn is_open(&self, number: usize) -> bool {
        self.control & CONTROL_WRITABLE == CONTROL_ENABLE
            && self.entries[number].control & ENTRY_MASKED == 0
    }

    fn refresh_all(&mut self) {
        for number in 0..self.entries.len() {
            self.refresh(number);
        }
    }

    /// Routes a vector that can be delivered now, and delivers what is pending.
    fn refresh(&mut self, number: usize) {
        if !self.is_open(number) {
            return;
        }
        let Entry { address, data, .. } = self.entries[number];
        let message = MsiMessage { address, data };
        let slot = &mut self.lines[number];
        if slot.is_none() {
            match self.platform.interrupt_line() {
                Ok(line) => *slot = Some(Line { line, routed: None }),
                Err(error) => {
                    tracing::error!(vector = number, %error, "an interrupt line cannot be had");
                    return;
                }
            }
        }
        let Some(line) = slot else { return };
        if line.routed != Some(message) {
            match line.line.route(message) {
                Ok(()) => line.routed = Some(message),
                Err(error) => {
                    tracing::error!(vector = number, ?message, %error, "an interrupt cannot be routed");
                    return;
                }
            }
        }
        if self.pending & 1 << number != 0 {
            self.pending &= !(1 << number);
            line.line.signal();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::virtio::tests::FakePlatform;
    use super::*;

    fn open(msix: &mut Msix, vector: usize, data: u32) {
        let at = vector * ENTRY_BYTES;
        msix.write_table(at, &0xfee0_0000u64.to_le_bytes());
        msix.write_table(at + 8, &data.to_le_bytes());
        msix.write_table(at + 12, &0u32.to_le_bytes());
    }

    #[test]
    fn a_masked_vector_stays_pending_and_comes_when_it_is_unmasked() {
        let platform = FakePlatform::new();
        let mut msix = Msix::new(3, platform.clone());
        msix.signal(1);
        msix.set_control(CONTROL_ENABLE);
        msix.signal(1);
        assert!(platform.delivered().is_empty());
        let mut pending = [0; 8];
        msix.read_pending(0, &mut pending);
        assert_eq!(pending, 2u64.to_le_bytes());
        open(&mut msix, 1, 0x41);
        assert_eq!(platform.delivered(), [0x41]);
        msix.set_control(CONTROL_ENABLE | CONTROL_MASK_ALL);
        msix.signal(1);
        assert_eq!(platform.delivered(), [0x41]);
        msix.set_control(CONTROL_ENABLE);
        assert_eq!(platform.delivered(), [0x41, 0x41]);
    }

    #[test]
    fn a_vector_is_routed_again_only_when_its_message_changes() {
        let platform = FakePlatform::new();
        let mut msix = Msix::new(2, platform.clone());
        msix.set_control(CONTROL_ENABLE);
        open(&mut msix, 0, 0x30);
        for _ in 0..3 {
            msix.write_table(12, &1u32.to_le_bytes());
            msix.write_table(12, &0u32.to_le_bytes());
        }
        assert_eq!(platform.routed(), 1);
        msix.write_table(12, &1u32.to_le_bytes());
        open(&mut msix, 0, 0x31);
        msix.signal(0);
        assert_eq!((platform.routed(), platform.delivered()), (2, vec![0x31]));
    }
}
