//! Live migration: policy, progress and the messages between the source and the target VMM.
//!
//! One control connection and 1 to [`MAX_LANES`] lanes carry frames: a fixed [`FrameHeader`], then a payload of
//! bounded length. Control frames hold one JSON [`ToTarget`] or [`ToSource`]; page frames hold guest memory and
//! travel on lanes only. The order on the wire is
//!
//! ```text
//! source                                   target
//!   Hello{versions, capabilities, spec}  →
//!                                        ←  Accept{version} | Refuse{reason}
//!   Join{lane} on each lane              →
//!                                        ←  Joined on each lane
//!   Pages* Zero* EndOfRound on each lane →  (any number of rounds, the guest running)
//!   EndOfRound                           →
//!                                        ←  RoundReceived   (every lane's round is whole)
//!   --- the source pauses the guest ---
//!   Pages* Zero* EndOfRound on each lane →
//!   State Done                           →
//!                                        ←  Ready            (everything held and verified)
//!   --- the store moves owner and epoch; the target is told to run ---
//!                                        ←  Running{epoch}
//! ```
//!
//! Where the policy allows post-copy and pre-copy does not get there, the last pages follow the guest:
//!
//! ```text
//!   Missing* WillMiss                    →                   (the guest runs at the source)
//!                                        ←  Discarded
//!   --- the source pauses the guest ---
//!   Missing* State Done{missing_pages}   →
//!                                        ←  Armed            (whoever touches a missing page waits for it)
//!                                        ←  Ready
//!   Pages* Zero* on each lane            →
//!                                        ←  Want on an urgent lane
//!   Pages* Zero* Served on that lane     →
//!                                        ←  Running{epoch}   (the store's answer, as above)
//!                                        ←  Complete         (nothing is missing any more)
//! ```
//!
//! When connections break after `Done`, the source connects again with `Resume`; the target answers with `Missing`
//! frames and `Resumed`, lanes join, and it goes on.
//!
//! A target that still has memory of this VM from an earlier stay says so in `Accept`, if the source offered to compare.
//! In the first round each lane then asks for what the target holds before it sends:
//!
//! ```text
//!   Compare on a lane                    →                   (a slice of memory)
//!                                        ←  Held on that lane (which of its pages are there, and their hashes)
//!   Pages* Zero* on that lane            →                   (those that are not there as they are here)
//! ```
//!
//! A lane asks for its next slice before it sends the one before, so that neither end waits for the other.
//!
//! Disks whose content travels (`Hello` names them) go through the same rounds, before memory in each of them:
//!
//! ```text
//!   DiskContent* DiskZero* Pages* Zero* EndOfRound on each lane →
//!   EndOfRound                           →
//!                                        ←  RoundReceived{flush_us}   (what came of the disks is durable)
//! ```
//!
//! The first round brings all of a disk, each later one the clusters that the guest has changed since, and the one of
//! the blackout what is left. Also a guest that goes ahead of its memory takes its disks along whole: their last round
//! is sent while it stands still. The target makes them durable before it says `Ready`.
//!
//! A round ends on every lane before the next begins on any, so that no older copy of a page can overtake a newer
//! one. Either side may send `Abort` before `Done`; from `Done` on only the store's answer decides.

mod frame;
mod held;
mod identity;
mod policy;
mod travelling;

pub mod convergence;

pub use frame::{Codec, FrameError, FrameHeader, FrameKind, PayloadCheck, checksum};
pub use held::{HeldError, HeldPages, PAGE_HASH_BYTES};
pub use identity::{MigrationIdentity, MigrationToken};
pub use policy::{Compression, MAX_LANES, MigrationPolicy, PostCopy, Verify};
pub use travelling::{DISKS_CAPABILITY, TravellingDisk, difference};

use crate::cpu::GuestCpu;
use crate::id::{Epoch, MigrationId, VmId};
use crate::machine::{CpuFacts, MachineSpec};
use crate::unit::Bytes;
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;

