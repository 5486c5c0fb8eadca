//! Commands to simulated hosts.

use super::SimHosts;
use super::crash::Life;
use super::host::{SimHost, Way};
use crate::drive::host_driver::{Duplex, HostAddress, HostDriver};
use async_trait::async_trait;
use axum::body::Body;
use godwit_channel::CallError;
use godwit_wire::host_api::{
    CancelMigration, PrepareIncoming, SetBalloon, StartOutgoing, StartVm, StopVm, UpgradeVm,
    UpgradedVm, VmCommand, VmReport,
};
use godwit_wire::id::{DiskId, Epoch, ImageId, MigrationId, PoolId, SnapshotId, VmId};
use godwit_wire::problem::Problem;
use godwit_wire::storage::{
    CreateDisk, DiskReport, GrowDisk, ImageReport, ImportImage, SnapshotReport, TakeSnapshot,
};
use godwit_wire::vmm_api::{DirtyRate, DirtyRateRequest, IncomingReady, MigrationBandwidth};
use std::sync::Arc;
use std::time::Duration;

/// One way on the network.
pub(super) const LATENCY: Duration = Duration::from_millis(2);
/// How long a caller waits for an answer.
const TIMEOUT: Duration = Duration::from_secs(10);

#[derive(Debug)]
pub(super) struct SimDriver {
    hosts: SimHosts,
    life: Arc<Life>,
}

impl SimDriver {
    pub(super) fn new(hosts: SimHosts, life: Arc<Life>) -> Self {
        Self { hosts, life }
    }

    async fn call<T>(
        &self,
        to: HostAddress,
        what: &str,
        act: impl FnOnce(Arc<SimHost>) -> Result<T, Problem>,
    ) -> Result<T, CallError> {
        self.alive().await;
        let host = self.hosts[&to.host].clone();
        host.server_thawed().await;
        tokio::time::sleep(LATENCY).await;
        self.alive().await;
        let silent = |kind| CallError::Unanswered {
            peer: host.name().into(),
            request: what.into(),
            source: std::io::Error::from(kind),
        };
        let answers = async {
            if host.is_cut(Way::FromServer) {
                std::future::pending::<()>().await;
            }
            host.answering().await;
            act(host.clone())
        };
        let Ok(answer) = tokio::time::timeout(TIMEOUT, answers).await else {
            return Err(silent(std::io::ErrorKind::TimedOut));
        };
        tokio::time::sleep(LATENCY).await;
        host.server_thawed().await;
        self.alive().await;
        if !host.is_linked() || host.is_cut(Way::ToServer) {
            tokio::time::sleep(TIMEOUT).await;
            return Err(silent(std::io::ErrorKind::TimedOut));
        }
        answer.map_err(|problem| CallError::Problem {
            peer: host.name().into(),
            problem,
        })
    }

    /// A dead server neither sends nor receives.
    async fn alive(&self) {
        if self.life.is_over() {
            std::future::pending::<()>().await;
        }
    }
}

#[async_trait]
impl HostDriver for SimDriver {
    async fn start_vm(
        &self,
        to: HostAddress,
        vm: VmId,
        command: &StartVm,
    ) -> Result<VmReport, CallError> {
        if self.hosts[&to.host].holds_up(vm, command) {
            std::future::pending::<()>().await;
        }
        self.call(to, "start", |host| host.start_vm(vm, command))
            .await
    }

    async fn stop_vm(
        &self,
        to: HostAddress,
        vm: VmId,
        command: &StopVm,
    ) -> Result<VmReport, CallError> {
        self.call(to, "stop", |host| host.stop_vm(vm, command))
            .await
    }

    async fn pause_vm(
        &self,
        to: HostAddress,
        vm: VmId,
        command: &VmCommand,
    ) -> Result<VmReport, CallError> {
        self.call(to, "pause", |host| host.pause_vm(vm, command))
            .await
    }

    async fn resume_vm(
        &self,
        to: HostAddress,
        vm: VmId,
        command: &VmCommand,
    ) -> Result<VmReport, CallError> {
        self.call(to, "resume", |host| host.resume_vm(vm, command))
            .await
    }

    async fn set_balloon(
        &self,
        to: HostAddress,
        vm: VmId,
        command: &SetBalloon,
    ) -> Result<VmReport, CallError> {
        self.call(to, "balloon", |host| host.set_balloon(vm, command))
            .await
    }

    async fn prepare_incoming(
        &self,
        to: HostAddress,
        vm: VmId,
        command: &PrepareIncoming,
    ) -> Result<IncomingReady, CallError> {
        self.call(to, "prepare", |host| host.prepare_incoming(vm, command))
            .await
    }

    async fn start_outgoing(
        &self,
        to: HostAddress,
        vm: VmId,
        command: &StartOutgoing,
    ) -> Result<VmReport, CallError> {
        self.call(to, "outgoing", |host| host.start_outgoing(vm, command))
            .await
    }

