//! Disks that move along with their VM, because its new host does not see the storage pool they are in.

use super::Migration;
use godwit_wire::devices::{DiskFormat, DiskSource};
use godwit_wire::id::{DiskId, ImageId, MigrationId, PoolId};
use godwit_wire::machine::MachineSpec;
use godwit_wire::unit::Bytes;
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;

/// What becomes of a VM's disks that the target does not see.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "disks", rename_all = "snake_case")]
pub enum DisksOnMove {
    /// They keep the VM from going there.
    #[default]
    SharedOnly,
    /// They move along, into a pool that the target sees.
    Along {
        /// Only into this pool: its id, or the name that the target gives it.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        pool: Option<String>,
    },
}

/// A disk that moves along, as it was when the migration began.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MovingDisk {
    /// Which disk.
    pub disk: DiskId,
    /// Its name in the machine.
    pub name: String,
    /// The pool it leaves.
    pub from: PoolId,
    /// The pool it goes to.
    pub to: PoolId,
    /// Size the guest sees.
    pub bytes: Bytes,
    /// Format, here and there.
    pub format: DiskFormat,
    /// The image it is a thin copy of in the pool it leaves; in the other one it is whole by itself.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub base: Option<ImageId>,
    /// The migration that brought it into the pool it leaves; `None` of one that was made there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub made_for: Option<MigrationId>,
    /// How far the target is.
    pub blank: BlankDisk,
}

/// The blank disk at the target that the content goes to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum BlankDisk {
    /// The target is told to make it; nobody was told to write to it yet.
    Wanted,
    /// It is there. From now on the target may be told to receive, so it is not touched any more.
    Made,
}

impl Migration {
    /// The machine as it is at the target: its disks that move along are in other pools.
    pub fn spec_at_target(&self, spec: &MachineSpec) -> MachineSpec {
        let mut spec = spec.clone();
        for device in &mut spec.devices.disks {
            if let DiskSource::Volume { pool, disk } = &mut device.source
                && let Some(moving) = self.disks.iter().find(|moving| moving.disk == *disk)
            {
                *pool = moving.to;
            }
        }
        spec
    }

    /// Names, in the machine, of the disks that move along.
    pub fn disk_names(&self) -> BTreeSet<String> {
        self.disks.iter().map(|disk| disk.name.clone()).collect()
    }

    /// Size of the disks that move along: at most so much has to be sent of them.
    pub fn disk_bytes(&self) -> Bytes {
        total(self.disks.iter().map(|disk| disk.bytes))
    }
}

/// All of them together.
pub(crate) fn total(sizes: impl Iterator<Item = Bytes>) -> Bytes {
    Bytes(sizes.fold(0, |sum, size| sum.saturating_add(size.0)))
}
