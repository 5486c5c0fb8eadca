//! The power button of a `godwit-2` machine: an interrupt that the guest's ACPI takes for a press (see `acpi`).

use super::MachineError;
use super::layout::POWER_BUTTON_IRQ;
use crate::kvm::{KvmError, VmFd};
use vmm_sys_util::eventfd::EventFd;

/// A button that can be pressed from outside. It has no state of its own: a press that the guest has not heard of
/// yet is pending in its interrupt controllers, which are saved and moved with the machine.
#[derive(Debug)]
pub(super) struct PowerButton {
    irq: EventFd,
}

impl PowerButton {
    /// Wires a button to `vm`.
    pub(super) fn new(vm: &VmFd) -> Result<Self, MachineError> {
        let irq = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC).map_err(|source| {
            MachineError::Os {
                what: "an eventfd cannot be had",
                source,
            }
        })?;
        vm.register_irqfd(&irq, POWER_BUTTON_IRQ)
            .map_err(KvmError::during("KVM_IRQFD"))?;
        Ok(Self { irq })
    }

    /// Presses it; what the guest makes of that is up to it.
    pub(super) fn press(&self) -> Result<(), MachineError> {
        self.irq.write(1).map_err(|source| MachineError::Os {
            what: "the power button cannot be pressed",
            source,
        })
    }
}
