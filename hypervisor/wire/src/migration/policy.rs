//! What the operator asks of a migration.

use serde::{Deserialize, Serialize};

/// Most lanes of one migration.
pub const MAX_LANES: u8 = 16;

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
    /// Connections that carry pages, at most [`MAX_LANES`]; 0 lets the source choose.
    pub lanes: u8,
    /// Most bytes per second on all of them together; absent means no limit.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_bandwidth_bytes_per_s: Option<u64>,
    /// Most of their time that vCPUs may be kept from running when the guest dirties memory faster than it can be
    /// sent, and most of its rate that the guest may lose when it writes disks that travel faster than that; 0 never
    /// slows the guest.
    pub max_throttle_percent: u8,
    /// Whether pages are compressed.
    pub compression: Compression,
    /// Whether the guest may go ahead of its memory when it cannot be brought below the downtime limit otherwise.
    pub post_copy: PostCopy,
    /// The migration ends, one way or the other, within this time, in seconds; absent means no limit.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub deadline_s: Option<u64>,
}

impl Default for MigrationPolicy {
    fn default() -> Self {
        Self {
            downtime_limit_ms: 300,
            max_rounds: 30,
            verify: Verify::Frames,
            lanes: 0,
            max_bandwidth_bytes_per_s: None,
            max_throttle_percent: 80,
            compression: Compression::Auto,
            post_copy: PostCopy::Forbidden,
            deadline_s: None,
        }
    }
}

/// Whether pages are compressed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Compression {
    /// Where it was measured to be faster than sending them as they are.
    #[default]
    Auto,
    /// Never.
    Off,
}

/// Whether a guest may run at the target before all of its memory is there.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PostCopy {
    /// Never: at every moment one host has everything.
    #[default]
    Forbidden,
    /// Instead of slowing it down or giving up. Until its memory has followed, the loss of either host loses the
    /// running guest; it starts anew from its disks then.
    Allowed,
}

/// How the target proves that it holds what the source had.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Verify {
    /// A checksum per frame, page counts per round and a checksum of the state; what production uses.
    #[default]
    Frames,
    /// Also a hash of all guest memory, taken on both sides while paused. For tests: it lengthens the blackout.
    WholeMemory,
}
