//! What happened, for the operator.

use crate::model::Actor;
use godwit_wire::id::{
    DiskId, HostId, ImageId, MaintenanceId, NetworkId, OperationId, SnapshotId, VmId,
};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use std::fmt;
use uuid::Uuid;

/// One entry of the event log; written in the transaction of the change it tells of.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Event {
    /// Place in the log: 1, 2, 3 … without gaps, never reused.
    pub revision: u64,
    /// When.
    pub time: Timestamp,
    /// Stable name, such as `vm.started`.
    pub kind: String,
    /// How bad.
    pub severity: Severity,
    /// About what.
    pub subject: Subject,
    /// What happened, in a sentence with names and values.
    pub message: String,
    /// Who wanted it.
    pub actor: Actor,
}

/// How bad an event is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Severity {
    /// All is well.
    Info,
    /// Someone should look by day.
    Warning,
    /// Someone should look now.
    Error,
}

/// Something an event or an operation is about.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Subject {
    /// What sort of thing.
    pub kind: SubjectKind,
    /// Its id.
    pub id: Uuid,
    /// Its name at the time.
    pub name: String,
}

/// Sorts of things.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
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

impl Subject {
    /// A VM.
    pub fn vm(id: VmId, name: impl Into<String>) -> Self {
        Self {
            kind: SubjectKind::Vm,
            id: id.0,
            name: name.into(),
        }
    }

    /// A host.
    pub fn host(id: HostId, name: impl Into<String>) -> Self {
        Self {
            kind: SubjectKind::Host,
            id: id.0,
            name: name.into(),
        }
    }

    /// A maintenance; called by its host's name.
    pub fn maintenance(id: MaintenanceId, host_name: impl Into<String>) -> Self {
        Self {
            kind: SubjectKind::Maintenance,
            id: id.0,
            name: host_name.into(),
        }
    }

    /// An operation; called by its kind.
    pub fn operation(id: OperationId, kind: impl Into<String>) -> Self {
        Self {
            kind: SubjectKind::Operation,
            id: id.0,
            name: kind.into(),
        }
    }

    /// An image.
    pub fn image(id: ImageId, name: impl Into<String>) -> Self {
        Self {
            kind: SubjectKind::Image,
            id: id.0,
            name: name.into(),
        }
    }

    /// A disk.
    pub fn disk(id: DiskId, name: impl Into<String>) -> Self {
        Self {
            kind: SubjectKind::Disk,
            id: id.0,
            name: name.into(),
        }
    }

    /// A network.
    pub fn network(id: NetworkId, name: impl Into<String>) -> Self {
        Self {
            kind: SubjectKind::Network,
            id: id.0,
            name: name.into(),
        }
    }

    /// A snapshot.
    pub fn snapshot(id: SnapshotId, name: impl Into<String>) -> Self {
        Self {
            kind: SubjectKind::Snapshot,
            id: id.0,
            name: name.into(),
        }
    }

    /// The pool as a whole.
    pub fn pool() -> Self {
        Self {
            kind: SubjectKind::Pool,
            id: Uuid::nil(),
            name: "pool".into(),
        }
    }
}

impl fmt::Display for Subject {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.name)
    }
}
