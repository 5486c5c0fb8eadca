//! Facts about the pilot that both the guest and its users on the host need.

/// The word that opens the banner line; its first byte is the first byte the guest ever sends.
pub const BANNER_PREFIX: &str = "pilot ";

/// Every vCPU's timer tick period, unless `tick_us=` on the command line says otherwise.
pub const TICK_PERIOD_US: u64 = 2_000;

/// The shortest and longest `tick_us=`; others are brought within.
pub const TICK_PERIOD_US_MIN: u64 = 500;
pub const TICK_PERIOD_US_MAX: u64 = 1_000_000;

/// A gap between two ticks longer than this many periods is recorded as a blackout.
pub const BLACKOUT_THRESHOLD_PERIODS: u64 = 3;

/// The most vCPUs the guest starts; a larger `vcpus=` on its command line is lowered to this.
pub const VCPUS_MAX: usize = 64;

/// The longest command line the shell accepts, in bytes, without the line end.
pub const COMMAND_BYTES_MAX: usize = 120;

/// Bytes in one page of guest memory.
pub const PAGE_BYTES: u64 = 4096;

/// Pages in one MiB.
pub const PAGES_PER_MIB: u64 = (1 << 20) / PAGE_BYTES;

/// Received on an empty line, this byte (Ctrl-D, EOT) powers the guest off.
pub const POWER_OFF_BYTE: u8 = 0x04;
