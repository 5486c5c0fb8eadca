//! Commands to simulated hosts.

use super::SimHosts;
use super::crash::Life;
use super::host::SimHost;
use crate::drive::host_driver::{Duplex, HostAddress, HostDriver};
use async_trait::async_trait;
use godwit_channel::CallError;
use godwit_wire::host_api::{
    CancelMigration, PrepareIncoming, StartOutgoing, StartVm, StopVm, VmCommand, VmReport,
};
use godwit_wire::id::{Epoch, VmId};
use godwit_wire::problem::Problem;
use godwit_wire::vmm_api::IncomingReady;
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
        tokio::time::sleep(LATENCY).await;
        self.alive().await;
        let silent = |kind| CallError::Unanswered {
            peer: host.name().into(),
            request: what.into(),
            source: std::io::Error::from(kind),
        };
        let answers = async {
            host.answering().await;
            act(host.clone())
        };
        let Ok(answer) = tokio::time::timeout(TIMEOUT, answers).await else {
            return Err(silent(std::io::ErrorKind::TimedOut));
        };
        tokio::time::sleep(LATENCY).await;
        self.alive().await;
        if !host.is_linked() {
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

    async fn cancel_migration(
        &self,
        to: HostAddress,
        vm: VmId,
        command: &CancelMigration,
    ) -> Result<VmReport, CallError> {
        self.call(to, "cancel", |host| host.cancel_migration(vm, command))
            .await
    }

    async fn destroy(&self, to: HostAddress, vm: VmId, epoch: Epoch) -> Result<(), CallError> {
        self.call(to, "destroy", |host| host.destroy(vm, epoch))
            .await
    }

    async fn serial(&self, to: HostAddress, vm: VmId) -> Result<Box<dyn Duplex>, CallError> {
        self.call(to, "serial", |host| host.serial(vm)).await
    }
}
