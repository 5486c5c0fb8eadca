//! Live migration: policy, progress and the messages between the source and the target VMM.
//!
//! One TCP connection carries frames: a fixed [`FrameHeader`], then a payload of bounded length. Control frames
//! hold one JSON [`ToTarget`] or [`ToSource`]; page frames hold raw guest memory. The order on the wire is
//!
//! ```text
//! source                                   target
//!   Hello{versions, capabilities, spec}  →
//!                                        ←  Accept{version, capabilities} | Refuse{reason}
//!   Pages* Zero* EndOfRound              →  (any number of rounds, the guest running)
//!                                        ←  RoundReceived
//!   --- the source pauses the guest ---
//!   Pages* Zero* State Done              →
//!                                        ←  Ready            (everything held and verified)
//!   --- the store moves owner and epoch; the target is told to run ---
//!                                        ←  Running{epoch}
//! ```
//!
//! Either side may send `Abort` before `Done`; from `Done` on only the store's answer decides.

use crate::cpu::GuestCpu;
use crate::id::{Epoch, MigrationId, VmId};
use crate::machine::{CpuFacts, MachineSpec};
use crate::unit::Bytes;
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;

/// Newest protocol version this program speaks.
pub const PROTOCOL_VERSION: u32 = 1;
/// Oldest protocol version this program still speaks.
pub const OLDEST_PROTOCOL_VERSION: u32 = 1;
/// Longest control message; a longer one is refused before it is read.
pub const MAX_CONTROL_BYTES: u32 = 256 * 1024;
/// Longest device-and-vCPU state.
pub const MAX_STATE_BYTES: u32 = 16 * 1024 * 1024;
/// Most stretches of touched memory that a hello names; the rest is found when it arrives.
pub const MAX_TOUCHED_STRETCHES: usize = 1024;
/// Most pages in one frame (1 MiB): long enough to keep a link full, short enough to react to a cancel.
pub const MAX_FRAME_PAGES: u32 = 256;
/// Bytes in an encoded [`FrameHeader`].
pub const FRAME_HEADER_BYTES: usize = 24;
/// First four bytes of every frame.
pub const FRAME_MAGIC: u32 = u32::from_le_bytes(*b"GWM1");

/// What the operator asks of one migration.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct MigrationPolicy {
    /// Longest time the guest may stand still, in milliseconds.
    pub downtime_limit_ms: u64,
    /// Most pre-copy rounds before the migration gives up and leaves the source running.
    pub max_rounds: u32,
    /// Whether all of guest memory is hashed on both sides during the blackout.
    pub verify: Verify,
}

impl Default for MigrationPolicy {
    fn default() -> Self {
        Self {
            downtime_limit_ms: 300,
            max_rounds: 30,
            verify: Verify::Frames,
        }
    }
}

/// How the target proves that it holds what the source had.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Verify {
    /// Page counts per round and a checksum of the state; what production uses.
    #[default]
    Frames,
    /// Also a hash of all guest memory, taken on both sides while paused. For tests: it lengthens the blackout.
    WholeMemory,
}

/// Which end of a migration a VMM is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MigrationRole {
    /// The VM runs here now.
    Source,
    /// The VM shall run here.
    Target,
}

/// Where a migration stands, seen from one end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MigrationPhase {
    /// Source: connecting and shaking hands. Target: listening.
    Connecting,
    /// Memory is copied while the guest runs.
    PreCopy,
    /// The guest stands still; the rest is copied.
    Blackout,
    /// The target holds and has verified everything (as far as this end knows); the store decides.
    AwaitingCommit,
    /// The guest runs at the target.
    Completed,
    /// It ended before the commit; the guest runs at the source.
    Failed,
    /// It was called off before the commit; the guest runs at the source.
    Cancelled,
}

impl MigrationPhase {
    /// Whether nothing will change any more.
    pub const fn is_final(self) -> bool {
        matches!(self, Self::Completed | Self::Failed | Self::Cancelled)
    }
}

/// Progress figures of a migration.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct MigrationProgress {
    /// Pre-copy round under way, from 1; the blackout's pass counts as one more.
    pub round: u32,
    /// Guest memory in all.
    pub memory_bytes: Bytes,
    /// Bytes put on (or taken off) the wire.
    pub transferred_bytes: Bytes,
    /// Pages sent with their content.
    pub content_pages: u64,
    /// Pages sent as "all zero".
    pub zero_pages: u64,
    /// Memory still to be sent in this round.
    pub remaining_bytes: Bytes,
    /// Measured transfer rate.
    pub rate_bytes_per_s: u64,
    /// Measured rate at which the guest dirties memory.
    pub dirty_bytes_per_s: u64,
    /// Blackout to expect if the guest were paused now.
    pub predicted_blackout_ms: u64,
    /// Since the migration began.
    pub elapsed_ms: u64,
    /// From pause at the source to the news that the target runs; known at the end, at the source.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub downtime_us: Option<u64>,
}

