//! Live migrations.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use uuid::Uuid;

/// One attempt to move one running VM.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Migration {
    /// Never changes.
    pub id: Uuid,
    /// The VM.
    pub vm: Uuid,
    /// Its name.
    pub vm_name: String,
    /// The host it leaves.
    pub source: Uuid,
    /// Name of that host.
    pub source_name: String,
    /// The host it goes to.
    pub target: Uuid,
    /// Name of that host.
    pub target_name: String,
    /// What the store has decided.
    pub state: MigrationState,
    /// Where it stands.
    pub phase: Option<MigrationPhase>,
    /// Figures.
    pub progress: MigrationProgress,
    /// Disks whose content moves along.
    #[serde(default)]
    pub disks: Vec<MigrationDisk>,
    /// Why it failed or was cancelled.
    pub reason: Option<String>,
    /// What was foreseen when it began; absent until then.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub foreseen: Option<Foreseen>,
    /// When it began.
    pub started_at: Timestamp,
    /// When it ended.
    pub ended_at: Option<Timestamp>,
}

/// A disk whose content moves along with its VM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct MigrationDisk {
    /// The disk.
    pub disk: Uuid,
    /// Its name in the VM.
    pub name: String,
    /// Size the guest sees.
    pub bytes: u64,
    /// The storage pool it leaves.
    pub from_pool: Uuid,
    /// Name of that pool.
    pub from_pool_name: String,
    /// The storage pool it goes to.
    pub to_pool: Uuid,
    /// Name of that pool.
    pub to_pool_name: String,
}

/// What the store has decided about a migration.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum MigrationState {
    /// Nothing yet: the source owns the VM.
    Open,
    /// The target owns the VM.
    Committed,
    /// It is called off: the source owns the VM.
    Void,
}

/// Where a migration stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum MigrationPhase {
    /// Shaking hands.
    Connecting,
    /// Memory is copied while the guest runs.
    PreCopy,
    /// The guest stands still; the rest is copied.
    Blackout,
    /// The target holds everything; the store decides.
    AwaitingCommit,
    /// The guest runs at the target and some of its memory is still at the source: until it has followed, the loss of
    /// either host loses the running guest.
    PostCopy,
    /// The guest runs at the target.
    Completed,
    /// It ended early; the guest runs at the source.
    Failed,
    /// It was called off; the guest runs at the source.
    Cancelled,
}

/// Figures of a migration.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct MigrationProgress {
    /// Round under way, from 1.
    pub round: u32,
    /// Guest memory in all.
    pub memory_bytes: u64,
    /// Bytes sent.
    pub transferred_bytes: u64,
    /// Pages sent with their content.
    pub content_pages: u64,
    /// Pages sent as all zero.
    pub zero_pages: u64,
    /// Pages not sent, because the target had kept them from an earlier stay.
    #[serde(default)]
    pub kept_pages: u64,
    /// Still to be sent in this round.
    pub remaining_bytes: u64,
    /// Transfer rate.
    pub rate_bytes_per_s: u64,
    /// Rate at which the guest dirties memory.
    pub dirty_bytes_per_s: u64,
    /// Blackout to expect if the guest were paused now.
    pub predicted_blackout_ms: u64,
    /// Since the migration began.
    pub elapsed_ms: u64,
    /// Connections that carry pages at the moment.
    #[serde(default)]
    pub lanes: u8,
    /// Connections that there are for pages; those that would not make it faster rest.
    #[serde(default)]
    pub opened_lanes: u8,
    /// Share of their time that vCPUs are kept from running, so that the copy catches up.
    #[serde(default)]
    pub throttle_percent: u8,
    /// For how long each vCPU was kept from running, by its number; empty when none was.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub stalled_us: Vec<u64>,
    /// Bytes that compression has saved.
    #[serde(default)]
    pub saved_bytes: u64,
    /// How long the target took to take host memory, before anything was sent.
    #[serde(default)]
    pub prefault_ms: u64,
    /// What is to be moved of disks, in all.
    #[serde(default)]
    pub disk_bytes: u64,
    /// What remains of that.
    #[serde(default)]
    pub disk_remaining_bytes: u64,
    /// What was sent of disks.
    #[serde(default)]
    pub disk_transferred_bytes: u64,
    /// What the blackout consisted of; known at the end.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub blackout: Option<Blackout>,
    /// From pause at the source to the news that the target runs; known at the end.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub downtime_us: Option<u64>,
    /// Silence of the guest's network because of the move, from the last frame of any of its cards at the source to the
    /// first at the target; absent as long as it lasts, and where the network was quiet before.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub packet_gap_us: Option<u64>,
    /// Memory that follows or followed the guest; absent when nothing did.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub post_copy: Option<PostCopy>,
}

