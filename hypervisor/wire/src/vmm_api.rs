//! The API of one VMM process: HTTP + JSON on a UNIX socket.
//!
//! | method and path | body | answer |
//! |---|---|---|
//! | `GET /v1/info` | | [`VmmInfo`] |
//! | `PUT /v1/machine` | [`CreateRequest`] | [`VmmInfo`] |
//! | `PUT /v1/incoming` | [`IncomingRequest`] | [`IncomingReady`] |
//! | `POST /v1/boot`, `/v1/pause`, `/v1/resume`, `/v1/kill` | [`Command`] | [`VmmInfo`] |
//! | `POST /v1/stop` | [`Command`] | [`VmmInfo`]; asks the guest to stop, returns at once |
//! | `POST /v1/snapshot` | [`SnapshotRequest`] | [`SnapshotInfo`] |
//! | `PUT /v1/restore` | [`RestoreRequest`] | [`VmmInfo`] |
//! | `POST /v1/disks/{name}/resize` | [`ResizeDisk`] | [`VmmInfo`] |
//! | `POST /v1/balloon` | [`BalloonRequest`] | [`VmmInfo`] |
//! | `POST /v1/dirty-rate` | [`DirtyRateRequest`] | [`DirtyRate`] |
//! | `POST /v1/outgoing` | [`OutgoingRequest`] | [`MigrationStatus`] |
//! | `GET /v1/migration?after=SEQ&wait_ms=MS` | | [`MigrationStatus`]; waits until `sequence > SEQ` |
//! | `POST /v1/migration/bandwidth` | [`MigrationBandwidth`] | [`MigrationStatus`]; source only: send at another pace |
//! | `POST /v1/migration/cancel`, `/abort`, `/release` | [`MigrationCommand`] | [`MigrationStatus`] |
//! | `POST /v1/migration/commit` | [`MigrationCommand`] | [`MigrationStatus`]; target only: run now |
//! | `PUT /v1/succession/offer` | [`OfferSuccession`] | [`SuccessionStatus`]; predecessor: let a successor come |
//! | `PUT /v1/succession/prepare` | [`PrepareSuccession`] | [`SuccessionStatus`]; successor: build the machine |
//! | `POST /v1/succession/take` | [`SuccessionCommand`] | [`SuccessionStatus`]; successor: have the state handed over |
//! | `POST /v1/succession/commit` | [`SuccessionCommand`] | [`SuccessionStatus`]; successor: run now |
//! | `POST /v1/succession/abort` | [`SuccessionCommand`] | [`SuccessionStatus`]; predecessor: go on as before |
//!
//! Errors are [`Problem`](crate::problem::Problem) bodies. `cancel` works until the source has sent everything;
//! `abort` is the store's word that the migration is void (source: run again, target: forget the machine);
//! `release` is the store's word that the target owns the VM (source: end).
//!
//! A predecessor whose machine is the successor's is not told but killed; so is a successor that is not wanted, before
//! its predecessor hears `abort`.
//!
//! [`OfferSuccession`]: crate::succession::OfferSuccession
//! [`PrepareSuccession`]: crate::succession::PrepareSuccession
//! [`SuccessionCommand`]: crate::succession::SuccessionCommand

use crate::devices::Attachments;
use crate::id::{Epoch, MigrationId, VmId};
use crate::machine::{CpuFacts, MachineSpec};
use crate::migration::{MigrationIdentity, MigrationPolicy, MigrationStatus, MigrationToken};
use crate::problem::FieldProblem;
use crate::succession::SuccessionStatus;
use crate::unit::{Bytes, Mib};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::time::Duration;

/// Name of the memfd that is a guest's memory, as `/proc/<pid>/fd` shows it.
pub const GUEST_MEMORY_NAME: &str = "godwit-guest-ram";
/// What whoever starts a VMM puts in its environment, as (name, value). glibc before 2.39 copies with
/// `rep movsb` on AMD's processors, which takes up to seven times as long as vector instructions where the destination
/// lies less than 32 bytes behind the source, within a page or pages apart (glibc's bug 30994); TLS copies like that all
/// the time. Other C libraries do not look at it.
pub const VMM_ENVIRONMENT: (&str, &str) = (
    "GLIBC_TUNABLES",
    "glibc.cpu.x86_rep_movsb_threshold=0x10000000",
);

