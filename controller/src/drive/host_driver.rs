//! Commands to host agents.

use async_trait::async_trait;
use axum::body::Body;
use godwit_channel::CallError;
use godwit_wire::host_api::{
    CancelMigration, PrepareIncoming, SetBalloon, StartOutgoing, StartVm, StopVm, UpgradeVm,
    UpgradedVm, VmCommand, VmReport,
};
use godwit_wire::id::{DiskId, Epoch, HostId, ImageId, MigrationId, PoolId, SnapshotId, VmId};
use godwit_wire::storage::{
    CreateDisk, DiskReport, GrowDisk, ImageReport, ImportImage, SnapshotReport, TakeSnapshot,
};
use godwit_wire::vmm_api::{DirtyRate, DirtyRateRequest, IncomingReady, MigrationBandwidth};
use std::fmt;
use std::net::SocketAddr;
use tokio::io::{AsyncRead, AsyncWrite};

/// Bytes both ways: a VM's serial console.
pub trait Duplex: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Duplex for T {}

/// Whom to call.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct HostAddress {
    /// Which host; another one that answers there is refused.
    pub host: HostId,
    /// Where its agent listens.
    pub address: SocketAddr,
}

/// Sends commands to agents. Every command may be repeated; agents answer a repeated one as the first time.
#[async_trait]
pub trait HostDriver: fmt::Debug + Send + Sync + 'static {
    /// Starts a VM.
    async fn start_vm(
        &self,
        to: HostAddress,
        vm: VmId,
        command: &StartVm,
    ) -> Result<VmReport, CallError>;

    /// Stops a VM; answers when it has stopped.
    async fn stop_vm(
        &self,
        to: HostAddress,
        vm: VmId,
        command: &StopVm,
    ) -> Result<VmReport, CallError>;

    /// Pauses a VM.
    async fn pause_vm(
        &self,
        to: HostAddress,
        vm: VmId,
        command: &VmCommand,
    ) -> Result<VmReport, CallError>;

    /// Lets a paused VM run.
    async fn resume_vm(
        &self,
        to: HostAddress,
        vm: VmId,
        command: &VmCommand,
    ) -> Result<VmReport, CallError>;

    /// Asks a VM's guest to live with so much memory.
    async fn set_balloon(
        &self,
        to: HostAddress,
        vm: VmId,
        command: &SetBalloon,
    ) -> Result<VmReport, CallError>;

    /// Makes a host ready to receive a VM.
    async fn prepare_incoming(
        &self,
        to: HostAddress,
        vm: VmId,
        command: &PrepareIncoming,
    ) -> Result<IncomingReady, CallError>;

    /// Makes a host send a VM.
    async fn start_outgoing(
        &self,
        to: HostAddress,
        vm: VmId,
        command: &StartOutgoing,
    ) -> Result<VmReport, CallError>;

    /// Asks how fast a VM's guest dirties memory, which takes as long as it is watched. Changes nothing.
    async fn dirty_rate(
        &self,
        to: HostAddress,
        vm: VmId,
        ask: &DirtyRateRequest,
    ) -> Result<DirtyRate, CallError>;

    /// Tells a source how much it may send from now on.
    async fn set_migration_bandwidth(
        &self,
        to: HostAddress,
        vm: VmId,
        command: &MigrationBandwidth,
    ) -> Result<VmReport, CallError>;

    /// Calls a migration off at one end.
    async fn cancel_migration(
        &self,
        to: HostAddress,
        vm: VmId,
        command: &CancelMigration,
    ) -> Result<VmReport, CallError>;

    /// Lets a VMM of the agent's own program take a VM over; answers when it runs there.
    async fn upgrade_vm(
        &self,
        to: HostAddress,
        vm: VmId,
        command: &UpgradeVm,
    ) -> Result<UpgradedVm, CallError>;

    /// Kills what is left of a VM, up to and including `epoch`, and forgets it. Fine if there is nothing.
    async fn destroy(&self, to: HostAddress, vm: VmId, epoch: Epoch) -> Result<(), CallError>;

    /// Begins to import an image.
    async fn import_image(
        &self,
        to: HostAddress,
        pool: PoolId,
        image: ImageId,
        command: &ImportImage,
    ) -> Result<ImageReport, CallError>;

    /// Sends the bytes of an image that is being uploaded, `length` of them.
    async fn upload_image(
        &self,
        to: HostAddress,
        pool: PoolId,
        image: ImageId,
        length: u64,
        content: Body,
    ) -> Result<ImageReport, CallError>;

    /// How an image stands.
    async fn image(
        &self,
        to: HostAddress,
        pool: PoolId,
        image: ImageId,
    ) -> Result<ImageReport, CallError>;

    /// Deletes an image, or what there is of it.
    async fn delete_image(
        &self,
        to: HostAddress,
        pool: PoolId,
        image: ImageId,
    ) -> Result<(), CallError>;

    /// Begins to make a disk.
    async fn create_disk(
        &self,
        to: HostAddress,
        pool: PoolId,
        disk: DiskId,
        command: &CreateDisk,
    ) -> Result<DiskReport, CallError>;

    /// How a disk stands.
    async fn disk(
        &self,
        to: HostAddress,
        pool: PoolId,
        disk: DiskId,
    ) -> Result<DiskReport, CallError>;

    /// Makes a disk larger.
    async fn grow_disk(
        &self,
        to: HostAddress,
        pool: PoolId,
        disk: DiskId,
        command: &GrowDisk,
    ) -> Result<DiskReport, CallError>;

    /// Deletes a disk, or what there is of it.
    async fn delete_disk(
        &self,
        to: HostAddress,
        pool: PoolId,
        disk: DiskId,
    ) -> Result<(), CallError>;

    /// Erases what is left of a disk, but only the one that was made for `made_for`, or the original; any other is
    /// refused as [`ANOTHER_COPY`](godwit_wire::storage::ANOTHER_COPY). Done also when none is there.
    async fn erase_copy(
        &self,
        to: HostAddress,
        pool: PoolId,
        disk: DiskId,
        made_for: Option<MigrationId>,
    ) -> Result<(), CallError>;

    /// Begins to save a VM.
    async fn take_snapshot(
        &self,
        to: HostAddress,
        vm: VmId,
        snapshot: SnapshotId,
        command: &TakeSnapshot,
    ) -> Result<SnapshotReport, CallError>;

    /// How a snapshot stands.
    async fn snapshot(
        &self,
        to: HostAddress,
        pool: PoolId,
        snapshot: SnapshotId,
    ) -> Result<SnapshotReport, CallError>;

    /// Deletes a snapshot, or what there is of it.
    async fn delete_snapshot(
        &self,
        to: HostAddress,
        pool: PoolId,
        snapshot: SnapshotId,
    ) -> Result<(), CallError>;

    /// Opens a VM's serial console.
    async fn serial(&self, to: HostAddress, vm: VmId) -> Result<Box<dyn Duplex>, CallError>;
}
