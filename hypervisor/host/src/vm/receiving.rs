//! The target's side of a migration.

use super::driver::{Driver, News};
use super::handover::{Handover, OBEY_TIMEOUT, Warm, pauses};
use super::ledger::WriteRecord;
use crate::backoff::random;
use crate::handover::{TargetStep, Verdict};
use crate::record::{End, Purpose, VmDirectory};
use godwit_wire::host_api::{CommitReply, CommitRequest};
use godwit_wire::id::{Epoch, MigrationId};
use godwit_wire::migration::{MigrationPhase, MigrationRole, MigrationStatus};
use godwit_wire::problem::Problem;
use godwit_wire::vmm_api::{MigrationCommand, StopReason, VmmState};
use http::Method;
use tokio_util::task::AbortOnDropHandle;

impl Driver {
    /// Whether the store was asked for the commit of an incoming migration.
    pub(super) fn asked_the_store(&self) -> bool {
        let handover = self.handover();
        handover.is_some_and(Handover::is_decided_by_store)
    }

    /// Goes on receiving what a former agent began to receive.
    pub(super) fn resume_receiving(
        &mut self,
        migration: MigrationId,
        status: Option<MigrationStatus>,
    ) {
        let Some(holding) = &mut self.holding else {
            return;
        };
        let (epoch, purpose) = (holding.record.epoch, holding.record.purpose);
        holding.migration = status;
        tracing::info!(vm = %self.vm, %migration, ?purpose, "going on with an incoming migration");
        self.watch_handover(migration, MigrationRole::Target, epoch, None);
        let granted = matches!(purpose, Purpose::Granted { .. });
        if let Some(handover) = self.handover_mut()
            && granted
        {
            handover.verdict = Verdict::Given(CommitReply::Granted { epoch });
        }
    }

    /// Asks the store something harmless, so that the commit finds an open connection.
    pub(super) fn warm_up(&mut self) {
        let request = self.resolve_request();
        let control = self.context.control.clone();
        let Some(handover) = self.handover_mut() else {
            return;
        };
        if handover.warm == Warm::Asked {
            return;
        }
        handover.warm = Warm::Asked;
        let (migration, news) = (handover.migration, self.news.clone());
        let Some(request) = request else { return };
        tokio::spawn(async move {
            if let Ok(resolution) = control.resolve(migration, &request).await {
                // Should the migration be void already, there is no point in going on.
                let _ = news.send(News::Resolution(resolution)).await;
            }
        });
    }

    pub(super) async fn verdict_given(&mut self, reply: CommitReply) {
        let vm = self.vm;
        let Some(handover) = self.handover_mut() else {
            return;
        };
        tracing::info!(%vm, migration = %handover.migration, ?reply, "the store has decided");
        handover.courier = None;
        handover.verdict = Verdict::Given(reply);
        handover.pauses.reset();
        self.advance_handover().await;
    }

    pub(super) async fn take_target_step(&mut self, step: TargetStep) {
        match step {
            TargetStep::Wait => {}
            TargetStep::AskStore => self.ask_for_commit(),
            TargetStep::TellVmm { epoch } => self.run_here(epoch).await,
            TargetStep::Own { epoch } => self.own(epoch),
            TargetStep::Destroy { reason } => {
                tracing::info!(vm = %self.vm, reason, "an incoming VM is destroyed");
                self.depart(StopReason::IncomingAborted).await;
            }
            TargetStep::Lose { epoch } => {
                self.own(epoch);
                self.record_end(End::Lost);
            }
        }
    }

    pub(super) fn ask_for_commit(&mut self) {
        let control = self.context.control.clone();
        let host = self.context.host;
        let (vm, news) = (self.vm, self.news.clone());
        let Some(handover) = self.handover_mut() else {
            return;
        };
        handover.verdict = Verdict::Asked;
        if handover.courier.is_some() {
            return;
        }
        let migration = handover.migration;
        let request = CommitRequest {
            vm,
            host,
            epoch: handover.source_epoch,
        };
        handover.courier = Some(AbortOnDropHandle::new(tokio::spawn(async move {
            let mut retry = pauses();
            loop {
                match control.commit(migration, &request).await {
                    Ok(reply) => return drop(news.send(News::Verdict(reply)).await),
                    Err(error) if retry.failures() == 0 => {
                        tracing::warn!(%vm, %migration, %error, "the store gives no answer on the commit; asking on");
                    }
                    Err(_) => {}
                }
                tokio::time::sleep(retry.next(random())).await;
            }
        })));
    }

    /// The store has given the VM to this host: written down first, then the VMM is told.
    pub(super) async fn run_here(&mut self, epoch: Epoch) {
        let Some(handover) = self.handover_mut() else {
            return;
        };
        let migration = handover.migration;
        // The guest stands still: the disk is not waited for until it runs.
        let purpose = Purpose::Granted { migration };
        let written = self.take_ownership(epoch, purpose, VmDirectory::write_record_swiftly);
        if let Err(problem) = written {
            tracing::error!(vm = %self.vm, %migration, %problem, "the commit could not be written down; trying again");
            return self.look_again_later();
        }
        let Some(live) = self.live() else { return };
        live.observer.command_sent();
        let vmm = live.vmm.clone();
        let command = MigrationCommand { migration, epoch };
        let told = vmm.request_within(
            OBEY_TIMEOUT,
            Method::POST,
            "/v1/migration/commit",
            Some(&command),
        );
        match self.vmm_answer::<MigrationStatus>(told).await {
            Ok(status)
                if matches!(
                    status.phase,
                    MigrationPhase::Completed | MigrationPhase::PostCopy
                ) =>
            {
                if let Some(holding) = &mut self.holding {
                    holding.migration = Some(status);
                }
                self.own(epoch);
            }
            Ok(_) => self.look_again_later(),
            Err(problem) => {
                tracing::warn!(vm = %self.vm, %migration, %problem, "the VMM did not run the VM; telling it again");
                self.look_again_later();
            }
        }
    }

    pub(super) fn take_ownership(
        &mut self,
        epoch: Epoch,
        purpose: Purpose,
        write: WriteRecord,
    ) -> Result<(), Problem> {
        let mut fence = self.fence;
        fence.raise(epoch);
        let settled = self
            .holding
            .as_ref()
            .is_some_and(|h| (h.record.epoch, h.record.purpose) == (epoch, purpose));
        if !settled {
            self.change_record_by(write, |record| {
                record.epoch = epoch;
                record.purpose = purpose;
                record.fence = fence;
            })?;
        }
        self.fence = fence;
        Ok(())
    }

    /// The migration is over, and the VM is this host's.
    pub(super) fn own(&mut self, epoch: Epoch) {
        if let Err(problem) = self.take_ownership(epoch, Purpose::Owned, VmDirectory::write_record)
        {
            // The record says `Granted` under this epoch, from which a successor comes to the same end.
            tracing::error!(vm = %self.vm, %epoch, %problem, "the end of the migration could not be written down");
        }
        tracing::info!(vm = %self.vm, %epoch, "the VM is this host's");
        if let Some(holding) = &mut self.holding {
            holding.handover = None;
            if let Some(live) = &mut holding.live {
                live.state = VmmState::Running;
            }
        }
    }
}
