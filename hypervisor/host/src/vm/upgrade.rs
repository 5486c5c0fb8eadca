//! A new program under a running machine: a second VMM is started beside the first, takes the machine over with its
//! memory as it is, and the first one ends. The store has no part in it: the VM stays this host's, under its epoch.
//!
//! ```text
//! [record: a succession begins] ─▶ start, offer, prepare ─▶ take: the guest stands still
//!      │ failed                         │ failed               │ failed      │ whole
//!      ▼                                ▼                      ▼             ▼
//!   as before              second VMM killed, first one goes on    [record: the second is the VM's] ─▶ it runs
//!                                                                            │
//!                                             [record: nothing is open] ◀─ first one killed
//! ```
//!
//! In brackets: written down. An agent that dies on the way leaves a record from which
//! [`settle_succession`](Driver::settle_succession) goes on.

use super::driver::{Driver, Live};
use super::handover::{OBEY_TIMEOUT, not_running};
use super::ledger::unwritable;
use super::start::BUILD_TIMEOUT;
use crate::process::{self, VmmProcess};
use crate::procfs;
use crate::record::{Purpose, Seat, VmDirectory};
use crate::succession::{Settlement, settlement};
use godwit_channel::uds::UdsClient;
use godwit_wire::host_api::{UpgradeOutcome, UpgradeVm, UpgradedVm};
use godwit_wire::id::{Epoch, SuccessionId};
use godwit_wire::problem::Problem;
use godwit_wire::succession::{
    OfferSuccession, PrepareSuccession, SuccessionCommand, SuccessionPhase, SuccessionStatus,
};
use godwit_wire::vmm_api::{VmmInfo, VmmState};
use http::Method;
use std::time::Duration;

/// How long the guest may stand still until its new VMM has everything; the old one goes on after that.
const TAKE_TIMEOUT: Duration = Duration::from_secs(15);
/// How often a VMM that has the machine is told to run it before the next look at it does that.
const COMMIT_ATTEMPTS: u32 = 3;
/// How long a killed VMM is waited for until it has let go of what a host gives only once. It holds no memory alone.
const LET_GO_TIME: Duration = Duration::from_secs(2);

/// A second VMM for the machine.
struct Successor {
    process: VmmProcess,
    vmm: UdsClient,
    seat: Seat,
}

impl Driver {
    /// `POST /v1/vms/{vm}/upgrade`.
    pub(super) async fn upgrade(&mut self, ask: UpgradeVm) -> Result<UpgradedVm, Problem> {
        self.not_doomed(ask.epoch)?;
        self.present_under(ask.epoch)?;
        self.nothing_moves()?;
        let live = self.live().ok_or_else(|| not_running(self.vm))?;
        if live.stopping.is_some() {
            let detail = format!("VM {} is stopping", self.vm);
            return Err(Problem::conflict("stopping", detail));
        }
        if let Some(upgraded) = self.upgraded_already(ask.succession).await? {
            return Ok(upgraded);
        }
        let live = self.live().ok_or_else(|| not_running(self.vm))?;
        let _dirty_log = live.observer.reserve_dirty_log().await;
        let status = self.change_vmm(ask).await.inspect_err(|problem| {
            tracing::warn!(vm = %self.vm, %problem, "the VM stays in its VMM");
        })?;
        let pid = self.live().map_or(0, |live| live.process.id().pid);
        tracing::info!(vm = %self.vm, pid, blackout = ?status.blackout, "the VM runs in a new VMM");
        Ok(UpgradedVm {
            outcome: UpgradeOutcome::Upgraded,
            pid: pid.unsigned_abs(),
            blackout: status.blackout,
        })
    }

    /// Whether the machine runs in a VMM of this program; perhaps this very command has brought it there.
    async fn upgraded_already(
        &mut self,
        asked: SuccessionId,
    ) -> Result<Option<UpgradedVm>, Problem> {
        let live = self.live().ok_or_else(|| not_running(self.vm))?;
        let (vmm, pid) = (live.vmm.clone(), live.process.id().pid);
        let info: VmmInfo = self.vmm_answer(vmm.get("/v1/info")).await?;
        let by_this = info.succession.clone().filter(|status| {
            status.succession == asked && status.phase == SuccessionPhase::Completed
        });
        if let Some(status) = by_this {
            return Ok(Some(UpgradedVm {
                outcome: UpgradeOutcome::Upgraded,
                pid: info.pid,
                blackout: status.blackout,
            }));
        }
        // What a former agent left half done must not stand in the way of this attempt.
        self.settle_succession(info.succession.as_ref()).await;
        let wanted = procfs::program_at(&self.context.program);
        let current = wanted.is_some() && procfs::program_of(pid) == wanted;
        Ok(current.then_some(UpgradedVm {
            outcome: UpgradeOutcome::Current,
            pid: info.pid,
            blackout: None,
        }))
    }