/// Builds the machine (it does not run yet).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CreateRequest {
    /// Identity of the VM.
    pub vm: VmId,
    /// Epoch under which it may run here.
    pub epoch: Epoch,
    /// The machine.
    pub spec: MachineSpec,
    /// The lease page to watch; a machine without one runs until it is told otherwise.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lease: Option<PathBuf>,
    /// Where this host has what the spec names.
    #[serde(default)]
    pub attachments: Attachments,
}

/// Builds the machine and waits for its content from another VMM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct IncomingRequest {
    /// Identity of the VM.
    pub vm: VmId,
    /// Epoch under which it runs at the source.
    pub epoch: Epoch,
    /// The machine.
    pub spec: MachineSpec,
    /// As in [`CreateRequest`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lease: Option<PathBuf>,
    /// As in [`CreateRequest`].
    #[serde(default)]
    pub attachments: Attachments,
    /// The migration to accept; any other is refused.
    pub migration: MigrationId,
    /// Where to listen; port 0 takes a free one.
    pub listen: SocketAddr,
    /// Last port that will do: the first free one from the one named above on is taken. That one alone when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_port: Option<u16>,
    /// Memory to begin with; what cannot be used makes way for fresh memory.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kept: Option<KeptMemory>,
    /// Names of the disks whose content comes with the VM; what they have here is blank. The others are shared by
    /// both hosts.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub arriving_disks: BTreeSet<String>,
    /// What this end proves itself with; without it the connections are not encrypted and the token alone tells
    /// the source from a stranger.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub identity: Option<MigrationIdentity>,
}

/// Memory that a VM had on this host before it moved away. Only its content is of use: whether that is what the VM has
/// now is found out page by page.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeptMemory {
    /// Where the memfd can be opened, in `/proc`.
    pub path: PathBuf,
    /// Its inode, which tells it from whatever else may be there by now.
    pub inode: u64,
}

/// The target waits.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct IncomingReady {
    /// Where the source shall connect.
    pub address: SocketAddr,
    /// What it must say there.
    pub token: MigrationToken,
}

/// A command that changes a machine's state.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Command {
    /// Must be the machine's epoch; an older one is refused.
    pub epoch: Epoch,
}

/// Starts to send the machine to another VMM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct OutgoingRequest {
    /// Must be the machine's epoch.
    pub epoch: Epoch,
    /// The migration.
    pub migration: MigrationId,
    /// Where the target listens.
    pub target: SocketAddr,
    /// The token it gave out.
    pub token: MigrationToken,
    /// Limits.
    #[serde(default)]
    pub policy: MigrationPolicy,
    /// What a blackout takes beside sending the rest, as earlier migrations showed it; bounded by the source (see
    /// [`fixed_cost`](crate::migration::convergence::fixed_cost)).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fixed_cost_us: Option<u64>,
    /// Names of the disks whose content goes with the VM: as many as arrive at the target.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub leaving_disks: BTreeSet<String>,
    /// What this end proves itself with, if the target asks for it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub identity: Option<MigrationIdentity>,
}

/// A word about the migration under way.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MigrationCommand {
    /// The migration meant.
    pub migration: MigrationId,
    /// For `commit`: the epoch under which the target runs; else the machine's present epoch.
    pub epoch: Epoch,
}

/// The migration under way shall send no more than so much. Refused with `409 handing-over` while the guest stands still.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MigrationBandwidth {
    /// The migration meant.
    pub migration: MigrationId,
    /// Must be the machine's epoch.
    pub epoch: Epoch,
    /// Most bytes per second on all lanes together; absent means no limit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_bytes_per_s: Option<u64>,
}

/// Saves the machine to a directory. It goes on as it was, running or paused.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SnapshotRequest {
    /// Must be the machine's epoch.
    pub epoch: Epoch,
    /// A directory that does not exist yet, or is empty.
    pub directory: PathBuf,
}

/// What a snapshot is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SnapshotInfo {
    /// Where it is.
    pub directory: PathBuf,
    /// Room it takes.
    pub bytes: Bytes,
    /// How long the guest stood still.
    pub pause_us: u64,
}

/// Builds the machine as it was saved; it is paused then.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RestoreRequest {
    /// Identity of the VM.
    pub vm: VmId,
    /// Epoch under which it may run here.
    pub epoch: Epoch,
    /// As in [`CreateRequest`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lease: Option<PathBuf>,
    /// As in [`CreateRequest`]; absent takes the files that the snapshot's spec names.
    #[serde(default)]
    pub attachments: Attachments,
    /// The snapshot.
    pub directory: PathBuf,
    /// How much of it is read before the machine can run.
    #[serde(default)]
    pub verify: VerifyMemory,
}

