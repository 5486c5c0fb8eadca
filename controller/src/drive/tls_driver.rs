//! Commands to host agents over mutual TLS. What the two ends of a migration prove themselves with is made here, at
//! the edge: it goes to the hosts and nowhere else.

use crate::drive::host_driver::{Duplex, HostAddress, HostDriver};
use async_trait::async_trait;
use axum::body::Body;
use axum::http::Method;
use godwit_channel::CallError;
use godwit_channel::client::NO_BODY;
use godwit_channel::pki::{Authority, Identity};
use godwit_channel::tls::{self, TlsClient, TlsError};
use godwit_wire::host_api::{
    CancelMigration, PrepareIncoming, SERIAL_UPGRADE, SetBalloon, StartOutgoing, StartVm, StopMode,
    StopVm, UpgradeVm, UpgradedVm, VmCommand, VmReport,
};
use godwit_wire::id::{DiskId, Epoch, ImageId, MigrationId, PoolId, SnapshotId, VmId};
use godwit_wire::migration::{MigrationIdentity, MigrationRole};
use godwit_wire::problem::Problem;
use godwit_wire::storage::{
    CreateDisk, DiskReport, GrowDisk, ImageReport, ImportImage, MADE_FOR_NONE, SnapshotReport,
    TakeSnapshot,
};
use godwit_wire::vmm_api::{DirtyRate, DirtyRateRequest, IncomingReady, MigrationBandwidth};
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

/// How long a command may take that starts a process.
const SPAWN_TIME: Duration = Duration::from_secs(20);
/// How long a VM may take to change its VMM: the new one maps all of the guest's memory first.
const UPGRADE_TIME: Duration = Duration::from_secs(180);
/// How long any other command may take.
const COMMAND_TIME: Duration = Duration::from_secs(10);
/// How long the upload of an image may take in all; whoever sends it is bound to keep it going.
const UPLOAD_TIME: Duration = Duration::from_secs(12 * 3600);

/// See the module. Connections are kept per host.
pub struct TlsDriver {
    config: Arc<rustls::ClientConfig>,
    authority: Arc<Authority>,
    clients: Mutex<BTreeMap<HostAddress, TlsClient>>,
}

impl fmt::Debug for TlsDriver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TlsDriver").finish_non_exhaustive()
    }
}

impl TlsDriver {
    /// A driver that shows the server's certificate and lets `authority` vouch for the ends of migrations.
    pub fn new(identity: &Identity, authority: Arc<Authority>) -> Result<Self, TlsError> {
        Ok(Self {
            config: tls::client(identity)?,
            authority,
            clients: Mutex::default(),
        })
    }

    fn client(&self, to: HostAddress) -> TlsClient {
        let mut clients = self.clients.lock().unwrap_or_else(PoisonError::into_inner);
        // A host that moved to another address leaves its old client behind.
        clients.retain(|known, _| known.host != to.host || known.address == to.address);
        let make = || TlsClient::to_host(&to.address.to_string(), to.host, self.config.clone());
        clients.entry(to).or_insert_with(make).clone()
    }

    /// A fresh one each time a command is sent: a repeated command may carry another, since the ends check each
    /// other's name and CA, never one certificate.
    fn vouch(
        &self,
        migration: MigrationId,
        role: MigrationRole,
    ) -> Result<MigrationIdentity, CallError> {
        self.authority
            .issue_migration(migration, role)
            .map_err(|error| CallError::Problem {
                peer: "the pool's CA".into(),
                problem: Problem::internal(format!(
                    "the pool's CA cannot vouch for an end of migration {migration}: {error}"
                )),
            })
    }

    async fn send<T: DeserializeOwned>(
        &self,
        to: HostAddress,
        within: Duration,
        method: Method,
        path: String,
        body: &impl Serialize,
    ) -> Result<T, CallError> {
        self.client(to)
            .request_within(within, method, &path, Some(body))
            .await
    }
}

fn image_path(pool: PoolId, image: ImageId) -> String {
    format!("/v1/pools/{pool}/images/{image}")
}

fn disk_path(pool: PoolId, disk: DiskId) -> String {
    format!("/v1/pools/{pool}/disks/{disk}")
}

fn snapshot_path(pool: PoolId, snapshot: SnapshotId) -> String {
    format!("/v1/pools/{pool}/snapshots/{snapshot}")
}

