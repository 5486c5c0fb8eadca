//! Operations: what takes time.

use super::{Host, Maintenance, Problem, Vm};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use uuid::Uuid;

/// Something under way, or done.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Operation {
    /// Never changes.
    pub id: Uuid,
    /// What is done: `create`, `change`, `start`, `stop`, `reboot`, `pause`, `resume`, `migrate`, `delete`, `restart`,
    /// `upgrade`, `evacuate`, `drain`, `restore`, `create_image`, `delete_image`, `create_disk`, `grow_disk`,
    /// `delete_disk` or `erase_copy`.
    pub kind: String,
    /// What it is done to.
    pub subject: Subject,
    /// Where it stands.
    pub state: OperationState,
    /// From 0 to 1.
    pub progress: f64,
    /// The operation this one is part of.
    pub parent: Option<Uuid>,
    /// Its latest steps, oldest first.
    pub steps: Vec<Step>,
    /// Why it failed.
    pub error: Option<Problem>,
    /// When it was asked for.
    pub created_at: Timestamp,
    /// When it ended.
    pub ended_at: Option<Timestamp>,
    /// Who asked for it.
    pub actor: String,
}

/// What an operation or event is about.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Subject {
    /// Kind of thing.
    pub kind: SubjectKind,
    /// Which one.
    pub id: Uuid,
    /// Its name.
    pub name: String,
}

/// Kind of thing an operation or event is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum SubjectKind {
    /// A VM.
    Vm,
    /// A host.
    Host,
    /// A maintenance.
    Maintenance,
    /// An operation.
    Operation,
    /// An image.
    Image,
    /// A disk.
    Disk,
    /// A network.
    Network,
    /// A snapshot.
    Snapshot,
    /// The pool as a whole.
    Pool,
}

/// Where an operation stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum OperationState {
    /// Not begun.
    Pending,
    /// Under way.
    Running,
    /// Done.
    Succeeded,
    /// It failed; `error` says why.
    Failed,
    /// It was called off.
    Cancelled,
}

impl OperationState {
    /// Whether nothing will change any more.
    pub fn is_final(self) -> bool {
        matches!(self, Self::Succeeded | Self::Failed | Self::Cancelled)
    }
}

/// One step of an operation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Step {
    /// What it does.
    pub name: String,
    /// Where it stands.
    pub state: StepState,
    /// With which values, or with what result.
    pub detail: String,
    /// When it began.
    pub started_at: Timestamp,
    /// When it ended.
    pub ended_at: Option<Timestamp>,
}

/// Where a step stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum StepState {
    /// Under way.
    Running,
    /// Done.
    Done,
    /// It failed.
    Failed,
}

/// A change to a VM was accepted.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct VmAccepted {
    /// The operation that carries it out; null when nothing is left to do.
    pub operation: Option<Operation>,
    /// The VM as it is now.
    pub vm: Vm,
}

/// A change to a host was accepted.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct HostAccepted {
    /// The operation that carries it out; null when nothing is left to do.
    pub operation: Option<Operation>,
    /// The host as it is now.
    pub host: Host,
}

/// A change to a maintenance was accepted.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct MaintenanceAccepted {
    /// The operation that carries it out; null when nothing is left to do.
    pub operation: Option<Operation>,
    /// The maintenance as it is now.
    pub maintenance: Maintenance,
}
