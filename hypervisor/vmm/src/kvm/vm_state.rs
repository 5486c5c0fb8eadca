//! State of a VM outside its vCPUs: interrupt controllers, timer, clock.

use super::KvmError;
use kvm_bindings::{kvm_clock_data, kvm_irqchip, kvm_pit_state2};
use kvm_ioctls::VmFd;
use serde::{Deserialize, Serialize};

const CHIPS: [u32; 3] = [
    kvm_bindings::KVM_IRQCHIP_PIC_MASTER,
    kvm_bindings::KVM_IRQCHIP_PIC_SLAVE,
    kvm_bindings::KVM_IRQCHIP_IOAPIC,
];

/// Saved with all vCPUs stopped.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct VmState {
    pit: kvm_pit_state2,
    irqchips: Vec<kvm_irqchip>,
    /// Guest's kvmclock in nanoseconds at the moment of saving.
    clock_ns: u64,
}

impl VmState {
    /// Reads the state. vCPUs must be stopped; `clock_ns` is kvmclock as sampled together with their TSCs.
    pub fn save(vm: &VmFd, clock_ns: u64) -> Result<Self, KvmError> {
        let mut irqchips = Vec::with_capacity(CHIPS.len());
        for chip_id in CHIPS {
            let mut chip = kvm_irqchip {
                chip_id,
                ..Default::default()
            };
            vm.get_irqchip(&mut chip)
                .map_err(KvmError::during("KVM_GET_IRQCHIP"))?;
            irqchips.push(chip);
        }
        Ok(Self {
            pit: vm.get_pit2().map_err(KvmError::during("KVM_GET_PIT2"))?,
            irqchips,
            clock_ns,
        })
    }

    /// Writes the state to a fresh VM, kvmclock moved on by the time that passed since it was saved: guests
    /// measure the blackout instead of falling behind.
    pub fn restore(&self, vm: &VmFd, elapsed_ns: u64) -> Result<(), KvmError> {
        vm.set_pit2(&self.pit)
            .map_err(KvmError::during("KVM_SET_PIT2"))?;
        let clock = kvm_clock_data {
            clock: self.clock_ns.saturating_add(elapsed_ns),
            ..Default::default()
        };
        vm.set_clock(&clock)
            .map_err(KvmError::during("KVM_SET_CLOCK"))?;
        for chip in &self.irqchips {
            vm.set_irqchip(chip)
                .map_err(KvmError::during("KVM_SET_IRQCHIP"))?;
        }
        Ok(())
    }
}