/// Newest protocol version this program speaks.
pub const PROTOCOL_VERSION: u32 = 3;
/// Oldest protocol version this program still speaks.
pub const OLDEST_PROTOCOL_VERSION: u32 = 3;
/// Longest control message; a longer one is refused before it is read.
pub const MAX_CONTROL_BYTES: u32 = 256 * 1024;
/// Longest device-and-vCPU state.
pub const MAX_STATE_BYTES: u32 = 16 * 1024 * 1024;
/// Most stretches of touched memory that a hello names; the rest is found when it arrives.
pub const MAX_TOUCHED_STRETCHES: usize = 1024;
/// Most pages in one frame (1 MiB): long enough to keep a link full, short enough to react to a cancel.
pub const MAX_FRAME_PAGES: u32 = 256;
/// Unit of disks.
pub const SECTOR_BYTES: u64 = 512;
/// Most sectors in one frame (1 MiB).
pub const MAX_FRAME_SECTORS: u32 = 2048;
/// Most pages that one map of missing pages covers (1 GiB; 32 KiB on the wire).
pub const MAX_MAPPED_PAGES: u32 = 1 << 18;
/// Most pages that are compared at a time (4 MiB; at most 16.1 KiB of hashes). Two such answers fit what a connection
/// holds on the way, so an answer never waits for an end that is itself sending.
pub const MAX_COMPARED_PAGES: u32 = 1024;
/// Bytes in an encoded [`FrameHeader`].
pub const FRAME_HEADER_BYTES: usize = 32;
/// First four bytes of every frame.
pub const FRAME_MAGIC: u32 = u32::from_le_bytes(*b"GWM2");

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
    /// The guest runs at the target and some of its memory is still at the source: until it has followed, the loss
    /// of either host loses the running guest.
    PostCopy,
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
    /// Pages not sent, because the target still had them as they are from an earlier stay; known at the source.
    pub kept_pages: u64,
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
    /// Connections that carry pages at the moment.
    pub lanes: u8,
    /// Connections that there are for pages; those that would not make it faster rest. 0 from a source that does not
    /// tell.
    pub opened_lanes: u8,
    /// Share of their time that the throttled vCPUs are kept from running.
    pub throttle_percent: u8,
    /// For how long each vCPU was kept from running so far, by its number; empty while none was.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub stalled_us: Vec<u64>,
    /// Bytes that compression has saved.
    pub saved_bytes: Bytes,
    /// How long the target took to take host memory, before anything was sent.
    pub prefault_ms: u64,
    /// What is to be moved of disks, in all.
    pub disk_bytes: Bytes,
    /// What remains of that.
    pub disk_remaining_bytes: Bytes,
    /// What was sent of disks.
    pub disk_transferred_bytes: Bytes,
    /// What the blackout consisted of; known at the end, at the source.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub blackout: Option<Blackout>,
    /// From pause at the source to the news that the target runs; known at the end, at the source.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub downtime_us: Option<u64>,
    /// How long the source took to hash all of the guest's memory in the blackout, so that the target's can be held
    /// against it; the target takes about as long. Absent where that was not asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hashing_us: Option<u64>,
    /// The silence that the hand-over made in the guest's network: from the last frame that passed any
    /// of its cards at the source, either way, to the first that did at the target. The two hosts' clocks need not
    /// agree; for as long as [`Done`] was on its way the gap is told too short. Known at the target once a frame has
    /// passed there, and absent where the network was quiet before the pause.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub packet_gap_us: Option<u64>,
    /// What followed the guest; absent while or if nothing did.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub post_copy: Option<PostCopyProgress>,
}

/// A last pass that should take at most so long shows what a pass costs beside its pages; of a longer one nobody can
/// say whether it was the cost or the link.
const SHORT_PASS_US: u64 = 20_000;

