//! Carrying out what [`handover`](crate::handover) decides: the driver's side of a migration.
//!
//! A *watcher* brings the VMM's word, a *courier* asks the store until it answers; both belong to the [`Handover`] and
//! end with it.

use super::driver::{Driver, News};
use super::observe::watch_migration;
use crate::admission::Admission;
use crate::backoff::{Backoff, random};
use crate::handover::{SOURCE_PATIENCE, SourceStep, TargetStep, Verdict, source_step, target_step};
use crate::record::{End, Purpose};
use godwit_wire::host_api::{
    CancelMigration, CommitReply, CommitRequest, Resolution, ResolveRequest, StartOutgoing,
    VmReport,
};
use godwit_wire::id::{Epoch, MigrationId};
use godwit_wire::migration::{MigrationPhase, MigrationRole, MigrationStatus};
use godwit_wire::problem::Problem;
use godwit_wire::vmm_api::{MigrationCommand, OutgoingRequest, StopReason, VmmState};
use http::Method;
use std::time::Duration;
use tokio::sync::OwnedMutexGuard;
use tokio::time::Instant;
use tokio_util::task::AbortOnDropHandle;

/// First and longest pause between two questions to a store that does not answer, and two words to a VMM that does
/// not obey.
const FIRST_PAUSE: Duration = Duration::from_millis(50);
const LONGEST_PAUSE: Duration = Duration::from_secs(1);
/// How long a VMM may take to obey in the blackout.
const OBEY_TIMEOUT: Duration = Duration::from_secs(5);
/// How long a source VMM may take to be released before it is killed.
const RELEASE_TIMEOUT: Duration = Duration::from_secs(1);

/// A migration under way, seen from this end.
#[derive(Debug)]
pub(super) struct Handover {
    migration: MigrationId,
    role: MigrationRole,
    /// Epoch the source has.
    source_epoch: Epoch,
    verdict: Verdict,
    resolution: Option<Resolution>,
    /// Since when the VMM has been waiting for the commit.
    awaiting_since: Option<Instant>,
    look_again: Option<Instant>,
    pauses: Backoff,
    warm: Warm,
    _watcher: AbortOnDropHandle<()>,
    courier: Option<AbortOnDropHandle<()>>,
    _dirty_log: Option<OwnedMutexGuard<()>>,
}

/// Whether a connection to the server has been opened for the commit, which falls into the guest's blackout.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Warm {
    NotYet,
    Asked,
}

impl Handover {
    pub(super) fn look_again_at(&self) -> Option<Instant> {
        self.look_again
    }

    pub(super) fn look_now(&mut self) {
        self.look_again = Some(Instant::now());
    }

    pub(super) fn look_later(&mut self) {
        self.look_again = Some(Instant::now() + self.pauses.next(random()));
    }

    /// Whether only the store can decide now.
    fn is_decided_by_store(&self) -> bool {
        self.verdict != Verdict::NotAsked
    }

