//! An immutable picture of everything the controller knows: stored records and what hosts say.
//!
//! A view is cheap to hand out (one `Arc`) and cheap to renew: records are shared between views, so two views
//! can be compared record by record with [`Arc::ptr_eq`].

mod storage;

pub use storage::{Attachment, Pool, PoolHost, attachments, leases};

use crate::model::limits::VMM_OVERHEAD;
use crate::model::{
    Disk, Host, HostState, Image, Liveness, Maintenance, MaintenanceState, Migration, MoveState,
    Network, Operation, OperationState, PowerIntent, ProvisionCause, Retry, Snapshot, StepState,
    Trouble, Vm, VmState, Work,
};
use crate::store::Revision;
use godwit_wire::host_api::{LeasePolicy, VmReport};
use godwit_wire::id::{
    DiskId, Epoch, HostId, ImageId, MaintenanceId, MigrationId, NetworkId, OperationId, SnapshotId,
    VmId,
};
use godwit_wire::migration::{MigrationPhase, MigrationProgress, MigrationRole};
use godwit_wire::storage::PoolReport;
use godwit_wire::unit::Mib;
use godwit_wire::usage::{HostUsage, VmUsage};
use godwit_wire::vmm_api::{PauseReason, StopReason, VmmState};
use jiff::Timestamp;
use serde::Serialize;
use std::collections::BTreeMap;
use std::sync::Arc;
use uuid::Uuid;

/// Records by id.
pub type Records<Id, T> = Arc<BTreeMap<Id, Arc<T>>>;

/// Everything at one instant.
#[derive(Clone, Debug, Default)]
pub struct View {
    /// Grows with every new view, whether records or observations changed.
    pub version: u64,
    /// Revision of the store these records are from.
    pub revision: Revision,
    /// Latest entry of the event log.
    pub event_revision: u64,
    /// VMs.
    pub vms: Records<VmId, Vm>,
    /// Hosts.
    pub hosts: Records<HostId, Host>,
    /// Operations, also ended ones.
    pub operations: Records<OperationId, Operation>,
    /// Maintenances, also ended ones.
    pub maintenances: Records<MaintenanceId, Maintenance>,
    /// Migrations, also ended ones.
    pub migrations: Records<MigrationId, Migration>,
    /// Images.
    pub images: Records<ImageId, Image>,
    /// Disks.
    pub disks: Records<DiskId, Disk>,
    /// Networks.
    pub networks: Records<NetworkId, Network>,
    /// Snapshots.
    pub snapshots: Records<SnapshotId, Snapshot>,
    /// What is known of each host and is not stored.
    pub observed: Records<HostId, Observed>,
    pub(crate) index: Arc<Index>,
}

/// What is known of a host and is not stored.
#[derive(Clone, Debug, PartialEq)]
pub struct Observed {
    /// How it stands.
    pub liveness: Liveness,
    /// When its latest heartbeat came; `None` when none came since this server started.
    pub heard_at: Option<Timestamp>,
    /// Which run of the agent it came from.
    pub incarnation: Option<Uuid>,
    /// Its use, from that heartbeat.
    pub usage: HostUsage,
    /// VMs it owns and does not report, with the number of heartbeats in a row that lacked them.
    pub missing: BTreeMap<VmId, u32>,
    /// Its VMs, from that heartbeat.
    pub vms: BTreeMap<VmId, VmReport>,
    /// Its storage pools, from that heartbeat.
    pub pools: Vec<PoolReport>,
}

impl Observed {
    /// Nothing heard yet.
    pub(crate) fn nothing_yet() -> Self {
        Self {
            liveness: Liveness::Up,
            heard_at: None,
            incarnation: None,
            usage: HostUsage::default(),
            missing: BTreeMap::new(),
            vms: BTreeMap::new(),
            pools: Vec::new(),
        }
    }
}

/// What a host has promised.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Committed {
    /// vCPUs of its VMs.
    pub vcpus: u32,
    /// Memory of its VMs, with what their VMMs need.
    pub memory_mib: Mib,
    /// VMs it owns or is about to receive.
    pub vms: usize,
}

impl Committed {
    fn add(&mut self, vm: &Vm) {
        self.vcpus += u32::from(vm.spec.vcpus);
        self.memory_mib = Mib(self.memory_mib.0 + vm_memory(vm).0);
        self.vms += 1;
    }
}

/// Memory a host has to set aside for a VM.
pub fn vm_memory(vm: &Vm) -> Mib {
    Mib(vm.spec.memory_mib.0 + VMM_OVERHEAD.0)
}