/// What is checked of a snapshot's memory before the machine can run. Each part of it is checked when it is brought
/// in, too.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum VerifyMemory {
    /// All of it, unless the file is the one that was written and was never changed or copied: then nothing.
    #[default]
    Changed,
    /// All of it.
    Full,
}

/// Makes a disk larger, or tells the guest that it has become larger.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ResizeDisk {
    /// Must be the machine's epoch.
    pub epoch: Epoch,
    /// New size; never smaller than the present one.
    pub bytes: Bytes,
}

/// Sets how much memory the guest shall give back.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BalloonRequest {
    /// Must be the machine's epoch.
    pub epoch: Epoch,
    /// Memory the guest shall keep; its full size deflates the balloon.
    pub keep_mib: Mib,
}

/// Counters of one device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceInfo {
    /// Name in the spec, or `rng`, `balloon`, `console`, `vsock`, `seed`.
    pub name: String,
    /// `block`, `net`, …
    pub kind: String,
    /// Whether its driver works with it.
    pub driver: DriverState,
    /// Counters by name.
    pub counters: BTreeMap<String, u64>,
}

/// What a device's driver does.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "state", rename_all = "snake_case")]
pub enum DriverState {
    /// No driver has set it up.
    Absent,
    /// It works.
    Working,
    /// The driver broke the rules; the device waits for a reset.
    NeedsReset {
        /// What the driver did.
        reason: String,
    },
}

/// Shortest and longest time for which a guest is watched.
pub const DIRTY_WINDOW_MS: RangeInclusive<u64> = 10..=5_000;
/// Most readings within that time.
pub const MAX_DIRTY_READINGS: u8 = 8;

/// Asks how fast the guest dirties memory. Refused while a migration or a snapshot uses the dirty log; one that
/// begins meanwhile ends the watching.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DirtyRateRequest {
    /// How long to watch, within [`DIRTY_WINDOW_MS`].
    pub window_ms: u64,
    /// How often to look, 1 to [`MAX_DIRTY_READINGS`]: at the end, after half of the time, after a quarter, and so on.
    #[serde(default = "one_reading")]
    pub readings: u8,
}

const fn one_reading() -> u8 {
    1
}

impl DirtyRateRequest {
    /// What is wrong with it.
    pub fn problems(&self) -> Vec<FieldProblem> {
        let mut found = Vec::new();
        if !DIRTY_WINDOW_MS.contains(&self.window_ms) {
            found.push(FieldProblem::new(
                "window_ms",
                format!("{} is outside {DIRTY_WINDOW_MS:?}", self.window_ms),
                "choose a window within the limits",
            ));
        }
        if !(1..=MAX_DIRTY_READINGS).contains(&self.readings) {
            found.push(FieldProblem::new(
                "readings",
                format!("{} is outside 1..={MAX_DIRTY_READINGS}", self.readings),
                "look at least once and no more often than that",
            ));
        }
        found
    }

    /// When to look, in order.
    pub fn moments(&self) -> Vec<Duration> {
        let window = Duration::from_millis(self.window_ms);
        (0..u32::from(self.readings.min(MAX_DIRTY_READINGS)))
            .rev()
            .map(|halvings| window / (1 << halvings))
            .collect()
    }
}

/// How fast the guest dirties memory.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DirtyRate {
    /// Distinct pages dirtied in the window, as bytes per second.
    pub bytes_per_s: u64,
    /// What was dirty at each reading, in order. A guest that writes the same memory over and over dirties hardly more
    /// in a longer time; one that goes through its memory does.
    #[serde(default)]
    pub series: Vec<DirtyReading>,
    /// What each vCPU did meanwhile. KVM does not tell which vCPU wrote a page, so this is its share of CPU time and
    /// says only which one may have.
    #[serde(default)]
    pub vcpus: Vec<VcpuBusy>,
}

/// One look at what a guest has dirtied.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DirtyReading {
    /// Since everything counted as clean.
    pub after_us: u64,
    /// Distinct memory that the guest and its devices have written since.
    pub bytes: u64,
}

/// What a vCPU did for a while.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VcpuBusy {
    /// Number, from 0.
    pub index: u8,
    /// Share of the time for which its thread ran, 0 to 100.
    pub busy_percent: u8,
}

