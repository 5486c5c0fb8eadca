//! Making a machine: started from its spec, or prepared to be filled by a migration.

use super::driver::{Driver, Holding};
use super::ledger::unwritable;
use crate::admission::Admission;
use crate::kept::Kept;
use crate::process::{self, VmmProcess};
use crate::record::{NewRecord, Purpose, Started, VmRecord};
use godwit_channel::CallError;
use godwit_channel::client::NO_BODY;
use godwit_channel::uds::UdsClient;
use godwit_wire::devices::Attachments;
use godwit_wire::host_api::{LeasePolicy, MAX_VMS_PER_HOST, PrepareIncoming, StartVm, VmReport};
use godwit_wire::id::{Epoch, Generation};
use godwit_wire::machine::MachineSpec;
use godwit_wire::migration::{MigrationRole, MigrationStatus};
use godwit_wire::problem::Problem;
use godwit_wire::storage::RestoreFrom;
use godwit_wire::unit::Bytes;
use godwit_wire::usage::VmUsage;
use godwit_wire::vmm_api::{
    Command as VmmCommand, CreateRequest, IncomingReady, IncomingRequest, RestoreRequest,
    StopReason, VerifyMemory, VmmInfo, VmmState,
};
use http::Method;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

/// How long a VMM process may take until its API answers.
const READY_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a VMM may take to build a machine: it prefaults all of its memory.
pub(super) const BUILD_TIMEOUT: Duration = Duration::from_secs(120);
/// How long it may take to restore one: it may have to read all of the snapshot first.
const RESTORE_TIMEOUT: Duration = Duration::from_secs(600);
/// First and longest pause between two looks for the API of a new VMM. A socket that appears announces itself to
/// nobody who could wait for it.
const FIRST_LOOK: Duration = Duration::from_millis(2);
const LONGEST_LOOK: Duration = Duration::from_millis(50);

impl Driver {
    /// `PUT /v1/vms/{vm}`.
    pub(super) async fn start(&mut self, ask: StartVm) -> Result<VmReport, Problem> {
        self.not_doomed(ask.epoch)?;
        self.check_spec(&ask.spec)?;
        let mut fence = self.fence;
        let admission = fence
            .admit_start(ask.epoch, ask.generation)
            .map_err(|stale| stale.problem(self.vm))?;
        if admission == Admission::Repeat {
            return self.repeat(ask.epoch, ask.generation);
        }
        if self.runs_already(&ask)? {
            self.change_record(|record| {
                record.generation = ask.generation;
                record.fence = fence;
            })?;
            self.fence = fence;
            return self.answer();
        }
        self.fence = fence;
        let record = VmRecord::new(NewRecord {
            vm: self.vm,
            name: ask.name,
            epoch: ask.epoch,
            generation: ask.generation,
            fence,
            spec: ask.spec,
            networks: ask.networks,
            lease: ask.lease,
            purpose: Purpose::Owned,
            boot_id: self.context.boot_id,
        });
        match self.run_machine(record, ask.restore).await {
            Ok(()) => self.answer(),
            Err(problem) => self.abandon(ask.epoch, ask.generation, problem).await,
        }
    }

    /// Whether there is nothing to start. What is here under an older epoch, or has ended, makes way.
    fn runs_already(&self, ask: &StartVm) -> Result<bool, Problem> {
        let Some(holding) = &self.holding else {
            return Ok(false);
        };
        if holding.record.epoch < ask.epoch {
            return Ok(false);
        }
        self.nothing_moves()?;
        let Some(live) = &holding.live else {
            return Ok(false);
        };
        if live.stopping.is_some() {
            let detail = format!("VM {} is stopping", self.vm);
            return Err(
                Problem::conflict("stopping", detail).with_remedy("wait until it has stopped")
            );
        }
        if matches!(live.state, VmmState::Stopped { .. }) {
            return Ok(false);
        }
        if holding.record.spec != ask.spec {
            let detail = format!("VM {} runs here with another spec", self.vm);
            return Err(Problem::conflict("already-running", detail).with_remedy("stop it first"));
        }
        Ok(true)
    }

