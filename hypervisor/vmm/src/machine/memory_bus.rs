//! Memory without RAM behind it: PCI configuration space and the memory of PCI functions. Whoever is not there reads
//! as all ones and swallows writes.

use super::layout::{ECAM_BYTES, ECAM_START, MMIO_WINDOW};
use godwit_devices::pci::PciBus;
use std::sync::Arc;

/// What vCPUs reach through memory accesses that leave the guest.
#[derive(Clone, Debug, Default)]
pub(super) struct MemoryBus {
    pci: Option<Arc<PciBus>>,
}

impl MemoryBus {
    pub(super) const fn new(pci: Option<Arc<PciBus>>) -> Self {
        Self { pci }
    }

    pub(super) fn read(&self, address: u64, data: &mut [u8]) {
        match (&self.pci, config_offset(address)) {
            (Some(pci), Some(offset)) => pci.read_config(offset, data),
            (Some(pci), None) if MMIO_WINDOW.contains(&address) => pci.read(address, data),
            _ => data.fill(0xff),
        }
    }

    pub(super) fn write(&self, address: u64, data: &[u8]) {
        match (&self.pci, config_offset(address)) {
            (Some(pci), Some(offset)) => pci.write_config(offset, data),
            (Some(pci), None) if MMIO_WINDOW.contains(&address) => pci.write(address, data),
            _ => {}
        }
    }
}

fn config_offset(address: u64) -> Option<u64> {
    address
        .checked_sub(ECAM_START)
        .filter(|offset| *offset < ECAM_BYTES)
}
