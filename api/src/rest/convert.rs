//! From the controller's records and observations to the resources of the API.

mod forecast;
mod storage;

pub(super) use storage::{disk, image, network, pool, snapshot};

use crate::resource::{self as api, Problem};
use godwit_controller::intent::{BandwidthLimit, Placement, Preview};
use godwit_controller::model;
use godwit_controller::view::View;
use godwit_wire::host_api::LeasePolicy;
use godwit_wire::id::OperationId;
use godwit_wire::machine::{Boot, CpuBaseline, CpuFacts, MachineSpec, MachineType};
use godwit_wire::migration::{MigrationPhase, MigrationProgress};
use godwit_wire::unit::Mib;
use godwit_wire::usage::{HostUsage, VmUsage};
use std::path::PathBuf;

/// A VM as the API shows it.
pub(super) fn vm(view: &View, vm: &model::Vm) -> api::Vm {
    let status = view.vm_status(vm);
    api::Vm {
        id: vm.id.0,
        name: vm.name.clone(),
        spec: spec(&vm.spec),
        disks: storage::vm_disks(view, vm),
        nics: storage::vm_nics(view, vm),
        cloud_init: vm.spec.devices.cloud_init.as_ref().map(storage::cloud_init),
        vsock: vm
            .spec
            .devices
            .vsock
            .map(|vsock| api::Vsock { cid: vsock.cid }),
        console: storage::console(vm.spec.devices.console),
        memory_backing: storage::memory_backing(vm.spec.devices.memory_backing),
        intent: match vm.intent {
            model::PowerIntent::Running => api::PowerIntent::Running,
            model::PowerIntent::Stopped => api::PowerIntent::Stopped,
            model::PowerIntent::Paused => api::PowerIntent::Paused,
        },
        state: vm_state(status.state),
        reason: status.reason,
        host: vm.owner.map(|host| host.0),
        host_name: vm.owner.map(|host| view.host_name(host)),
        home: vm.home.map(|host| host.0),
        epoch: vm.epoch.0,
        lease: match vm.lease {
            LeasePolicy::Watched => api::LeasePolicy::Watched,
            LeasePolicy::Unwatched => api::LeasePolicy::Unwatched,
        },
        maintenance_policy: match vm.maintenance_policy {
            model::MaintenancePolicy::Migrate => api::VmMaintenancePolicy::Migrate,
            model::MaintenancePolicy::RestartElsewhere => {
                api::VmMaintenancePolicy::RestartElsewhere
            }
            model::MaintenancePolicy::StopAndReturn => api::VmMaintenancePolicy::StopAndReturn,
            model::MaintenancePolicy::Block => api::VmMaintenancePolicy::Block,
        },
        post_copy: match vm.post_copy {
            model::PostCopyPermission::Allowed => api::PostCopyPermission::Allowed,
            model::PostCopyPermission::Forbidden => api::PostCopyPermission::Forbidden,
        },
        usage: vm_usage(view.vm_usage(vm)),
        migration: vm
            .migration
            .and_then(|id| view.migrations.get(&id))
            .map(|record| migration(view, record)),
        operation: vm.operation.map(|id| id.0),
        created_at: vm.created_at,
        changed_at: vm.changed_at,
    }
}

fn vm_state(state: model::VmState) -> api::VmState {
    match state {
        model::VmState::Pending => api::VmState::Pending,
        model::VmState::Starting => api::VmState::Starting,
        model::VmState::Running => api::VmState::Running,
        model::VmState::Paused => api::VmState::Paused,
        model::VmState::Migrating => api::VmState::Migrating,
        model::VmState::Stopping => api::VmState::Stopping,
        model::VmState::Stopped => api::VmState::Stopped,
        model::VmState::Failed => api::VmState::Failed,
        model::VmState::Unreachable => api::VmState::Unreachable,
        model::VmState::AwaitingFence => api::VmState::AwaitingFence,
    }
}

