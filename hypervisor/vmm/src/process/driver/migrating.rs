//! The driver's part in migrations: starting them, and every step that decides whether the guest may run.

use super::*;
use crate::machine::{SavedMachine, Throttle};
use crate::migration::{AtRest, HandOverError, SourceMachine, TargetMachine, ThisCpu};
use godwit_wire::devices::MemoryBacking;
use godwit_wire::id::MigrationId;
use godwit_wire::migration::{MigrationToken, TargetMemory};
use godwit_wire::vmm_api::MigrationBandwidth;
use std::time::Duration;

/// No guest has written more; a hostile source may say so, and what follows must still be countable.
const MOST_OUTPUT_BYTES: u64 = u64::MAX / 2;

impl Driver {
    /// Refuses what must not happen while the machine is on its way.
    pub(super) fn admit_without_migration(&self) -> Result<(), Problem> {
        if let Some(status) = self.migration_status()
            && !status.phase.is_final()
        {
            return Err(Problem::conflict(
                "migrating",
                format!("migration {} is under way", status.migration),
            )
            .with_remedy("repeat this when it is over, or cancel it"));
        }
        Ok(())
    }

    /// The latest migration.
    pub(super) fn migration_status(&self) -> Option<MigrationStatus> {
        match &self.migration {
            Migration::None => None,
            Migration::Outgoing(outgoing) => Some(outgoing.ledger.status()),
            Migration::Incoming(incoming, _) => Some(incoming.status()),
        }
    }

    /// The latest migration and its sequence number to wait on.
    pub(in crate::process) fn watch_migration(
        &self,
    ) -> Result<(watch::Receiver<u64>, StatusReader), Problem> {
        match &self.migration {
            Migration::None => Err(Problem::not_found("migration", "of this machine")),
            Migration::Outgoing(outgoing) => {
                let ledger = outgoing.ledger.clone();
                Ok((ledger.subscribe(), Box::new(move || ledger.status())))
            }
            Migration::Incoming(incoming, _) => {
                let incoming = incoming.clone();
                let changes = incoming.ledger.subscribe();
                Ok((changes, Box::new(move || incoming.status())))
            }
        }
    }

    /// Builds the machine and waits for its content.
    pub(in crate::process) fn incoming(
        &mut self,
        request: IncomingRequest,
    ) -> Result<IncomingReady, Problem> {
        admit(Request::Build, &self.state.borrow())?;
        let kept = kept_memory(&request);
        let memory = match kept {
            Some(_) => TargetMemory::Kept,
            None => TargetMemory::Fresh,
        };
        self.build(
            request.vm,
            request.epoch,
            request.spec.clone(),
            request.lease.clone(),
            (request.attachments.clone(), kept),
        )?;
        let disks = self
            .arriving(&request)
            .inspect_err(|_| self.drop_machine())?;
        let bound = MigrationListener::bind(request.listen, request.last_port);
        let (listener, address) = bound
            .map_err(|error| not_listening(&request, &error))
            .inspect_err(|_| self.drop_machine())?;
        let ledger = Ledger::new(
            request.migration,
            MigrationRole::Target,
            TargetHandOver::Filling,
        );
        let token = MigrationToken(
            godwit_channel::pki::fresh_secret()
                .map_err(|error| Problem::internal(error.to_string()))
                .inspect_err(|_| self.drop_machine())?,
        );
        let cards = self.machine()?.frame_times();
        let incoming = Incoming::new(Arc::new(ledger), listener, token.clone(), cards);
        let incoming = Arc::new(incoming);
        self.migration = Migration::Incoming(incoming.clone(), request.epoch);
        let facts = self.cpu()?;
        let machine = self.machine()?;
        let (ram, cpu, owner) = (
            machine.ram().clone(),
            ThisCpu {
                facts,
                guest: machine.guest_cpu().clone(),
                scaling: machine.tsc_scaling(),
            },
            Owner {
                driver: self.handle.clone(),
                migration: request.migration,
            },
        );
        spawn("migration-in", move || {
            receive_machine(&incoming, &request, &cpu, (&ram, memory), disks, &owner)
        })?;
        self.enter(VmmState::Incoming);
        Ok(IncomingReady { address, token })
    }