    async fn run_machine(
        &mut self,
        record: VmRecord,
        restore: Option<RestoreFrom>,
    ) -> Result<(), Problem> {
        let (spec, lease) = (record.spec.clone(), self.lease_page(record.lease));
        let command = VmmCommand {
            epoch: record.epoch,
        };
        // It begins afresh: nothing of an earlier stay is of use.
        self.context.kept.forget(self.vm);
        let (vmm, attachments) = self.spawn_vmm(record, Bytes(0)).await?;
        let go = match restore {
            None => {
                let request = CreateRequest {
                    vm: self.vm,
                    epoch: command.epoch,
                    spec,
                    lease,
                    attachments,
                };
                let built =
                    vmm.request_within(BUILD_TIMEOUT, Method::PUT, "/v1/machine", Some(&request));
                let _: VmmInfo = self.vmm_answer(built).await?;
                "/v1/boot"
            }
            Some(from) => {
                let request = RestoreRequest {
                    vm: self.vm,
                    epoch: command.epoch,
                    lease,
                    directory: self.saved_machine(from, &spec, &attachments).await?,
                    attachments,
                    verify: VerifyMemory::default(),
                };
                let built =
                    vmm.request_within(RESTORE_TIMEOUT, Method::PUT, "/v1/restore", Some(&request));
                let info: VmmInfo = self.vmm_answer(built).await?;
                if info.spec.as_ref() != Some(&spec) {
                    let detail = format!("snapshot {} is of another machine", from.snapshot);
                    return Err(Problem::conflict("machine-changed", detail)
                        .with_remedy("give the VM back the machine it had, or start it"));
                }
                "/v1/resume"
            }
        };
        let info: VmmInfo = self.vmm_answer(vmm.post(go, &command)).await?;
        self.has_started(info.state)?;
        tracing::info!(vm = %self.vm, epoch = %command.epoch, ?restore, "the VM is started");
        Ok(())
    }

    /// `PUT /v1/vms/{vm}/incoming`.
    pub(super) async fn prepare(&mut self, ask: PrepareIncoming) -> Result<IncomingReady, Problem> {
        self.not_doomed(ask.epoch)?;
        self.check_spec(&ask.spec)?;
        let mut fence = self.fence;
        let admission = fence
            .admit(ask.epoch, ask.generation)
            .map_err(|stale| stale.problem(self.vm))?;
        if admission == Admission::Repeat {
            return match &self.prepared {
                Some((generation, ready)) if *generation == ask.generation => Ok(ready.clone()),
                _ => Err(self
                    .repeat(ask.epoch, ask.generation)
                    .err()
                    .unwrap_or_else(|| already_here(self.vm))),
            };
        }
        self.make_way_for(&ask).await?;
        self.fence = fence;
        let record = VmRecord::new(NewRecord {
            vm: self.vm,
            name: ask.name.clone(),
            epoch: ask.epoch,
            generation: ask.generation,
            fence,
            spec: ask.spec.clone(),
            networks: ask.networks.clone(),
            lease: ask.lease,
            purpose: Purpose::Receiving {
                migration: ask.migration,
            },
            boot_id: self.context.boot_id,
        });
        match self.receive_machine(record, &ask).await {
            Ok(ready) => {
                self.prepared = Some((ask.generation, ready.clone()));
                Ok(ready)
            }
            Err(problem) => self.abandon(ask.epoch, ask.generation, problem).await,
        }
    }

    /// What an earlier migration or an earlier epoch has left is removed; a VM that is here under this very epoch
    /// cannot come from elsewhere.
    async fn make_way_for(&mut self, ask: &PrepareIncoming) -> Result<(), Problem> {
        let Some(holding) = &self.holding else {
            return Ok(());
        };
        match holding.record.purpose {
            Purpose::Receiving { .. } => {
                if self.asked_the_store() {
                    self.nothing_moves()?;
                }
                self.depart(StopReason::IncomingAborted).await;
                Ok(())
            }
            Purpose::Owned | Purpose::Granted { .. } if holding.record.epoch >= ask.epoch => {
                Err(already_here(self.vm))
            }
            Purpose::Owned | Purpose::Granted { .. } => Ok(()),
        }
    }

