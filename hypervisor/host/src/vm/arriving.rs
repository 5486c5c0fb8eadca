//! Disks whose content comes with a VM: what they have here must be blank.

use super::driver::Driver;
use crate::storage::{Storage, StorageError};
use godwit_wire::devices::{Devices, DiskAccess, DiskSource};
use godwit_wire::host_api::PrepareIncoming;
use godwit_wire::problem::{FieldProblem, Problem};
use godwit_wire::storage::WorkState;
use std::collections::BTreeSet;

impl Driver {
    /// Refuses a VM by the name of a disk that it could not be given here, before anything is begun.
    pub(super) async fn check_arriving_disks(
        &mut self,
        ask: &PrepareIncoming,
    ) -> Result<(), Problem> {
        if ask.arriving_disks.is_empty() {
            return Ok(());
        }
        let storage = self.context.storage.clone();
        let (names, devices) = (ask.arriving_disks.clone(), ask.spec.devices.clone());
        self.unless_doomed(async move {
            // A pool may be slow.
            let checked = tokio::task::spawn_blocking(move || check(&storage, &names, &devices));
            checked
                .await
                .map_err(|error| Problem::internal(error.to_string()))?
        })
        .await
    }
}

fn check(storage: &Storage, names: &BTreeSet<String>, devices: &Devices) -> Result<(), Problem> {
    for name in names {
        let found = devices.disks.iter().find(|disk| disk.name == *name);
        let Some((DiskSource::Volume { pool, disk }, DiskAccess::ReadWrite)) =
            found.map(|disk| (&disk.source, disk.access))
        else {
            let problem =
                format!("{name} is no writable disk of a storage pool that the machine has");
            let remedy = "name disks of the machine, without those that are shared or only read";
            return Err(Problem::invalid(vec![FieldProblem::new(
                "arriving_disks",
                problem,
                remedy,
            )]));
        };
        let report = match storage.disk(*pool, *disk) {
            Err(StorageError::NoSuchDisk(_)) => return Err(not_there(name)),
            other => other.map_err(|error| error.problem())?,
        };
        if report.state != WorkState::Ready {
            return Err(not_there(name));
        }
        if let Some(base) = report.base {
            let detail = format!("what {name} would be copied over is a thin copy of image {base}");
            return Err(Problem::conflict("disk-not-blank", detail)
                .with_remedy("delete it and make a blank disk in its place"));
        }
    }
    Ok(())
}

fn not_there(name: &str) -> Problem {
    let detail = format!("there is no blank disk here for {name}, whose content comes with the VM");
    Problem::conflict("no-blank-disk", detail)
        .with_remedy("make a blank disk of its size in the pool that the machine names")
}
