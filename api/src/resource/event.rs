//! Events.

use super::Subject;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// Something that happened; the audit trail and the operator's log.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Event {
    /// Orders events; ask for what comes after it.
    pub revision: u64,
    /// When.
    pub time: Timestamp,
    /// What, such as `vm.started`.
    pub kind: String,
    /// How much it matters.
    pub severity: Severity,
    /// What it is about.
    pub subject: Subject,
    /// For people.
    pub message: String,
    /// Who wanted it; `controller` when nobody asked.
    pub actor: String,
}

/// How much an event matters.
#[derive(
    Clone,
    Copy,
    Debug,
    PartialEq,
    Eq,
    PartialOrd,
    Ord,
    Serialize,
    Deserialize,
    ToSchema,
    clap::ValueEnum,
)]
#[serde(rename_all = "snake_case")]
pub enum Severity {
    /// The ordinary course of things.
    Info,
    /// Worth a look.
    Warning,
    /// Someone must act.
    Error,
}

/// A resource is gone; sent on the event stream only.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Deleted {
    /// `vm`, `host`, `operation`, `maintenance`, `migration`, `image`, `disk`, `network` or `pool`.
    pub kind: String,
    /// Which one.
    pub id: String,
}
