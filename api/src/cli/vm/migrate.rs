//! `godwit vm migrate`.

use super::act;
use crate::cli::words::size;
use crate::cli::{ChangeOptions, Failure, Session};
use crate::resource::{Compression, MigrateDisks, MigrateVm, MigrationPolicy, Verify};
use clap::Args;

/// A move.
#[derive(Debug, Args)]
pub struct MigrateArgs {
    /// Name or id.
    vm: String,
    /// Host to move it to; the best one when absent.
    #[arg(long)]
    to: Option<String>,
    /// Longest time the guest may stand still.
    #[arg(long, value_name = "MS")]
    downtime_limit_ms: Option<u64>,
    /// Most rounds of copying before it gives up.
    #[arg(long)]
    max_rounds: Option<u32>,
    /// How the target proves that it holds everything.
    #[arg(long, value_enum)]
    verify: Option<Verify>,
    /// Connections that carry pages, at most 16; the source chooses when absent.
    #[arg(long)]
    lanes: Option<u32>,
    /// Most memory sent per second, such as 200M; no limit when absent.
    #[arg(long, value_name = "SIZE", value_parser = size)]
    max_bandwidth: Option<u64>,
    /// Most of its time that the guest may be kept from running so that the copy catches up; 0 never slows it.
    #[arg(long, value_name = "PERCENT")]
    max_throttle: Option<u32>,
    /// Whether pages are compressed.
    #[arg(long, value_enum)]
    compression: Option<Compression>,
    /// The guest may run at the target before all of its memory is there, when it changes too fast to be copied first.
    /// Until the rest has followed, the loss of either host loses the running guest.
    #[arg(long)]
    allow_postcopy: bool,
    /// The move ends, one way or the other, within this time.
    #[arg(long, value_name = "SECONDS")]
    deadline_s: Option<u64>,
    /// Disks that the target does not see move along, into one of its storage pools.
    #[arg(long)]
    with_disks: bool,
    /// Storage pool of the target that they go to: one of the same name, else the roomiest, when absent.
    #[arg(long, value_name = "POOL", requires = "with_disks")]
    disk_pool: Option<String>,
    #[command(flatten)]
    change: ChangeOptions,
}

pub(super) async fn migrate(session: &Session, arguments: MigrateArgs) -> Result<(), Failure> {
    let MigrateArgs {
        vm,
        to,
        downtime_limit_ms,
        max_rounds,
        verify,
        lanes,
        max_bandwidth,
        max_throttle,
        compression,
        allow_postcopy,
        deadline_s,
        with_disks,
        disk_pool,
        change,
    } = arguments;
    let body = MigrateVm {
        target: to,
        policy: Some(MigrationPolicy {
            downtime_limit_ms,
            max_rounds,
            verify,
            lanes,
            max_bandwidth_bytes_per_s: max_bandwidth,
            max_throttle_percent: max_throttle,
            compression,
            allow_postcopy: allow_postcopy.then_some(true),
            deadline_s,
        }),
        disks: with_disks.then_some(MigrateDisks::Along),
        disk_pool,
    };
    act(session, &vm, "migrate", &body, change).await
}