fn vm_usage(usage: VmUsage) -> api::VmUsage {
    api::VmUsage {
        cpu_percent: tenths(usage.cpu_percent),
        rss_bytes: usage.rss_bytes.0,
        exits_per_s: tenths(usage.exits_per_s),
        dirty_bytes_per_s: usage.dirty_bytes_per_s,
    }
}

/// One decimal: more would only make every sample look like a change.
fn tenths(value: f64) -> f64 {
    (value * 10.0).round() / 10.0
}

fn spec(spec: &MachineSpec) -> api::MachineSpec {
    let path = |path: &PathBuf| path.to_string_lossy().into_owned();
    api::MachineSpec {
        machine_type: match spec.machine_type {
            MachineType::Godwit1 => api::MachineType::Godwit1,
            MachineType::Godwit2 => api::MachineType::Godwit2,
        },
        vcpus: spec.vcpus,
        memory_mib: spec.memory_mib.0,
        boot: match &spec.boot {
            Boot::Pilot => api::Boot::Pilot,
            Boot::Linux {
                kernel,
                initrd,
                cmdline,
            } => api::Boot::Linux {
                kernel: path(kernel),
                initrd: initrd.as_ref().map(path),
                cmdline: cmdline.clone(),
            },
        },
        cpu: baseline(spec.cpu),
    }
}

/// The machine a request describes.
pub(super) fn machine(spec: api::MachineSpec) -> MachineSpec {
    MachineSpec {
        machine_type: match spec.machine_type {
            api::MachineType::Godwit1 => MachineType::Godwit1,
            api::MachineType::Godwit2 => MachineType::Godwit2,
        },
        vcpus: spec.vcpus,
        memory_mib: Mib(spec.memory_mib),
        boot: match spec.boot {
            api::Boot::Pilot => Boot::Pilot,
            api::Boot::Linux {
                kernel,
                initrd,
                cmdline,
            } => Boot::Linux {
                kernel: kernel.into(),
                initrd: initrd.map(PathBuf::from),
                cmdline,
            },
        },
        cpu: match spec.cpu {
            api::CpuBaseline::V2 => CpuBaseline::V2,
            api::CpuBaseline::V3 => CpuBaseline::V3,
            api::CpuBaseline::V4 => CpuBaseline::V4,
            api::CpuBaseline::Host => CpuBaseline::Host,
        },
        // Devices are asked for by name, beside the machine.
        devices: Default::default(),
    }
}

pub(super) fn lease(policy: api::LeasePolicy) -> LeasePolicy {
    match policy {
        api::LeasePolicy::Watched => LeasePolicy::Watched,
        api::LeasePolicy::Unwatched => LeasePolicy::Unwatched,
    }
}

pub(super) fn maintenance_policy(policy: api::VmMaintenancePolicy) -> model::MaintenancePolicy {
    match policy {
        api::VmMaintenancePolicy::Migrate => model::MaintenancePolicy::Migrate,
        api::VmMaintenancePolicy::RestartElsewhere => model::MaintenancePolicy::RestartElsewhere,
        api::VmMaintenancePolicy::StopAndReturn => model::MaintenancePolicy::StopAndReturn,
        api::VmMaintenancePolicy::Block => model::MaintenancePolicy::Block,
    }
}

pub(super) fn post_copy_permission(asked: api::PostCopyPermission) -> model::PostCopyPermission {
    match asked {
        api::PostCopyPermission::Allowed => model::PostCopyPermission::Allowed,
        api::PostCopyPermission::Forbidden => model::PostCopyPermission::Forbidden,
    }
}

fn baseline(baseline: CpuBaseline) -> api::CpuBaseline {
    match baseline {
        CpuBaseline::V2 => api::CpuBaseline::V2,
        CpuBaseline::V3 => api::CpuBaseline::V3,
        CpuBaseline::V4 => api::CpuBaseline::V4,
        CpuBaseline::Host => api::CpuBaseline::Host,
    }
}

