//! One VMM takes a machine over from another on the same host, the test playing the host's agent.

use crate::test_dir::TestDir;
use crate::vmm::Vmm;
use anyhow::Context;
use godwit_wire::id::{Epoch, SuccessionId, VmId};
use godwit_wire::succession::{
    OfferSuccession, PrepareSuccession, SuccessionCommand, SuccessionStatus,
};
use godwit_wire::vmm_api::CreateRequest;
use std::fs;
use std::path::PathBuf;

/// A succession between two processes.
#[derive(Debug)]
pub struct Succession<'a> {
    /// The VMM the guest runs in.
    pub predecessor: &'a Vmm,
    /// The VMM the guest shall run in.
    pub successor: &'a Vmm,
    /// Its id.
    pub succession: SuccessionId,
    vm: VmId,
    epoch: Epoch,
    socket: PathBuf,
    record: PathBuf,
}

impl<'a> Succession<'a> {
    /// One that has not begun.
    pub fn of(
        dir: &TestDir,
        predecessor: &'a Vmm,
        successor: &'a Vmm,
        request: &CreateRequest,
    ) -> Self {
        Self {
            predecessor,
            successor,
            succession: SuccessionId::fresh(),
            vm: request.vm,
            epoch: request.epoch,
            socket: dir.join("take.sock"),
            record: dir.join("record"),
        }
    }

    /// The same one again, as an agent finds it that did not begin it.
    pub fn found(self, succession: SuccessionId) -> Self {
        Self { succession, ..self }
    }

    /// Up to a successor that has built the machine; the guest runs in the predecessor.
    pub async fn prepare(&self) -> anyhow::Result<SuccessionStatus> {
        let offer = OfferSuccession {
            epoch: self.epoch,
            succession: self.succession,
            socket: self.socket.clone(),
        };
        let _: SuccessionStatus = self
            .predecessor
            .api
            .put("/v1/succession/offer", &offer)
            .await
            .context("offer")?;
        let prepare = PrepareSuccession {
            vm: self.vm,
            epoch: self.epoch,
            succession: self.succession,
            socket: self.socket.clone(),
        };
        self.successor
            .api
            .put("/v1/succession/prepare", &prepare)
            .await
            .context("prepare")
    }

    /// The guest stands still from here, and the successor has everything at the end.
    pub async fn take(&self) -> anyhow::Result<SuccessionStatus> {
        self.tell(self.successor, "take").await
    }

    /// The machine is the successor's: writes that down, as an agent does, and lets it run.
    pub async fn commit(&self) -> anyhow::Result<SuccessionStatus> {
        let fresh = self.record.with_extension("new");
        fs::write(&fresh, self.succession.to_string())?;
        fs::rename(&fresh, &self.record)?;
        self.tell(self.successor, "commit").await
    }

    /// The machine stays the predecessor's; the successor must be dead by now.
    pub async fn abort(&self) -> anyhow::Result<SuccessionStatus> {
        self.tell(self.predecessor, "abort").await
    }

    /// All of it; gives the successor's last word.
    pub async fn complete(&self) -> anyhow::Result<SuccessionStatus> {
        self.prepare().await?;
        self.take().await?;
        self.commit().await
    }

    async fn tell(&self, vmm: &Vmm, verb: &str) -> anyhow::Result<SuccessionStatus> {
        let command = SuccessionCommand {
            succession: self.succession,
            epoch: self.epoch,
        };
        vmm.api
            .post(&format!("/v1/succession/{verb}"), &command)
            .await
            .with_context(|| verb.to_owned())
    }
}

/// Which memory file process `pid` has mapped as its guest's: the same number means the same memory.
pub fn guest_memory_file(pid: u32) -> anyhow::Result<u64> {
    let maps = fs::read_to_string(format!("/proc/{pid}/maps"))?;
    let line = maps
        .lines()
        .find(|line| line.contains("godwit-guest-ram"))
        .context("guest memory is mapped")?;
    // Range, permissions, offset, device, inode, name.
    let inode = line.split_whitespace().nth(4).context("an inode")?;
    Ok(inode.parse()?)
}