    async fn receive_machine(
        &mut self,
        record: VmRecord,
        ask: &PrepareIncoming,
    ) -> Result<IncomingReady, Problem> {
        self.check_arriving_disks(ask).await?;
        let ports = self.context.migration_ports;
        let request = IncomingRequest {
            attachments: Attachments::default(),
            vm: self.vm,
            epoch: ask.epoch,
            spec: ask.spec.clone(),
            lease: self.lease_page(ask.lease),
            migration: ask.migration,
            listen: SocketAddr::new(
                self.context.migration_address,
                ports.map_or(0, |ports| ports.first),
            ),
            last_port: ports.map(|ports| ports.last),
            kept: None,
            arriving_disks: ask.arriving_disks.clone(),
            identity: ask.identity.clone(),
        };
        // Held until its new VMM has it.
        let kept = self.memory_from_before(&record).await;
        let already = kept.as_ref().map_or(Bytes(0), Kept::bytes);
        let (vmm, attachments) = self.spawn_vmm(record, already).await?;
        let request = IncomingRequest {
            attachments,
            kept: kept.as_ref().and_then(Kept::place),
            ..request
        };
        let built = vmm.request_within(BUILD_TIMEOUT, Method::PUT, "/v1/incoming", Some(&request));
        let ready: IncomingReady = self.vmm_answer(built).await?;
        drop(kept);
        self.has_started(VmmState::Incoming)?;
        let status: MigrationStatus = self
            .vmm_answer(vmm.get("/v1/migration?after=0&wait_ms=0"))
            .await?;
        self.begin_handover(status, MigrationRole::Target, ask.epoch, None);
        tracing::info!(vm = %self.vm, migration = %ask.migration, address = %ready.address, "ready to receive the VM");
        Ok(ready)
    }

    /// What is kept of an earlier stay of a VM that comes home, once nobody else can touch it.
    async fn memory_from_before(&mut self, record: &VmRecord) -> Option<Kept> {
        let kept = self
            .context
            .kept
            .take(self.vm, record.epoch, &record.spec)?;
        let former = kept.former().clone();
        let gone = async move {
            let gone = former.until_gone().await;
            gone.map_err(|error| Problem::internal(error.to_string()))
        };
        match self.unless_doomed(gone).await {
            Ok(_) => {
                tracing::info!(vm = %self.vm, bytes = %kept.bytes(), "the VM comes home to memory that was kept");
                Some(kept)
            }
            Err(problem) => {
                tracing::warn!(vm = %self.vm, %problem, "memory that was kept cannot be used");
                None
            }
        }
    }

    fn check_spec(&self, spec: &MachineSpec) -> Result<(), Problem> {
        let problems = spec.problems("spec");
        if !problems.is_empty() {
            return Err(Problem::invalid(problems));
        }
        if self.holding.is_none() && self.context.board.len() >= MAX_VMS_PER_HOST {
            let detail = format!("this host has {MAX_VMS_PER_HOST} VMs, the most it can have");
            return Err(Problem::conflict("host-full", detail).with_remedy("choose another host"));
        }
        Ok(())
    }

    fn lease_page(&self, policy: LeasePolicy) -> Option<PathBuf> {
        match policy {
            LeasePolicy::Watched => Some(self.context.state.lease()),
            LeasePolicy::Unwatched => None,
        }
    }