#[async_trait]
impl HostDriver for TlsDriver {
    async fn start_vm(
        &self,
        to: HostAddress,
        vm: VmId,
        command: &StartVm,
    ) -> Result<VmReport, CallError> {
        self.send(
            to,
            SPAWN_TIME,
            Method::PUT,
            format!("/v1/vms/{vm}"),
            command,
        )
        .await
    }

    async fn stop_vm(
        &self,
        to: HostAddress,
        vm: VmId,
        command: &StopVm,
    ) -> Result<VmReport, CallError> {
        let patience = match command.mode {
            StopMode::Graceful { timeout_ms } => Duration::from_millis(timeout_ms),
            StopMode::Kill => Duration::ZERO,
        };
        self.send(
            to,
            COMMAND_TIME + patience,
            Method::POST,
            format!("/v1/vms/{vm}/stop"),
            command,
        )
        .await
    }

    async fn pause_vm(
        &self,
        to: HostAddress,
        vm: VmId,
        command: &VmCommand,
    ) -> Result<VmReport, CallError> {
        self.send(
            to,
            COMMAND_TIME,
            Method::POST,
            format!("/v1/vms/{vm}/pause"),
            command,
        )
        .await
    }

    async fn resume_vm(
        &self,
        to: HostAddress,
        vm: VmId,
        command: &VmCommand,
    ) -> Result<VmReport, CallError> {
        self.send(
            to,
            COMMAND_TIME,
            Method::POST,
            format!("/v1/vms/{vm}/resume"),
            command,
        )
        .await
    }

    async fn set_balloon(
        &self,
        to: HostAddress,
        vm: VmId,
        command: &SetBalloon,
    ) -> Result<VmReport, CallError> {
        let path = format!("/v1/vms/{vm}/balloon");
        self.send(to, COMMAND_TIME, Method::POST, path, command)
            .await
    }

    async fn prepare_incoming(
        &self,
        to: HostAddress,
        vm: VmId,
        command: &PrepareIncoming,
    ) -> Result<IncomingReady, CallError> {
        let command = PrepareIncoming {
            identity: Some(self.vouch(command.migration, MigrationRole::Target)?),
            ..command.clone()
        };
        self.send(
            to,
            SPAWN_TIME,
            Method::PUT,
            format!("/v1/vms/{vm}/incoming"),
            &command,
        )
        .await
    }

    async fn start_outgoing(
        &self,
        to: HostAddress,
        vm: VmId,
        command: &StartOutgoing,
    ) -> Result<VmReport, CallError> {
        let command = StartOutgoing {
            identity: Some(self.vouch(command.migration, MigrationRole::Source)?),
            ..command.clone()
        };
        self.send(
            to,
            COMMAND_TIME,
            Method::POST,
            format!("/v1/vms/{vm}/outgoing"),
            &command,
        )
        .await
    }

    async fn dirty_rate(
        &self,
        to: HostAddress,
        vm: VmId,
        ask: &DirtyRateRequest,
    ) -> Result<DirtyRate, CallError> {
        let path = format!("/v1/vms/{vm}/dirty-rate");
        let within = COMMAND_TIME + Duration::from_millis(ask.window_ms);
        self.send(to, within, Method::POST, path, ask).await
    }

    async fn set_migration_bandwidth(
        &self,
        to: HostAddress,
        vm: VmId,
        command: &MigrationBandwidth,
    ) -> Result<VmReport, CallError> {
        let path = format!("/v1/vms/{vm}/migration/bandwidth");
        self.send(to, COMMAND_TIME, Method::POST, path, command)
            .await
    }

    async fn cancel_migration(
        &self,
        to: HostAddress,
        vm: VmId,
        command: &CancelMigration,
    ) -> Result<VmReport, CallError> {
        self.send(
            to,
            COMMAND_TIME,
            Method::POST,
            format!("/v1/vms/{vm}/migration/cancel"),
            command,
        )
        .await
    }

    async fn upgrade_vm(
        &self,
        to: HostAddress,
        vm: VmId,
        command: &UpgradeVm,
    ) -> Result<UpgradedVm, CallError> {
        self.send(
            to,
            UPGRADE_TIME,
            Method::POST,
            format!("/v1/vms/{vm}/upgrade"),
            command,
        )
        .await
    }