/// A host as the API shows it.
pub(super) fn host(view: &View, host: &model::Host) -> api::Host {
    let facts = &host.facts;
    let committed = view.committed(host.id);
    api::Host {
        id: host.id.0,
        name: host.name().to_owned(),
        address: facts.address.to_string(),
        state: match view.host_state(host) {
            model::HostState::Joining => api::HostState::Joining,
            model::HostState::Up => api::HostState::Up,
            model::HostState::Cordoned => api::HostState::Cordoned,
            model::HostState::Maintenance => api::HostState::Maintenance,
            model::HostState::Unreachable => api::HostState::Unreachable,
        },
        reason: view.host_reason(host),
        facts: api::HostFacts {
            cpu: cpu(&facts.cpu),
            cores: facts.cores,
            memory_mib: facts.memory_mib.0,
            guest_memory_mib: facts.guest_memory_mib.0,
            kernel: facts.kernel.clone(),
            boot_id: facts.boot_id,
        },
        usage: host_usage(view.host_usage(host.id)),
        capacity: api::Capacity {
            cores: facts.cores,
            guest_memory_mib: facts.guest_memory_mib.0,
        },
        committed: api::Committed {
            vcpus: committed.vcpus,
            memory_mib: committed.memory_mib.0,
            vms: u32::try_from(committed.vms).unwrap_or(u32::MAX),
        },
        maintenance: host.maintenance.map(|id| id.0),
        last_seen: view
            .observed
            .get(&host.id)
            .and_then(|observed| observed.heard_at),
        version: facts.version.clone(),
        migration_bandwidth_bytes_per_s: host.migration_bandwidth,
        links: view
            .links_of(host.id)
            .into_iter()
            .map(|(other, bytes_per_s)| api::HostLink {
                host: other.0,
                host_name: view.host_name(other),
                bytes_per_s,
            })
            .collect(),
    }
}

/// A limit of bandwidth as requests have it.
pub(super) fn bandwidth(bytes_per_s: u64) -> BandwidthLimit {
    match bytes_per_s {
        0 => BandwidthLimit::None,
        limit => BandwidthLimit::BytesPerS(limit),
    }
}

fn cpu(cpu: &CpuFacts) -> api::CpuFacts {
    api::CpuFacts {
        level: baseline(cpu.level),
        signature: cpu.signature.clone(),
        model: cpu.model.clone(),
    }
}

fn host_usage(usage: HostUsage) -> api::HostUsage {
    api::HostUsage {
        cpu_percent: tenths(usage.cpu_percent),
        memory_used_bytes: usage.memory_used_bytes.0,
        kept_memory_bytes: usage.kept_memory_bytes.0,
        pressure: api::Pressure {
            cpu_percent: usage.pressure.cpu_percent,
            memory_percent: usage.pressure.memory_percent,
            io_percent: usage.pressure.io_percent,
        },
    }
}

/// A migration as the API shows it.
pub(super) fn migration(view: &View, migration: &model::Migration) -> api::Migration {
    let figures = view.migration_figures(migration);
    let (state, reason) = match &migration.state {
        model::MigrationState::Open => (api::MigrationState::Open, None),
        model::MigrationState::Committed { .. } => (api::MigrationState::Committed, None),
        model::MigrationState::Void { reason } => (api::MigrationState::Void, Some(reason.clone())),
    };
    api::Migration {
        id: migration.id.0,
        vm: migration.vm.0,
        vm_name: migration.vm_name.clone(),
        source: migration.source.0,
        source_name: migration.source_name.clone(),
        target: migration.target.0,
        target_name: migration.target_name.clone(),
        state,
        phase: figures.phase.map(|phase| match phase {
            MigrationPhase::Connecting => api::MigrationPhase::Connecting,
            MigrationPhase::PreCopy => api::MigrationPhase::PreCopy,
            MigrationPhase::Blackout => api::MigrationPhase::Blackout,
            MigrationPhase::AwaitingCommit => api::MigrationPhase::AwaitingCommit,
            MigrationPhase::PostCopy => api::MigrationPhase::PostCopy,
            MigrationPhase::Completed => api::MigrationPhase::Completed,
            MigrationPhase::Failed => api::MigrationPhase::Failed,
            MigrationPhase::Cancelled => api::MigrationPhase::Cancelled,
        }),
        progress: progress(&figures.progress),
        disks: migration
            .disks
            .iter()
            .map(|disk| moving_disk(view, migration, disk))
            .collect(),
        reason,
        foreseen: migration.foreseen.as_ref().map(forecast::foreseen),
        started_at: migration.started_at,
        ended_at: migration.ended_at,
    }
}