/// State of a migration at one end, as the VMM's API reports it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MigrationStatus {
    /// Which migration.
    pub migration: MigrationId,
    /// Grows with every change of phase, so that a caller can wait for the next.
    pub sequence: u64,
    /// Which end this is.
    pub role: MigrationRole,
    /// Where it stands.
    pub phase: MigrationPhase,
    /// Figures.
    pub progress: MigrationProgress,
    /// Whether the connection to the other end is up.
    pub connected: bool,
    /// Why it failed or was cancelled.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
}

/// Consecutive pages of guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stretch {
    /// Guest physical address of the first page.
    pub address: u64,
    /// Number of pages.
    pub pages: u64,
}

/// What a guest does after it has moved.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Arrival {
    /// It runs, as it did at the source.
    Run,
    /// It was paused by the operator and stays so.
    StayPaused,
}

/// Something both ends must know to move a machine; unknown names in `required` are refused before the pause.
pub type Capability = String;

/// Control messages from the source to the target.
// One greeting per migration is large; a box would only complicate everyone who reads it.
#[allow(clippy::large_enum_variant)]
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum ToTarget {
    /// Opens the connection.
    Hello {
        /// Newest version the source speaks.
        version: u32,
        /// Oldest version the source speaks.
        oldest_version: u32,
        /// What the target must support.
        required: BTreeSet<Capability>,
        /// Which migration this is; the target waits for exactly one.
        migration: MigrationId,
        /// Which VM moves.
        vm: VmId,
        /// Epoch under which it runs at the source.
        epoch: Epoch,
        /// The machine.
        spec: MachineSpec,
        /// CPU the guest runs on.
        cpu: CpuFacts,
        /// What the guest sees of it; absent from sources that do not tell.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        guest_cpu: Option<GuestCpu>,
        /// Whether `Done` will carry a hash of all memory.
        verify: Verify,
        /// Memory the guest has touched so far: the target takes host memory for it before it accepts, so that
        /// the transfer does not wait for page faults. At most [`MAX_TOUCHED_STRETCHES`]; a hint, never trusted.
        #[serde(default)]
        touched: Vec<Stretch>,
    },
    /// All pages of a round have been sent.
    EndOfRound {
        /// Number of the round, from 1.
        round: u32,
        /// Pages sent so far (with content and zero), all rounds together.
        pages: u64,
    },
    /// Everything has been sent: the target may become ready.
    Done {
        /// Pages sent in all.
        pages: u64,
        /// XXH3-128 of the state frame's payload, as 32 hex digits.
        state_hash: String,
        /// Time since the guest's clocks were sampled for the state, in nanoseconds. The target adds what passes
        /// until it restores them, so the hosts' own clocks need not agree.
        clock_age_ns: u64,
        /// What the guest does once the target owns it.
        then: Arrival,
        /// XXH3-128 of all guest memory, as 32 hex digits, when asked for.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        memory_hash: Option<String>,
    },
    /// The source calls it off.
    Abort {
        /// Why.
        reason: String,
    },
}

/// Control messages from the target to the source.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum ToSource {
    /// The target can take this machine.
    Accept {
        /// Version to speak.
        version: u32,
    },
    /// The target cannot take this machine.
    Refuse {
        /// Why, for the operator.
        reason: String,
    },
    /// A round arrived whole.
    RoundReceived {
        /// Number of the round.
        round: u32,
    },
    /// Everything is held and verified.
    Ready,
    /// The guest runs here now.
    Running {
        /// Epoch under which it runs.
        epoch: Epoch,
    },
    /// The target calls it off.
    Abort {
        /// Why.
        reason: String,
    },
}

/// What a frame carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
pub enum FrameKind {
    /// One JSON control message.
    Control = 1,
    /// `pages` consecutive pages of content from `address` on.
    Pages = 2,
    /// `pages` consecutive pages of zeros from `address` on; no payload.
    Zero = 3,
    /// The device and vCPU state (CBOR).
    State = 4,
}

/// Fixed header of every frame, little-endian: magic u32, kind u16, flags u16 (0), pages u32, length u32,
/// address u64.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FrameHeader {
    /// What follows.
    pub kind: FrameKind,
    /// Number of pages, for page frames.
    pub pages: u32,
    /// Bytes of payload behind the header.
    pub length: u32,
    /// Guest physical address of the first page, for page frames.
    pub address: u64,
}

/// A header that no correct peer sends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// Not a Godwit migration stream, or out of step.
    #[error("frame starts with {0:#010x} instead of the magic")]
    BadMagic(u32),
    /// A kind or flag of some other version.
    #[error("unknown frame kind {kind} with flags {flags:#x}")]
    Unknown {
        /// Kind on the wire.
        kind: u16,
        /// Flags on the wire.
        flags: u16,
    },
    /// The length does not fit the kind.
    #[error("a frame of kind {kind:?} with {pages} pages cannot have {length} bytes")]
    BadLength {
        /// Kind on the wire.
        kind: FrameKind,
        /// Pages on the wire.
        pages: u32,
        /// Length on the wire.
        length: u32,
    },
    /// The address is not the start of a page.
    #[error("page frame at {0:#x}, which is not a page boundary")]
    Unaligned(u64),
}

