//! One attempt to move one VM, and the decision about it that stands for ever.

use super::MovingDisk;
use godwit_wire::id::{Epoch, Generation, HostId, MigrationId, OperationId, VmId};
use godwit_wire::migration::{MigrationPhase, MigrationPolicy, MigrationProgress};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};

/// A migration as stored.
///
/// ```text
/// open ── the target's commit, owner and epoch moved in the same transaction ──▶ committed
///   └──── cancel, failure, the source's question, failover ────────────────────▶ void
/// ```
/// Neither end state is ever left.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Migration {
    /// Identity.
    pub id: MigrationId,
    /// What moves.
    pub vm: VmId,
    /// Its name at the time.
    pub vm_name: String,
    /// From where.
    pub source: HostId,
    /// Name at the time.
    pub source_name: String,
    /// To where.
    pub target: HostId,
    /// Name at the time.
    pub target_name: String,
    /// Epoch at the source.
    pub epoch: Epoch,
    /// Generation of the command to the target.
    pub prepare_generation: Generation,
    /// Generation of the command to the source.
    pub send_generation: Generation,
    /// Limits.
    pub policy: MigrationPolicy,
    /// Disks whose content moves along.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub disks: Vec<MovingDisk>,
    /// The operation that drives it.
    pub operation: OperationId,
    /// The decision.
    pub state: MigrationState,
    /// Latest phase at the source, once the migration has ended.
    pub phase: Option<MigrationPhase>,
    /// Figures of the source, once the migration has ended.
    pub progress: Option<MigrationProgress>,
    /// Whether something kept it from showing what the link carries: others that ran beside it, or a limit of a host or
    /// link.
    #[serde(default)]
    pub held_back: HeldBack,
    /// What was foreseen when it began.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub foreseen: Option<Foreseen>,
    /// When it began.
    pub started_at: Timestamp,
    /// When it was decided.
    pub ended_at: Option<Timestamp>,
}

/// Whether a migration had the link for itself.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum HeldBack {
    /// It had, and no limit but its own.
    #[default]
    No,
    /// It shared the link, or was limited.
    Yes,
}

/// What was foreseen of a migration when it began, to be compared with what came of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Foreseen {
    /// What would become of it.
    pub outcome: ForeseenOutcome,
    /// From start to end.
    pub took_ms: u64,
    /// Guest memory sent.
    pub mib: u64,
    /// Time the guest stands still.
    pub blackout_ms: u64,
    /// How much it is slowed down.
    pub throttle_percent: u8,
}

/// What would become of a migration.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ForeseenOutcome {
    /// It gets below the downtime limit.
    Converges,
    /// The guest goes ahead of its memory.
    GoesAhead,
    /// It does not get below the downtime limit.
    WillNotConverge,
}

/// Who owns the VM, as far as this migration matters.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "state", rename_all = "snake_case")]
pub enum MigrationState {
    /// The source owns the VM.
    Open,
    /// The target owns it.
    Committed {
        /// Under this epoch.
        epoch: Epoch,
    },
    /// The source keeps it.
    Void {
        /// Why.
        reason: String,
    },
}

impl MigrationState {
    /// The name in the API.
    pub const fn name(&self) -> &'static str {
        match self {
            Self::Open => "open",
            Self::Committed { .. } => "committed",
            Self::Void { .. } => "void",
        }
    }
}

impl Migration {
    /// Whether the decision is still to come.
    pub const fn is_open(&self) -> bool {
        matches!(self.state, MigrationState::Open)
    }
}

#[cfg(test)]
impl Migration {
    /// One that moved some VM, with what it showed, for tests of what is made of that.
    pub(crate) fn committed(source: HostId, target: HostId, progress: MigrationProgress) -> Self {
        Self {
            id: MigrationId::fresh(),
            vm: VmId::fresh(),
            vm_name: "a".into(),
            source,
            source_name: "source".into(),
            target,
            target_name: "target".into(),
            epoch: Epoch(1),
            prepare_generation: Generation(1),
            send_generation: Generation(2),
            policy: MigrationPolicy::default(),
            disks: Vec::new(),
            operation: OperationId::fresh(),
            state: MigrationState::Committed { epoch: Epoch(2) },
            phase: Some(MigrationPhase::Completed),
            progress: Some(progress),
            held_back: HeldBack::No,
            foreseen: None,
            started_at: Timestamp::UNIX_EPOCH,
            ended_at: None,
        }
    }
}
