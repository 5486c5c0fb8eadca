//! Configuration space of one function (PCI Local Bus specification 3.0, chapter 6): bytes, and which of their bits
//! the guest may write.

/// Bytes that a conventional function has; what lies behind reads as zero.
pub const CONFIG_BYTES: usize = 256;

pub(super) const COMMAND: usize = 0x04;
pub(super) const BAR0: usize = 0x10;
const STATUS: usize = 0x06;
const REVISION: usize = 0x08;
const CLASS: usize = 0x09;
const SUBSYSTEM: usize = 0x2c;
const CAPABILITIES: usize = 0x34;
const INTERRUPT_LINE: usize = 0x3c;
const FIRST_CAPABILITY: usize = 0x40;

/// Command register: the function answers in memory.
pub(super) const COMMAND_MEMORY: u16 = 1 << 1;
const COMMAND_BUS_MASTER: u16 = 1 << 2;
const COMMAND_INTX_DISABLE: u16 = 1 << 10;
const STATUS_CAPABILITIES: u16 = 1 << 4;

/// What a function is.
#[derive(Clone, Copy, Debug)]
pub(super) struct Identity {
    pub(super) vendor: u16,
    pub(super) device: u16,
    /// Class, subclass and programming interface, from the highest byte down.
    pub(super) class: u32,
    pub(super) revision: u8,
    pub(super) subsystem: u16,
}

/// The registers of one function.
#[derive(Clone, Debug)]
pub(super) struct ConfigSpace {
    bytes: [u8; CONFIG_BYTES],
    /// Bits the guest may write.
    writable: [u8; CONFIG_BYTES],
    /// Where the next capability goes, and the pointer that will name it.
    next: usize,
    link: usize,
}

impl ConfigSpace {
    pub(super) fn new(identity: Identity) -> Self {
        let mut space = Self {
            bytes: [0; CONFIG_BYTES],
            writable: [0; CONFIG_BYTES],
            next: FIRST_CAPABILITY,
            link: CAPABILITIES,
        };
        space.put(0, &identity.vendor.to_le_bytes());
        space.put(2, &identity.device.to_le_bytes());
        space.put(REVISION, &[identity.revision]);
        space.put(CLASS, &identity.class.to_le_bytes()[..3]);
        space.put(SUBSYSTEM, &identity.vendor.to_le_bytes());
        space.put(SUBSYSTEM + 2, &identity.subsystem.to_le_bytes());
        let command = COMMAND_MEMORY | COMMAND_BUS_MASTER | COMMAND_INTX_DISABLE;
        space.allow(COMMAND, &command.to_le_bytes());
        space.allow(INTERRUPT_LINE, &[0xff]);
        space
    }

    /// Gives the function `bytes` (a power of two) of 32-bit memory at `address` behind BAR 0.
    pub(super) fn set_bar0(&mut self, address: u32, bytes: u32) {
        assert!(
            bytes.is_power_of_two() && bytes >= 16 && address.is_multiple_of(bytes),
            "a BAR is aligned to its size"
        );
        self.put(BAR0, &address.to_le_bytes());
        self.allow(BAR0, &(!(bytes - 1)).to_le_bytes());
    }

    /// Appends a capability; `body` follows its id and its pointer to the next. Gives where it begins.
    pub(super) fn add_capability(&mut self, id: u8, body: &[u8]) -> usize {
        let at = self.next;
        self.put(self.link, &[at as u8]);
        self.put(at, &[id, 0]);
        self.put(at + 2, body);
        self.link = at + 1;
        self.next = (at + 2 + body.len()).next_multiple_of(4);
        assert!(self.next <= CONFIG_BYTES, "all capabilities have room");
        let status = self.u16(STATUS) | STATUS_CAPABILITIES;
        self.put(STATUS, &status.to_le_bytes());
        at
    }

