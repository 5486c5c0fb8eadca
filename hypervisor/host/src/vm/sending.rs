//! The source's side of a migration.

use super::driver::{Driver, News};
use super::handover::{OBEY_TIMEOUT, not_running, pauses};
use crate::admission::Admission;
use crate::backoff::random;
use crate::handover::{SourceStep, source_patience};
use crate::kept::Kept;
use godwit_wire::host_api::{Resolution, StartOutgoing, VmReport};
use godwit_wire::id::Epoch;
use godwit_wire::migration::{MigrationPhase, MigrationRole, MigrationStatus};
use godwit_wire::problem::Problem;
use godwit_wire::vmm_api::{MigrationBandwidth, MigrationCommand, OutgoingRequest, StopReason};
use http::Method;
use std::time::Duration;
use tokio::time::Instant;
use tokio_util::task::AbortOnDropHandle;

/// How long a source VMM may take to answer that it is released.
const RELEASE_TIMEOUT: Duration = Duration::from_secs(1);
/// How long it may take to answer that it goes at another pace: what it says meanwhile waits, and it is told again.
const PACE_TIMEOUT: Duration = Duration::from_secs(1);

impl Driver {
    /// `POST /v1/vms/{vm}/outgoing`.
    pub(super) async fn send(&mut self, ask: StartOutgoing) -> Result<VmReport, Problem> {
        if self.admit_here(ask.epoch, ask.generation)? == Admission::Repeat {
            return self.repeat(ask.epoch, ask.generation);
        }
        match self.begin_sending(&ask).await {
            Ok(()) => self.answer(),
            Err(problem) => self.refuse(ask.epoch, ask.generation, problem),
        }
    }

    pub(super) async fn begin_sending(&mut self, ask: &StartOutgoing) -> Result<(), Problem> {
        self.nothing_moves()?;
        let live = self.live().ok_or_else(|| not_running(self.vm))?;
        let dirty_log = live.observer.reserve_dirty_log().await;
        live.observer.command_sent();
        let request = OutgoingRequest {
            epoch: ask.epoch,
            migration: ask.migration,
            target: ask.target,
            token: ask.token.clone(),
            policy: ask.policy.clone(),
            fixed_cost_us: ask.fixed_cost_us,
            leaving_disks: ask.leaving_disks.clone(),
            identity: ask.identity.clone(),
        };
        let vmm = live.vmm.clone();
        let status: MigrationStatus = self.vmm_answer(vmm.post("/v1/outgoing", &request)).await?;
        tracing::info!(vm = %self.vm, migration = %ask.migration, target = %ask.target, "sending the VM");
        self.begin_handover(status, MigrationRole::Source, ask.epoch, Some(dirty_log));
        Ok(())
    }

    /// `POST /v1/vms/{vm}/migration/bandwidth`. It decides nothing, so it may be repeated and may come late.
    pub(super) async fn set_bandwidth(
        &mut self,
        ask: MigrationBandwidth,
    ) -> Result<VmReport, Problem> {
        self.present_under(ask.epoch)?;
        let holding = self
            .holding
            .as_ref()
            .ok_or_else(|| Problem::not_found("VM", self.vm))?;
        let sends = holding.handover.as_ref().is_some_and(|handover| {
            handover.migration == ask.migration && handover.role == MigrationRole::Source
        });
        if !sends {
            return Err(Problem::not_found("migration", ask.migration));
        }
        let live = holding.live.as_ref().ok_or_else(|| not_running(self.vm))?;
        let vmm = live.vmm.clone();
        let told = vmm.request_within(
            PACE_TIMEOUT,
            Method::POST,
            "/v1/migration/bandwidth",
            Some(&ask),
        );
        self.vmm_answer::<MigrationStatus>(told).await?;
        tracing::debug!(vm = %self.vm, migration = %ask.migration, max_bytes_per_s = ?ask.max_bytes_per_s, "the VM is sent at another pace");
        self.answer()
    }

    /// A VMM says that it is sending, and this driver does not know: a former agent began it.
    pub(super) fn adopt_handover(&mut self, status: MigrationStatus) {
        let Some(holding) = &mut self.holding else {
            return;
        };
        let over = matches!(
            status.phase,
            MigrationPhase::Failed | MigrationPhase::Cancelled
        );
        if holding.handover.is_some() {
            return;
        }
        if status.role == MigrationRole::Target {
            // The VM is owned here by now, and its memory may still be arriving.
            holding.migration = Some(status);
            return;
        }
        holding.migration = Some(status.clone());
        if over {
            return;
        }
        let epoch = holding.record.epoch;
        let dirty_log = holding
            .live
            .as_ref()
            .and_then(|live| live.observer.try_reserve_dirty_log());
        tracing::info!(vm = %self.vm, migration = %status.migration, phase = ?status.phase, "going on with a migration");
        let awaits = status.phase == MigrationPhase::AwaitingCommit;
        let patience = source_patience(&status);
        self.begin_handover(status, MigrationRole::Source, epoch, dirty_log);
        if let Some(handover) = self.handover_mut().filter(|_| awaits) {
            // How long it has waited already is not known: long enough.
            handover.awaiting_since = Instant::now().checked_sub(patience);
        }
    }

    pub(super) async fn take_source_step(&mut self, step: SourceStep) {
        match step {
            SourceStep::Wait => {}
            SourceStep::LookAgainIn(time) => {
                if let Some(handover) = self.handover_mut() {
                    handover.look_again = Some(Instant::now() + time);
                }
            }
            SourceStep::AskStore => self.ask_for_resolution(),
            SourceStep::TellVmmToRun { epoch } => self.run_again(epoch).await,
            SourceStep::Release => self.release().await,
            SourceStep::Keep => self.keep(),
        }
    }

