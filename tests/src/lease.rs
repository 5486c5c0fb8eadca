//! Plays the host agent's part in the lease: writes the page that VMMs watch.

use anyhow::Context;
use godwit_wire::lease::{
    BOOT_ID_OFFSET, DEADLINE_OFFSET, LEASE_MAGIC, LEASE_PAGE_BYTES, LEASE_VERSION, MAGIC_OFFSET,
    VERSION_OFFSET,
};
use rustix::time::{ClockId, clock_gettime};
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Duration;
use uuid::Uuid;

/// A lease page under the test's control.
#[derive(Debug)]
pub struct LeasePage {
    path: PathBuf,
    file: File,
}

impl LeasePage {
    /// A page that was never granted.
    pub fn create(path: &Path) -> anyhow::Result<Self> {
        let file = File::options()
            .read(true)
            .write(true)
            .create_new(true)
            .open(path)?;
        file.set_len(LEASE_PAGE_BYTES as u64)?;
        let boot_id =
            fs::read_to_string("/proc/sys/kernel/random/boot_id").context("the boot id")?;
        file.write_all_at(
            Uuid::parse_str(boot_id.trim())?.as_bytes(),
            BOOT_ID_OFFSET as u64,
        )?;
        file.write_all_at(&LEASE_VERSION.to_le_bytes(), VERSION_OFFSET as u64)?;
        file.write_all_at(&LEASE_MAGIC.to_le_bytes(), MAGIC_OFFSET as u64)?;
        Ok(Self {
            path: path.to_owned(),
            file,
        })
    }

    /// Lets VMs run for `duration` from now.
    pub fn grant(&self, duration: Duration) -> anyhow::Result<()> {
        self.set_deadline_ns(boottime_ns().saturating_add(duration.as_nanos() as u64))
    }

    /// Path of the page, for a VMM.
    pub fn path(&self) -> &Path {
        &self.path
    }

    fn set_deadline_ns(&self, deadline_ns: u64) -> anyhow::Result<()> {
        // One aligned eight-byte write lands in the page cache as a whole, as a store into the mapping would.
        Ok(self
            .file
            .write_all_at(&deadline_ns.to_le_bytes(), DEADLINE_OFFSET as u64)?)
    }
}

/// Now on the clock that leases count on.
pub fn boottime_ns() -> u64 {
    let now = clock_gettime(ClockId::Boottime);
    now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64
}
