//! Ways for a machine to end: stopped as asked, killed, destroyed because it belongs elsewhere, moved away; and the
//! two that it comes back from: pause and resume. And the balloon, which is one command of the same sort.

use super::Reply;
use super::driver::{Driver, FenceKept};
use super::handover::not_running;
use super::ledger::unwritable;
use crate::admission::{Admission, Stale};
use crate::process;
use crate::record::End;
use godwit_wire::host_api::{SetBalloon, StopMode, StopVm, VmCommand, VmReport};
use godwit_wire::id::{Epoch, VmId};
use godwit_wire::problem::Problem;
use godwit_wire::vmm_api::{
    BalloonRequest, Command as VmmCommand, PauseReason, StopReason, VmmInfo, VmmState,
};
use http::Method;
use serde::Serialize;
use std::time::Duration;
use tokio::time::Instant;

/// How long a VMM may take to pass the guest the wish to stop.
const ASK_TIMEOUT: Duration = Duration::from_secs(2);
/// Longest patience with a guest that was asked to stop.
const LONGEST_PATIENCE: Duration = Duration::from_secs(3600);

/// A guest that was asked to stop.
#[derive(Debug)]
pub(super) struct Stopping {
    deadline: Instant,
    waiting: Vec<Reply<VmReport>>,
}

impl Stopping {
    pub(super) fn deadline(&self) -> Instant {
        self.deadline
    }

    pub(super) fn is_over(&self) -> bool {
        Instant::now() >= self.deadline
    }
}

impl Driver {
    /// `POST /v1/vms/{vm}/stop`; answers when the VM has stopped.
    pub(super) async fn stop(&mut self, ask: StopVm, reply: Reply<VmReport>) {
        match self.admit_here(ask.epoch, ask.generation) {
            Err(problem) => return drop(reply.send(Err(problem))),
            Ok(Admission::Repeat) => {
                return match self.live_mut().and_then(|live| live.stopping.as_mut()) {
                    Some(stopping) => stopping.waiting.push(reply),
                    None => drop(reply.send(self.repeat(ask.epoch, ask.generation))),
                };
            }
            Ok(Admission::New) => {}
        }
        if let Err(problem) = self.nothing_moves() {
            return drop(reply.send(self.refuse(ask.epoch, ask.generation, problem)));
        }
        let Some(live) = self.live_mut() else {
            return drop(reply.send(self.answer()));
        };
        let mut stopping = live.stopping.take().unwrap_or_else(|| Stopping {
            deadline: Instant::now(),
            waiting: Vec::new(),
        });
        stopping.waiting.push(reply);
        let halted = matches!(live.state, VmmState::Stopped { .. });
        match ask.mode {
            StopMode::Graceful { timeout_ms } if !halted => {
                stopping.deadline =
                    Instant::now() + Duration::from_millis(timeout_ms).min(LONGEST_PATIENCE);
                live.stopping = Some(stopping);
                live.observer.command_sent();
                live.observer.hurry();
                let vmm = live.vmm.clone();
                let command = VmmCommand { epoch: ask.epoch };
                let asked =
                    vmm.request_within(ASK_TIMEOUT, Method::POST, "/v1/stop", Some(&command));
                if let Err(problem) = self.vmm_answer::<VmmInfo>(asked).await {
                    tracing::warn!(vm = %self.vm, %problem, "the guest could not be asked to stop; it will be killed");
                }
            }
            StopMode::Graceful { .. } | StopMode::Kill => {
                live.stopping = Some(stopping);
                self.finish_stop().await;
            }
        }
    }

    /// The guest has stopped, or shall not be waited for.
    pub(super) async fn finish_stop(&mut self) {
        let Some(live) = self.live_mut() else { return };
        let Some(stopping) = live.stopping.take() else {
            return;
        };
        let reason = match &live.state {
            VmmState::Stopped { reason } => reason.clone(),
            _ => StopReason::Killed,
        };
        match self.end_process().await {
            Ok(()) => self.stopped(reason, stopping).await,
            Err(problem) => {
                for reply in stopping.waiting {
                    drop(reply.send(Err(problem.clone())));
                }
            }
        }
    }

    pub(super) async fn kill_after_patience(&mut self) {
        tracing::warn!(vm = %self.vm, "the guest did not stop in time; killing it");
        self.finish_stop().await;
    }

    /// The machine is no more, as asked.
    pub(super) async fn stopped(&mut self, reason: StopReason, stopping: Stopping) {
        self.record_end(End::Stopped { reason });
        for reply in stopping.waiting {
            drop(reply.send(self.answer()));
        }
    }