/// What a VMM is doing.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "state", rename_all = "snake_case")]
pub enum VmmState {
    /// No machine yet.
    Empty,
    /// Built, never run.
    Created,
    /// vCPUs run.
    Running,
    /// vCPUs stand still.
    Paused {
        /// Why.
        reason: PauseReason,
    },
    /// A target: the machine is being filled.
    Incoming,
    /// The guest is gone for good.
    Stopped {
        /// Why.
        reason: StopReason,
    },
}

impl VmmState {
    /// Whether the guest stands still because memory from its former host does not arrive.
    pub const fn waits_for_memory(&self) -> bool {
        matches!(
            self,
            Self::Paused {
                reason: PauseReason::Memory { .. }
            }
        )
    }
}

/// Why a machine is paused.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum PauseReason {
    /// Someone asked for it.
    Requested,
    /// The host's lease ran out.
    LeaseExpired,
    /// A migration's blackout, or its outcome is not known yet.
    HandOver,
    /// A disk cannot be written without losing the guest's data: the pool is full, say.
    Storage {
        /// Name of the disk.
        disk: String,
        /// What stands in the way.
        detail: String,
    },
    /// Memory that follows the guest from its former host does not arrive.
    Memory {
        /// What stands in the way.
        detail: String,
    },
    /// KVM could not go on.
    Fault {
        /// What it said.
        detail: String,
    },
}

/// Why a machine stopped.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum StopReason {
    /// The guest powered off.
    GuestHalted,
    /// Someone killed it.
    Killed,
    /// It runs at another host now.
    MigratedAway,
    /// The incoming migration ended before the commit.
    IncomingAborted,
    /// The guest restarted itself and could not be booted again.
    Failed {
        /// Why.
        detail: String,
    },
}

/// Counters of a VMM.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Counters {
    /// Exits from guest mode, all vCPUs.
    pub exits: u64,
    /// Port exits.
    pub io_exits: u64,
    /// MMIO exits.
    pub mmio_exits: u64,
    /// Bytes the guest wrote to its serial port.
    pub serial_tx_bytes: u64,
    /// Bytes sent to the guest's serial port.
    pub serial_rx_bytes: u64,
    /// Times the guest restarted itself.
    pub resets: u64,
}

/// One vCPU.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct VcpuInfo {
    /// Number, from 0.
    pub index: u8,
    /// CPU time of its thread.
    pub cpu_time_ms: u64,
    /// Exits from guest mode.
    pub exits: u64,
}

/// Everything a VMM tells about itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmmInfo {
    /// Version of the program.
    pub version: String,
    /// Process id.
    pub pid: u32,
    /// The VM, once there is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vm: Option<VmId>,
    /// Its epoch.
    pub epoch: Epoch,
    /// Its machine.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub spec: Option<MachineSpec>,
    /// What it is doing.
    #[serde(flatten)]
    pub state: VmmState,
    /// Since the process started.
    pub uptime_ms: u64,
    /// CPU of this host.
    pub cpu: CpuFacts,
    /// Resident guest memory.
    pub guest_resident_bytes: Bytes,
    /// Guest memory that is still to be brought in from a snapshot.
    #[serde(default)]
    pub guest_expected_bytes: Bytes,
    /// Counters.
    pub counters: Counters,
    /// Its vCPUs.
    #[serde(default)]
    pub vcpus: Vec<VcpuInfo>,
    /// Its devices, in the order of the bus.
    #[serde(default)]
    pub devices: Vec<DeviceInfo>,
    /// The latest migration.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub migration: Option<MigrationStatus>,
    /// The latest succession.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub succession: Option<SuccessionStatus>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_window_is_halved_for_each_further_reading() {
        let ask = DirtyRateRequest {
            window_ms: 1_000,
            readings: 4,
        };
        assert_eq!(ask.problems(), []);
        assert_eq!(
            ask.moments(),
            [125, 250, 500, 1_000].map(Duration::from_millis)
        );
    }

    #[test]
    fn a_caller_that_knows_nothing_of_readings_gets_one() {
        let ask: DirtyRateRequest = serde_json::from_str(r#"{"window_ms":200}"#).unwrap();
        assert_eq!(ask.moments(), [Duration::from_millis(200)]);
    }

    #[test]
    fn a_window_or_readings_out_of_bounds_are_named() {
        let ask = DirtyRateRequest {
            window_ms: 5_001,
            readings: 0,
        };
        let fields: Vec<_> = ask.problems().into_iter().map(|p| p.field).collect();
        assert_eq!(fields, ["window_ms", "readings"]);
    }
}