impl MigrationProgress {
    /// What the blackout took beside sending the rest, in microseconds: what the next one between the same hosts will
    /// take too. `None` when it is not known, the guest went ahead of its memory, or disks went along.
    pub fn fixed_cost_us(&self) -> Option<u64> {
        // Where disks went along, making them durable is part of it, which depends on what the guest wrote.
        let plain = self.post_copy.is_none() && self.disk_bytes == Bytes(0);
        let parts = self.blackout.filter(|_| plain)?;
        let beside = match parts.rest_bytes_per_s {
            0 => 0,
            rate => {
                let sending = u128::from(parts.rest_bytes) * 1_000_000 / u128::from(rate);
                match u64::try_from(sending) {
                    Ok(sending_us) if sending_us <= SHORT_PASS_US => {
                        parts.pages_us.saturating_sub(sending_us)
                    }
                    _ => 0,
                }
            }
        };
        let whole = [
            parts.pause_us,
            parts.save_us,
            beside,
            parts.restore_us,
            parts.commit_us,
        ];
        Some(whole.into_iter().fold(0, u64::saturating_add))
    }
}

/// Memory that follows a guest which runs at the target already.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct PostCopyProgress {
    /// What was missing when the guest was handed over.
    pub owed_bytes: Bytes,
    /// What is still missing: lost with either host.
    pub missing_bytes: Bytes,
    /// Pages the guest had to wait for.
    pub wanted_pages: u64,
    /// Time the guest's accesses waited for them, all together; known at the target.
    pub waited_us: u64,
    /// The longest of these waits; known at the target.
    pub longest_wait_us: u64,
    /// Times the connections broke and were made again.
    pub interruptions: u32,
    /// From the hand-over until nothing was missing.
    pub took_ms: u64,
}

/// Parts of a blackout, in microseconds, as the source measured them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Blackout {
    /// What was predicted when the guest was paused.
    pub predicted_us: u64,
    /// Until every vCPU and device stood still.
    pub pause_us: u64,
    /// Saving vCPUs and devices.
    pub save_us: u64,
    /// Sending the last dirty pages.
    pub pages_us: u64,
    /// How much of them that was; 0 from a source that does not tell.
    pub rest_bytes: u64,
    /// Transfer rate that the prediction reckoned with; 0 from a source that does not tell.
    pub rest_bytes_per_s: u64,
    /// From everything sent to the target whole: its last pages, its checks, restoring the machine.
    pub restore_us: u64,
    /// From there until the target told that the guest runs: the store's commit.
    pub commit_us: u64,
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

/// What a connection beside the control connection is for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LaneKind {
    /// Carries pages in the source's order.
    #[default]
    Bulk,
    /// Carries pages that the guest at the target waits for.
    Urgent,
}

/// What the target's memory holds before anything is sent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TargetMemory {
    /// Zeros.
    #[default]
    Fresh,
    /// What the VM had when it left that host, or anything else: it is to be compared page by page.
    Kept,
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

/// What a machine's processes have counted so far: counters go on where they were. A peer that does not know one leaves
/// it at 0.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Counted {
    /// Exits from guest mode, all vCPUs.
    pub exits: u64,
    /// Port exits.
    pub io_exits: u64,
    /// MMIO exits.
    pub mmio_exits: u64,
    /// Bytes sent to the guest's serial port.
    pub serial_rx_bytes: u64,
    /// Bytes the guest sent on it.
    pub serial_tx_bytes: u64,
    /// Times the guest restarted itself.
    pub resets: u64,
}

/// What the source says when everything has been sent that is sent before the hand-over.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Done {
    /// Number of the last round.
    pub round: u32,
    /// Pages sent in all.
    pub pages: u64,
    /// Bytes of disks sent in all, zeros among them.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub disk_bytes: u64,
    /// XXH3-128 of the state frame's payload, as 32 hex digits.
    pub state_hash: String,
    /// Time since the guest's clocks were sampled for the state, in nanoseconds. The target adds what passes until it
    /// restores them, so the hosts' own clocks need not agree.
    pub clock_age_ns: u64,
    /// Time since the last frame passed any of the guest's cards, either way, in nanoseconds; the target takes it from
    /// when this message comes. Absent where none passed shortly before the pause, and from a source that does not tell.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub packet_age_ns: Option<u64>,
    /// Pages that follow later, all of them named by `Missing` frames; 0 when everything has been sent.
    #[serde(default)]
    pub missing_pages: u64,
    /// What the guest does once the target owns it.
    pub then: Arrival,
    /// What the machine's processes have counted so far.
    #[serde(default)]
    pub counted: Counted,
    /// XXH3-128 of all guest memory, as 32 hex digits, when asked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory_hash: Option<String>,
}

