//! The driver's part in devices: what they report, and what the operator asks of them.

use super::snapshots::admit_whole_memory;
use super::*;
use godwit_devices::device::DeviceEvent;
use godwit_wire::machine::MIN_MEMORY;
use godwit_wire::unit::Mib;
use godwit_wire::vmm_api::{BalloonRequest, ResizeDisk};

impl Driver {
    /// Makes a disk larger.
    pub(in crate::process) fn resize_disk(
        &mut self,
        name: &str,
        request: ResizeDisk,
    ) -> Result<VmmInfo, Problem> {
        admit_epoch(request.epoch, self.epoch)?;
        match self.machine()?.resize_disk(name, request.bytes) {
            Ok(true) => self.info(),
            Ok(false) => Err(Problem::not_found("disk", name)),
            Err(error) => Err(error.problem("spec")),
        }
    }

    /// Asks the guest to give memory back.
    pub(in crate::process) fn balloon(
        &mut self,
        request: BalloonRequest,
    ) -> Result<VmmInfo, Problem> {
        admit_epoch(request.epoch, self.epoch)?;
        let most = self.spec.as_ref().map_or(Mib(0), |spec| spec.memory_mib);
        if request.keep_mib < MIN_MEMORY || request.keep_mib > most {
            return Err(Problem::invalid(vec![FieldProblem::new(
                "keep_mib",
                format!("{} is outside {MIN_MEMORY} to {most}", request.keep_mib),
                "choose an amount within the machine's memory",
            )]));
        }
        let machine = self.machine()?;
        admit_whole_memory(machine)?;
        if !machine.keep_memory(request.keep_mib) {
            return Err(Problem::conflict(
                "no-balloon",
                "a machine of type godwit-1 has no balloon",
            )
            .with_remedy("use godwit-2"));
        }
        self.keep_memory = Some(request.keep_mib);
        self.info()
    }

    /// A device reports something.
    pub(super) fn handle_device_event(&mut self, event: DeviceEvent) {
        match event {
            DeviceEvent::Stalled { device, reason } => {
                // A machine that stands still for another reason hears of it again when it goes on.
                if *self.state.borrow() != VmmState::Running {
                    return;
                }
                tracing::warn!(
                    device,
                    reason,
                    "the guest stands still until its disk can be written"
                );
                self.stop_vcpus();
                self.enter(VmmState::Paused {
                    reason: PauseReason::Storage {
                        disk: device,
                        detail: reason,
                    },
                });
            }
            DeviceEvent::Failed { device, reason } => {
                tracing::warn!(
                    device,
                    reason,
                    "a device stopped until its driver resets it"
                );
            }
        }
    }
}