    /// `POST /v1/vms/{vm}/pause`.
    pub(super) async fn pause(&mut self, ask: VmCommand) -> Result<VmReport, Problem> {
        self.command_vmm(ask, "/v1/pause").await
    }

    /// `POST /v1/vms/{vm}/resume`.
    pub(super) async fn resume(&mut self, ask: VmCommand) -> Result<VmReport, Problem> {
        self.command_vmm(ask, "/v1/resume").await
    }

    /// `POST /v1/vms/{vm}/balloon`.
    pub(super) async fn balloon(&mut self, ask: SetBalloon) -> Result<VmReport, Problem> {
        if self.admit_here(ask.epoch, ask.generation)? == Admission::Repeat {
            return self.repeat(ask.epoch, ask.generation);
        }
        let request = BalloonRequest {
            epoch: ask.epoch,
            keep_mib: ask.keep_mib,
        };
        let asked = match self.nothing_moves() {
            Ok(()) => self.post_to_vmm("/v1/balloon", &request).await,
            Err(problem) => Err(problem),
        };
        match asked {
            Ok(()) => self.answer(),
            Err(problem) => self.refuse(ask.epoch, ask.generation, problem),
        }
    }

    async fn command_vmm(&mut self, ask: VmCommand, path: &str) -> Result<VmReport, Problem> {
        if self.admit_here(ask.epoch, ask.generation)? == Admission::Repeat {
            return self.repeat(ask.epoch, ask.generation);
        }
        let commanded = match self.nothing_moves() {
            Ok(()) => self.post_command(ask.epoch, path).await,
            Err(problem) => Err(problem),
        };
        match commanded {
            Ok(()) => self.answer(),
            Err(problem) => self.refuse(ask.epoch, ask.generation, problem),
        }
    }

    pub(super) async fn post_command(&mut self, epoch: Epoch, path: &str) -> Result<(), Problem> {
        self.post_to_vmm(path, &VmmCommand { epoch }).await
    }

    async fn post_to_vmm(
        &mut self,
        path: &str,
        body: &(impl Serialize + Sync),
    ) -> Result<(), Problem> {
        let live = self.live().ok_or_else(|| not_running(self.vm))?;
        live.observer.command_sent();
        let vmm = live.vmm.clone();
        let info: VmmInfo = self.vmm_answer(vmm.post(path, body)).await?;
        if let Some(live) = self.live_mut() {
            // Should a look have begun while the VMM was obeying, it may have seen either state.
            live.observer.command_sent();
            live.state = info.state;
        }
        Ok(())
    }

    /// The server's order, given together with a renewed lease.
    pub(super) async fn resume_after_lease(&mut self, epoch: Epoch) {
        let Some(holding) = &self.holding else { return };
        let here = holding.record.epoch;
        let expired = VmmState::Paused {
            reason: PauseReason::LeaseExpired,
        };
        let waits = holding
            .live
            .as_ref()
            .is_some_and(|live| live.state == expired);
        if here != epoch || holding.handover.is_some() || !waits {
            tracing::debug!(vm = %self.vm, %epoch, %here, "an order to resume does not apply");
            return;
        }
        match self.post_command(epoch, "/v1/resume").await {
            Ok(()) => {
                tracing::info!(vm = %self.vm, %epoch, "the VM runs again: the lease is renewed")
            }
            Err(problem) => {
                tracing::warn!(vm = %self.vm, %epoch, %problem, "the VM could not be resumed")
            }
        }
    }

    /// `DELETE /v1/vms/{vm}`, and the server's order: kill what has at most this epoch.
    pub(super) async fn destroy(&mut self, epoch: Epoch) -> Result<(), Problem> {
        self.destructions += 1;
        match &self.holding {
            Some(holding) if epoch < holding.record.epoch => {
                return Err(Stale::Epoch {
                    given: epoch,
                    known: holding.record.epoch,
                }
                .problem(self.vm));
            }
            Some(holding) => {
                tracing::info!(vm = %self.vm, %epoch, here = %holding.record.epoch, "destroying the VM")
            }
            None if epoch < self.fence.epoch && self.fence_kept == FenceKept::OnDisk => {
                return Ok(());
            }
            None => {}
        }
        self.fence.close(epoch);
        self.context.kept.forget_before(self.vm, epoch);
        self.leave().await?;
        self.context.board.retract(self.vm);
        match self.fence_kept {
            FenceKept::OnDisk => Ok(()),
            // Nothing runs; but the order is fulfilled only when the next agent would refuse late starts as well.
            FenceKept::InMemory => Err(Problem::internal(format!(
                "the fence of VM {} could not be written down",
                self.vm
            ))
            .with_remedy("make room on the agent's state directory, and check its permissions")),
        }
    }

