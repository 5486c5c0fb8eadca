//! The lease page that the host agent writes and this process only reads (see `godwit_wire::lease`).

use godwit_wire::lease::{
    BOOT_ID_OFFSET, DEADLINE_OFFSET, LEASE_MAGIC, LEASE_PAGE_BYTES, LEASE_VERSION, LeaseState,
    MAGIC_OFFSET, VERSION_OFFSET,
};
use std::fs::File;
use std::io;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use uuid::Uuid;
use vm_memory::{Bytes as _, FileOffset, MmapRegion, VolatileMemory};

/// A lease page that cannot be relied on.
#[derive(Debug, thiserror::Error)]
pub enum LeasePageError {
    /// It cannot be read.
    #[error("the lease page cannot be opened")]
    Open(#[source] io::Error),
    /// It is too short, or mapping failed.
    #[error("the lease page cannot be mapped: {0}")]
    Map(String),
    /// It is some other file, or of another version.
    #[error("the file is not a lease page of version {LEASE_VERSION}")]
    NotALeasePage,
    /// Its deadline is on another boot's clock.
    #[error("the lease page was written during another boot of this host")]
    OtherBoot,
}

/// A mapped lease page.
#[derive(Debug)]
pub struct LeasePage {
    region: MmapRegion,
}

impl LeasePage {
    /// Maps the page read-only and checks that it is one, of this boot.
    pub fn open(path: &Path) -> Result<Self, LeasePageError> {
        let file = File::open(path).map_err(LeasePageError::Open)?;
        let length = file.metadata().map_err(LeasePageError::Open)?.len();
        if length < LEASE_PAGE_BYTES as u64 {
            return Err(LeasePageError::Map(format!(
                "it has {length} bytes instead of {LEASE_PAGE_BYTES}"
            )));
        }
        let region = MmapRegion::build(
            Some(FileOffset::new(file, 0)),
            LEASE_PAGE_BYTES,
            libc::PROT_READ,
            libc::MAP_SHARED,
        )
        .map_err(|error| LeasePageError::Map(error.to_string()))?;
        let page = Self { region };
        if page.load(MAGIC_OFFSET) != LEASE_MAGIC || page.load(VERSION_OFFSET) != LEASE_VERSION {
            return Err(LeasePageError::NotALeasePage);
        }
        let mut written = [0; 16];
        page.region
            .as_volatile_slice()
            .read_slice(&mut written, BOOT_ID_OFFSET)
            .map_err(|error| LeasePageError::Map(error.to_string()))?;
        if boot_id().is_some_and(|ours| ours != Uuid::from_bytes(written)) {
            return Err(LeasePageError::OtherBoot);
        }
        Ok(page)
    }

    /// What the lease says at this moment.
    pub fn state(&self) -> LeaseState {
        LeaseState::at(self.load(DEADLINE_OFFSET), boot_time_ns())
    }

    fn load(&self, offset: usize) -> u64 {
        self.region
            .get_atomic_ref::<AtomicU64>(offset)
            .expect("every field is aligned and within the page")
            .load(Ordering::Acquire)
    }
}

/// CLOCK_BOOTTIME, which goes on while the host is suspended.
pub fn boot_time_ns() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64
}

fn boot_id() -> Option<Uuid> {
    Uuid::parse_str(
        std::fs::read_to_string("/proc/sys/kernel/random/boot_id")
            .ok()?
            .trim(),
    )
    .ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn page(deadline: u64, boot: Uuid) -> tempfile::NamedTempFile {
        let file = tempfile::NamedTempFile::new().unwrap();
        let mut bytes = vec![0; LEASE_PAGE_BYTES];
        bytes[..8].copy_from_slice(&LEASE_MAGIC.to_le_bytes());
        bytes[8..16].copy_from_slice(&LEASE_VERSION.to_le_bytes());
        bytes[16..24].copy_from_slice(&deadline.to_le_bytes());
        bytes[24..40].copy_from_slice(boot.as_bytes());
        std::fs::write(file.path(), bytes).unwrap();
        file
    }

    #[test]
    fn a_page_of_another_boot_is_refused() {
        assert!(matches!(
            LeasePage::open(page(u64::MAX, Uuid::nil()).path()),
            Err(LeasePageError::OtherBoot)
        ));
    }

    #[test]
    fn a_new_deadline_is_seen_at_once() {
        let file = page(1, boot_id().unwrap());
        let lease = LeasePage::open(file.path()).unwrap();
        assert_eq!(lease.state(), LeaseState::Expired);
        use std::os::unix::fs::FileExt;
        let later = boot_time_ns() + 1_000_000_000_000;
        file.as_file()
            .write_at(&later.to_le_bytes(), DEADLINE_OFFSET as u64)
            .unwrap();
        assert!(matches!(lease.state(), LeaseState::Held { .. }));
    }

    #[test]
    fn a_short_or_foreign_file_is_refused() {
        let file = tempfile::NamedTempFile::new().unwrap();
        assert!(matches!(
            LeasePage::open(file.path()),
            Err(LeasePageError::Map(_))
        ));
        std::fs::write(file.path(), vec![0; LEASE_PAGE_BYTES]).unwrap();
        assert!(matches!(
            LeasePage::open(file.path()),
            Err(LeasePageError::NotALeasePage)
        ));
    }
}