impl FrameHeader {
    /// Header of a control message of `length` bytes.
    pub const fn control(length: u32) -> Self {
        Self {
            kind: FrameKind::Control,
            pages: 0,
            length,
            address: 0,
        }
    }

    /// Header of `pages` pages of content from `address` on.
    pub const fn pages(address: u64, pages: u32) -> Self {
        Self {
            kind: FrameKind::Pages,
            pages,
            length: pages * crate::unit::PAGE_BYTES as u32,
            address,
        }
    }

    /// Header of `pages` pages of zeros from `address` on.
    pub const fn zero(address: u64, pages: u32) -> Self {
        Self {
            kind: FrameKind::Zero,
            pages,
            length: 0,
            address,
        }
    }

    /// Header of a machine state of `length` bytes.
    pub const fn state(length: u32) -> Self {
        Self {
            kind: FrameKind::State,
            pages: 0,
            length,
            address: 0,
        }
    }

    /// The bytes on the wire.
    pub fn encode(&self) -> [u8; FRAME_HEADER_BYTES] {
        let mut out = [0; FRAME_HEADER_BYTES];
        out[0..4].copy_from_slice(&FRAME_MAGIC.to_le_bytes());
        out[4..6].copy_from_slice(&(self.kind as u16).to_le_bytes());
        out[8..12].copy_from_slice(&self.pages.to_le_bytes());
        out[12..16].copy_from_slice(&self.length.to_le_bytes());
        out[16..24].copy_from_slice(&self.address.to_le_bytes());
        out
    }

    /// Reads and judges a header; whatever it returns is bounded by the limits of this module.
    pub fn decode(bytes: &[u8; FRAME_HEADER_BYTES]) -> Result<Self, FrameError> {
        let u16_at = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
        let u32_at = |at: usize| u32::from(u16_at(at)) | u32::from(u16_at(at + 2)) << 16;
        let magic = u32_at(0);
        if magic != FRAME_MAGIC {
            return Err(FrameError::BadMagic(magic));
        }
        let kind = match (u16_at(4), u16_at(6)) {
            (1, 0) => FrameKind::Control,
            (2, 0) => FrameKind::Pages,
            (3, 0) => FrameKind::Zero,
            (4, 0) => FrameKind::State,
            (kind, flags) => return Err(FrameError::Unknown { kind, flags }),
        };
        let (pages, length) = (u32_at(8), u32_at(12));
        let address = u64::from(u32_at(16)) | u64::from(u32_at(20)) << 32;
        let fits = match kind {
            FrameKind::Control => pages == 0 && length <= MAX_CONTROL_BYTES,
            FrameKind::State => pages == 0 && length <= MAX_STATE_BYTES,
            FrameKind::Pages => {
                (1..=MAX_FRAME_PAGES).contains(&pages)
                    && length == pages * crate::unit::PAGE_BYTES as u32
            }
            FrameKind::Zero => pages >= 1 && length == 0,
        };
        if !fits {
            return Err(FrameError::BadLength {
                kind,
                pages,
                length,
            });
        }
        if !address.is_multiple_of(crate::unit::PAGE_BYTES) {
            return Err(FrameError::Unaligned(address));
        }
        Ok(Self {
            kind,
            pages,
            length,
            address,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn headers_survive_the_wire() {
        for header in [
            FrameHeader::control(17),
            FrameHeader::pages(0x1000, 256),
            FrameHeader::zero(0x1_0000_0000, 70_000),
            FrameHeader::state(5),
        ] {
            assert_eq!(FrameHeader::decode(&header.encode()), Ok(header));
        }
    }

    #[test]
    fn the_wire_form_of_a_page_frame_is_fixed() {
        expect_test::expect!["47574d310200000003000000003000000020000000000000"].assert_eq(
            &FrameHeader::pages(0x2000, 3)
                .encode()
                .iter()
                .map(|byte| format!("{byte:02x}"))
                .collect::<String>(),
        );
    }

    proptest! {
        #[test]
        fn any_bytes_give_a_bounded_header_or_an_error(bytes in prop::array::uniform24(any::<u8>())) {
            if let Ok(header) = FrameHeader::decode(&bytes) {
                prop_assert!(header.length <= MAX_STATE_BYTES);
                prop_assert_eq!(header.encode(), bytes);
            }
        }

        #[test]
        fn no_header_with_the_magic_allows_an_unbounded_payload(
            kind in 0u16..6, pages in any::<u32>(), length in any::<u32>(), address in any::<u64>()
        ) {
            let mut bytes = [0; FRAME_HEADER_BYTES];
            bytes[0..4].copy_from_slice(&FRAME_MAGIC.to_le_bytes());
            bytes[4..6].copy_from_slice(&kind.to_le_bytes());
            bytes[8..12].copy_from_slice(&pages.to_le_bytes());
            bytes[12..16].copy_from_slice(&length.to_le_bytes());
            bytes[16..24].copy_from_slice(&address.to_le_bytes());
            if let Ok(header) = FrameHeader::decode(&bytes) {
                prop_assert!(header.length <= MAX_STATE_BYTES);
            }
        }
    }
}