/// State of a VM and why it is in it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VmStatus {
    /// State.
    pub state: VmState,
    /// Why, when that is not obvious.
    pub reason: Option<String>,
}

/// A migration's latest figures.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MigrationFigures {
    /// Phase at the source, if it has said one.
    pub phase: Option<MigrationPhase>,
    /// Figures.
    pub progress: MigrationProgress,
}

/// What is derived from the records once per change of them.
#[derive(Debug, Default)]
pub(crate) struct Index {
    /// Kept as long as no name changes: the commit of a migration must not wait for thousands of them.
    names: Arc<Names>,
    committed: BTreeMap<HostId, Committed>,
    by_owner: BTreeMap<HostId, Vec<VmId>>,
    left_behind: BTreeMap<HostId, Vec<VmId>>,
    /// Migrations that are open or not concluded yet.
    moving: Vec<MigrationId>,
    storage: storage::StorageIndex,
}

#[derive(Debug, Default)]
struct Names {
    vms: BTreeMap<String, VmId>,
    hosts: BTreeMap<String, HostId>,
    images: BTreeMap<String, ImageId>,
    disks: BTreeMap<String, DiskId>,
    networks: BTreeMap<String, NetworkId>,
}

/// Whether names have changed since the last index.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum NamesAre {
    Same,
    Changed,
}

impl Index {
    /// The index of a view whose records have changed; `view.index` is the one before.
    pub(crate) fn of(view: &View, names: NamesAre) -> Self {
        let names = match names {
            NamesAre::Same => view.index.names.clone(),
            NamesAre::Changed => Arc::new(Names {
                vms: view
                    .vms
                    .values()
                    .map(|vm| (vm.name.clone(), vm.id))
                    .collect(),
                hosts: view
                    .hosts
                    .values()
                    .map(|host| (host.name().to_owned(), host.id))
                    .collect(),
                images: view
                    .images
                    .values()
                    .map(|image| (image.name.clone(), image.id))
                    .collect(),
                disks: view
                    .disks
                    .values()
                    .map(|disk| (disk.name.clone(), disk.id))
                    .collect(),
                networks: view
                    .networks
                    .values()
                    .map(|network| (network.name().to_owned(), network.id()))
                    .collect(),
            }),
        };
        let mut index = Self {
            names,
            ..Self::default()
        };
        for vm in view.vms.values() {
            index.storage.add(vm);
            index.moving.extend(vm.migration);
            if let Some(owner) = vm.owner {
                index.committed.entry(owner).or_default().add(vm);
                index.by_owner.entry(owner).or_default().push(vm.id);
            }
            for host in vm.left_behind.keys() {
                index.left_behind.entry(*host).or_default().push(vm.id);
            }
        }
        for migration in view.open_migrations() {
            if let Some(vm) = view.vms.get(&migration.vm) {
                index.committed.entry(migration.target).or_default().add(vm);
            }
        }
        index
    }
}

impl View {
    /// The VM with this name or id.
    pub fn find_vm(&self, name_or_id: &str) -> Option<&Arc<Vm>> {
        let id = match name_or_id.parse() {
            Ok(id) => id,
            Err(_) => *self.index.names.vms.get(name_or_id)?,
        };
        self.vms.get(&id)
    }

    /// The host with this name or id.
    pub fn find_host(&self, name_or_id: &str) -> Option<&Arc<Host>> {
        let id = match name_or_id.parse() {
            Ok(id) => id,
            Err(_) => *self.index.names.hosts.get(name_or_id)?,
        };
        self.hosts.get(&id)
    }

    /// Name of a host, or its id once it is gone.
    pub fn host_name(&self, id: HostId) -> String {
        self.hosts
            .get(&id)
            .map_or_else(|| id.to_string(), |host| host.name().to_owned())
    }

    /// VMs that a host owns, by id.
    pub fn vms_of(&self, host: HostId) -> impl Iterator<Item = &Arc<Vm>> {
        self.index
            .by_owner
            .get(&host)
            .into_iter()
            .flatten()
            .filter_map(|id| self.vms.get(id))
    }

    /// What VMs may have left behind at a host, by the epoch they had there.
    pub(crate) fn left_behind(&self, host: HostId) -> impl Iterator<Item = (VmId, Epoch)> {
        let vms = self.index.left_behind.get(&host).into_iter().flatten();
        vms.filter_map(move |id| Some((*id, *self.vms.get(id)?.left_behind.get(&host)?)))
    }

    /// What a host has promised.
    pub fn committed(&self, host: HostId) -> Committed {
        self.index.committed.get(&host).copied().unwrap_or_default()
    }

