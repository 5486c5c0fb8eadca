//! The pilot guest, and how to understand it.
//!
//! [`ELF`] is a freestanding x86-64 guest for demonstrations, tests and benchmarks. It boots by
//! the Linux 64-bit boot protocol and by PVH, ticks on every vCPU, measures the gaps between
//! ticks, keeps memory whose contents it can prove, and answers a line shell on COM1: every
//! command but a blank line gets exactly one line back, beginning with `ok ` or `error `.
//!
//! | command | answer, read by |
//! |---|---|
//! | (boot) | [`Banner`] |
//! | `ticks` | [`Ticks`] |
//! | `ticks reset` | `ok blackouts=0` |
//! | `fill <MiB>` | [`Filled`] |
//! | `dirty <MiB/s> <working set MiB>` | [`Dirtying`] |
//! | `verify` | [`Verified`] |
//! | `stop` | `ok stopped` |
//! | `spin <on\|off>` | `ok spin=<on\|off>` |
//! | `halt` | `ok halting`, then power off; the byte [`POWER_OFF_BYTE`] on an empty line does the same |
//! | `reset` | `ok resetting`, then a reset |
//! | `help` | `ok commands=…` |
//!
//! Any of them can be read as a [`Reply`] first.

/// The guest's pure parts: its constants, and the rest for their tests.
#[path = "../guest/pure/mod.rs"]
#[allow(
    dead_code,
    unreachable_pub,
    reason = "the guest uses what this library does not"
)]
mod pure;
mod reply;

pub use pure::constants::{
    BANNER_PREFIX, BLACKOUT_THRESHOLD_PERIODS, COMMAND_BYTES_MAX, PAGE_BYTES, PAGES_PER_MIB,
    POWER_OFF_BYTE, TICK_PERIOD_US, VCPUS_MAX,
};
pub use reply::{Banner, Clock, Dirtying, Filled, Reply, ReplyError, Ticks, Verified};

/// The guest's image: an ELF64 executable, loaded at 2 MiB, that needs about 4 MiB of memory for
/// itself. On its command line it takes `vcpus=N` (default 1), and expects APIC ids `0..N`, and
/// `tick_us=N` (default [`TICK_PERIOD_US`]), where a longer period makes an idle guest cheaper.
pub const ELF: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/pilot.elf"));