fn moving_disk(
    view: &View,
    migration: &model::Migration,
    disk: &model::MovingDisk,
) -> api::MigrationDisk {
    api::MigrationDisk {
        disk: disk.disk.0,
        name: disk.name.clone(),
        bytes: disk.bytes.0,
        from_pool: disk.from.0,
        from_pool_name: view.pool_name_at(migration.source, disk.from),
        to_pool: disk.to.0,
        to_pool_name: view.pool_name_at(migration.target, disk.to),
    }
}

fn progress(progress: &MigrationProgress) -> api::MigrationProgress {
    api::MigrationProgress {
        round: progress.round,
        memory_bytes: progress.memory_bytes.0,
        transferred_bytes: progress.transferred_bytes.0,
        content_pages: progress.content_pages,
        zero_pages: progress.zero_pages,
        kept_pages: progress.kept_pages,
        remaining_bytes: progress.remaining_bytes.0,
        rate_bytes_per_s: progress.rate_bytes_per_s,
        dirty_bytes_per_s: progress.dirty_bytes_per_s,
        predicted_blackout_ms: progress.predicted_blackout_ms,
        elapsed_ms: progress.elapsed_ms,
        lanes: progress.lanes,
        opened_lanes: progress.opened_lanes,
        throttle_percent: progress.throttle_percent,
        stalled_us: progress.stalled_us.clone(),
        saved_bytes: progress.saved_bytes.0,
        prefault_ms: progress.prefault_ms,
        disk_bytes: progress.disk_bytes.0,
        disk_remaining_bytes: progress.disk_remaining_bytes.0,
        disk_transferred_bytes: progress.disk_transferred_bytes.0,
        blackout: progress.blackout.map(|parts| api::Blackout {
            predicted_us: parts.predicted_us,
            pause_us: parts.pause_us,
            save_us: parts.save_us,
            pages_us: parts.pages_us,
            rest_bytes: parts.rest_bytes,
            rest_bytes_per_s: parts.rest_bytes_per_s,
            restore_us: parts.restore_us,
            commit_us: parts.commit_us,
        }),
        downtime_us: progress.downtime_us,
        packet_gap_us: progress.packet_gap_us,
        post_copy: progress.post_copy.map(|memory| api::PostCopy {
            owed_bytes: memory.owed_bytes.0,
            missing_bytes: memory.missing_bytes.0,
            wanted_pages: memory.wanted_pages,
            waited_us: memory.waited_us,
            longest_wait_us: memory.longest_wait_us,
            interruptions: memory.interruptions,
            took_ms: memory.took_ms,
        }),
    }
}

/// An operation as the API shows it.
pub(super) fn operation(view: &View, operation: &model::Operation) -> api::Operation {
    api::Operation {
        id: operation.id.0,
        kind: operation.work.kind().to_owned(),
        subject: subject(&operation.subject),
        state: match operation.state {
            model::OperationState::Pending => api::OperationState::Pending,
            model::OperationState::Running => api::OperationState::Running,
            model::OperationState::Succeeded => api::OperationState::Succeeded,
            model::OperationState::Failed => api::OperationState::Failed,
            model::OperationState::Cancelled => api::OperationState::Cancelled,
        },
        progress: (view.operation_progress(operation) * 1000.0).round() / 1000.0,
        parent: operation.parent.map(|id| id.0),
        steps: operation.steps.iter().map(step).collect(),
        error: operation.error.clone().map(Problem::from),
        created_at: operation.created_at,
        ended_at: operation.ended_at,
        actor: operation.actor.to_string(),
    }
}

