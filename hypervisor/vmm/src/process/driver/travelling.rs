//! The driver's part in disks whose content goes with a machine.

use super::*;
use godwit_devices::block::{ArrivingDisk, DiskContent, LeavingDisk};
use std::collections::BTreeSet;

impl Driver {
    /// The disks that leave with the machine; what the guest changes of them is noted from here on.
    pub(super) fn leaving(&self, request: &OutgoingRequest) -> Result<Vec<LeavingDisk>, Problem> {
        self.contents(&request.leaving_disks, "leaving_disks")?
            .iter()
            .map(|disk| disk.leave().map_err(unusable))
            .collect()
    }

    /// The disks that are filled with what arrives, taken under the source's epoch: nobody else may have them.
    pub(super) fn arriving(&self, request: &IncomingRequest) -> Result<Vec<ArrivingDisk>, Problem> {
        self.contents(&request.arriving_disks, "arriving_disks")?
            .iter()
            .map(|disk| disk.arrive(request.epoch).map_err(unusable))
            .collect()
    }

    fn contents(&self, names: &BTreeSet<String>, field: &str) -> Result<Vec<DiskContent>, Problem> {
        let machine = self.machine()?;
        names
            .iter()
            .map(|name| {
                machine.disk_content(name).ok_or_else(|| {
                    Problem::invalid(vec![FieldProblem::new(
                        field,
                        format!("the machine has no disk called {name}"),
                        "name disks of the machine's spec",
                    )])
                })
            })
            .collect()
    }
}

fn unusable(error: godwit_devices::device::DeviceError) -> Problem {
    MachineError::from(error).problem("spec")
}