fn is_zero(number: &u64) -> bool {
    *number == 0
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
        /// What the target gave out when it was prepared.
        token: MigrationToken,
        /// Lanes that will join, 1 to [`MAX_LANES`].
        lanes: u8,
        /// Urgent lanes that will join after them, 0 to [`MAX_LANES`]; 0 where post-copy is not allowed.
        #[serde(default)]
        urgent_lanes: u8,
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
        /// The source can compare pages with what the target has kept; their hashes begin from this number, drawn at
        /// random for this migration. Absent from sources that cannot.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        compare_seed: Option<u64>,
        /// Disks whose content comes along, numbered from 0 in disk frames. A source that names some requires
        /// [`DISKS_CAPABILITY`].
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        disks: Vec<TravellingDisk>,
    },
    /// Opens a lane.
    Join {
        /// As in `Hello`.
        migration: MigrationId,
        /// As in `Hello`.
        token: MigrationToken,
        /// Which kind of lane.
        #[serde(default)]
        kind: LaneKind,
        /// Which lane of its kind, from 0.
        lane: u8,
    },
    /// Opens the control connection of a post-copy whose connections broke.
    Resume {
        /// As in `Hello`.
        migration: MigrationId,
        /// As in `Hello`.
        token: MigrationToken,
        /// As in `Hello`.
        lanes: u8,
        /// As in `Hello`, and not 0.
        urgent_lanes: u8,
    },
    /// The pages named by the `Missing` frames before it will not be sent before the guest is handed over.
    WillMiss {
        /// Number of pages named.
        pages: u64,
    },
    /// All pages of a round have been sent, on this lane or (on the control connection) on all of them.
    EndOfRound {
        /// Number of the round, from 1.
        round: u32,
        /// Pages sent so far (with content and zero) on this lane or on all of them, all rounds together.
        pages: u64,
        /// Bytes of disks sent so far, likewise.
        #[serde(default, skip_serializing_if = "is_zero")]
        disk_bytes: u64,
    },
    /// Everything has been sent, or will follow: the target may become ready.
    Done(Done),
    /// The source calls it off.
    Abort {
        /// Why.
        reason: String,
    },
}

impl ToTarget {
    /// What kind of message it is.
    pub const fn name(&self) -> &'static str {
        match self {
            Self::Hello { .. } => "Hello",
            Self::Join { .. } => "Join",
            Self::Resume { .. } => "Resume",
            Self::WillMiss { .. } => "WillMiss",
            Self::EndOfRound { .. } => "EndOfRound",
            Self::Done(_) => "Done",
            Self::Abort { .. } => "Abort",
        }
    }
}

/// Control messages from the target to the source.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum ToSource {
    /// The target can take this machine.
    Accept {
        /// Version to speak.
        version: u32,
        /// Urgent lanes it takes: as many as asked for, or 0 where post-copy cannot be had.
        #[serde(default)]
        urgent_lanes: u8,
        /// What its memory holds; anything but zeros only if the source can compare.
        #[serde(default)]
        memory: TargetMemory,
    },
    /// The lane is open.
    Joined,
    /// The target cannot take this machine.
    Refuse {
        /// Why, for the operator.
        reason: String,
    },
    /// A round arrived whole.
    RoundReceived {
        /// Number of the round.
        round: u32,
        /// How long it took to make durable what came of disks, in microseconds: the last round's will take about as
        /// long.
        #[serde(default, skip_serializing_if = "is_zero")]
        flush_us: u64,
    },
    /// What `WillMiss` named is not here any more.
    Discarded,
    /// Missing pages can be sent and are asked for.
    Armed,
    /// Answers `Resume`, behind `Missing` frames that name what is still missing.
    Resumed {
        /// Round that pages belong to from here on.
        round: u32,
        /// Number of pages named.
        missing_pages: u64,
        /// Epoch under which the guest runs, if it does.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        running: Option<Epoch>,
    },
    /// Nothing is missing any more: the source's memory is not needed.
    Complete,
    /// Everything is held and verified; after `Armed`, everything but what is missing.
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