    pub(super) fn ask_for_resolution(&mut self) {
        let Some(request) = self.resolve_request() else {
            return;
        };
        let control = self.context.control.clone();
        let (vm, news) = (self.vm, self.news.clone());
        let Some(handover) = self.handover_mut() else {
            return;
        };
        if handover.courier.is_some() {
            return;
        }
        let migration = handover.migration;
        handover.courier = Some(AbortOnDropHandle::new(tokio::spawn(async move {
            let mut retry = pauses();
            loop {
                match control.resolve(migration, &request).await {
                    // Not for a source to hear; it asks until the store has decided.
                    Ok(Resolution::Open) => {}
                    Ok(resolution) => return drop(news.send(News::Resolution(resolution)).await),
                    Err(error) if retry.failures() == 0 => {
                        tracing::warn!(%vm, %migration, %error, "the store does not say what became of the migration; the VM stays paused");
                    }
                    Err(_) => {}
                }
                tokio::time::sleep(retry.next(random())).await;
            }
        })));
    }

    /// The migration is void: the VM runs again where it was.
    pub(super) async fn run_again(&mut self, epoch: Epoch) {
        let Some(holding) = &self.holding else { return };
        let Some(handover) = &holding.handover else {
            return;
        };
        if epoch != holding.record.epoch {
            tracing::error!(vm = %self.vm, %epoch, here = %holding.record.epoch, "the store names another epoch to run under");
        }
        let migration = handover.migration;
        let Some(live) = &holding.live else { return };
        live.observer.command_sent();
        let vmm = live.vmm.clone();
        let command = MigrationCommand {
            migration,
            epoch: holding.record.epoch,
        };
        let told = vmm.request_within(
            OBEY_TIMEOUT,
            Method::POST,
            "/v1/migration/abort",
            Some(&command),
        );
        match self.vmm_answer::<MigrationStatus>(told).await {
            Ok(status) => {
                let over = matches!(
                    status.phase,
                    MigrationPhase::Failed | MigrationPhase::Cancelled
                );
                if let Some(holding) = &mut self.holding {
                    holding.migration = Some(status);
                }
                if over {
                    self.keep();
                } else {
                    self.look_again_later();
                }
            }
            Err(problem) => {
                tracing::warn!(vm = %self.vm, %migration, %problem, "the VMM did not run the VM again; telling it again");
                self.look_again_later();
            }
        }
    }

    /// The migration ended before its commit: the VM runs here as before.
    pub(super) fn keep(&mut self) {
        if let Some(holding) = &mut self.holding {
            holding.handover = None;
            if let Some(live) = &holding.live {
                live.observer.command_sent();
                live.observer.look_now();
            }
        }
    }

    /// The VM runs at the target: the source ends.
    pub(super) async fn release(&mut self) {
        let Some(holding) = &self.holding else { return };
        let Some(handover) = &holding.handover else {
            return;
        };
        let migration = handover.migration;
        let last = holding.migration.as_ref().map(|status| status.phase);
        let mut kept = None;
        if let Some(live) = &holding.live {
            let vmm = live.vmm.clone();
            let command = MigrationCommand {
                migration,
                epoch: holding.record.epoch,
            };
            let told = vmm.request_within(
                RELEASE_TIMEOUT,
                Method::POST,
                "/v1/migration/release",
                Some(&command),
            );
            match self.vmm_answer::<MigrationStatus>(told).await {
                Ok(status) => {
                    let phase = status.phase;
                    if let Some(holding) = &mut self.holding {
                        holding.migration = Some(status);
                    }
                    if phase == MigrationPhase::Completed {
                        kept = self.memory_left();
                    }
                    if phase == MigrationPhase::PostCopy {
                        tracing::info!(vm = %self.vm, %migration, "the VM has moved away ahead of its memory, which is kept until all of it has followed");
                        return;
                    }
                }
                // It was done, or the guest runs in it although the VM is another's.
                Err(problem) if last.is_some_and(MigrationPhase::is_final) => {
                    tracing::debug!(vm = %self.vm, %migration, %problem, "the source was not released; killing it")
                }
                // It does not run the guest by itself any more, and the VM may have gone ahead of memory that only it
                // has. If it has none, the server has it destroyed.
                Err(problem) => {
                    tracing::warn!(vm = %self.vm, %migration, %problem, "the source was not released, and the VM may still need its memory: it is not killed");
                    return self.look_again_later();
                }
            }
        }
        tracing::info!(vm = %self.vm, %migration, "the VM has moved away");
        let departed = self.depart(StopReason::MigratedAway).await.is_some();
        match (kept, departed) {
            (Some(kept), true) => self.context.kept.keep(self.vm, kept),
            // It is tried again.
            (Some(kept), false) => {
                if let Some(handover) = self.handover_mut() {
                    handover.memory = Some(kept.into_memory());
                }
            }
            (None, _) => {}
        }
    }

    /// The memory that the VM leaves behind, if it shall be kept.
    fn memory_left(&mut self) -> Option<Kept> {
        let holding = self.holding.as_mut()?;
        let (former, record) = (holding.live.as_ref()?.process.clone(), &holding.record);
        let memory = holding.handover.as_mut()?.memory.take()?;
        Some(Kept::new(memory, record.epoch, &record.spec, former))
    }
}
