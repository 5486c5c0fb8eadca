//! Durable operations: what is being done, recorded step by step so that a server killed at any instant resumes.

use crate::model::limits::MAX_STEPS;
use crate::model::{Actor, AfterSnapshot, DisksOnDelete, DisksOnMove, MoveAction, Subject};
use godwit_wire::host_api::StopMode;
use godwit_wire::id::{
    DiskId, Epoch, Generation, HostId, ImageId, MaintenanceId, MigrationId, OperationId, PoolId,
    SnapshotId, SuccessionId, VmId,
};
use godwit_wire::migration::MigrationPolicy;
use godwit_wire::problem::Problem;
use godwit_wire::unit::{Bytes, Mib};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};

/// An operation as stored.
///
/// ```text
/// pending ─▶ running ─▶ succeeded | failed | cancelled
/// ```
/// `work` holds what a resumed executor needs: the stage it had recorded before it acted.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Operation {
    /// Identity.
    pub id: OperationId,
    /// What is done, and how far it is.
    pub work: Work,
    /// What it is done to.
    pub subject: Subject,
    /// Where it stands.
    pub state: OperationState,
    /// What was done so far, oldest first, at most [`MAX_STEPS`].
    pub steps: Vec<Step>,
    /// Why it failed.
    pub error: Option<Problem>,
    /// Who asked for it to be called off.
    pub cancel: Option<Actor>,
    /// The operation this one is part of.
    pub parent: Option<OperationId>,
    /// Who asked for it.
    pub actor: Actor,
    /// When.
    pub created_at: Timestamp,
    /// When it ended.
    pub ended_at: Option<Timestamp>,
}

/// Where an operation stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OperationState {
    /// Accepted.
    Pending,
    /// Under way.
    Running,
    /// Done.
    Succeeded,
    /// Not done; what it had begun is undone.
    Failed,
    /// Called off; what it had begun is undone.
    Cancelled,
}

impl OperationState {
    /// Whether nothing will change any more.
    pub const fn is_final(self) -> bool {
        matches!(self, Self::Succeeded | Self::Failed | Self::Cancelled)
    }
}

/// One step of an operation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Step {
    /// What it does.
    pub name: String,
    /// Where it stands.
    pub state: StepState,
    /// With which values, or with what result.
    pub detail: String,
    /// When it was recorded.
    pub started_at: Timestamp,
    /// When its result was.
    pub ended_at: Option<Timestamp>,
}

/// Where a step stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum StepState {
    /// Recorded; it may or may not have reached the host.
    Running,
    /// Carried out.
    Done,
    /// Refused.
    Failed,
}