/// The operation with this id, if it is still kept.
pub(super) fn operation_of(view: &View, id: Option<OperationId>) -> Option<api::Operation> {
    id.and_then(|id| view.operations.get(&id))
        .map(|record| operation(view, record))
}

fn step(step: &model::Step) -> api::Step {
    api::Step {
        name: step.name.clone(),
        state: match step.state {
            model::StepState::Running => api::StepState::Running,
            model::StepState::Done => api::StepState::Done,
            model::StepState::Failed => api::StepState::Failed,
        },
        detail: step.detail.clone(),
        started_at: step.started_at,
        ended_at: step.ended_at,
    }
}

fn subject(subject: &model::Subject) -> api::Subject {
    api::Subject {
        kind: match subject.kind {
            model::SubjectKind::Vm => api::SubjectKind::Vm,
            model::SubjectKind::Host => api::SubjectKind::Host,
            model::SubjectKind::Maintenance => api::SubjectKind::Maintenance,
            model::SubjectKind::Operation => api::SubjectKind::Operation,
            model::SubjectKind::Image => api::SubjectKind::Image,
            model::SubjectKind::Disk => api::SubjectKind::Disk,
            model::SubjectKind::Network => api::SubjectKind::Network,
            model::SubjectKind::Snapshot => api::SubjectKind::Snapshot,
            model::SubjectKind::Pool => api::SubjectKind::Pool,
        },
        id: subject.id,
        name: subject.name.clone(),
    }
}

/// A maintenance as the API shows it.
pub(super) fn maintenance(maintenance: &model::Maintenance) -> api::Maintenance {
    api::Maintenance {
        id: maintenance.id.0,
        host: maintenance.host.0,
        host_name: maintenance.host_name.clone(),
        reason: maintenance.reason.clone(),
        state: match maintenance.state {
            model::MaintenanceState::Planned => api::MaintenanceState::Planned,
            model::MaintenanceState::Blocked => api::MaintenanceState::Blocked,
            model::MaintenanceState::Ready => api::MaintenanceState::Ready,
            model::MaintenanceState::Cordoned => api::MaintenanceState::Cordoned,
            model::MaintenanceState::Draining => api::MaintenanceState::Draining,
            model::MaintenanceState::Drained => api::MaintenanceState::Drained,
            model::MaintenanceState::Working => api::MaintenanceState::Working,
            model::MaintenanceState::Verifying => api::MaintenanceState::Verifying,
            model::MaintenanceState::Restoring => api::MaintenanceState::Restoring,
            model::MaintenanceState::Done => api::MaintenanceState::Done,
            model::MaintenanceState::Cancelling => api::MaintenanceState::Cancelling,
            model::MaintenanceState::Cancelled => api::MaintenanceState::Cancelled,
            model::MaintenanceState::Failed => api::MaintenanceState::Failed,
        },
        detail: maintenance.detail.clone(),
        policy: api::MaintenancePolicy {
            returning: match maintenance.return_policy {
                model::ReturnPolicy::Exact => api::ReturnPolicy::Exact,
                model::ReturnPolicy::Rebalance => api::ReturnPolicy::Rebalance,
                model::ReturnPolicy::None => api::ReturnPolicy::None,
            },
        },
        plan: plan(&maintenance.plan),
        moved: maintenance.moved.iter().map(moved).collect(),
        operation: maintenance.operation.map(|id| id.0),
        created_at: maintenance.created_at,
        changed_at: maintenance.changed_at,
        ended_at: maintenance.ended_at,
        actor: maintenance.actor.to_string(),
    }
}