    /// Starts to send the machine away.
    pub(in crate::process) fn outgoing(
        &mut self,
        request: OutgoingRequest,
    ) -> Result<MigrationStatus, Problem> {
        admit_epoch(request.epoch, self.epoch)?;
        if let Some(status) = self.migration_status() {
            if status.migration == request.migration && status.role == MigrationRole::Source {
                return Ok(status);
            }
            if !status.phase.is_final() {
                return Err(Problem::conflict(
                    "migrating",
                    format!("migration {} is under way", status.migration),
                ));
            }
        }
        self.admit_without_snapshot()?;
        self.admit_without_succession()?;
        admit(Request::SendAway, &self.state.borrow())?;
        let disks = self.leaving(&request)?;
        let ledger = Ledger::new(
            request.migration,
            MigrationRole::Source,
            SourceHandOver::Copying,
        );
        let outgoing = Arc::new(Outgoing::new(
            Arc::new(ledger),
            request.policy.max_bandwidth_bytes_per_s,
        ));
        let machine = self.machine()?;
        let (ram, log) = (machine.ram().clone(), machine.dirty_log().clone());
        let guest_cpu = machine.guest_cpu().clone();
        let (vm, spec) = match (self.vm, self.spec.clone()) {
            (Some(vm), Some(spec)) => (vm, spec),
            _ => return Err(Problem::internal("a machine without identity")),
        };
        let (cpu, owner) = (
            self.cpu()?,
            Owner {
                driver: self.handle.clone(),
                migration: request.migration,
            },
        );
        self.migration = Migration::Outgoing(outgoing.clone());
        let status = outgoing.ledger.status();
        spawn("migration-out", move || {
            let start_log = move || Ok(log.start()?);
            send_machine(
                &outgoing,
                &request,
                (vm, &spec, &cpu, &guest_cpu),
                (&ram, disks),
                start_log,
                &owner,
            );
        })?;
        Ok(status)
    }

    /// The operator calls the migration off.
    pub(in crate::process) fn cancel(
        &mut self,
        command: MigrationCommand,
    ) -> Result<MigrationStatus, Problem> {
        match self.addressed(command)? {
            Addressed::Outgoing(outgoing) => {
                outgoing.cancel("cancelled by request").map_err(refused)?;
                self.resume_after_migration();
            }
            Addressed::Incoming(incoming, _) => {
                incoming.abort("cancelled by request").map_err(refused)?;
                self.void_incoming();
            }
        }
        self.status()
    }

    /// The migration shall send at another pace from now on.
    pub(in crate::process) fn set_migration_bandwidth(
        &mut self,
        command: MigrationBandwidth,
    ) -> Result<MigrationStatus, Problem> {
        let addressed = self.addressed(MigrationCommand {
            migration: command.migration,
            epoch: command.epoch,
        })?;
        let Addressed::Outgoing(outgoing) = addressed else {
            return Err(Problem::conflict(
                "wrong-role",
                "this is the target of the migration; its source sends",
            ));
        };
        outgoing
            .set_bandwidth(command.max_bytes_per_s)
            .map_err(|refused| {
                Problem::conflict("handing-over", refused.to_string())
                    .with_remedy("repeat this when it has been handed over, if it still matters")
            })?;
        self.status()
    }

    /// The store has voided the migration.
    pub(in crate::process) fn abort(
        &mut self,
        command: MigrationCommand,
    ) -> Result<MigrationStatus, Problem> {
        match self.addressed(command)? {
            Addressed::Outgoing(outgoing) => {
                outgoing.abort().map_err(refused)?;
                self.resume_after_migration();
            }
            Addressed::Incoming(incoming, _) => {
                incoming
                    .abort("the store voided the migration")
                    .map_err(refused)?;
                self.void_incoming();
            }
        }
        self.status()
    }

    /// The store has given the VM to the target: end here, and then this process.
    pub(in crate::process) fn release(
        &mut self,
        command: MigrationCommand,
    ) -> Result<MigrationStatus, Problem> {
        let Addressed::Outgoing(outgoing) = self.addressed(command)? else {
            return Err(Problem::conflict(
                "wrong-role",
                "a target cannot be released; abort it",
            ));
        };
        if outgoing.release().map_err(refused)? == SourceHandOver::Serving {
            // The target still needs memory from here, and says when it does not.
            return self.status();
        }
        self.migrated_away();
        let _ = self
            .end
            .try_send(Outcome::Stopped(StopReason::MigratedAway));
        self.status()
    }