    /// Lets the guest write the bits of `mask` from `offset` on.
    pub(super) fn allow(&mut self, offset: usize, mask: &[u8]) {
        self.writable[offset..offset + mask.len()].copy_from_slice(mask);
    }

    /// Sets bytes, whatever the guest may do.
    pub(super) fn put(&mut self, offset: usize, bytes: &[u8]) {
        self.bytes[offset..offset + bytes.len()].copy_from_slice(bytes);
    }

    pub(super) fn u16(&self, offset: usize) -> u16 {
        u16::from_le_bytes([self.bytes[offset], self.bytes[offset + 1]])
    }

    pub(super) fn u32(&self, offset: usize) -> u32 {
        u32::from(self.u16(offset)) | u32::from(self.u16(offset + 2)) << 16
    }

    /// The guest reads.
    pub(super) fn read(&self, offset: usize, data: &mut [u8]) {
        for (number, byte) in data.iter_mut().enumerate() {
            *byte = self.bytes.get(offset + number).copied().unwrap_or(0);
        }
    }

    /// The guest writes.
    pub(super) fn write(&mut self, offset: usize, data: &[u8]) {
        for (number, value) in data.iter().enumerate() {
            let at = offset + number;
            if at < CONFIG_BYTES {
                let writable = self.writable[at];
                self.bytes[at] = self.bytes[at] & !writable | value & writable;
            }
        }
    }

    /// Where the function answers in memory, if it does.
    pub(super) fn bar0(&self) -> Option<u64> {
        (self.u16(COMMAND) & COMMAND_MEMORY != 0).then(|| u64::from(self.u32(BAR0) & !0xf))
    }

    /// The registers as they are.
    pub(super) const fn bytes(&self) -> &[u8; CONFIG_BYTES] {
        &self.bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const IDENTITY: Identity = Identity {
        vendor: 0x1af4,
        device: 0x1042,
        class: 0x01_8000,
        revision: 1,
        subsystem: 0x1100,
    };

    #[test]
    fn writing_ones_to_a_bar_tells_its_size_and_the_address_comes_back() {
        let mut space = ConfigSpace::new(IDENTITY);
        space.set_bar0(0xc000_8000, 0x8000);
        space.write(BAR0, &[0xff; 4]);
        assert_eq!(space.u32(BAR0), 0xffff_8000);
        space.write(BAR0, &0xc000_8000u32.to_le_bytes());
        assert_eq!(space.u32(BAR0), 0xc000_8000);
        assert_eq!(space.bar0(), None);
        space.write(COMMAND, &COMMAND_MEMORY.to_le_bytes());
        assert_eq!(space.bar0(), Some(0xc000_8000));
        space.write(BAR0 + 4, &[0xff; 4]);
        assert_eq!(space.u32(BAR0 + 4), 0);
    }

    #[test]
    fn capabilities_form_a_chain_from_the_pointer_on() {
        let mut space = ConfigSpace::new(IDENTITY);
        let first = space.add_capability(9, &[0; 14]);
        let second = space.add_capability(0x11, &[0; 10]);
        assert_eq!(space.bytes()[CAPABILITIES] as usize, first);
        assert_eq!(space.bytes()[first + 1] as usize, second);
        assert_eq!(
            (space.bytes()[second], space.bytes()[second + 1]),
            (0x11, 0)
        );
    }

    proptest! {
        #[test]
        fn the_guest_changes_only_what_it_may(offset in 0usize..300, data in prop::collection::vec(any::<u8>(), 1..8)) {
            let mut space = ConfigSpace::new(IDENTITY);
            space.set_bar0(0xc000_0000, 0x8000);
            let before = space.bytes;
            space.write(offset, &data);
            for (at, (old, new)) in before.iter().zip(&space.bytes).enumerate() {
                prop_assert_eq!(old & !space.writable[at], new & !space.writable[at]);
            }
            let mut read = vec![0; data.len()];
            space.read(offset, &mut read);
        }
    }
}