    async fn change_vmm(&mut self, ask: UpgradeVm) -> Result<SuccessionStatus, Problem> {
        let process = self.live().map(|live| live.process.id());
        self.change_record(|record| {
            // An agent that had no time to write it down when it started the VMM must not leave this open now.
            record.process = process;
            record.succession = Some(ask.succession);
            // Nothing of a migration is under way here, or this were not allowed.
            record.purpose = Purpose::Owned;
        })?;
        match self.hand_to_successor(ask).await {
            Ok(successor) => self.commit_to(successor, ask).await,
            Err(problem) => {
                // What its VMM says does not matter: it may not have heard of the succession at all.
                self.end_succession(ask.succession, Settlement::GoOn).await;
                Err(problem)
            }
        }
    }

    /// Up to a second VMM that is whole, with the guest standing still.
    async fn hand_to_successor(&mut self, ask: UpgradeVm) -> Result<Successor, Problem> {
        let holding = self.holding.as_ref();
        let seat = holding.map_or(Seat::First, |holding| holding.record.seat.other());
        let live = self.live().ok_or_else(|| not_running(self.vm))?;
        let (predecessor, named) = (live.vmm.clone(), live.process.id());
        process::kill_all_but(&self.directory, named, LET_GO_TIME)
            .await
            .map_err(|error| Problem::internal(format!("another VMM of this VM stays: {error}")))?;
        self.directory
            .clear_seat(seat)
            .map_err(|error| unwritable(&error))?;
        let process = VmmProcess::spawn(
            &self.context.program,
            &self.directory,
            seat,
            self.context.after_agent,
        )
        .map_err(|error| self.cannot_spawn(&error))?;
        tracing::debug!(vm = %self.vm, pid = process.id().pid, "a second VMM process started");
        let vmm = UdsClient::new(self.directory.api_socket(seat));
        let info = self.wait_until_ready(&vmm, &process).await?;
        if i32::try_from(info.pid) != Ok(process.id().pid) {
            return Err(Problem::internal(
                "another VMM answers in the new one's place",
            ));
        }
        let offer = OfferSuccession {
            epoch: ask.epoch,
            succession: ask.succession,
            socket: self.directory.succession_socket(),
        };
        let path = "/v1/succession/offer";
        let offered = predecessor.request_within(OBEY_TIMEOUT, Method::PUT, path, Some(&offer));
        let _: SuccessionStatus = self.vmm_answer(offered).await.map_err(too_old)?;
        let prepare = PrepareSuccession {
            vm: self.vm,
            epoch: ask.epoch,
            succession: ask.succession,
            socket: offer.socket,
        };
        let path = "/v1/succession/prepare";
        let prepared = vmm.request_within(BUILD_TIMEOUT, Method::PUT, path, Some(&prepare));
        let _: SuccessionStatus = self.vmm_answer(prepared).await?;
        if let Some(live) = self.live() {
            live.observer.command_sent();
        }
        let command = SuccessionCommand {
            succession: ask.succession,
            epoch: ask.epoch,
        };
        let path = "/v1/succession/take";
        let taken = vmm.request_within(TAKE_TIMEOUT, Method::POST, path, Some(&command));
        let status: SuccessionStatus = self.vmm_answer(taken).await?;
        if status.phase != SuccessionPhase::Ready {
            let detail = format!("the new VMM is {:?} instead of ready", status.phase);
            return Err(Problem::internal(detail));
        }
        Ok(Successor { process, vmm, seat })
    }