    /// Migrations that are not decided.
    pub fn open_migrations(&self) -> impl Iterator<Item = &Arc<Migration>> {
        self.vms
            .values()
            .filter_map(|vm| self.migrations.get(&vm.migration?))
            .filter(|m| m.is_open())
    }

    /// Migrations that are not decided, or decided and not concluded: memory may still follow a guest.
    pub fn moving(&self) -> impl Iterator<Item = &Arc<Migration>> {
        let ids = self.index.moving.iter();
        ids.filter_map(|id| self.migrations.get(id))
    }

    /// Most bytes per second that migrations may send over the link between two hosts, each way.
    pub fn link_bandwidth(&self, one: HostId, other: HostId) -> Option<u64> {
        let (keeper, other) = (one.min(other), one.max(other));
        self.hosts.get(&keeper)?.link_bandwidth.get(&other).copied()
    }

    /// The limits of all links of a host, by the host at the other end.
    pub fn links_of(&self, host: HostId) -> BTreeMap<HostId, u64> {
        let others = self.hosts.keys().filter(|other| **other != host);
        others
            .filter_map(|other| Some((*other, self.link_bandwidth(host, *other)?)))
            .collect()
    }

    /// Operations that have not ended.
    pub fn active_operations(&self) -> impl Iterator<Item = &Arc<Operation>> {
        self.operations
            .values()
            .filter(|operation| !operation.state.is_final())
    }

    /// How a host stands; a host never heard of is as good as silent.
    pub fn liveness(&self, host: HostId) -> Liveness {
        self.observed
            .get(&host)
            .map_or(Liveness::Suspect, |observed| observed.liveness)
    }

    /// What a host is to the pool.
    pub fn host_state(&self, host: &Host) -> HostState {
        if host.first_heard_at.is_none() {
            return HostState::Joining;
        }
        if self.liveness(host.id).is_silent() {
            return HostState::Unreachable;
        }
        match host.maintenance.and_then(|id| self.maintenances.get(&id)) {
            Some(m)
                if matches!(
                    m.state,
                    MaintenanceState::Drained
                        | MaintenanceState::Working
                        | MaintenanceState::Verifying
                ) =>
            {
                HostState::Maintenance
            }
            Some(_) => HostState::Cordoned,
            None if host.cordon.is_some() => HostState::Cordoned,
            None => HostState::Up,
        }
    }

    /// Why a host is in its state, when that is not obvious.
    pub fn host_reason(&self, host: &Host) -> Option<String> {
        match self.host_state(host) {
            HostState::Joining => Some("waiting for its first heartbeat".into()),
            HostState::Unreachable => Some("no heartbeat comes from its agent".into()),
            _ => match host.maintenance.and_then(|id| self.maintenances.get(&id)) {
                Some(maintenance) => Some(format!(
                    "maintenance ({}): {}",
                    maintenance.state.name(),
                    maintenance.reason
                )),
                None => host
                    .cordon
                    .as_ref()
                    .map(|cordon| format!("cordoned by {}: {}", cordon.actor, cordon.reason)),
            },
        }
    }

    /// What the VM's owner says of it, under its present epoch.
    pub fn report(&self, vm: &Vm) -> Option<&VmReport> {
        self.report_at(vm.owner?, vm.id)
            .filter(|report| report.epoch == vm.epoch)
    }

    /// What `host` says of a VM, whoever owns it.
    pub fn report_at(&self, host: HostId, vm: VmId) -> Option<&VmReport> {
        self.observed.get(&host)?.vms.get(&vm)
    }

    /// What a VM uses; zero when it is off.
    pub fn vm_usage(&self, vm: &Vm) -> VmUsage {
        self.report(vm)
            .map(|report| report.usage)
            .unwrap_or_default()
    }

    /// What a host uses.
    pub fn host_usage(&self, host: HostId) -> HostUsage {
        self.observed
            .get(&host)
            .map(|observed| observed.usage)
            .unwrap_or_default()
    }

