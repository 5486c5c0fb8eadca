//! What a simulated agent is told about migrations.

use super::{SimHost, SimVm, refuse};
use godwit_wire::host_api::{CancelMigration, PrepareIncoming, StartOutgoing, VmReport};
use godwit_wire::id::{MigrationId, VmId};
use godwit_wire::migration::{
    MigrationPhase, MigrationProgress, MigrationRole, MigrationStatus, MigrationToken,
};
use godwit_wire::problem::Problem;
use godwit_wire::unit::Bytes;
use godwit_wire::vmm_api::{IncomingReady, VmmState};
use std::collections::BTreeSet;
use std::sync::Arc;
use tokio::time::Instant;

impl SimHost {
    pub(in crate::simulation) fn prepare_incoming(
        &self,
        vm: VmId,
        command: &PrepareIncoming,
    ) -> Result<IncomingReady, Problem> {
        self.check_disks(&command.spec)?;
        self.check_arriving(vm, command)?;
        let mut state = self.admit(vm, command.epoch, command.generation)?;
        let status = MigrationStatus {
            migration: command.migration,
            sequence: 1,
            role: MigrationRole::Target,
            phase: MigrationPhase::Connecting,
            progress: MigrationProgress::default(),
            connected: false,
            reason: None,
        };
        let known = state.vms.get(&vm).and_then(|vm| vm.migration.as_ref());
        if known.is_none_or(|known| known.migration != command.migration) {
            state.vms.insert(
                vm,
                SimVm {
                    epoch: command.epoch,
                    generation: command.generation,
                    state: Some(VmmState::Incoming),
                    lease: command.lease,
                    migration: Some(status),
                    disks: super::disks::of(&command.spec),
                    successions: BTreeSet::new(),
                },
            );
        }
        self.poke.notify_one();
        Ok(IncomingReady {
            address: state.facts.address,
            token: token_of(command.migration),
        })
    }

    pub(in crate::simulation) fn start_outgoing(
        self: &Arc<Self>,
        vm: VmId,
        command: &StartOutgoing,
    ) -> Result<VmReport, Problem> {
        if command.token != token_of(command.migration) {
            return Err(Problem::conflict(
                "bad-token",
                "this is not the target's token",
            ));
        }
        let mut begun = false;
        let rate_bytes_per_s = self.state().sends_bytes_per_s;
        let report = self.set(vm, command.epoch, command.generation, |vm, _| {
            if vm
                .migration
                .as_ref()
                .is_some_and(|known| known.migration == command.migration)
            {
                return Ok(());
            }
            begun = true;
            vm.migration = Some(MigrationStatus {
                migration: command.migration,
                sequence: 1,
                role: MigrationRole::Source,
                phase: MigrationPhase::PreCopy,
                progress: MigrationProgress {
                    memory_bytes: Bytes(512 << 20),
                    rate_bytes_per_s,
                    ..MigrationProgress::default()
                },
                connected: true,
                reason: None,
            });
            Ok(())
        })?;
        if begun {
            let told = command.fixed_cost_us;
            let share = (vm, command.policy.max_bandwidth_bytes_per_s);
            let mut state = self.state();
            state.told_fixed_cost_us.push(told);
            state.told_bytes_per_s.push(share);
        }
        let hosts = self.hosts.get().unwrap();
        let target = hosts
            .values()
            .find(|host| host.state().facts.address == command.target)
            .cloned();
        if let Some(target) = target.filter(|_| begun) {
            tokio::spawn(super::migration::send(
                self.clone(),
                target,
                vm,
                command.migration,
                (command.epoch, command.policy.post_copy),
            ));
        }
        Ok(report)
    }

    pub(in crate::simulation) fn cancel_migration(
        &self,
        vm: VmId,
        command: &CancelMigration,
    ) -> Result<VmReport, Problem> {
        let mut state = self.state();
        let held = state.lease_held(Instant::now());
        let known = state
            .vms
            .get_mut(&vm)
            .filter(|vm| vm.state.is_some())
            .ok_or_else(|| Problem::not_found("VM", vm))?;
        let status = known
            .migration
            .as_mut()
            .filter(|known| known.migration == command.migration);
        let status = status.ok_or_else(|| Problem::not_found("migration", command.migration))?;
        match (status.role, status.phase) {
            (MigrationRole::Source, MigrationPhase::PreCopy | MigrationPhase::Blackout) => {
                status.phase = MigrationPhase::Cancelled;
                status.reason = Some("cancelled".into());
                let _ = known.run(held);
            }
            (_, phase) if phase.is_final() => {}
            _ => return Err(refuse("too-late")),
        }
        self.poke.notify_one();
        Ok(state.report(vm).unwrap())
    }

    /// The first frame passes a card of a VM that has moved here.
    pub(in crate::simulation) fn first_frame(&self, vm: VmId, migration: MigrationId, gap_us: u64) {
        self.with_migration(vm, migration, |known, _| {
            let status = known.migration.as_mut().unwrap();
            status.progress.packet_gap_us = Some(gap_us);
        });
    }

    pub(super) fn with_migration<T>(
        &self,
        vm: VmId,
        migration: MigrationId,
        change: impl FnOnce(&mut SimVm, bool) -> T,
    ) -> Option<T> {
        let mut state = self.state();
        let held = state.lease_held(Instant::now());
        // A dead VMM takes no part.
        let known = state.vms.get_mut(&vm).filter(|vm| vm.state.is_some())?;
        known
            .migration
            .as_ref()
            .filter(|known| known.migration == migration)?;
        let result = change(known, held);
        self.poke.notify_one();
        Some(result)
    }

    /// Where one end of a migration stands; `None` when it is not there.
    pub(in crate::simulation) fn phase(
        &self,
        vm: VmId,
        migration: MigrationId,
    ) -> Option<MigrationPhase> {
        self.with_migration(vm, migration, |vm, _| {
            vm.migration.as_ref().map(|status| status.phase)
        })?
    }

    pub(super) fn enter(&self, vm: VmId, migration: MigrationId, phase: MigrationPhase) {
        self.with_migration(vm, migration, |vm, _| vm.enter(phase));
    }
}

/// What a simulated target gives out.
fn token_of(migration: MigrationId) -> MigrationToken {
    MigrationToken(format!("token of {migration}"))
}