    /// The store has given the VM to this side under `command.epoch`.
    pub(in crate::process) fn commit(
        &mut self,
        command: MigrationCommand,
    ) -> Result<MigrationStatus, Problem> {
        // The epoch is checked against the source's by the hand-over itself.
        let Addressed::Incoming(incoming, source_epoch) = self.addressed(MigrationCommand {
            epoch: self.epoch,
            ..command
        })?
        else {
            return Err(Problem::conflict(
                "wrong-role",
                "this is the source of the migration",
            ));
        };
        let machine = self.machine()?;
        if incoming.ledger.hand_over() == TargetHandOver::Whole && !machine.lease_allows() {
            return Err(Problem::conflict(
                "lease-expired",
                "this host's lease does not allow the guest to run",
            )
            .with_remedy("repeat the commit once the host agent has renewed its lease"));
        }
        let first = !matches!(incoming.ledger.hand_over(), TargetHandOver::Running(_));
        incoming
            .commit(command.epoch, source_epoch)
            .map_err(refused)?;
        self.epoch = command.epoch;
        if first {
            // The VM is this side's now, whatever happens: if it cannot go on, it must be seen to need help.
            let state = self.go_on(incoming.arrival().unwrap_or(Arrival::Run))?;
            let runs = state == VmmState::Running;
            self.enter(state);
            incoming.announce_running(command.epoch);
            if let Some(reason) = incoming.memory_is_cut_off() {
                self.stall(reason);
            }
            if runs {
                self.machine()?.announce();
            }
            release_start_pages();
        }
        self.status()
    }

    /// Whether the guest runs here, or ran, ahead of memory that has not arrived yet. Then nothing may wait for its
    /// devices or vCPUs, and nothing of it may be taken apart: what is missing would be zeros for whoever still uses it,
    /// a disk that is being written among them.
    pub(super) fn lacks_memory(&self) -> bool {
        match &self.migration {
            Migration::Incoming(incoming, _) => incoming.lacks_memory(),
            _ => false,
        }
    }

    /// Ends the migration under way, for a machine that will not go on as it is. Memory that follows goes on arriving.
    pub(super) fn cancel_migration(&mut self, reason: &str) {
        self.cancel_succession(reason);
        if self.lacks_memory() {
            return;
        }
        let refused = match &self.migration {
            Migration::Outgoing(outgoing) if !outgoing.ledger.status().phase.is_final() => {
                outgoing.cancel(reason).err()
            }
            Migration::Incoming(incoming, _) if !incoming.ledger.status().phase.is_final() => {
                incoming.abort(reason).err()
            }
            _ => None,
        };
        if let Some(refused) = refused {
            tracing::error!(%refused, reason, "the migration could not be called off");
        }
    }

    fn status(&self) -> Result<MigrationStatus, Problem> {
        self.migration_status()
            .ok_or_else(|| Problem::not_found("migration", "of this machine"))
    }

    fn addressed(&self, command: MigrationCommand) -> Result<Addressed, Problem> {
        let status = self.status()?;
        if status.migration != command.migration {
            return Err(
                Problem::not_found("migration", command.migration).with_remedy(format!(
                    "the latest migration of this machine is {}",
                    status.migration
                )),
            );
        }
        admit_epoch(command.epoch, self.epoch)?;
        Ok(match &self.migration {
            Migration::Outgoing(outgoing) => Addressed::Outgoing(outgoing.clone()),
            Migration::Incoming(incoming, epoch) => Addressed::Incoming(incoming.clone(), *epoch),
            Migration::None => unreachable!("it has a status"),
        })
    }

    /// Lets a guest that was paused for the hand-over go on here as it was, if it may.
    fn resume_after_migration(&mut self) {
        // An earlier migration has no say over a guest that stands still for a successor.
        if self.admit_without_succession().is_err() {
            return;
        }
        let may_run = match &self.migration {
            Migration::Outgoing(outgoing) => outgoing.ledger.hand_over().may_run(),
            _ => false,
        };
        if !may_run
            || *self.state.borrow()
                != (VmmState::Paused {
                    reason: PauseReason::HandOver,
                })
        {
            return;
        }
        if let Ok(state) = self.go_on(self.before_hand_over) {
            self.enter(state);
        }
    }