fn plan(plan: &model::MaintenancePlan) -> api::MaintenancePlan {
    let planned = |step: &model::PlannedMove| api::PlannedMove {
        vm: step.vm.0,
        vm_name: step.vm_name.clone(),
        action: action(step.action),
        to: step.to.map(|host| host.0),
        to_name: step.to_name.clone(),
        predicted_s: step.predicted_s,
        predicted_mib: step.predicted_mib,
        predicted_blackout_ms: step.predicted_blackout_ms,
        reserve_after_mib: step.reserve_after_mib,
    };
    let blocker = |blocker: &model::Blocker| api::Blocker {
        vm: blocker.vm.map(|vm| vm.0),
        vm_name: blocker.vm_name.clone(),
        kind: blocker.kind.name().to_owned(),
        detail: blocker.detail.clone(),
        remedy: blocker.remedy.clone(),
    };
    api::MaintenancePlan {
        moves: plan.moves.iter().map(planned).collect(),
        blockers: plan.blockers.iter().map(blocker).collect(),
        total_s: plan.total_s,
    }
}

fn action(action: model::MoveAction) -> api::MoveAction {
    match action {
        model::MoveAction::Migrate => api::MoveAction::Migrate,
        model::MoveAction::RestartElsewhere => api::MoveAction::RestartElsewhere,
        model::MoveAction::StopAndReturn => api::MoveAction::StopAndReturn,
    }
}

fn moved(moved: &model::MovedVm) -> api::MaintenanceMove {
    let (state, reason) = match &moved.state {
        model::MovedState::Away => (api::MovedState::Away, None),
        model::MovedState::Returned => (api::MovedState::Returned, None),
        model::MovedState::Stayed { reason } => (api::MovedState::Stayed, Some(reason.clone())),
    };
    api::MaintenanceMove {
        vm: moved.vm.0,
        vm_name: moved.vm_name.clone(),
        from: moved.from.0,
        to: moved.to.map(|host| host.0),
        action: action(moved.action),
        state,
        reason,
    }
}

/// An event as the API shows it.
pub(super) fn event(event: &model::Event) -> api::Event {
    api::Event {
        revision: event.revision,
        time: event.time,
        kind: event.kind.clone(),
        severity: match event.severity {
            model::Severity::Info => api::Severity::Info,
            model::Severity::Warning => api::Severity::Warning,
            model::Severity::Error => api::Severity::Error,
        },
        subject: subject(&event.subject),
        message: event.message.clone(),
        actor: event.actor.to_string(),
    }
}

/// What a change would do.
pub(super) fn dry_run(preview: Preview) -> api::DryRun {
    let mut changes = preview.effects;
    changes.extend(
        preview
            .forecast
            .as_ref()
            .map(|forecast| format!("the migration {forecast}")),
    );
    api::DryRun {
        dry_run: true,
        changes,
        placement: preview.placement.map(placement),
        plan: preview.plan.as_ref().map(plan),
        forecast: preview.forecast.as_ref().map(forecast::forecast),
    }
}

fn placement(placement: Placement) -> api::Placement {
    let rejection = |rejected: model::HostRejection| api::Rejection {
        host: rejected.host.0,
        kind: rejection_name(&rejected.rejection),
        detail: rejected.rejection.to_string(),
        remedy: rejected.rejection.remedy(),
        host_name: rejected.host_name,
    };
    api::Placement {
        host: placement.host.0,
        host_name: placement.host_name,
        score: placement.score,
        rejections: placement.rejections.into_iter().map(rejection).collect(),
    }
}

/// The name under which the model stores it.
fn rejection_name(rejection: &model::Rejection) -> String {
    let tagged = serde_json::to_value(rejection).unwrap_or_default();
    tagged["kind"].as_str().unwrap_or("other").to_owned()
}
