//! Why nothing was handed over.

use crate::kvm::KvmError;
use crate::machine::MachineError;
use crate::migration::hand_over::HandOverError;
use crate::migration::lane::PagesError;
use crate::migration::stream::StreamError;
use godwit_wire::migration::ToSource;
use godwit_wire::unit::Bytes;

/// Why nothing was handed over.
#[derive(Debug, thiserror::Error)]
pub(super) enum SourceError {
    #[error("the target at {target} cannot be reached: {source}")]
    Connect {
        target: std::net::SocketAddr,
        source: StreamError,
    },
    #[error(transparent)]
    Stream(#[from] StreamError),
    #[error("the target refused: {0}")]
    Refused(String),
    #[error("the target ended it: {0}")]
    Aborted(String),
    #[error("the target answered {got} where {expected} was expected")]
    OutOfTurn { got: String, expected: &'static str },
    #[error(
        "the guest does not converge: after {rounds} rounds {rest} would still stand {blackout_ms} ms of blackout, above the limit of {limit_ms} ms"
    )]
    DoesNotConverge {
        rounds: u32,
        rest: Bytes,
        blackout_ms: u128,
        limit_ms: u64,
    },
    #[error(
        "the guest does not converge: {rest} would still stand {blackout_ms} ms of blackout after {deadline_s} s, the deadline"
    )]
    Deadline {
        rest: Bytes,
        blackout_ms: u128,
        deadline_s: u64,
    },
    #[error("round {round} was still under way after {deadline_s} s, the deadline")]
    RoundTooLong { round: u32, deadline_s: u64 },
    #[error(transparent)]
    Machine(#[from] MachineError),
    #[error(transparent)]
    Kvm(#[from] KvmError),
    #[error("the machine's state cannot be encoded: {0}")]
    Encode(String),
    #[error(transparent)]
    Pages(PagesError),
    #[error(
        "the last pass took several times the limit of {limit_ms} ms, because the link became slow"
    )]
    BlackoutTooLong { limit_ms: u64 },
    #[error("the target named {named} missing pages and spoke of {told}")]
    OtherPages { named: u64, told: u64 },
    #[error(transparent)]
    HandOver(#[from] HandOverError),
    #[error("the system gives no random numbers")]
    NoRandomness,
    #[error("cancelled")]
    Cancelled,
}

impl From<PagesError> for SourceError {
    fn from(error: PagesError) -> Self {
        match error {
            PagesError::Stopped => Self::Cancelled,
            PagesError::Stream(error) => Self::Stream(error),
            error => Self::Pages(error),
        }
    }
}

pub(super) fn out_of_turn(message: ToSource, expected: &'static str) -> SourceError {
    match message {
        ToSource::Abort { reason } => SourceError::Aborted(reason),
        other => SourceError::OutOfTurn {
            got: format!("{other:?}"),
            expected,
        },
    }
}
