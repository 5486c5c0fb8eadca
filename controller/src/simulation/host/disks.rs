//! The disks of the VMs on a simulated host.
//!
//! A disk is blank until something has been written to it: by a VM that runs with it, or by a migration that brings its
//! content. A VM that has run never finds a blank disk.

use super::{SimHost, refuse};
use godwit_wire::devices::DiskSource;
use godwit_wire::host_api::PrepareIncoming;
use godwit_wire::id::{DiskId, MigrationId, PoolId, VmId};
use godwit_wire::machine::MachineSpec;
use godwit_wire::problem::Problem;
use godwit_wire::storage::ANOTHER_COPY;
use godwit_wire::vmm_api::VmmState;

pub(super) fn of(spec: &MachineSpec) -> Vec<(PoolId, DiskId)> {
    crate::view::attachments(spec)
        .map(|attached| (attached.pool, attached.disk))
        .collect()
}

impl SimHost {
    /// Every disk must be there, whole, before a VM that has it comes.
    pub(super) fn check_disks(&self, spec: &MachineSpec) -> Result<(), Problem> {
        for attached in crate::view::attachments(spec) {
            if !self.pool(attached.pool)?.can_use(attached.disk) {
                return Err(refuse("no-disk"));
            }
        }
        Ok(())
    }

    /// What the content goes over must be blank and whole by itself.
    pub(super) fn check_arriving(
        &self,
        vm: VmId,
        command: &PrepareIncoming,
    ) -> Result<(), Problem> {
        if self.has_begun(vm, command) {
            return Ok(());
        }
        for device in &command.spec.devices.disks {
            let DiskSource::Volume { pool, disk } = &device.source else {
                continue;
            };
            let arrives = command.arriving_disks.contains(&device.name);
            if arrives && !self.pool(*pool)?.is_blank(*disk) {
                return Err(refuse("disk-not-blank"));
            }
        }
        Ok(())
    }

    fn has_begun(&self, vm: VmId, command: &PrepareIncoming) -> bool {
        let state = self.state();
        let known = state.vms.get(&vm).and_then(|vm| vm.migration.as_ref());
        known.is_some_and(|known| known.migration == command.migration)
    }

    /// The VM, or a migration that fills it, has written to all of its disks.
    pub(super) fn write_disks(&self, vm: VmId) {
        let known = self.state().vms.get(&vm).cloned();
        let Some(known) = known else { return };
        for (pool, disk) in &known.disks {
            if let Ok(pool) = self.pool(*pool) {
                pool.write(*disk);
            }
        }
    }

    /// Deletes a disk, unless a VMM of any host has it open.
    pub(in crate::simulation) fn delete_disk(
        &self,
        pool: PoolId,
        disk: DiskId,
    ) -> Result<(), Problem> {
        let hosts = self.hosts.get().unwrap();
        if hosts.values().any(|host| host.has_open(pool, disk)) {
            return Err(refuse("disk-in-use"));
        }
        self.pool(pool)?.delete_disk(disk)
    }

    /// As [`delete_disk`](Self::delete_disk), but only the one that was made for `made_for`, or the original.
    pub(in crate::simulation) fn erase_copy(
        &self,
        pool: PoolId,
        disk: DiskId,
        made_for: Option<MigrationId>,
    ) -> Result<(), Problem> {
        let found = self.pool(pool)?.disk(disk);
        if found.is_ok_and(|found| found.made_for != made_for) {
            return Err(refuse(ANOTHER_COPY));
        }
        self.delete_disk(pool, disk)
    }

    fn has_open(&self, pool: PoolId, disk: DiskId) -> bool {
        let state = self.state();
        state.vms.values().any(|vm| {
            let open = matches!(vm.state, Some(VmmState::Running | VmmState::Incoming));
            open && vm.disks.contains(&(pool, disk))
        })
    }
}
