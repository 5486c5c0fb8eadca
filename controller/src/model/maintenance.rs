//! Maintenance of one host: a resource with a plan.

use crate::model::rejection::HostRejection;
use crate::model::{Actor, MaintenancePolicy};
use godwit_wire::id::{HostId, MaintenanceId, OperationId, VmId};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// A maintenance as stored.
///
/// ```text
/// planned ─▶ blocked ◀─▶ ready ─start─▶ cordoned ─▶ draining ─▶ drained ─▶ working ─finish─▶ verifying
///                                          │            │           └──────── finish ───────▶    │
///                                        cancel: cancelling ─▶ [restoring] ─▶ cancelled      restoring ─▶ done
/// ```
/// A drain that cannot go on ends in `failed`: the host stays cordoned, every VM runs where it is; `start`
/// tries again, `cancel` gives up. Verifying fails back to `working` when the host does not answer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Maintenance {
    /// Identity.
    pub id: MaintenanceId,
    /// Which host.
    pub host: HostId,
    /// Its name at the time.
    pub host_name: String,
    /// Why the operator wants it.
    pub reason: String,
    /// How VMs come back at the end.
    pub return_policy: ReturnPolicy,
    /// Policies that differ from the VM's own, for this maintenance only.
    pub overrides: BTreeMap<VmId, MaintenancePolicy>,
    /// Where it stands.
    pub state: MaintenanceState,
    /// Why it stands there, if that is not obvious.
    pub detail: Option<String>,
    /// Latest plan; made anew at the start.
    pub plan: MaintenancePlan,
    /// What was done with the VMs.
    pub moved: Vec<MovedVm>,
    /// The drain or restore under way, or the last one.
    pub operation: Option<OperationId>,
    /// What a cancel does with VMs that have moved already.
    pub on_cancel: Option<RestoreOnCancel>,
    /// Who created it.
    pub actor: Actor,
    /// When it was created.
    pub created_at: Timestamp,
    /// When this record last changed.
    pub changed_at: Timestamp,
    /// When it ended.
    pub ended_at: Option<Timestamp>,
}

/// Where a maintenance stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MaintenanceState {
    /// Created; its plan is not made yet.
    Planned,
    /// The plan has blockers.
    Blocked,
    /// The plan can be carried out.
    Ready,
    /// The host takes no new VMs.
    Cordoned,
    /// VMs are leaving.
    Draining,
    /// The host is empty.
    Drained,
    /// The host is being worked on: it has gone silent or restarted since it was drained.
    Working,
    /// Work is over; the host is checked before it takes VMs.
    Verifying,
    /// VMs are coming back.
    Restoring,
    /// Over.
    Done,
    /// Called off; the move in flight is being finished.
    Cancelling,
    /// Called off.
    Cancelled,
    /// The drain could not go on; the host is still cordoned.
    Failed,
}

impl MaintenanceState {
    /// Whether nothing will change any more.
    pub const fn is_final(self) -> bool {
        matches!(self, Self::Done | Self::Cancelled)
    }

    /// Whether it has not touched the pool yet.
    pub const fn is_only_a_plan(self) -> bool {
        matches!(self, Self::Planned | Self::Blocked | Self::Ready)
    }

    /// The name in the API.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Planned => "planned",
            Self::Blocked => "blocked",
            Self::Ready => "ready",
            Self::Cordoned => "cordoned",
            Self::Draining => "draining",
            Self::Drained => "drained",
            Self::Working => "working",
            Self::Verifying => "verifying",
            Self::Restoring => "restoring",
            Self::Done => "done",
            Self::Cancelling => "cancelling",
            Self::Cancelled => "cancelled",
            Self::Failed => "failed",
        }
    }
}

/// How VMs come back when the host does.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ReturnPolicy {
    /// Those that left come home.
    #[default]
    Exact,
    /// VMs move to the host as long as that evens the load out.
    Rebalance,
    /// Those that moved stay where they are; those that were stopped start again.
    None,
}

/// What a cancel does with VMs that have moved already.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RestoreOnCancel {
    /// They come back.
    #[default]
    Restore,
    /// They stay.
    Stay,
}

/// The dry run of a drain.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct MaintenancePlan {
    /// In this order.
    pub moves: Vec<PlannedMove>,
    /// What stands in the way.
    pub blockers: Vec<Blocker>,
    /// Predicted time for all of it.
    pub total_s: f64,
}

/// What happens to one VM.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PlannedMove {
    /// Which VM.
    pub vm: VmId,
    /// Its name.
    pub vm_name: String,
    /// How.
    pub action: MoveAction,
    /// To where; `None` when it only stops.
    pub to: Option<HostId>,
    /// Name of that host.
    pub to_name: Option<String>,
    /// Predicted time.
    pub predicted_s: f64,
    /// Predicted bytes on the wire.
    pub predicted_mib: u64,
    /// Predicted blackout; for a restart the whole time it is down.
    pub predicted_blackout_ms: u64,
    /// Memory that would be left after this step if the largest of the other hosts failed; negative when not
    /// every VM could be started again.
    pub reserve_after_mib: i64,
}

/// How a VM leaves its host.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MoveAction {
    /// Live migration.
    Migrate,
    /// Stop here, start there.
    RestartElsewhere,
    /// Stop, and start again when the host is back.
    StopAndReturn,
}

/// Something that keeps a maintenance from starting.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Blocker {
    /// The VM concerned; `None` when it is the host itself.
    pub vm: Option<VmId>,
    /// Its name.
    pub vm_name: Option<String>,
    /// What it is.
    pub kind: BlockerKind,
    /// With the values involved.
    pub detail: String,
    /// The way out.
    pub remedy: String,
}

/// Sorts of blockers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum BlockerKind {
    /// No host takes the VM.
    NoRoom {
        /// Each host and why not.
        rejections: Vec<HostRejection>,
    },
    /// Its policy is `block`.
    PolicyBlocks,
    /// Another operation is changing it.
    Busy {
        /// Which.
        operation: OperationId,
    },
    /// The host does not answer, so nothing can be moved off it.
    HostSilent,
    /// The host is in another maintenance.
    OtherMaintenance {
        /// Which.
        maintenance: MaintenanceId,
    },
    /// The VM does not run as it should, so it cannot be moved.
    NotRunning {
        /// Its state.
        state: crate::model::VmState,
    },
}

impl BlockerKind {
    /// Stable name for the API.
    pub const fn name(&self) -> &'static str {
        match self {
            Self::NoRoom { .. } => "no_room",
            Self::PolicyBlocks => "policy_blocks",
            Self::Busy { .. } => "busy",
            Self::HostSilent => "host_silent",
            Self::OtherMaintenance { .. } => "other_maintenance",
            Self::NotRunning { .. } => "not_running",
        }
    }
}

/// What became of a VM of the host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MovedVm {
    /// Which VM.
    pub vm: VmId,
    /// Its name.
    pub vm_name: String,
    /// Where it was.
    pub from: HostId,
    /// Where it went; `None` when it was stopped.
    pub to: Option<HostId>,
    /// How.
    pub action: MoveAction,
    /// What became of it.
    pub state: MovedState,
}

/// What became of a VM of the host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "state", rename_all = "snake_case")]
pub enum MovedState {
    /// It left.
    Away,
    /// It came back.
    Returned,
    /// It stays where it is.
    Stayed {
        /// Why.
        reason: String,
    },
}

impl MovedState {
    /// Stable name for the API.
    pub const fn name(&self) -> &'static str {
        match self {
            Self::Away => "away",
            Self::Returned => "returned",
            Self::Stayed { .. } => "stayed",
        }
    }
}