    /// Takes what only the machine's owner may hold, and lets the guest go on as it was; gives its state then.
    pub(super) fn go_on(&self, arrival: Arrival) -> Result<VmmState, Problem> {
        let machine = self.machine()?;
        let claimed = machine.claim(self.epoch);
        Ok(match (arrival, claimed) {
            // It is claimed again before it runs.
            (Arrival::StayPaused, claimed) => {
                if let Err(error) = claimed {
                    tracing::warn!(%error, "a device of the paused machine cannot be claimed yet");
                }
                VmmState::Paused {
                    reason: PauseReason::Requested,
                }
            }
            (Arrival::Run, Err(error)) => {
                let detail = error.problem("spec").detail;
                tracing::error!(
                    detail,
                    "the guest stands still: its disks cannot be claimed"
                );
                let disk = match error {
                    MachineError::Device(error) => error.device().to_owned(),
                    _ => String::new(),
                };
                VmmState::Paused {
                    reason: PauseReason::Storage { disk, detail },
                }
            }
            (Arrival::Run, Ok(())) => match machine.run() {
                // If the lease is over the vCPUs stop themselves at once and say so.
                Ok(()) => VmmState::Running,
                Err(error) => VmmState::Paused {
                    reason: PauseReason::Fault {
                        detail: error.problem("spec").detail,
                    },
                },
            },
        })
    }

    /// Whether `migration` is the latest one: the thread of an earlier one may still be ending, and has no say.
    fn is_current(&self, migration: MigrationId) -> bool {
        self.migration_status()
            .is_some_and(|status| status.migration == migration)
    }

    pub(super) fn pause_for_hand_over(&mut self) -> Result<Arrival, MachineError> {
        let state = self.state.borrow().clone();
        self.before_hand_over = match state {
            VmmState::Running => {
                self.machine
                    .as_ref()
                    .ok_or(MachineError::VcpuGone(0))?
                    .pause()?;
                Arrival::Run
            }
            VmmState::Paused {
                reason: PauseReason::Requested,
            } => Arrival::StayPaused,
            _ => {
                return Err(MachineError::BadState(
                    "the machine has stopped or cannot go on".into(),
                ));
            }
        };
        self.enter(VmmState::Paused {
            reason: PauseReason::HandOver,
        });
        Ok(self.before_hand_over)
    }

    /// Memory that the guest may need does not arrive: it stands still meanwhile.
    pub(super) fn stall(&mut self, reason: String) {
        if *self.state.borrow() == VmmState::Running
            && let Some(machine) = &self.machine
        {
            machine.stall();
            self.enter(VmmState::Paused {
                reason: PauseReason::Memory { detail: reason },
            });
        }
    }

    /// Everything that followed the guest is here.
    fn memory_is_whole(&mut self) {
        if std::mem::take(&mut self.resets_when_whole) {
            self.reset();
        } else {
            self.go_on_after_stall();
        }
    }

    /// Memory arrives again.
    fn go_on_after_stall(&mut self) {
        if self.resets_when_whole {
            return;
        }
        let stalled = self.state.borrow().waits_for_memory();
        if let Some(machine) = self.machine.as_ref().filter(|_| stalled) {
            let state = match self.let_run(machine) {
                Ok(()) => VmmState::Running,
                Err(problem) => paused_by(machine, problem),
            };
            self.enter(state);
        }
    }

    fn migrated_away(&mut self) {
        self.drop_machine();
        self.enter(VmmState::Stopped {
            reason: StopReason::MigratedAway,
        });
    }

    fn void_incoming(&mut self) {
        if *self.state.borrow() == VmmState::Incoming {
            self.drop_machine();
            self.enter(VmmState::Stopped {
                reason: StopReason::IncomingAborted,
            });
        }
    }
}

/// Memory of an earlier stay of the VM, if there is some that can be used.
fn kept_memory(request: &IncomingRequest) -> Option<GuestRam> {
    let kept = request.kept.as_ref()?;
    // A part of a page of 2 MiB cannot be given back for one that is zero.
    if request.spec.devices.memory_backing != MemoryBacking::Standard {
        return None;
    }
    GuestRam::take_up(kept, request.spec.memory_mib)
        .inspect_err(|error| {
            let source = std::error::Error::source(error).map(ToString::to_string);
            tracing::warn!(%error, source, "memory that was kept makes way for fresh memory");
        })
        .ok()
}

/// Reads a migration's status without the driver.
pub(in crate::process) type StatusReader = Box<dyn Fn() -> MigrationStatus + Send>;

enum Addressed {
    Outgoing(Arc<Outgoing>),
    Incoming(Arc<Incoming>, Epoch),
}