    fn awaiting(&self) -> Duration {
        self.awaiting_since
            .map_or(Duration::ZERO, |since| since.elapsed())
    }
}

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

    async fn begin_sending(&mut self, ask: &StartOutgoing) -> Result<(), Problem> {
        self.nothing_moves()?;
        let live = self.live().ok_or_else(|| not_running(self.vm))?;
        let dirty_log = live.observer.reserve_dirty_log().await;
        live.observer.command_sent();
        let request = OutgoingRequest {
            epoch: ask.epoch,
            migration: ask.migration,
            target: ask.target,
            policy: ask.policy.clone(),
        };
        let vmm = live.vmm.clone();
        let status: MigrationStatus = self.vmm_answer(vmm.post("/v1/outgoing", &request)).await?;
        tracing::info!(vm = %self.vm, migration = %ask.migration, target = %ask.target, "sending the VM");
        self.begin_handover(status, MigrationRole::Source, ask.epoch, Some(dirty_log));
        Ok(())
    }

    /// Refuses while a migration is under way: its outcome is not for others to decide.
    pub(super) fn nothing_moves(&self) -> Result<(), Problem> {
        match self
            .holding
            .as_ref()
            .and_then(|holding| holding.handover.as_ref())
        {
            None => Ok(()),
            Some(handover) => {
                let detail = format!(
                    "migration {} of VM {} is under way",
                    handover.migration, self.vm
                );
                Err(Problem::conflict("migration-under-way", detail)
                    .with_remedy("cancel it or wait for its end"))
            }
        }
    }

    /// Whether the store was asked for the commit of an incoming migration.
    pub(super) fn asked_the_store(&self) -> bool {
        let handover = self
            .holding
            .as_ref()
            .and_then(|holding| holding.handover.as_ref());
        handover.is_some_and(Handover::is_decided_by_store)
    }

    pub(super) fn begin_handover(
        &mut self,
        status: MigrationStatus,
        role: MigrationRole,
        source_epoch: Epoch,
        dirty_log: Option<OwnedMutexGuard<()>>,
    ) {
        let migration = status.migration;
        if let Some(holding) = &mut self.holding {
            holding.migration = Some(status);
        }
        self.watch_handover(migration, role, source_epoch, dirty_log);
    }

    fn watch_handover(
        &mut self,
        migration: MigrationId,
        role: MigrationRole,
        source_epoch: Epoch,
        dirty_log: Option<OwnedMutexGuard<()>>,
    ) {
        let news = self.news.clone();
        let Some(holding) = &mut self.holding else {
            return;
        };
        let Some(live) = &holding.live else { return };
        let watcher = watch_migration(live.vmm.clone(), news);
        holding.handover = Some(Handover {
            migration,
            role,
            source_epoch,
            verdict: Verdict::NotAsked,
            resolution: None,
            awaiting_since: None,
            look_again: None,
            pauses: Backoff::new(FIRST_PAUSE, LONGEST_PAUSE),
            warm: Warm::NotYet,
            _watcher: watcher,
            courier: None,
            _dirty_log: dirty_log,
        });
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
        if holding.handover.is_some() || status.role == MigrationRole::Target {
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
        self.begin_handover(status, MigrationRole::Source, epoch, dirty_log);
        if let Some(handover) = self
            .holding
            .as_mut()
            .and_then(|holding| holding.handover.as_mut())
        {
            // How long it has waited already is not known: long enough.
            handover.awaiting_since = Instant::now().checked_sub(SOURCE_PATIENCE);
        }
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
        if let Some(handover) = self
            .holding
            .as_mut()
            .and_then(|holding| holding.handover.as_mut())
            && granted
        {
            handover.verdict = Verdict::Given(CommitReply::Granted { epoch });
        }
    }

    pub(super) async fn migration_seen(&mut self, status: MigrationStatus) {
        let Some(holding) = &mut self.holding else {
            return;
        };
        let Some(handover) = &mut holding.handover else {
            return;
        };
        if handover.migration != status.migration {
            return;
        }
        let former = holding.migration.as_ref().map(|status| status.phase);
        if former != Some(status.phase) {
            tracing::info!(
                vm = %self.vm, migration = %status.migration, role = ?status.role, phase = ?status.phase,
                connected = status.connected, reason = status.reason, "migration"
            );
        }
        if status.phase == MigrationPhase::AwaitingCommit && handover.awaiting_since.is_none() {
            handover.awaiting_since = Some(Instant::now());
        }
        if status.phase == MigrationPhase::PreCopy && status.role == MigrationRole::Target {
            self.warm_up();
        }
        if let Some(holding) = &mut self.holding {
            holding.migration = Some(status);
        }
        self.advance_handover().await;
    }

    /// Asks the store something harmless, so that the commit finds an open connection.
    fn warm_up(&mut self) {
        let request = self.resolve_request();
        let control = self.context.control.clone();
        let Some(handover) = self
            .holding
            .as_mut()
            .and_then(|holding| holding.handover.as_mut())
        else {
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
        let Some(handover) = self
            .holding
            .as_mut()
            .and_then(|holding| holding.handover.as_mut())
        else {
            return;
        };
        tracing::info!(vm = %self.vm, migration = %handover.migration, ?reply, "the store has decided");
        handover.courier = None;
        handover.verdict = Verdict::Given(reply);
        handover.pauses.reset();
        self.advance_handover().await;
    }

    pub(super) async fn resolution_given(&mut self, resolution: Resolution) {
        let Some(handover) = self
            .holding
            .as_mut()
            .and_then(|holding| holding.handover.as_mut())
        else {
            return;
        };
        match handover.role {
            MigrationRole::Source => {
                tracing::info!(vm = %self.vm, migration = %handover.migration, ?resolution, "the store has decided");
                handover.courier = None;
                handover.resolution = Some(resolution);
            }
            MigrationRole::Target
                if resolution == Resolution::End && !handover.is_decided_by_store() =>
            {
                let reason = "the migration is void".to_owned();
                handover.verdict = Verdict::Given(CommitReply::Refused { reason });
            }
            MigrationRole::Target => {}
        }
        self.advance_handover().await;
    }

    /// Takes the next steps of a migration until it has to wait for something.
    pub(super) async fn advance_handover(&mut self) {
        let Some(holding) = &mut self.holding else {
            return;
        };
        let Some(handover) = &mut holding.handover else {
            return;
        };
        handover.look_again = None;
        let status = holding
            .migration
            .as_ref()
            .filter(|status| status.migration == handover.migration);
        let alive = holding.live.is_some();
        match handover.role {
            // A live VMM that has not said anything yet is not one that failed.
            MigrationRole::Target if alive && status.is_none() => {}
            MigrationRole::Target => {
                let step = target_step(status.filter(|_| alive), &handover.verdict);
                self.take_target_step(step).await;
            }
            MigrationRole::Source => {
                let Some(status) = status else { return };
                // Of a source that died only this is known: if it had completed, the VM runs elsewhere.
                if !alive && status.phase != MigrationPhase::Completed {
                    holding.handover = None;
                    return;
                }
                let step = source_step(status, handover.awaiting(), handover.resolution);
                self.take_source_step(step).await;
            }
        }
    }

    async fn take_target_step(&mut self, step: TargetStep) {
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

    fn ask_for_commit(&mut self) {
        let control = self.context.control.clone();
        let host = self.context.host;
        let (vm, news) = (self.vm, self.news.clone());
        let Some(handover) = self
            .holding
            .as_mut()
            .and_then(|holding| holding.handover.as_mut())
        else {
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
            let mut pauses = Backoff::new(FIRST_PAUSE, LONGEST_PAUSE);
            loop {
                match control.commit(migration, &request).await {
                    Ok(reply) => return drop(news.send(News::Verdict(reply)).await),
                    Err(error) if pauses.failures() == 0 => {
                        tracing::warn!(%vm, %migration, %error, "the store gives no answer on the commit; asking on");
                    }
                    Err(_) => {}
                }
                tokio::time::sleep(pauses.next(random())).await;
            }
        })));
    }

    /// The store has given the VM to this host: written down first, then the VMM is told.
    async fn run_here(&mut self, epoch: Epoch) {
        let Some(handover) = self
            .holding
            .as_mut()
            .and_then(|holding| holding.handover.as_mut())
        else {
            return;
        };
        let migration = handover.migration;
        if let Err(problem) = self.take_ownership(epoch, Purpose::Granted { migration }) {
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
            Ok(status) if status.phase == MigrationPhase::Completed => {
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

    fn take_ownership(&mut self, epoch: Epoch, purpose: Purpose) -> Result<(), Problem> {
        let mut fence = self.fence;
        fence.raise(epoch);
        let settled = self
            .holding
            .as_ref()
            .is_some_and(|h| (h.record.epoch, h.record.purpose) == (epoch, purpose));
        if !settled {
            self.change_record(|record| {
                record.epoch = epoch;
                record.purpose = purpose;
                record.fence = fence;
            })?;
        }
        self.fence = fence;
        Ok(())
    }

    /// The migration is over, and the VM is this host's.
    fn own(&mut self, epoch: Epoch) {
        if let Err(problem) = self.take_ownership(epoch, Purpose::Owned) {
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

    async fn take_source_step(&mut self, step: SourceStep) {
        match step {
            SourceStep::Wait => {}
            SourceStep::LookAgainIn(time) => {
                if let Some(handover) = self
                    .holding
                    .as_mut()
                    .and_then(|holding| holding.handover.as_mut())
                {
                    handover.look_again = Some(Instant::now() + time);
                }
            }
            SourceStep::AskStore => self.ask_for_resolution(),
            SourceStep::TellVmmToRun { epoch } => self.run_again(epoch).await,
            SourceStep::Release => self.release().await,
            SourceStep::Keep => self.keep(),
        }
    }

    fn resolve_request(&self) -> Option<ResolveRequest> {
        let handover = self.holding.as_ref()?.handover.as_ref()?;
        Some(ResolveRequest {
            vm: self.vm,
            host: self.context.host,
            role: handover.role,
            epoch: handover.source_epoch,
        })
    }

    fn ask_for_resolution(&mut self) {
        let Some(request) = self.resolve_request() else {
            return;
        };
        let control = self.context.control.clone();
        let (vm, news) = (self.vm, self.news.clone());
        let Some(handover) = self
            .holding
            .as_mut()
            .and_then(|holding| holding.handover.as_mut())
        else {
            return;
        };
        if handover.courier.is_some() {
            return;
        }
        let migration = handover.migration;
        handover.courier = Some(AbortOnDropHandle::new(tokio::spawn(async move {
            let mut pauses = Backoff::new(FIRST_PAUSE, LONGEST_PAUSE);
            loop {
                match control.resolve(migration, &request).await {
                    // Not for a source to hear; it asks until the store has decided.
                    Ok(Resolution::Open) => {}
                    Ok(resolution) => return drop(news.send(News::Resolution(resolution)).await),
                    Err(error) if pauses.failures() == 0 => {
                        tracing::warn!(%vm, %migration, %error, "the store does not say what became of the migration; the VM stays paused");
                    }
                    Err(_) => {}
                }
                tokio::time::sleep(pauses.next(random())).await;
            }
        })));
    }

    /// The migration is void: the VM runs again where it was.
    async fn run_again(&mut self, epoch: Epoch) {
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
    fn keep(&mut self) {
        if let Some(holding) = &mut self.holding {
            holding.handover = None;
            if let Some(live) = &holding.live {
                live.observer.look_now();
            }
        }
    }

    fn look_again_later(&mut self) {
        if let Some(handover) = self
            .holding
            .as_mut()
            .and_then(|holding| holding.handover.as_mut())
        {
            handover.look_later();
        }
    }

    /// The VM runs at the target: the source ends.
    async fn release(&mut self) {
        let Some(holding) = &self.holding else { return };
        let Some(handover) = &holding.handover else {
            return;
        };
        let migration = handover.migration;
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
                    if let Some(holding) = &mut self.holding {
                        holding.migration = Some(status);
                    }
                }
                Err(problem) => {
                    tracing::debug!(vm = %self.vm, %migration, %problem, "the source was not released; killing it")
                }
            }
        }
        tracing::info!(vm = %self.vm, %migration, "the VM has moved away");
        self.depart(StopReason::MigratedAway).await;
    }

    /// `POST /v1/vms/{vm}/migration/cancel`.
    pub(super) async fn cancel(&mut self, ask: CancelMigration) -> Result<VmReport, Problem> {
        self.present_under(ask.epoch)?;
        let holding = self
            .holding
            .as_ref()
            .ok_or_else(|| Problem::not_found("VM", self.vm))?;
        let Some(handover) = holding
            .handover
            .as_ref()
            .filter(|handover| handover.migration == ask.migration)
        else {
            let known = holding
                .migration
                .as_ref()
                .is_some_and(|status| status.migration == ask.migration);
            return if known {
                self.answer()
            } else {
                Err(Problem::not_found("migration", ask.migration))
            };
        };
        match handover.role {
            MigrationRole::Target if handover.is_decided_by_store() => {
                let detail = format!(
                    "the commit of migration {} has been asked for; the store decides",
                    ask.migration
                );
                Err(Problem::conflict("too-late", detail))
            }
            MigrationRole::Target => {
                tracing::info!(vm = %self.vm, migration = %ask.migration, "an incoming migration is called off");
                self.depart(StopReason::IncomingAborted)
                    .await
                    .ok_or_else(|| Problem::not_found("VM", self.vm))
            }
            MigrationRole::Source => {
                let Some(live) = &holding.live else {
                    return Err(not_running(self.vm));
                };
                live.observer.command_sent();
                let vmm = live.vmm.clone();
                let command = MigrationCommand {
                    migration: ask.migration,
                    epoch: ask.epoch,
                };
                let status: MigrationStatus = self
                    .vmm_answer(vmm.post("/v1/migration/cancel", &command))
                    .await?;
                self.migration_seen(status).await;
                self.answer()
            }
        }
    }
}

pub(super) fn not_running(vm: godwit_wire::id::VmId) -> Problem {
    Problem::conflict("not-running", format!("the machine of VM {vm} is no more"))
        .with_remedy("start the VM first")
}