    /// The machine is the successor's from the moment that is written down; its predecessor never runs it again.
    async fn commit_to(
        &mut self,
        successor: Successor,
        ask: UpgradeVm,
    ) -> Result<SuccessionStatus, Problem> {
        let Successor { process, vmm, seat } = successor;
        // The guest stands still: the disk is not waited for. A host that goes down takes both processes along.
        let written = self.change_record_by(VmDirectory::write_record_swiftly, |record| {
            record.process = Some(process.id());
            record.seat = seat;
        });
        if let Err(problem) = written {
            self.end_succession(ask.succession, Settlement::GoOn).await;
            return Err(problem);
        }
        let told = self.tell_to_run(&vmm, ask.succession, ask.epoch).await;
        let before = self.live().map(|live| live.state.clone());
        let state = match (&told, before) {
            (Ok(_), Some(before)) => before,
            // The next look at it tells, and repeats the word.
            _ => VmmState::Paused {
                reason: godwit_wire::vmm_api::PauseReason::HandOver,
            },
        };
        let live = self.watch_over(process, seat, state);
        if let Some(holding) = &mut self.holding
            && let Some(Live { process, .. }) = holding.live.replace(live)
        {
            self.former = Some(process);
        }
        self.end_succession(ask.succession, Settlement::Nothing)
            .await;
        told
    }

    async fn tell_to_run(
        &mut self,
        vmm: &UdsClient,
        succession: SuccessionId,
        epoch: Epoch,
    ) -> Result<SuccessionStatus, Problem> {
        let command = SuccessionCommand { succession, epoch };
        let mut attempt = 1;
        loop {
            let path = "/v1/succession/commit";
            let told = vmm.request_within(OBEY_TIMEOUT, Method::POST, path, Some(&command));
            match self.vmm_answer(told).await {
                Err(problem) if attempt < COMMIT_ATTEMPTS => {
                    tracing::warn!(vm = %self.vm, %problem, "the new VMM did not run the VM; telling it again");
                    attempt += 1;
                }
                told => return told,
            }
        }
    }

    /// Goes on with what an earlier agent, or an earlier attempt, has left half done. `status` is the word of the VMM
    /// that the record names.
    pub(super) async fn settle_succession(&mut self, status: Option<&SuccessionStatus>) {
        let Some(holding) = &self.holding else { return };
        let open = holding.record.succession;
        let settlement = settlement(status);
        let Some(succession) = status
            .filter(|_| settlement != Settlement::Nothing)
            .map(|status| status.succession)
            .or(open)
        else {
            return;
        };
        tracing::warn!(vm = %self.vm, %succession, ?settlement, "a change of VMMs was left half done");
        self.end_succession(succession, settlement).await;
    }

    /// Leaves only the VMM that the record names, tells it how it goes on, and writes down that nothing is open. What
    /// fails is tried again by the next look at that VMM.
    async fn end_succession(&mut self, succession: SuccessionId, settlement: Settlement) {
        let Some(holding) = &self.holding else { return };
        let epoch = holding.record.epoch;
        let unwanted_seat = holding.record.seat.other();
        let Some(live) = &holding.live else { return };
        let (named, vmm) = (live.process.id(), live.vmm.clone());
        live.observer.command_sent();
        if let Err(error) = process::kill_all_but(&self.directory, named, LET_GO_TIME).await {
            return tracing::error!(vm = %self.vm, %error, "a VMM that must not run the VM could not be ended");
        }
        let command = SuccessionCommand { succession, epoch };
        let told = match settlement {
            Settlement::Nothing => Ok(()),
            Settlement::Run => self.tell_to_run(&vmm, succession, epoch).await.map(drop),
            Settlement::GoOn => {
                let path = "/v1/succession/abort";
                let told = vmm.request_within(OBEY_TIMEOUT, Method::POST, path, Some(&command));
                match self.vmm_answer::<SuccessionStatus>(told).await {
                    // It has never heard of it.
                    Err(problem) if problem.status == 404 => Ok(()),
                    told => told.map(drop),
                }
            }
        };
        if let Err(problem) = told {
            return tracing::error!(vm = %self.vm, %problem, ?settlement, "a VMM does not go on; telling it again");
        }
        let cleared = self
            .change_record(|record| record.succession = None)
            .and_then(|()| {
                self.directory
                    .clear_seat(unwanted_seat)
                    .map_err(|error| unwritable(&error))
            });
        if let Err(problem) = cleared {
            tracing::warn!(vm = %self.vm, %problem, "the end of a change of VMMs could not be written down");
        }
        if let Some(live) = self.live() {
            live.observer.command_sent();
            live.observer.look_now();
        }
    }
}

/// A VMM that knows nothing of successions is of an older version.
fn too_old(problem: Problem) -> Problem {
    if problem.status != 404 {
        return problem;
    }
    Problem::conflict(
        "vmm-too-old",
        "the VMM is of a version that cannot hand its machine to another process",
    )
    .with_remedy("migrate the VM to another host, and back")
}