    async fn dirty_rate(
        &self,
        to: HostAddress,
        vm: VmId,
        ask: &DirtyRateRequest,
    ) -> Result<DirtyRate, CallError> {
        self.call(to, "dirty rate", |host| host.dirty_rate(vm, ask))
            .await
    }

    async fn set_migration_bandwidth(
        &self,
        to: HostAddress,
        vm: VmId,
        command: &MigrationBandwidth,
    ) -> Result<VmReport, CallError> {
        self.call(to, "bandwidth", |host| {
            host.set_migration_bandwidth(vm, command)
        })
        .await
    }

    async fn cancel_migration(
        &self,
        to: HostAddress,
        vm: VmId,
        command: &CancelMigration,
    ) -> Result<VmReport, CallError> {
        self.call(to, "cancel", |host| host.cancel_migration(vm, command))
            .await
    }

    async fn upgrade_vm(
        &self,
        to: HostAddress,
        vm: VmId,
        command: &UpgradeVm,
    ) -> Result<UpgradedVm, CallError> {
        self.call(to, "upgrade", |host| host.upgrade_vm(vm, command))
            .await
    }

    async fn destroy(&self, to: HostAddress, vm: VmId, epoch: Epoch) -> Result<(), CallError> {
        self.call(to, "destroy", |host| host.destroy(vm, epoch))
            .await
    }

    async fn import_image(
        &self,
        to: HostAddress,
        pool: PoolId,
        image: ImageId,
        command: &ImportImage,
    ) -> Result<ImageReport, CallError> {
        self.call(to, "import", |host| host.pool(pool)?.import(image, command))
            .await
    }

    async fn upload_image(
        &self,
        to: HostAddress,
        pool: PoolId,
        image: ImageId,
        _length: u64,
        _content: Body,
    ) -> Result<ImageReport, CallError> {
        self.call(to, "upload", |host| host.pool(pool)?.uploaded(image))
            .await
    }

    async fn image(
        &self,
        to: HostAddress,
        pool: PoolId,
        image: ImageId,
    ) -> Result<ImageReport, CallError> {
        self.call(to, "image", |host| host.pool(pool)?.image(image))
            .await
    }

    async fn delete_image(
        &self,
        to: HostAddress,
        pool: PoolId,
        image: ImageId,
    ) -> Result<(), CallError> {
        self.call(to, "delete image", |host| {
            host.pool(pool)?.delete_image(image)
        })
        .await
    }

    async fn create_disk(
        &self,
        to: HostAddress,
        pool: PoolId,
        disk: DiskId,
        command: &CreateDisk,
    ) -> Result<DiskReport, CallError> {
        self.call(to, "create disk", |host| {
            host.pool(pool)?.create_disk(disk, command)
        })
        .await
    }

    async fn disk(
        &self,
        to: HostAddress,
        pool: PoolId,
        disk: DiskId,
    ) -> Result<DiskReport, CallError> {
        self.call(to, "disk", |host| host.pool(pool)?.disk(disk))
            .await
    }

    async fn grow_disk(
        &self,
        to: HostAddress,
        pool: PoolId,
        disk: DiskId,
        command: &GrowDisk,
    ) -> Result<DiskReport, CallError> {
        self.call(to, "grow disk", |host| host.pool(pool)?.grow(disk, command))
            .await
    }

    async fn delete_disk(
        &self,
        to: HostAddress,
        pool: PoolId,
        disk: DiskId,
    ) -> Result<(), CallError> {
        self.call(to, "delete disk", |host| host.delete_disk(pool, disk))
            .await
    }

    async fn erase_copy(
        &self,
        to: HostAddress,
        pool: PoolId,
        disk: DiskId,
        made_for: Option<MigrationId>,
    ) -> Result<(), CallError> {
        self.call(to, "erase copy", |host| {
            host.erase_copy(pool, disk, made_for)
        })
        .await
    }

    async fn take_snapshot(
        &self,
        to: HostAddress,
        vm: VmId,
        snapshot: SnapshotId,
        command: &TakeSnapshot,
    ) -> Result<SnapshotReport, CallError> {
        self.call(to, "snapshot", |host| {
            host.can_be_saved(vm, command.epoch)?;
            Ok(host.pool(command.pool)?.take_snapshot(snapshot))
        })
        .await
    }

    async fn snapshot(
        &self,
        to: HostAddress,
        pool: PoolId,
        snapshot: SnapshotId,
    ) -> Result<SnapshotReport, CallError> {
        self.call(to, "snapshot", |host| host.pool(pool)?.snapshot(snapshot))
            .await
    }

    async fn delete_snapshot(
        &self,
        to: HostAddress,
        pool: PoolId,
        snapshot: SnapshotId,
    ) -> Result<(), CallError> {
        self.call(to, "delete snapshot", |host| {
            host.pool(pool)?.delete_snapshot(snapshot);
            Ok(())
        })
        .await
    }

    async fn serial(&self, to: HostAddress, vm: VmId) -> Result<Box<dyn Duplex>, CallError> {
        self.call(to, "serial", |host| host.serial(vm)).await
    }
}