#[cfg(test)]
mod tests {
    use super::*;

    fn progress(rest_bytes: u64, pages_us: u64) -> MigrationProgress {
        MigrationProgress {
            blackout: Some(Blackout {
                pause_us: 1_000,
                save_us: 2_000,
                pages_us,
                rest_bytes,
                rest_bytes_per_s: 100_000_000,
                restore_us: 3_000,
                commit_us: 4_000,
                ..Blackout::default()
            }),
            ..MigrationProgress::default()
        }
    }

    #[test]
    fn a_source_of_a_quiet_network_says_the_same_as_one_that_does_not_tell() {
        let told = r#"{"round":3,"pages":7,"state_hash":"00","clock_age_ns":5,"missing_pages":0,"then":"run","counted":{"exits":0,"io_exits":0,"mmio_exits":0,"serial_rx_bytes":0,"serial_tx_bytes":0,"resets":0}}"#;
        let quiet: Done = serde_json::from_str(told).unwrap();
        assert_eq!(quiet.packet_age_ns, None);
        assert_eq!(serde_json::to_string(&quiet).unwrap(), told);
        let lively = Done {
            packet_age_ns: Some(9),
            ..quiet
        };
        let again: Done = serde_json::from_str(&serde_json::to_string(&lively).unwrap()).unwrap();
        assert_eq!(again.packet_age_ns, Some(9));
    }

    #[test]
    fn a_source_that_does_not_tell_what_was_counted_leaves_it_at_0() {
        let done: Done = serde_json::from_str(
            r#"{"round":3,"pages":7,"state_hash":"00","clock_age_ns":5,"then":"run"}"#,
        )
        .unwrap();
        assert_eq!(done.counted, Counted::default());
        let some: Counted = serde_json::from_str(r#"{"exits":9,"later":1}"#).unwrap();
        assert_eq!((some.exits, some.resets), (9, 0));
    }

    #[test]
    fn what_a_short_pass_takes_beside_its_pages_is_a_fixed_cost() {
        // 100,000 bytes take 1 ms.
        assert_eq!(progress(100_000, 1_500).fixed_cost_us(), Some(10_500));
        assert_eq!(progress(100_000, 500).fixed_cost_us(), Some(10_000));
    }

    #[test]
    fn of_a_long_pass_nothing_is_a_fixed_cost() {
        assert_eq!(progress(10_000_000, 500_000).fixed_cost_us(), Some(10_000));
    }

    #[test]
    fn a_guest_that_went_ahead_or_took_disks_along_shows_no_fixed_cost() {
        let ahead = MigrationProgress {
            post_copy: Some(PostCopyProgress::default()),
            ..progress(0, 0)
        };
        assert_eq!(ahead.fixed_cost_us(), None);
        let with_disks = MigrationProgress {
            disk_bytes: Bytes(1),
            ..progress(0, 0)
        };
        assert_eq!(with_disks.fixed_cost_us(), None);
        assert_eq!(MigrationProgress::default().fixed_cost_us(), None);
    }

    #[test]
    fn parts_told_by_an_older_source_are_read() {
        let told = r#"{"blackout":{"predicted_us":9,"pause_us":1,"save_us":2,"pages_us":3,"restore_us":4,"commit_us":5}}"#;
        let read: MigrationProgress = serde_json::from_str(told).unwrap();
        assert_eq!(read.fixed_cost_us(), Some(12));
    }
}