    /// State of a VM.
    pub fn vm_status(&self, vm: &Vm) -> VmStatus {
        let status = |state, reason: Option<String>| VmStatus { state, reason };
        let operation = vm
            .operation
            .and_then(|id| self.operations.get(&id))
            .filter(|op| !op.state.is_final());
        if let Some(owner) = vm.owner
            && self.liveness(owner).is_silent()
            && self
                .hosts
                .get(&owner)
                .is_some_and(|host| host.first_heard_at.is_some())
            && !matches!(
                operation.map(|op| &op.work),
                Some(Work::Start {
                    placed: Some(_),
                    ..
                })
            )
        {
            let name = self.host_name(owner);
            return match (vm.lease, self.liveness(owner)) {
                (LeasePolicy::Unwatched, Liveness::RestartAllowed) => status(
                    VmState::AwaitingFence,
                    Some(format!(
                        "{name} is silent and the VM is not watched: prove that the host is off"
                    )),
                ),
                (_, Liveness::RestartAllowed) => {
                    status(VmState::Unreachable, self.no_room(vm, &name))
                }
                _ => status(VmState::Unreachable, Some(format!("{name} is silent"))),
            };
        }
        if let Some(operation) = operation {
            match &operation.work {
                Work::Provision {
                    cause: ProvisionCause::Create { .. },
                    ..
                } => {
                    return status(VmState::Pending, Some("its disks are being made".into()));
                }
                Work::Start { .. } => return status(VmState::Starting, None),
                Work::Restart { .. } => return status(VmState::Starting, Some("rebooting".into())),
                Work::Stop { .. } | Work::Delete { .. } => return status(VmState::Stopping, None),
                // A guest that waits for memory in vain does not run: the operator should know.
                Work::Migrate {
                    migration: Some(_), ..
                } if !self.waits_for_memory(vm) => return status(VmState::Migrating, None),
                _ => {}
            }
        }
        match vm.owner {
            None => self.status_without_owner(vm),
            Some(_) => self.status_from_report(vm),
        }
    }

    fn waits_for_memory(&self, vm: &Vm) -> bool {
        let state = self.report(vm).and_then(|report| report.state.as_ref());
        state.is_some_and(VmmState::waits_for_memory)
    }

    fn no_room(&self, vm: &Vm, host_name: &str) -> Option<String> {
        match &vm.trouble {
            Some(Trouble::NoRoom { reason }) => Some(format!(
                "{host_name} is silent, no other host takes it: {reason}"
            )),
            _ => Some(format!("{host_name} is silent; starting it elsewhere")),
        }
    }

    fn status_without_owner(&self, vm: &Vm) -> VmStatus {
        let status = |state, reason: Option<String>| VmStatus { state, reason };
        if let Some(maintenance) = vm.held_by {
            let host = self
                .maintenances
                .get(&maintenance)
                .map(|m| m.host_name.clone())
                .unwrap_or_default();
            return status(
                VmState::Stopped,
                Some(format!("stopped for the maintenance of {host}")),
            );
        }
        match (vm.intent, &vm.trouble) {
            (
                _,
                Some(Trouble::StartFailed {
                    reason,
                    retry: Retry::Never,
                    ..
                }),
            ) => status(VmState::Failed, Some(reason.clone())),
            (PowerIntent::Stopped, Some(Trouble::Halted)) => {
                status(VmState::Stopped, Some("the guest powered off".into()))
            }
            (PowerIntent::Stopped, _) => status(VmState::Stopped, None),
            (
                _,
                Some(Trouble::StartFailed {
                    reason, attempts, ..
                }),
            ) => status(
                VmState::Pending,
                Some(format!(
                    "attempt {attempts} failed, another follows: {reason}"
                )),
            ),
            (_, Some(Trouble::NoRoom { reason })) => status(VmState::Pending, Some(reason.clone())),
            (_, _) => status(VmState::Pending, None),
        }
    }

    fn status_from_report(&self, vm: &Vm) -> VmStatus {
        let status = |state, reason: Option<&str>| VmStatus {
            state,
            reason: reason.map(str::to_owned),
        };
        let Some(report) = self.report(vm) else {
            return status(VmState::Starting, Some("waiting for the host's report"));
        };
        match &report.state {
            None => status(VmState::Failed, Some("its VMM process is gone")),
            Some(VmmState::Running) => status(VmState::Running, None),
            Some(VmmState::Paused {
                reason: PauseReason::Requested,
            }) => status(VmState::Paused, None),
            Some(VmmState::Paused {
                reason: PauseReason::HandOver,
            }) => status(VmState::Migrating, None),
            Some(VmmState::Paused {
                reason: PauseReason::LeaseExpired,
            }) => status(
                VmState::Paused,
                Some("its host's lease ran out; it resumes when the host is back"),
            ),
            Some(VmmState::Paused {
                reason: PauseReason::Storage { detail, .. },
            }) => status(VmState::Paused, Some(detail)),
            Some(VmmState::Paused {
                reason: PauseReason::Memory { .. },
            }) => status(
                VmState::Paused,
                Some("it waits for memory from its former host, which cannot be reached"),
            ),
            Some(VmmState::Paused {
                reason: PauseReason::Fault { detail },
            }) => status(VmState::Failed, Some(detail)),
            Some(VmmState::Empty | VmmState::Created) => status(VmState::Starting, None),
            Some(VmmState::Incoming) => status(VmState::Migrating, None),
            Some(VmmState::Stopped {
                reason: StopReason::GuestHalted,
            }) => status(VmState::Stopped, Some("the guest powered off")),
            Some(VmmState::Stopped { .. }) => status(VmState::Failed, Some("its VMM was killed")),
        }
    }