    async fn destroy(&self, to: HostAddress, vm: VmId, epoch: Epoch) -> Result<(), CallError> {
        let path = format!("/v1/vms/{vm}?epoch={epoch}");
        self.client(to)
            .request_within(COMMAND_TIME, Method::DELETE, &path, NO_BODY)
            .await
    }

    async fn import_image(
        &self,
        to: HostAddress,
        pool: PoolId,
        image: ImageId,
        command: &ImportImage,
    ) -> Result<ImageReport, CallError> {
        let path = image_path(pool, image);
        self.send(to, COMMAND_TIME, Method::POST, path, command)
            .await
    }

    async fn upload_image(
        &self,
        to: HostAddress,
        pool: PoolId,
        image: ImageId,
        length: u64,
        content: Body,
    ) -> Result<ImageReport, CallError> {
        let path = format!("{}/content", image_path(pool, image));
        self.client(to)
            .upload(UPLOAD_TIME, &path, length, content)
            .await
    }

    async fn image(
        &self,
        to: HostAddress,
        pool: PoolId,
        image: ImageId,
    ) -> Result<ImageReport, CallError> {
        self.client(to).get(&image_path(pool, image)).await
    }

    async fn delete_image(
        &self,
        to: HostAddress,
        pool: PoolId,
        image: ImageId,
    ) -> Result<(), CallError> {
        self.client(to).delete(&image_path(pool, image)).await
    }

    async fn create_disk(
        &self,
        to: HostAddress,
        pool: PoolId,
        disk: DiskId,
        command: &CreateDisk,
    ) -> Result<DiskReport, CallError> {
        let path = disk_path(pool, disk);
        self.send(to, COMMAND_TIME, Method::POST, path, command)
            .await
    }

    async fn disk(
        &self,
        to: HostAddress,
        pool: PoolId,
        disk: DiskId,
    ) -> Result<DiskReport, CallError> {
        self.client(to).get(&disk_path(pool, disk)).await
    }

    async fn grow_disk(
        &self,
        to: HostAddress,
        pool: PoolId,
        disk: DiskId,
        command: &GrowDisk,
    ) -> Result<DiskReport, CallError> {
        let path = format!("{}/grow", disk_path(pool, disk));
        self.send(to, COMMAND_TIME, Method::POST, path, command)
            .await
    }

    async fn delete_disk(
        &self,
        to: HostAddress,
        pool: PoolId,
        disk: DiskId,
    ) -> Result<(), CallError> {
        self.client(to).delete(&disk_path(pool, disk)).await
    }

    async fn erase_copy(
        &self,
        to: HostAddress,
        pool: PoolId,
        disk: DiskId,
        made_for: Option<MigrationId>,
    ) -> Result<(), CallError> {
        let made_for = made_for.map_or(MADE_FOR_NONE.to_owned(), |id| id.to_string());
        let path = format!("{}?made_for={made_for}", disk_path(pool, disk));
        self.client(to).delete(&path).await
    }

    async fn take_snapshot(
        &self,
        to: HostAddress,
        vm: VmId,
        snapshot: SnapshotId,
        command: &TakeSnapshot,
    ) -> Result<SnapshotReport, CallError> {
        let path = format!("/v1/vms/{vm}/snapshots/{snapshot}");
        self.send(to, COMMAND_TIME, Method::POST, path, command)
            .await
    }

    async fn snapshot(
        &self,
        to: HostAddress,
        pool: PoolId,
        snapshot: SnapshotId,
    ) -> Result<SnapshotReport, CallError> {
        self.client(to).get(&snapshot_path(pool, snapshot)).await
    }

    async fn delete_snapshot(
        &self,
        to: HostAddress,
        pool: PoolId,
        snapshot: SnapshotId,
    ) -> Result<(), CallError> {
        self.client(to).delete(&snapshot_path(pool, snapshot)).await
    }

    async fn serial(&self, to: HostAddress, vm: VmId) -> Result<Box<dyn Duplex>, CallError> {
        let stream = self
            .client(to)
            .upgrade(&format!("/v1/vms/{vm}/serial"), SERIAL_UPGRADE)
            .await?;
        Ok(Box::new(stream))
    }
}
