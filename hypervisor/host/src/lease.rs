//! The writing side of the lease page (`godwit_wire::lease` has its layout).
//!
//! ```text
//! never granted (0) ──heartbeat answered──▶ held until deadline ──heartbeat answered──▶ held until a later one
//!                                                 │ nothing answered
//!                                                 ▼
//!                                     expired: every VMM that watches stops its vCPUs by itself
//! ```
//!
//! The page outlives the agent: a restarted agent on the same boot keeps it as it is, so that restarting agents is
//! invisible to guests.

use crate::sys::SharedPage;
use godwit_channel::file::{self, Access, FileError};
use godwit_wire::lease::{
    BOOT_ID_OFFSET, DEADLINE_OFFSET, LEASE_DURATION, LEASE_MAGIC, LEASE_PAGE_BYTES, LEASE_VERSION,
    LeaseState, MAGIC_OFFSET, VERSION_OFFSET,
};
use std::fs::OpenOptions;
use std::io;
use std::path::Path;
use std::time::Duration;
use uuid::Uuid;

/// The host's lease.
#[derive(Debug)]
pub(crate) struct LeasePage {
    page: SharedPage,
}

impl LeasePage {
    /// Opens the page at `path`, made anew if there is none, or it is too short, of another boot or of another
    /// version. Any other trouble is an error: VMMs may be watching the page that is there.
    pub(crate) fn open(path: &Path, boot_id: Uuid) -> Result<Self, FileError> {
        match Self::map(path) {
            Ok(existing) if existing.is_valid(boot_id) => return Ok(existing),
            Ok(_) => {
                tracing::debug!(path = %path.display(), "the lease page is from another boot; making a new one")
            }
            Err(error) if error.is_missing() => {}
            Err(error) if error.source.kind() == io::ErrorKind::InvalidData => {
                tracing::warn!(%error, source = %error.source, "the lease page is too short; making a new one")
            }
            Err(error) => return Err(error),
        }
        // No VMM that watches the former page can be alive after a new boot, so the new one may be another file.
        file::write_atomically(path, &fresh_page(boot_id), Access::Private)?;
        Self::map(path)
    }

    fn map(path: &Path) -> Result<Self, FileError> {
        let open = OpenOptions::new().read(true).write(true).open(path);
        let page = open
            .and_then(|file| SharedPage::map(&file))
            .map_err(|e| FileError::new("map", path, e))?;
        Ok(Self { page })
    }

    fn is_valid(&self, boot_id: Uuid) -> bool {
        let (first, second) = boot_id_words(boot_id);
        self.page.load(MAGIC_OFFSET) == LEASE_MAGIC
            && self.page.load(VERSION_OFFSET) == LEASE_VERSION
            && self.page.load(BOOT_ID_OFFSET) == first
            && self.page.load(BOOT_ID_OFFSET + 8) == second
    }

    /// Renews the lease: it ends `lease` after `sent_ns`, the moment just before the heartbeat was sent. The
    /// server counts on no host granting itself more than [`LEASE_DURATION`].
    pub(crate) fn renew(&self, sent_ns: u64, lease: Duration) {
        let lease_ns = u64::try_from(lease.min(LEASE_DURATION).as_nanos()).unwrap_or(0);
        self.page
            .store(DEADLINE_OFFSET, sent_ns.saturating_add(lease_ns));
    }

    /// What the page says at `now_ns`.
    pub(crate) fn state(&self, now_ns: u64) -> LeaseState {
        LeaseState::at(self.page.load(DEADLINE_OFFSET), now_ns)
    }
}

/// The boot id's bytes as the two words at which they are kept.
fn boot_id_words(boot_id: Uuid) -> (u64, u64) {
    // A UUID's bytes are big-endian; the words are read in this machine's order.
    let (first, second) = boot_id.as_u64_pair();
    (
        u64::from_ne_bytes(first.to_be_bytes()),
        u64::from_ne_bytes(second.to_be_bytes()),
    )
}