    /// Writes the record, gets disks and networks ready, starts a VMM process and waits for its API. Whatever process
    /// there was for this VM is gone before, and memory is free for it, of which it has `already` some.
    async fn spawn_vmm(
        &mut self,
        mut record: VmRecord,
        already: Bytes,
    ) -> Result<(UdsClient, Attachments), Problem> {
        self.end_process().await?;
        self.wait_for_former(record.epoch).await?;
        let memory = record.spec.memory_mib;
        self.context.kept.make_room(self.vm, memory, already).await;
        let prepared = self
            .directory
            .create()
            .and_then(|()| self.directory.remove_sockets())
            .and_then(|()| self.directory.write_record(&record));
        prepared.map_err(|error| unwritable(&error))?;
        let attachments = self.attach(&record).await?;
        let process = VmmProcess::spawn(
            &self.context.program,
            &self.directory,
            record.seat,
            self.context.after_agent,
        )
        .map_err(|error| self.cannot_spawn(&error))?;
        tracing::debug!(vm = %self.vm, pid = process.id().pid, "VMM process started");
        record.process = Some(process.id());
        let written = self.directory.write_record(&record);
        let live = self.watch_over(process.clone(), record.seat, VmmState::Empty);
        let vmm = live.vmm.clone();
        self.refusal = None;
        self.prepared = None;
        self.holding = Some(Holding {
            record,
            live: Some(live),
            handover: None,
            migration: None,
            usage: VmUsage::default(),
            devices: None,
        });
        written.map_err(|error| unwritable(&error))?;
        self.wait_until_ready(&vmm, &process).await?;
        Ok((vmm, attachments))
    }

    pub(super) fn cannot_spawn(&self, error: &std::io::Error) -> Problem {
        let program = self.context.program.display();
        Problem::internal(format!(
            "the VMM program {program} cannot be started: {error}"
        ))
    }

    pub(super) async fn wait_until_ready(
        &mut self,
        vmm: &UdsClient,
        process: &VmmProcess,
    ) -> Result<VmmInfo, Problem> {
        let answers = async {
            let mut pause = FIRST_LOOK;
            loop {
                match vmm
                    .request_within::<VmmInfo>(READY_TIMEOUT, Method::GET, "/v1/info", NO_BODY)
                    .await
                {
                    Err(CallError::Unreachable { .. }) => tokio::time::sleep(pause).await,
                    other => return other,
                }
                pause = (pause * 2).min(LONGEST_LOOK);
            }
        };
        tokio::select! {
            ready = tokio::time::timeout(READY_TIMEOUT, self.vmm_answer(answers)) => ready.unwrap_or_else(|_| {
                let detail = format!("the VMM process {} did not answer within {READY_TIMEOUT:?}", process.id().pid);
                Err(Problem::internal(detail))
            }),
            // The words it left are added by `abandon`.
            exit = process.exited() => {
                Err(Problem::new(500, "vmm-ended", "The VMM process ended", format!("the VMM process ended ({exit})")))
            }
        }
    }

    /// The VMM has confirmed the machine.
    fn has_started(&mut self, state: VmmState) -> Result<(), Problem> {
        self.change_record(|record| record.started = Started::Yes)?;
        if let Some(live) = self.live_mut() {
            live.observer.command_sent();
            live.state = state;
        }
        Ok(())
    }

    /// A start that failed leaves nothing behind but the fence.
    async fn abandon<T>(
        &mut self,
        epoch: Epoch,
        generation: Generation,
        mut problem: Problem,
    ) -> Result<T, Problem> {
        let words = process::last_words(&self.directory);
        let by_vmm = problem.status < 500;
        if !by_vmm && !words.is_empty() {
            problem.detail = format!("{}; its last words: {words}", problem.detail);
        }
        match self.leave().await {
            Ok(()) => self.context.board.retract(self.vm),
            Err(left) => {
                tracing::error!(vm = %self.vm, problem = %left, "a start failed and left something behind")
            }
        }
        self.refuse(epoch, generation, problem)
    }
}

fn already_here(vm: godwit_wire::id::VmId) -> Problem {
    Problem::conflict(
        "already-here",
        format!("VM {vm} is on this host; it cannot be received from another one"),
    )
}
