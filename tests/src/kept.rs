//! Memory of a VMM's guest, held as an agent holds it that keeps it for the guest's return.

use crate::vmm::Vmm;
use anyhow::{Context, ensure};
use godwit_wire::vmm_api::{GUEST_MEMORY_NAME, KeptMemory};
use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt};

/// A guest's memory; it is there as long as this is, whatever becomes of the VMM.
#[derive(Debug)]
pub struct HeldMemory(File);

impl HeldMemory {
    /// Takes hold of what `vmm` has now.
    pub fn of(vmm: &Vmm) -> anyhow::Result<Self> {
        let directory = format!("/proc/{}/fd", vmm.process.pid());
        let name = format!("/memfd:{GUEST_MEMORY_NAME} (deleted)");
        let mut found = Vec::new();
        for entry in std::fs::read_dir(directory)? {
            let path = entry?.path();
            if std::fs::read_link(&path).is_ok_and(|target| target.as_os_str() == name.as_str()) {
                found.push(path);
            }
        }
        ensure!(found.len() == 1, "the guest has one memory, not {found:?}");
        let file = File::options().read(true).write(true).open(&found[0])?;
        Ok(Self(file))
    }

    /// How another VMM finds it as long as this is held.
    pub fn place(&self) -> anyhow::Result<KeptMemory> {
        let metadata = self.0.metadata().context("memory has metadata")?;
        Ok(KeptMemory {
            path: format!("/proc/{}/fd/{}", std::process::id(), self.0.as_raw_fd()).into(),
            inode: metadata.ino(),
        })
    }

    /// Puts something else where the guest had its memory: its address, below 3 GiB.
    pub fn overwrite(&self, address: u64, bytes: &[u8]) -> anyhow::Result<()> {
        Ok(self.0.write_all_at(bytes, address)?)
    }
}