    /// Phase and figures of a migration: live from the source's heartbeats, or what was kept at its end.
    pub fn migration_figures(&self, migration: &Migration) -> MigrationFigures {
        if let Some(progress) = &migration.progress {
            return MigrationFigures {
                phase: migration.phase,
                progress: progress.clone(),
            };
        }
        let said = |host, role| {
            self.report_at(host, migration.vm)
                .and_then(|report| report.migration.as_ref())
                .filter(|status| status.migration == migration.id && status.role == role)
        };
        match said(migration.source, MigrationRole::Source)
            .or_else(|| said(migration.target, MigrationRole::Target))
        {
            Some(status) => MigrationFigures {
                // One that is concluded has ended, whatever its ends still say.
                phase: migration
                    .phase
                    .filter(|phase| phase.is_final())
                    .or(Some(status.phase)),
                progress: self.with_target_figures(migration, status.progress.clone()),
            },
            None => MigrationFigures {
                phase: migration.phase,
                progress: MigrationProgress::default(),
            },
        }
    }

    /// The source's figures of a migration, and what only the target knows: for how long the guest waited for memory, and
    /// its network for frames.
    pub(crate) fn with_target_figures(
        &self,
        migration: &Migration,
        mut progress: MigrationProgress,
    ) -> MigrationProgress {
        let at_target = self
            .report_at(migration.target, migration.vm)
            .and_then(|report| report.migration.as_ref())
            .filter(|status| {
                status.migration == migration.id && status.role == MigrationRole::Target
            });
        progress.packet_gap_us = at_target.and_then(|status| status.progress.packet_gap_us);
        let waits = at_target.and_then(|status| status.progress.post_copy);
        if let (Some(memory), Some(waits)) = (&mut progress.post_copy, waits) {
            (memory.waited_us, memory.longest_wait_us) = (waits.waited_us, waits.longest_wait_us);
        }
        progress
    }

    /// How far an operation is, from 0 to 1.
    pub fn operation_progress(&self, operation: &Operation) -> f64 {
        match operation.state {
            OperationState::Succeeded => return 1.0,
            OperationState::Pending => return 0.0,
            _ => {}
        }
        match &operation.work {
            Work::Migrate {
                migration: Some(id),
                ..
            } => self
                .migrations
                .get(id)
                .map_or(0.0, |migration| self.migration_fraction(migration)),
            work if !work.moves().is_empty() => {
                let part = |state: &MoveState| match state {
                    MoveState::Waiting => 0.0,
                    MoveState::Running { operation } => self
                        .operations
                        .get(operation)
                        .map_or(0.0, |child| self.operation_progress(child)),
                    _ => 1.0,
                };
                work.moves()
                    .iter()
                    .map(|task| part(&task.state))
                    .sum::<f64>()
                    / work.moves().len() as f64
            }
            Work::Upgrade { vms, .. } => {
                let done = vms.iter().filter(|task| task.state.is_final()).count();
                done as f64 / vms.len().max(1) as f64
            }
            _ => {
                let done = operation
                    .steps
                    .iter()
                    .filter(|step| step.state == StepState::Done)
                    .count();
                let all = operation.steps.len().max(2) as f64;
                (done as f64 / all).min(0.95)
            }
        }
    }

    fn migration_fraction(&self, migration: &Migration) -> f64 {
        let figures = self.migration_figures(migration);
        match figures.phase {
            None | Some(MigrationPhase::Connecting) => 0.0,
            Some(MigrationPhase::PreCopy | MigrationPhase::Failed | MigrationPhase::Cancelled) => {
                let progress = &figures.progress;
                // What of the disks needs no sending is as good as sent.
                let disks = progress.disk_bytes.0 as f64;
                let disks_left = progress.disk_remaining_bytes.0 as f64;
                let sent = progress.transferred_bytes.0 as f64 + (disks - disks_left).max(0.0);
                let left = progress.remaining_bytes.0 as f64 + disks_left;
                if sent + left > 0.0 {
                    (sent / (sent + left)).min(0.9)
                } else {
                    0.0
                }
            }
            Some(MigrationPhase::Blackout) => 0.92,
            Some(MigrationPhase::AwaitingCommit) => 0.95,
            Some(MigrationPhase::PostCopy) => 0.97,
            Some(MigrationPhase::Completed) => 0.98,
        }
    }
}
