//! Succession: another VMM process of the same host takes a machine over, its memory as it is. It is how a new version
//! of this program gets under a running guest.
//!
//! The *successor* connects to a UNIX socket of the *predecessor*. A frame is four bytes with the length of a JSON
//! message, little-endian, then the message; descriptors travel with the length (`SCM_RIGHTS`).
//!
//! ```text
//! successor                                predecessor
//!   Hello{versions, succession, vm}     →
//!                                       ←  Offer{machine} + memory  |  Refuse{problem}
//!   (builds the whole machine around the memory; the guest runs)
//!   Take                                →
//!                                          (the guest stands still from here)
//!                                       ←  State{…} + taps, sockets; then the state's bytes and the console's
//!   --- the host's agent writes down whose the VM is, and tells one of both ---
//! ```
//!
//! Until it has sent `State` the predecessor goes on by itself if the connection breaks. From then on only the host's
//! agent decides, by its record: owner and epoch stay as they are, so the store has no part in it.

use crate::cpu::GuestCpu;
use crate::devices::Attachments;
use crate::id::{Epoch, SuccessionId, VmId};
use crate::machine::{CpuFacts, MachineSpec};
use crate::migration::{Arrival, Counted};
use crate::problem::Problem;
use crate::unit::Mib;
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// Newest version of the protocol that this program speaks.
pub const SUCCESSION_VERSION: u32 = 1;
/// Oldest version that this program still speaks.
pub const OLDEST_SUCCESSION_VERSION: u32 = 1;
/// Longest message.
pub const MAX_SUCCESSION_MESSAGE_BYTES: u32 = 1024 * 1024;
/// Most descriptors that travel with one message; the kernel's own limit is 253.
pub const MAX_LENT_DESCRIPTORS: usize = 250;
/// Most console output that a machine takes along.
pub const MAX_CONSOLE_BYTES: u32 = 1024 * 1024;

/// Which of the two processes a VMM is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SuccessionRole {
    /// The machine runs in it now.
    Predecessor,
    /// The machine shall run in it.
    Successor,
}

/// How far a succession has come, seen from one process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SuccessionPhase {
    /// Predecessor: a successor may come, and the guest runs. Successor: the machine is built and waits for its state.
    Prepared,
    /// The guest stands still while its state is saved or restored.
    Blackout,
    /// Predecessor: the state was handed over. Successor: the machine is whole. Only the agent's record decides.
    Ready,
    /// Successor: the machine runs here.
    Completed,
    /// It came to nothing; the machine is the predecessor's.
    Failed,
}

/// Where a succession stands, seen from one process.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SuccessionStatus {
    /// Which one.
    pub succession: SuccessionId,
    /// Which end.
    pub role: SuccessionRole,
    /// How far.
    pub phase: SuccessionPhase,
    /// How long the guest stood still; known at the successor at the end.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub blackout: Option<SuccessionBlackout>,
    /// Why it came to nothing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
}

/// How long the guest stood still, and why, in microseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct SuccessionBlackout {
    /// In all: from the order to pause until the vCPUs run again.
    pub total_us: u64,
    /// Until every vCPU and device stood still.
    pub pause_us: u64,
    /// Saving vCPUs and devices.
    pub save_us: u64,
    /// From the state saved until the machine was whole in the successor.
    pub restore_us: u64,
    /// From there until the vCPUs ran: the agent's record, and the word to run.
    pub commit_us: u64,
}

/// Lets a successor take the machine over.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct OfferSuccession {
    /// Must be the machine's epoch.
    pub epoch: Epoch,
    /// The succession; any other is refused.
    pub succession: SuccessionId,
    /// Where to wait for the successor; nothing may be there.
    pub socket: PathBuf,
}

/// Builds the machine that a predecessor offers around its memory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PrepareSuccession {
    /// Whose machine it must be.
    pub vm: VmId,
    /// Epoch under which it must run, and goes on.
    pub epoch: Epoch,
    /// The succession.
    pub succession: SuccessionId,
    /// Where the predecessor waits.
    pub socket: PathBuf,
}

/// A word about the succession under way.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SuccessionCommand {
    /// The succession meant.
    pub succession: SuccessionId,
    /// Must be the machine's epoch.
    pub epoch: Epoch,
}

/// Messages of the successor.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum ToPredecessor {
    /// Opens the connection.
    Hello {
        /// Newest version the successor speaks.
        version: u32,
        /// Oldest version the successor speaks.
        oldest_version: u32,
        /// Which succession this is.
        succession: SuccessionId,
        /// Whose machine it wants.
        vm: VmId,
        /// Under which epoch.
        epoch: Epoch,
    },
    /// The machine is built: pause, and hand its state over.
    Take,
}

/// Messages of the predecessor.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum ToSuccessor {
    /// The machine; its memory comes along as one descriptor.
    Offer(Box<Offer>),
    /// It will not do.
    Refuse {
        /// Why.
        problem: Problem,
    },
    /// Everything else, with the descriptors that its devices lend.
    State(Box<HandedState>),
}

/// A machine to be built around its memory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Offer {
    /// Version that both speak from here on.
    pub version: u32,
    /// The machine.
    pub spec: MachineSpec,
    /// The lease page to watch, if the machine is under a lease.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lease: Option<PathBuf>,
    /// Where this host has what the spec names.
    #[serde(default)]
    pub attachments: Attachments,
    /// What the predecessor makes of the host's CPU.
    pub cpu: CpuFacts,
    /// What the guest sees of it.
    pub guest_cpu: GuestCpu,
    /// Memory the guest was asked to live with, also after it restarts itself.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub keep_memory_mib: Option<Mib>,
}

/// What comes with a machine's state. The bytes of the state and of the console follow the message.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HandedState {
    /// Length of the state; the format is that of a migration.
    pub state_bytes: u32,
    /// XXH3-128 of the state, as 32 hex digits.
    pub state_hash: String,
    /// Descriptors that each function on the bus lends, by their order there.
    pub lent: Vec<u16>,
    /// When guest time was sampled, on CLOCK_BOOTTIME.
    pub sampled_at_ns: u64,
    /// When the order to pause came, on CLOCK_BOOTTIME.
    pub paused_at_ns: u64,
    /// As in [`SuccessionBlackout`].
    pub pause_us: u64,
    /// As in [`SuccessionBlackout`].
    pub save_us: u64,
    /// What the guest does next.
    pub then: Arrival,
    /// What the machine's processes have counted so far.
    pub counted: Counted,
    /// Length of the latest console output.
    pub console_bytes: u32,
    /// Bytes of output ever written.
    pub console_end: u64,
}
