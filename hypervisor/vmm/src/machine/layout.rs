//! Where things are in the guest's physical address space, the same in every machine of type `godwit-2`.
//!
//! ```text
//! 0            RAM …                       up to 3 GiB; the rest goes on at 4 GiB
//! 0xc000_0000  BARs of PCI functions       MMIO_WINDOW
//! 0xe000_0000  PCI configuration space     ECAM, one bus
//! 0xfec0_0000  IOAPIC, LAPIC, KVM's own pages
//! ```

use std::ops::Range;

/// Where RAM below 4 GiB ends at the latest.
pub const LOW_RAM_END: u64 = 0xc000_0000;
/// Memory that PCI functions answer in; the host bridge's `_CRS` gives it out.
pub const MMIO_WINDOW: Range<u64> = 0xc000_0000..0xe000_0000;
/// PCI Express configuration space of bus 0 of segment 0 (MCFG).
pub const ECAM_START: u64 = 0xe000_0000;
/// One bus: 32 devices of 8 functions of 4 KiB.
pub const ECAM_BYTES: u64 = 1 << 20;
/// Only bus of the machine.
pub const PCI_BUSES: std::ops::RangeInclusive<u8> = 0..=0;
/// The in-kernel IOAPIC.
pub const IOAPIC_ADDRESS: u32 = 0xfec0_0000;
/// Local APICs in xAPIC mode.
pub const LAPIC_ADDRESS: u32 = 0xfee0_0000;
/// IOAPIC pin of the power button (edge-triggered).
pub const POWER_BUTTON_IRQ: u32 = 5;
