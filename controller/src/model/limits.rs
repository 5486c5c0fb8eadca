//! Bounds on everything that is kept.

use godwit_wire::unit::Mib;
use std::time::Duration;

/// Events kept; older ones are dropped and a reader that far behind is told so.
pub const MAX_EVENTS: usize = 10_000;
/// Operations that have ended and are kept for the record.
pub const MAX_ENDED_OPERATIONS: usize = 2_000;
/// Migrations that have ended and are kept for the record.
pub const MAX_ENDED_MIGRATIONS: usize = 2_000;
/// Maintenances that have ended and are kept for the record.
pub const MAX_ENDED_MAINTENANCES: usize = 500;
/// Deleted VMs whose ids are remembered, so that a host that comes back with one is told to destroy it.
pub const MAX_DELETED_VMS: usize = 10_000;
/// VMs in a pool.
pub const MAX_VMS: usize = 20_000;
/// Hosts in a pool.
pub const MAX_HOSTS: usize = 1_000;
/// Images in a pool.
pub const MAX_IMAGES: usize = 10_000;
/// Disks in a pool.
pub const MAX_POOL_DISKS: usize = 100_000;
/// Snapshots of one VM.
pub const MAX_SNAPSHOTS_PER_VM: usize = 64;
/// Networks of a pool.
pub const MAX_NETWORKS: usize = 4_096;
/// Join tokens that are waiting to be used.
pub const MAX_JOIN_TOKENS: usize = 1_000;
/// Steps kept with one operation; a longer history keeps the newest.
pub const MAX_STEPS: usize = 200;

/// Migrations one host takes part in at the same time before its links are measured, unless configured otherwise.
pub const DEFAULT_MIGRATIONS_PER_HOST: usize = 2;
/// Migrations one host takes part in at the same time at most, however little of its links they use.
pub const MAX_MIGRATIONS_PER_HOST: usize = 8;
/// Least bandwidth that a limit may leave to migrations, in bytes per second: with less they would never end.
pub const LEAST_MIGRATION_BANDWIDTH: u64 = 1 << 20;
/// vCPUs promised per logical CPU of a host before placement turns it down.
pub const VCPUS_PER_CORE: u32 = 8;
/// Memory a VMM needs besides the guest's.
pub const VMM_OVERHEAD: Mib = Mib(8);
/// Hosts tried before an order to start a VM is given up.
pub const MAX_START_ATTEMPTS: usize = 3;
/// Times a VM is started again by itself before it is left `failed`.
pub const MAX_AUTOMATIC_RESTARTS: u32 = 5;
/// A VM that has run this long starts its count of automatic restarts afresh.
pub const RESTARTS_FORGIVEN_AFTER: Duration = Duration::from_secs(600);
/// Attempts to move one VM within one drain or evacuation.
pub const MAX_MOVE_ATTEMPTS: u32 = 3;
