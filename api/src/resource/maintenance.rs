//! Maintenances: taking every VM off a host, and back.

use super::VmMaintenancePolicy;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use uuid::Uuid;

/// A maintenance of one host.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Maintenance {
    /// Never changes.
    pub id: Uuid,
    /// The host.
    pub host: Uuid,
    /// Its name.
    pub host_name: String,
    /// Why.
    pub reason: String,
    /// Where it stands.
    pub state: MaintenanceState,
    /// What the state alone does not say.
    pub detail: Option<String>,
    /// How it is done.
    pub policy: MaintenancePolicy,
    /// What it does to each VM.
    pub plan: MaintenancePlan,
    /// VMs it has moved or stopped.
    pub moved: Vec<MaintenanceMove>,
    /// The operation under way.
    pub operation: Option<Uuid>,
    /// When it was created.
    pub created_at: Timestamp,
    /// When it last changed.
    pub changed_at: Timestamp,
    /// When it ended.
    pub ended_at: Option<Timestamp>,
    /// Who created it.
    pub actor: String,
}

/// Where a maintenance stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum MaintenanceState {
    /// It has no plan yet.
    Planned,
    /// Something must be put right first.
    Blocked,
    /// It can start.
    Ready,
    /// The host takes no new VMs.
    Cordoned,
    /// VMs are leaving.
    Draining,
    /// The host is empty.
    Drained,
    /// The operator is at work.
    Working,
    /// The host is being checked.
    Verifying,
    /// VMs are coming home.
    Restoring,
    /// It is over.
    Done,
    /// It is being called off.
    Cancelling,
    /// It was called off.
    Cancelled,
    /// It could not go on: the host stays cordoned, and `start` tries again.
    Failed,
}

impl MaintenanceState {
    /// Whether nothing will change any more.
    pub fn is_final(self) -> bool {
        matches!(self, Self::Done | Self::Cancelled)
    }
}

/// How a maintenance is done.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct MaintenancePolicy {
    /// What happens to the VMs that left, afterwards.
    #[serde(rename = "return")]
    pub returning: ReturnPolicy,
}

/// What happens after a maintenance to the VMs that left.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema, clap::ValueEnum,
)]
#[serde(rename_all = "snake_case")]
pub enum ReturnPolicy {
    /// Each comes home.
    #[default]
    Exact,
    /// As many come home as makes the pool even.
    Rebalance,
    /// They stay where they are.
    None,
}

/// What a maintenance does to each VM.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct MaintenancePlan {
    /// What is done, in order.
    pub moves: Vec<PlannedMove>,
    /// What stands in the way.
    pub blockers: Vec<Blocker>,
    /// Predicted time in all.
    pub total_s: f64,
}

/// What is done to one VM.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct PlannedMove {
    /// The VM.
    pub vm: Uuid,
    /// Its name.
    pub vm_name: String,
    /// How.
    pub action: MoveAction,
    /// The host it goes to; null when it is stopped and returns.
    pub to: Option<Uuid>,
    /// Name of that host.
    pub to_name: Option<String>,
    /// Predicted time.
    pub predicted_s: f64,
    /// Predicted transfer.
    pub predicted_mib: u64,
    /// Predicted time the guest stands still; for a restart, the time it is down.
    pub predicted_blackout_ms: u64,
    /// Memory that would be left after this step if the largest of the other hosts failed; negative when not
    /// every VM could be started again.
    pub reserve_after_mib: i64,
}

/// How a VM leaves its host.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum MoveAction {
    /// Live.
    Migrate,
    /// Stopped here, started there.
    RestartElsewhere,
    /// Stopped here, started here again afterwards.
    StopAndReturn,
}

/// What stands in the way of a maintenance.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Blocker {
    /// The VM it is about; null when it is about the host.
    pub vm: Option<Uuid>,
    /// Its name.
    pub vm_name: Option<String>,
    /// Name of the blocker.
    pub kind: String,
    /// What is in the way.
    pub detail: String,
    /// What to do about it.
    pub remedy: String,
}

/// A VM that a maintenance has moved or is moving.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct MaintenanceMove {
    /// The VM.
    pub vm: Uuid,
    /// Its name.
    pub vm_name: String,
    /// The host it left.
    pub from: Uuid,
    /// Where it went; null when it was stopped.
    pub to: Option<Uuid>,
    /// How.
    pub action: MoveAction,
    /// What became of it.
    pub state: MovedState,
    /// Why it stays, when it does.
    pub reason: Option<String>,
}

/// What became of a VM of a host in maintenance.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum MovedState {
    /// It left.
    Away,
    /// It came back.
    Returned,
    /// It stays where it is.
    Stayed,
}

/// Another policy for one VM during one maintenance.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct VmOverride {
    /// Id or name of the VM.
    pub vm: String,
    /// What to do with it.
    pub policy: VmMaintenancePolicy,
}
