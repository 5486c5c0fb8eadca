//! What can go wrong between two processes of one machine.

use crate::machine::MachineError;
use crate::migration::HandOverError;
use godwit_wire::id::{Epoch, VmId};
use godwit_wire::problem::Problem;
use godwit_wire::succession::{OLDEST_SUCCESSION_VERSION, SUCCESSION_VERSION};
use std::io;

/// A succession cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum SuccessionError {
    /// The connection broke or went silent.
    #[error("the connection to the other process failed: {0}")]
    Io(#[from] io::Error),
    /// A message that cannot be read.
    #[error("a message of the other process cannot be read: {0}")]
    Message(#[from] serde_json::Error),
    /// Something is longer than it may be.
    #[error("{what} has {bytes} bytes and may have {limit}")]
    TooLong {
        /// What it is.
        what: &'static str,
        /// Its length.
        bytes: u64,
        /// Its limit.
        limit: u32,
    },
    /// Descriptors were lost on the way, or there are too many or too few.
    #[error("{count} descriptors came where {expected} were expected")]
    Descriptors {
        /// What came.
        count: usize,
        /// What should have come.
        expected: usize,
    },
    /// A message that does not belong here.
    #[error("the other process spoke out of turn")]
    OutOfTurn,
    /// A stranger.
    #[error("a process of user {uid} connected, which is not this one's")]
    Stranger {
        /// Its user.
        uid: u32,
    },
    /// The two have no version in common.
    #[error(
        "the other process speaks versions {oldest} to {newest} of this protocol and this one {OLDEST_SUCCESSION_VERSION} to {SUCCESSION_VERSION}"
    )]
    Version {
        /// Oldest version of the other process.
        oldest: u32,
        /// Its newest.
        newest: u32,
    },
    /// Somebody else's machine.
    #[error("the other process wants machine {vm} under epoch {epoch}, which is not this one's")]
    OtherMachine {
        /// The machine it wants.
        vm: VmId,
        /// Under which epoch.
        epoch: Epoch,
    },
    /// The other process refused, or this host cannot go on with the machine.
    #[error("{0}")]
    Refused(Problem),
    /// The state is not what was sent.
    #[error("the machine's state was damaged on the way: {0}")]
    State(String),
    /// It was called off meanwhile, or is over.
    #[error(transparent)]
    HandOver(#[from] HandOverError),
    /// The machine.
    #[error(transparent)]
    Machine(#[from] MachineError),
}

impl SuccessionError {
    /// The same as an API problem. None of them has changed anything: the guest runs where it ran.
    pub fn problem(&self) -> Problem {
        match self {
            Self::Refused(problem) => problem.clone(),
            Self::Machine(error) => error.problem("spec"),
            Self::Version { .. } => Problem::conflict("succession-version", self.to_string())
                .with_remedy("migrate the VM to another host, and back, instead"),
            _ => Problem::conflict("succession-failed", self.to_string())
                .with_remedy("the guest stays where it is; try again"),
        }
    }
}