fn fresh_page(boot_id: Uuid) -> Vec<u8> {
    let mut page = vec![0; LEASE_PAGE_BYTES];
    page[MAGIC_OFFSET..MAGIC_OFFSET + 8].copy_from_slice(&LEASE_MAGIC.to_le_bytes());
    page[VERSION_OFFSET..VERSION_OFFSET + 8].copy_from_slice(&LEASE_VERSION.to_le_bytes());
    page[BOOT_ID_OFFSET..BOOT_ID_OFFSET + 16].copy_from_slice(boot_id.as_bytes());
    page
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND_NS: u64 = 1_000_000_000;

    #[test]
    fn a_lease_counts_from_the_moment_the_heartbeat_was_sent() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("lease");
        let lease = LeasePage::open(&path, Uuid::from_u128(1)).unwrap();
        assert_eq!(lease.state(0), LeaseState::Expired);
        lease.renew(10 * SECOND_NS, Duration::from_secs(6));
        assert_eq!(
            lease.state(15 * SECOND_NS),
            LeaseState::Held {
                remaining: Duration::from_secs(1)
            }
        );
        assert_eq!(lease.state(16 * SECOND_NS), LeaseState::Expired);
        let bytes = std::fs::read(&path).unwrap();
        assert_eq!(
            bytes[DEADLINE_OFFSET..DEADLINE_OFFSET + 8],
            (16 * SECOND_NS).to_le_bytes()
        );
        assert_eq!(
            bytes[BOOT_ID_OFFSET..BOOT_ID_OFFSET + 16],
            *Uuid::from_u128(1).as_bytes()
        );
        assert_eq!(&bytes[..8], b"GODWITLP");
    }

    #[test]
    fn no_answer_makes_a_lease_longer_than_the_pool_counts_on() {
        let directory = tempfile::tempdir().unwrap();
        let lease = LeasePage::open(&directory.path().join("lease"), Uuid::nil()).unwrap();
        lease.renew(0, Duration::from_secs(3600));
        assert_eq!(
            lease.state(0),
            LeaseState::Held {
                remaining: LEASE_DURATION
            }
        );
    }

    #[test]
    fn a_restarted_agent_keeps_the_page_and_a_new_boot_starts_without_a_lease() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("lease");
        let watched_by_a_vmm = LeasePage::open(&path, Uuid::from_u128(1)).unwrap();
        watched_by_a_vmm.renew(SECOND_NS, Duration::from_secs(5));
        let restarted = LeasePage::open(&path, Uuid::from_u128(1)).unwrap();
        assert_eq!(
            restarted.state(SECOND_NS),
            LeaseState::Held {
                remaining: Duration::from_secs(5)
            }
        );
        restarted.renew(2 * SECOND_NS, Duration::from_secs(5));
        let seen_by_the_vmm = watched_by_a_vmm.state(SECOND_NS);
        assert_eq!(
            seen_by_the_vmm,
            LeaseState::Held {
                remaining: Duration::from_secs(6)
            }
        );

        let rebooted = LeasePage::open(&path, Uuid::from_u128(2)).unwrap();
        assert_eq!(rebooted.state(SECOND_NS), LeaseState::Expired);
    }

    #[test]
    fn a_page_that_is_too_short_is_made_anew() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("lease");
        std::fs::write(&path, b"GODWITLP").unwrap();
        let lease = LeasePage::open(&path, Uuid::nil()).unwrap();
        assert_eq!(lease.state(0), LeaseState::Expired);
    }

    #[test]
    fn a_page_that_cannot_be_opened_is_not_replaced_behind_the_backs_of_those_who_watch_it() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("lease");
        std::fs::create_dir(&path).unwrap();
        assert!(LeasePage::open(&path, Uuid::nil()).is_err());
        assert!(path.is_dir());
    }
}