fn refused(error: HandOverError) -> Problem {
    let kind = match error {
        HandOverError::TooLate => "too-late",
        HandOverError::Over(_) => "migration-over",
        HandOverError::NotWhole => "not-whole",
        HandOverError::StaleEpoch { .. } => "stale-epoch",
    };
    Problem::conflict(kind, error.to_string())
}

pub(super) fn spawn(name: &str, body: impl FnOnce() + Send + 'static) -> Result<(), Problem> {
    std::thread::Builder::new()
        .name(name.to_owned())
        .spawn(body)
        .map(drop)
        .map_err(|error| Problem::internal(format!("a thread cannot be started: {error}")))
}

/// The driver, as the threads of one migration know it.
struct Owner {
    driver: DriverHandle,
    migration: MigrationId,
}

impl Owner {
    /// Lets the driver take a step of this migration, if it is still the latest one.
    fn step<T: Send + 'static>(
        &self,
        step: impl FnOnce(&mut Driver) -> Result<T, MachineError> + Send + 'static,
    ) -> Result<T, MachineError> {
        let migration = self.migration;
        let done = self.driver.call_blocking(move |driver| {
            if driver.is_current(migration) {
                step(driver)
            } else {
                Err(MachineError::BadState(
                    "another migration has taken its place".into(),
                ))
            }
        });
        done.unwrap_or_else(|| Err(MachineError::BadState("this VMM is ending".into())))
    }

    fn post(&self, step: fn(&mut Driver)) {
        let migration = self.migration;
        self.driver.post(move |driver| {
            if driver.is_current(migration) {
                step(driver);
            }
        });
    }
}

pub(super) const MACHINE_GONE: &str = "the machine is gone";

impl SourceMachine for Owner {
    fn pause(&self) -> Result<Arrival, MachineError> {
        self.step(Driver::pause_for_hand_over)
    }

    fn throttle(&self) -> Option<Throttle> {
        self.step(|driver| Ok(driver.machine.as_ref().map(Machine::throttle)))
            .ok()
            .flatten()
    }

    fn save(&self) -> Result<AtRest, MachineError> {
        self.step(|driver| match (&driver.machine, &*driver.state.borrow()) {
            (
                Some(machine),
                VmmState::Paused {
                    reason: PauseReason::HandOver,
                },
            ) => {
                // From here on the target may take what this machine held.
                machine.release()?;
                let (saved, sampled) = machine.save()?;
                Ok(AtRest {
                    saved,
                    sampled,
                    counted: driver.count(),
                    cards: machine.frame_times(),
                })
            }
            _ => Err(MachineError::BadState(MACHINE_GONE.into())),
        })
    }

    fn resume(&self) {
        self.post(Driver::resume_after_migration);
    }

    fn gone(&self) {
        self.post(Driver::migrated_away);
    }
}

impl TargetMachine for Owner {
    fn restore(
        &self,
        saved: SavedMachine,
        age: Duration,
        counted: Counted,
    ) -> Result<(), MachineError> {
        let asked = Instant::now();
        self.step(move |driver| match &driver.machine {
            Some(machine) => {
                machine.restore(saved, age + asked.elapsed())?;
                driver.counted = counted;
                // The output itself stays behind; where it ends in all that was ever written does not.
                let end = counted.serial_tx_bytes.min(MOST_OUTPUT_BYTES);
                driver.handle.console.go_on_from(&[], end);
                Ok(())
            }
            None => Err(MachineError::BadState(MACHINE_GONE.into())),
        })
    }

    fn void(&self) {
        self.post(Driver::void_incoming);
    }

    fn stall(&self, reason: String) {
        // Not waited for: the driver may itself be waiting for a device that waits for that memory.
        let migration = self.migration;
        self.driver.post(move |driver| {
            if driver.is_current(migration) {
                driver.stall(reason);
            }
        });
    }

    fn go_on(&self) {
        self.post(Driver::go_on_after_stall);
    }

    fn all_is_here(&self) {
        self.post(Driver::memory_is_whole);
    }
}

fn not_listening(request: &IncomingRequest, error: &std::io::Error) -> Problem {
    let ports = match request.last_port {
        Some(last) => format!("{} to port {last}", request.listen),
        None => request.listen.to_string(),
    };
    Problem::invalid(vec![FieldProblem::new(
        "listen",
        format!("{ports} cannot be listened on: {error}"),
        "choose an address of this host and a port, or a range of ports, that is not all taken; port 0 takes a free one",
    )])
}