/// What an operation does, with the stage a resumed executor goes on from.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Work {
    /// Places a VM and starts it; also after a crash or the loss of its host.
    Start {
        /// Which VM.
        vm: VmId,
        /// The only host to consider.
        wanted: Option<HostId>,
        /// Why.
        cause: StartCause,
        /// Hosts that failed, in order.
        tried: Vec<HostId>,
        /// Set before the host is told.
        placed: Option<Placed>,
    },
    /// Stops a VM and frees its host.
    Stop {
        /// Which VM.
        vm: VmId,
        /// How.
        mode: StopMode,
        /// Set before the host is told.
        sent: Option<Placed>,
    },
    /// Stops a VM and starts it again, on the same host or on another.
    Restart {
        /// Which VM.
        vm: VmId,
        /// How to stop it.
        mode: StopMode,
        /// The host to start it on.
        target: HostId,
        /// Set before the host is told to stop it. Once it has stopped, the work goes on as a `Start`.
        sent: Option<Placed>,
    },
    /// Pauses a VM.
    Pause {
        /// Which VM.
        vm: VmId,
        /// Set before the host is told.
        sent: Option<Placed>,
    },
    /// Lets a paused VM run.
    Resume {
        /// Which VM.
        vm: VmId,
        /// Set before the host is told.
        sent: Option<Placed>,
    },
    /// Asks a VM's guest to live with so much memory.
    Balloon {
        /// Which VM.
        vm: VmId,
        /// What the guest keeps.
        keep: Mib,
        /// Set before the host is told.
        sent: Option<Placed>,
    },
    /// Moves a VM live.
    Migrate {
        /// Which VM.
        vm: VmId,
        /// The only host to consider.
        wanted: Option<HostId>,
        /// Limits.
        policy: MigrationPolicy,
        /// What becomes of disks that the target does not see.
        #[serde(default)]
        disks: DisksOnMove,
        /// Why.
        cause: MigrateCause,
        /// The attempt under way; set before any host is told.
        migration: Option<MigrationId>,
    },
    /// Kills a VM and forgets it; its disks go by operations of their own afterwards.
    Delete {
        /// Which VM.
        vm: VmId,
        /// What becomes of its disks.
        #[serde(default)]
        disks: DisksOnDelete,
        /// Set before the host is told.
        sent: Option<Placed>,
    },
    /// Makes the disks that a VM is to have. Once they are there, a VM that shall run goes on as a `Start`.
    Provision {
        /// Which VM.
        vm: VmId,
        /// The disks, in order.
        disks: Vec<DiskId>,
        /// Why, and what comes after.
        cause: ProvisionCause,
    },
    /// Imports an image.
    CreateImage {
        /// Which.
        image: ImageId,
        /// The only host to consider: the one that has the file.
        wanted: Option<HostId>,
    },
    /// Deletes an image.
    DeleteImage {
        /// Which.
        image: ImageId,
    },
    /// Makes a disk.
    CreateDisk {
        /// Which.
        disk: DiskId,
    },
    /// Makes a disk larger.
    GrowDisk {
        /// Which.
        disk: DiskId,
        /// Its new size.
        bytes: Bytes,
    },
    /// Deletes a disk.
    DeleteDisk {
        /// Which.
        disk: DiskId,
    },
    /// Erases what a migration has left of a disk: in the pool it has gone from, or in the one it has not gone to.
    EraseCopy {
        /// Which disk.
        disk: DiskId,
        /// The pool, in which the disk is not.
        pool: PoolId,
        /// The host that left it there.
        host: HostId,
        /// The migration that the disk there was made for, `None` of an original; any other is not touched.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        made_for: Option<MigrationId>,
        /// The VM that must be seen to work with the disk where it is now, before this is erased.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        once_used_by: Option<VmId>,
        /// The image that it is a thin copy of.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        base: Option<ImageId>,
    },
    /// Saves a VM. One that shall not run on stands still first, and goes on as a `Stop` afterwards.
    CreateSnapshot {
        /// Which.
        snapshot: SnapshotId,
        /// The VM.
        vm: VmId,
        /// What the VM does once it is saved.
        then: AfterSnapshot,
        /// Set before the host is told.
        sent: Option<Placed>,
    },
    /// Deletes a snapshot.
    DeleteSnapshot {
        /// Which.
        snapshot: SnapshotId,
    },
    /// Hands a host's VMs to VMMs of the program that its agent runs.
    Upgrade {
        /// Which host.
        host: HostId,
        /// VM by VM.
        vms: Vec<UpgradeTask>,
    },
    /// Moves everything off a host.
    Evacuate {
        /// Which host.
        host: HostId,
        /// VM by VM.
        moves: Vec<MoveTask>,
    },
    /// Empties a host for a maintenance.
    Drain {
        /// Which maintenance.
        maintenance: MaintenanceId,
        /// Its host.
        host: HostId,
        /// VM by VM.
        moves: Vec<MoveTask>,
    },
    /// Brings VMs back after a maintenance.
    Restore {
        /// Which maintenance.
        maintenance: MaintenanceId,
        /// Its host.
        host: HostId,
        /// VM by VM.
        moves: Vec<MoveTask>,
    },
}