    /// Refuses what an order to destroy that waits behind it would end at once.
    pub(super) fn not_doomed(&self, epoch: Epoch) -> Result<(), Problem> {
        let doom = *self.doom.borrow();
        if doom.orders > self.destructions && doom.epoch >= epoch {
            return Err(being_destroyed(self.vm));
        }
        Ok(())
    }

    /// The VM leaves this host for good: its end is told until the server has heard it.
    pub(super) async fn depart(&mut self, reason: StopReason) -> Option<VmReport> {
        let mut report = self.report()?;
        if reason == StopReason::MigratedAway {
            self.fence.close(report.epoch);
        }
        if let Err(problem) = self.leave().await {
            tracing::error!(vm = %self.vm, %problem, "the VM could not be removed; trying again");
            if let Some(handover) = self.handover_mut() {
                handover.look_later();
            }
            return None;
        }
        report.state = Some(VmmState::Stopped { reason });
        self.context.board.bid_farewell(report.clone());
        Some(report)
    }

    /// Kills what is here and forgets it, except for the fence, which is written first.
    pub(super) async fn leave(&mut self) -> Result<(), Problem> {
        self.fence_kept = FenceKept::OnDisk;
        if let Err(error) = self.context.state.write_fence(self.vm, &self.fence) {
            // The process must go all the same; late commands are still refused as long as this agent lives.
            self.fence_kept = FenceKept::InMemory;
            tracing::error!(vm = %self.vm, %error, source = %error.source, "the fence could not be written down");
        }
        self.end_process().await?;
        self.context.networks.detach(self.vm);
        if let Err(error) = self.directory.remove() {
            // Nothing runs in it; a successor finds a VM without a process, and the server has it removed again.
            tracing::error!(vm = %self.vm, %error, source = %error.source, "the VM's directory could not be removed");
        }
        self.holding = None;
        Ok(())
    }

    /// Kills the VMM process and any other that was started for this VM; returns when no guest code can run in them
    /// any more, which does not wait for the kernel to give back their memory.
    pub(super) async fn end_process(&mut self) -> Result<(), Problem> {
        let unkillable = |vm, error: std::io::Error| {
            Problem::internal(format!(
                "the VMM process of VM {vm} could not be ended: {error}"
            ))
        };
        if let Some(live) = self.live() {
            let process = live.process.clone();
            process
                .kill_guest()
                .await
                .map_err(|error| unkillable(self.vm, error))?;
            let (vm, ending) = (self.vm, process.clone());
            tokio::spawn(async move {
                if let Err(error) = ending.until_gone().await {
                    tracing::error!(%vm, %error, "a killed VMM still holds its memory");
                }
            });
            self.former = Some(process);
        }
        process::kill_strays(&self.directory)
            .await
            .map_err(|error| unkillable(self.vm, error))?;
        if let Some(holding) = &mut self.holding
            && let Some(live) = holding.live.take()
            && let Some(stopping) = live.stopping
        {
            let gone =
                Problem::conflict("destroyed", format!("VM {} was killed meanwhile", self.vm));
            for reply in stopping.waiting {
                drop(reply.send(Err(gone.clone())));
            }
        }
        Ok(())
    }

    /// A new VMM needs the memory of the one before it. Not waited for if the VM must go.
    pub(super) async fn wait_for_former(&mut self, epoch: Epoch) -> Result<(), Problem> {
        let Some(former) = self.former.take() else {
            return Ok(());
        };
        let carried_out = self.destructions;
        let mut doom = self.doom.clone();
        let gone = tokio::select! {
            biased;
            Ok(_) = doom.wait_for(|doom| doom.orders > carried_out && doom.epoch >= epoch) => {
                Err(being_destroyed(self.vm))
            }
            gone = former.until_gone() => gone.map(drop).map_err(|error| Problem::internal(error.to_string())),
        };
        if gone.is_err() {
            self.former = Some(former);
        }
        gone
    }

    /// The agent ends and takes its VMMs along; the record stays, so that a successor reports the VM as gone.
    pub(super) async fn kill_process(&mut self) -> Result<(), Problem> {
        self.end_process().await?;
        if let Some(former) = self.former.take() {
            former
                .until_gone()
                .await
                .map_err(|error| Problem::internal(error.to_string()))?;
        }
        self.directory
            .remove_sockets()
            .map_err(|error| unwritable(&error))
    }
}

pub(super) fn being_destroyed(vm: VmId) -> Problem {
    Problem::conflict("destroyed", format!("VM {vm} is being destroyed"))
}