/// Memory that follows a guest which runs at the target already.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct PostCopy {
    /// What was missing when the guest was handed over.
    pub owed_bytes: u64,
    /// What is still missing: at risk, because it is lost with either host.
    pub missing_bytes: u64,
    /// Pages the guest had to wait for.
    pub wanted_pages: u64,
    /// Time the guest's accesses waited for them, all together.
    #[serde(default)]
    pub waited_us: u64,
    /// The longest of these waits.
    #[serde(default)]
    pub longest_wait_us: u64,
    /// Times the connections broke and were made again.
    pub interruptions: u32,
    /// From the hand-over until nothing was missing.
    pub took_ms: u64,
}

/// Parts of a blackout, one after the other, as the source measured them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Blackout {
    /// What was predicted when the guest was paused.
    pub predicted_us: u64,
    /// Until every vCPU and device stood still.
    pub pause_us: u64,
    /// Saving vCPUs and devices.
    pub save_us: u64,
    /// Sending the last dirty pages.
    pub pages_us: u64,
    /// How much of them that was.
    #[serde(default)]
    pub rest_bytes: u64,
    /// Transfer rate that the prediction reckoned with; 0 from a source that does not tell.
    #[serde(default)]
    pub rest_bytes_per_s: u64,
    /// Until the target held and had checked everything and had restored the machine.
    pub restore_us: u64,
    /// Until the target told that the guest runs: the store's commit.
    pub commit_us: u64,
}

/// What will or would become of a migration.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum MigrationOutlook {
    /// It gets below the downtime limit.
    Converges,
    /// It does not, and the guest goes ahead of its memory, as `allow_postcopy` lets it.
    GoesAhead,
    /// It does not, and the guest stays where it is.
    WillNotConverge,
}

/// What was foreseen of a migration when it began, to be compared with what came of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Foreseen {
    /// What would become of it.
    pub verdict: MigrationOutlook,
    /// From start to end.
    pub took_ms: u64,
    /// Guest memory sent.
    pub mib: u64,
    /// Time the guest stands still.
    pub blackout_ms: u64,
    /// How much the guest is slowed down.
    pub throttle_percent: u8,
}

/// What a migration would do if it began now.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Forecast {
    /// What would become of it.
    pub verdict: MigrationOutlook,
    /// The same in words, with the reason and the options.
    pub summary: String,
    /// Downtime limit it was made for.
    pub downtime_limit_ms: u64,
    /// From start to end; if it will not converge, until it is given up.
    pub seconds: f64,
    /// Guest memory sent.
    pub mib: u64,
    /// Size of the disks that move along: no more is sent of them.
    #[serde(default)]
    pub disk_bytes: u64,
    /// Time the guest stands still; if it will not converge, what it would be.
    pub blackout_ms: u64,
    /// How much the guest is slowed down; 0 if that is not needed.
    pub throttle_percent: u8,
    /// Rounds while it runs.
    pub rounds: u32,
    /// What is left then: sent during the blackout, or afterwards by post-copy.
    pub rest_bytes: u64,
    /// Why it will not converge.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub because: Option<ForecastReason>,
    /// What would help, each of it alone.
    #[serde(default)]
    pub options: Vec<ForecastOption>,
    /// What it was made from.
    pub measured: ForecastFigures,
}

/// Why a migration will not converge.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ForecastReason {
    /// `fixed_cost`, `dirties_too_fast`, `rounds`, `deadline`.
    pub kind: String,
    /// With the numbers.
    pub detail: String,
}

/// What would make a migration arrive.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ForecastOption {
    /// `allow_post_copy`, `raise_downtime_limit`, `allow_throttling`, `raise_bandwidth_limit`, `faster_link`,
    /// `allow_rounds`, `allow_time`.
    pub kind: String,
    /// In words.
    pub detail: String,
    /// What the limit would have to be, in the unit that the policy has it in.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub value: Option<u64>,
}

/// What a forecast was made from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ForecastFigures {
    /// `sampled`: the guest was watched just now; `last_known`: only an earlier rate is known, not the working set.
    pub dirty_from: String,
    /// Distinct memory that the guest dirties per second, over all of the time it was watched for.
    pub dirty_bytes_per_s: u64,
    /// Distinct memory it has dirtied after a time: a small working set hardly grows.
    #[serde(default)]
    pub dirty_series: Vec<DirtyReading>,
    /// What its vCPUs did meanwhile. Which of them wrote a page is not known.
    #[serde(default)]
    pub vcpus: Vec<VcpuBusy>,
    /// Memory it has touched.
    pub resident_bytes: u64,
    /// What the link carries.
    pub bytes_per_s: u64,
    /// `lanes` or `pair`: earlier migrations between these hosts (with as many connections); `pool`: between any hosts;
    /// `assumed`: none has been measured.
    pub bytes_per_s_from: String,
    /// What a blackout takes beside sending the rest.
    pub fixed_us: u64,
    /// As `bytes_per_s_from`.
    pub fixed_from: String,
}

/// One look at what a guest has dirtied.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct DirtyReading {
    /// Since everything counted as clean.
    pub after_us: u64,
    /// Distinct memory written since.
    pub bytes: u64,
}

/// What a vCPU did while its guest was watched.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct VcpuBusy {
    /// Number, from 0.
    pub index: u8,
    /// Share of the time for which it ran.
    pub busy_percent: u8,
}