impl Work {
    /// Stable name for the API.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Start {
                cause: StartCause::Asked,
                ..
            } => "start",
            Self::Start {
                cause: StartCause::Rebooted { .. },
                ..
            } => "reboot",
            Self::Start {
                cause: StartCause::Restored { .. },
                ..
            } => "restore_snapshot",
            Self::Start { .. } => "restart",
            Self::Stop { .. } => "stop",
            Self::Restart { .. } => "reboot",
            Self::Pause { .. } => "pause",
            Self::Resume { .. } => "resume",
            Self::Balloon { .. } => "balloon",
            Self::Migrate { .. } => "migrate",
            Self::Delete { .. } => "delete",
            Self::Provision {
                cause: ProvisionCause::Create { .. },
                ..
            } => "create",
            Self::Provision { .. } => "change",
            Self::CreateImage { .. } => "create_image",
            Self::DeleteImage { .. } => "delete_image",
            Self::CreateDisk { .. } => "create_disk",
            Self::GrowDisk { .. } => "grow_disk",
            Self::DeleteDisk { .. } => "delete_disk",
            Self::EraseCopy { .. } => "erase_copy",
            Self::CreateSnapshot { .. } => "create_snapshot",
            Self::DeleteSnapshot { .. } => "delete_snapshot",
            Self::Upgrade { .. } => "upgrade",
            Self::Evacuate { .. } => "evacuate",
            Self::Drain { .. } => "drain",
            Self::Restore { .. } => "restore",
        }
    }

    /// The VM it changes, if it is about one.
    pub fn vm(&self) -> Option<VmId> {
        match self {
            Self::Start { vm, .. }
            | Self::Stop { vm, .. }
            | Self::Restart { vm, .. }
            | Self::Pause { vm, .. }
            | Self::Resume { vm, .. }
            | Self::Balloon { vm, .. }
            | Self::Migrate { vm, .. }
            | Self::Delete { vm, .. }
            | Self::CreateSnapshot { vm, .. }
            | Self::Provision { vm, .. } => Some(*vm),
            _ => None,
        }
    }

    /// Its moves, if it consists of some.
    pub fn moves(&self) -> &[MoveTask] {
        match self {
            Self::Evacuate { moves, .. }
            | Self::Drain { moves, .. }
            | Self::Restore { moves, .. } => moves,
            _ => &[],
        }
    }

    /// Its moves, to change them.
    pub fn moves_mut(&mut self) -> Option<&mut Vec<MoveTask>> {
        match self {
            Self::Evacuate { moves, .. }
            | Self::Drain { moves, .. }
            | Self::Restore { moves, .. } => Some(moves),
            _ => None,
        }
    }
}

/// A command's address: the host and the counters it is sent with. A resumed executor repeats it unchanged.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Placed {
    /// To whom.
    pub host: HostId,
    /// Epoch under which the host owns the VM.
    pub epoch: Epoch,
    /// Order of commands.
    pub generation: Generation,
}

/// Why a VM is started.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "cause", rename_all = "snake_case")]
pub enum StartCause {
    /// Someone asked.
    Asked,
    /// Someone asked for it to go on from where it was saved.
    Restored {
        /// Where that is.
        snapshot: SnapshotId,
    },
    /// It has no owner and shall run.
    Wanted,
    /// It was stopped only to be started again.
    Rebooted {
        /// There, if that host takes it.
        target: HostId,
    },
    /// Its host has been silent for longer than its lease, the stop time and the clock margin.
    HostSilent {
        /// Which host.
        host: HostId,
    },
    /// Its VMM process is gone, as its own host says.
    Crashed {
        /// Which host.
        host: HostId,
    },
}

/// Why disks are made for a VM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "cause", rename_all = "snake_case")]
pub enum ProvisionCause {
    /// The VM is new; it goes if a disk cannot be made.
    Create {
        /// The only host to start it on.
        wanted: Option<HostId>,
    },
    /// The VM gets further disks; it loses them again if one of them cannot be made.
    Change,
}

/// Why a VM moves.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MigrateCause {
    /// Someone asked for it: where it goes is its new home.
    ByHand,
    /// Part of a drain, an evacuation or a restore: its home stays.
    ByPlan,
}

/// One VM of an upgrade.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct UpgradeTask {
    /// Which VM.
    pub vm: VmId,
    /// Its name.
    pub vm_name: String,
    /// Where it stands.
    pub state: UpgradeState,
}

/// Where one VM's upgrade stands.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "state", rename_all = "snake_case")]
pub enum UpgradeState {
    /// Its turn has not come.
    Waiting,
    /// Its host was, or is about to be, told. A resumed executor repeats the same command.
    Running {
        /// Names the attempt.
        succession: SuccessionId,
        /// Epoch under which the host owns it.
        epoch: Epoch,
    },
    /// It runs in a new VMM.
    Done {
        /// How long it stood still, in microseconds.
        blackout_us: Option<u64>,
    },
    /// It ran in a VMM of that program before.
    Current,
    /// Nothing to do.
    Skipped {
        /// Why.
        reason: String,
    },
    /// It stays in the VMM it runs in.
    Failed {
        /// Why.
        reason: String,
    },
}

impl UpgradeState {
    /// Whether nothing will change any more.
    pub const fn is_final(&self) -> bool {
        !matches!(self, Self::Waiting | Self::Running { .. })
    }
}

/// One VM of a drain, an evacuation or a restore.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MoveTask {
    /// Which VM.
    pub vm: VmId,
    /// Its name.
    pub vm_name: String,
    /// How.
    pub action: MoveAction,
    /// To where; `None` leaves it to placement at the time.
    pub to: Option<HostId>,
    /// Attempts so far.
    pub attempts: u32,
    /// Where it stands.
    pub state: MoveState,
}

/// Where one VM's move stands.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "state", rename_all = "snake_case")]
pub enum MoveState {
    /// Its turn has not come.
    Waiting,
    /// Under way.
    Running {
        /// The operation that moves it.
        operation: OperationId,
    },
    /// Moved.
    Done,
    /// Nothing to do.
    Skipped {
        /// Why.
        reason: String,
    },
    /// Given up.
    Failed {
        /// Why.
        reason: String,
    },
}

impl MoveState {
    /// Whether nothing will change any more.
    pub const fn is_final(&self) -> bool {
        matches!(
            self,
            Self::Done | Self::Skipped { .. } | Self::Failed { .. }
        )
    }
}

impl Operation {
    /// Records a step that is about to be taken. A resumed executor finds it running and does not record it twice.
    pub fn begin_step(
        &mut self,
        name: impl Into<String>,
        detail: impl Into<String>,
        now: Timestamp,
    ) {
        let (name, detail) = (name.into(), detail.into());
        if let Some(last) = self.steps.last()
            && last.state == StepState::Running
            && last.name == name
        {
            return;
        }
        self.end_step(StepState::Done, None, now);
        if self.steps.len() >= MAX_STEPS {
            self.steps.remove(0);
        }
        self.steps.push(Step {
            name,
            state: StepState::Running,
            detail,
            started_at: now,
            ended_at: None,
        });
    }

    /// Records why it waits before it does anything; a new reason takes the place of the one before.
    pub fn waits(&mut self, detail: impl Into<String>, now: Timestamp) {
        self.begin_step("wait", "", now);
        if let Some(last) = self.steps.last_mut() {
            last.detail = detail.into();
        }
    }

    /// Records how the running step ended; nothing happens when there is none.
    pub fn end_step(&mut self, state: StepState, detail: Option<String>, now: Timestamp) {
        if let Some(last) = self.steps.last_mut()
            && last.state == StepState::Running
        {
            last.state = state;
            last.ended_at = Some(now);
            if let Some(detail) = detail {
                last.detail = detail;
            }
        }
    }
}
