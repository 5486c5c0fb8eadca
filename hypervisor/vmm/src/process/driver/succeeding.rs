//! The driver's part in successions: every step that decides whether the guest may run here.

use super::migrating::{MACHINE_GONE, spawn};
use super::snapshots::admit_whole_memory;
use super::*;
use crate::memory::{GuestRam, boot_time_ns};
use crate::migration::HandOverError;
use crate::succession::{
    Arrived, Handed, Offered, Offering, PredecessorMachine, SuccessionError, yield_machine,
};
use godwit_wire::devices::{DiskAccess, DiskFormat, MemoryBacking};
use godwit_wire::succession::{
    Offer, OfferSuccession, PrepareSuccession, SUCCESSION_VERSION, SuccessionCommand,
    SuccessionPhase, SuccessionStatus,
};
use std::fs::File;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::path::Path;

/// Most stretches of touched memory that a successor maps before the guest stands still; the rest comes page by page.
const MAX_MAPPED_STRETCHES: usize = 1 << 16;

impl DriverHandle {
    /// Builds the machine that a predecessor offers, around its memory. Blocks for as long as that takes.
    pub(in crate::process) fn prepare_succession(
        &self,
        request: &PrepareSuccession,
    ) -> Result<SuccessionStatus, Problem> {
        let offering = Offering::ask(request).map_err(|error| error.problem())?;
        let (taking, offer, memory) = TakingOver::begin(request.succession, offering);
        let taking = Arc::new(taking);
        let (ours, ask) = (taking.clone(), request.clone());
        let ram = self
            .call_blocking(move |driver| driver.build_successor(&ask, offer, memory, ours))
            .ok_or_else(ending)??;
        // So that the guest does not wait for each page once it runs here.
        let mapped = match ram.backing() {
            MemoryBacking::Standard => ram
                .touched(MAX_MAPPED_STRETCHES)
                .and_then(|stretches| ram.populate_all(&stretches, &|| taking.waits())),
            // The kernel does not tell which of these were ever touched, and there are few to wait for.
            MemoryBacking::Huge2M => Ok(()),
        };
        if let Err(error) = mapped {
            tracing::warn!(%error, "guest memory is mapped page by page");
        }
        let (watched, driver) = (taking.clone(), self.clone());
        spawn("succession", move || {
            watched.wait_for_end();
            driver.post(move |driver| {
                if watched.waits() {
                    driver.void_successor(&watched, "the predecessor has called it off");
                }
            });
        })?;
        Ok(taking.status())
    }

    /// Has the predecessor stop the guest and hand everything over; the machine is whole then. Blocks until it is.
    pub(in crate::process) fn take_succession(
        &self,
        command: SuccessionCommand,
    ) -> Result<SuccessionStatus, Problem> {
        let begun = self
            .call_blocking(move |driver| driver.begin_take(command))
            .ok_or_else(ending)??;
        let (taking, first) = begun;
        if first == First::No {
            return Ok(taking.status());
        }
        let arrived = taking.take();
        let ours = taking.clone();
        self.call_blocking(move |driver| driver.arrive(&ours, arrived))
            .ok_or_else(ending)??;
        Ok(taking.status())
    }
}

/// Whether a command is carried out for the first time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum First {
    Yes,
    No,
}

impl Driver {
    /// The latest succession.
    pub(super) fn succession_status(&self) -> Option<SuccessionStatus> {
        match &self.succession {
            Succession::None => None,
            Succession::Yielding(yielding) => Some(yielding.status()),
            Succession::TakingOver(taking) => Some(taking.status()),
        }
    }

    /// Refuses what must not happen while another process is about to take the machine over.
    pub(super) fn admit_without_succession(&self) -> Result<(), Problem> {
        match self.succession_status() {
            Some(status)
                if !matches!(
                    status.phase,
                    SuccessionPhase::Completed | SuccessionPhase::Failed
                ) =>
            {
                Err(Problem::conflict(
                    "succeeding",
                    "another process of this host is taking the machine over",
                )
                .with_remedy("repeat this when that is done"))
            }
            _ => Ok(()),
        }
    }

    /// Lets a successor come for the machine.
    pub(in crate::process) fn offer_succession(
        &mut self,
        request: OfferSuccession,
    ) -> Result<SuccessionStatus, Problem> {
        admit_epoch(request.epoch, self.epoch)?;
        if let Some(status) = self.succession_status()
            && status.succession == request.succession
            && status.phase != SuccessionPhase::Failed
        {
            return Ok(status);
        }
        self.admit_without_succession()?;
        self.admit_without_snapshot()?;
        self.admit_without_migration()?;
        admit(Request::Succeed, &self.state.borrow())?;
        let offered = self.offered(&request)?;
        let yielding = Arc::new(Yielding::new(request.succession));
        let predecessor = Predecessor {
            driver: self.handle.clone(),
            yielding: yielding.clone(),
        };
        let ours = yielding.clone();
        spawn("succession", move || {
            yield_machine(&ours, offered, &predecessor)
        })?;
        let status = yielding.status();
        self.succession = Succession::Yielding(yielding);
        Ok(status)
    }

    fn offered(&mut self, request: &OfferSuccession) -> Result<Offered, Problem> {
        let cpu = self.cpu()?;
        let (Some(vm), Some(spec)) = (self.vm, self.spec.clone()) else {
            return Err(Problem::internal("a machine without identity"));
        };
        let unguarded =
            spec.devices
                .disks
                .iter()
                .zip(&self.attachments.disks)
                .find(|(disk, file)| {
                    disk.access == DiskAccess::ReadWrite
                        && file.lock.is_none()
                        && file.format == DiskFormat::Qcow2
                });
        if let Some((disk, _)) = unguarded {
            return Err(Problem::conflict(
                "disk-without-lock",
                format!(
                    "disk {} is a qcow2 image on a device: two processes cannot have it open in turn",
                    disk.name
                ),
            )
            .with_remedy("stop and start the VM instead"));
        }
        let machine = self.machine()?;
        admit_whole_memory(machine)?;
        let memory = machine
            .ram()
            .lend()
            .map_err(|error| Problem::internal(format!("guest memory cannot be lent: {error}")))?;
        let listener = listen(&request.socket).map_err(|error| {
            Problem::invalid(vec![FieldProblem::new(
                "socket",
                format!(
                    "{} cannot be listened on: {error}",
                    request.socket.display()
                ),
                "give a path in a directory of this process's user where nothing is yet",
            )])
        })?;
        Ok(Offered {
            vm,
            epoch: self.epoch,
            offer: Offer {
                version: SUCCESSION_VERSION,
                spec,
                lease: self.lease.clone(),
                attachments: self.attachments.clone(),
                cpu,
                guest_cpu: machine.guest_cpu().clone(),
                keep_memory_mib: self.keep_memory,
            },
            memory,
            listener,
            socket: request.socket.clone(),
        })
    }

    /// The agent's record names this process as the machine's: no successor will run it.
    pub(in crate::process) fn abort_succession(
        &mut self,
        command: SuccessionCommand,
    ) -> Result<SuccessionStatus, Problem> {
        self.admit_succession(command)?;
        let Succession::Yielding(yielding) = &self.succession else {
            return Err(Problem::conflict(
                "wrong-role",
                "a successor is not told to abort but killed",
            ));
        };
        let yielding = yielding.clone();
        yielding
            .abort("the host's agent has called it off")
            .map_err(refused)?;
        self.resume_after_succession();
        Ok(yielding.status())
    }

    /// The agent's record names this process as the machine's: it goes on here.
    pub(in crate::process) fn commit_succession(
        &mut self,
        command: SuccessionCommand,
    ) -> Result<SuccessionStatus, Problem> {
        self.admit_succession(command)?;
        let Succession::TakingOver(taking) = &self.succession else {
            return Err(Problem::conflict(
                "wrong-role",
                "this is the predecessor of the succession",
            ));
        };
        let taking = taking.clone();
        if taking.commit(command.epoch).map_err(refused)? {
            // The machine is this process's now, whatever happens: if it cannot go on, it must be seen to need help.
            let state = self.go_on(self.before_hand_over)?;
            taking.completed();
            self.enter(state);
            release_start_pages();
            tracing::info!(blackout = ?taking.status().blackout, "the machine runs in this process now");
        }
        Ok(taking.status())
    }

    /// The machine will not go on as it is: it is not handed over.
    pub(super) fn cancel_succession(&mut self, reason: &str) {
        let refused = match &self.succession {
            Succession::Yielding(yielding) if yielding.is_under_way() => {
                yielding.cancel(reason).err()
            }
            Succession::TakingOver(taking) if taking.waits() => taking.void(reason).err(),
            _ => None,
        };
        if let Some(refused) = refused {
            tracing::error!(%refused, reason, "the succession could not be called off");
        }
    }

    fn admit_succession(&self, command: SuccessionCommand) -> Result<(), Problem> {
        admit_epoch(command.epoch, self.epoch)?;
        match self.succession_status() {
            Some(status) if status.succession == command.succession => Ok(()),
            _ => Err(Problem::not_found("succession", command.succession)),
        }
    }

    /// Builds the machine around its predecessor's memory.
    fn build_successor(
        &mut self,
        request: &PrepareSuccession,
        offer: Offer,
        memory: File,
        taking: Arc<TakingOver>,
    ) -> Result<GuestRam, Problem> {
        admit(Request::Build, &self.state.borrow())?;
        let problems = offer.spec.problems("spec");
        if !problems.is_empty() {
            return Err(Problem::invalid(problems));
        }
        let unfit = |mismatch: godwit_wire::machine::CpuMismatch| {
            Problem::conflict("cpu-mismatch", mismatch.to_string())
                .with_remedy("migrate the VM to another host instead")
        };
        self.cpu()?
            .admits(offer.spec.cpu, Some(&offer.cpu.signature))
            .map_err(unfit)?;
        let machine = self
            .parts(request.vm, &offer.spec, &offer.attachments)
            .and_then(|parts| Machine::succeed(&parts, offer.lease.as_deref(), memory))
            .map_err(|error| error.problem("spec"))?;
        offer
            .guest_cpu
            .can_go_on(machine.guest_cpu(), machine.tsc_scaling())
            .map_err(unfit)?;
        let ram = machine.ram().clone();
        self.machine = Some(machine);
        (self.vm, self.epoch) = (Some(request.vm), request.epoch);
        (self.spec, self.lease) = (Some(offer.spec), offer.lease);
        (self.attachments, self.keep_memory) = (offer.attachments, offer.keep_memory_mib);
        self.succession = Succession::TakingOver(taking);
        self.publish_input();
        self.enter(VmmState::Incoming);
        Ok(ram)
    }

    fn begin_take(
        &mut self,
        command: SuccessionCommand,
    ) -> Result<(Arc<TakingOver>, First), Problem> {
        self.admit_succession(command)?;
        let Succession::TakingOver(taking) = &self.succession else {
            return Err(Problem::conflict(
                "wrong-role",
                "this is the predecessor of the succession",
            ));
        };
        let phase = taking.status().phase;
        if matches!(phase, SuccessionPhase::Ready | SuccessionPhase::Completed) {
            return Ok((taking.clone(), First::No));
        }
        taking.enter_blackout().map_err(refused)?;
        Ok((taking.clone(), First::Yes))
    }

    /// Makes the machine what its predecessor handed over.
    fn arrive(
        &mut self,
        taking: &Arc<TakingOver>,
        arrived: Result<Arrived, SuccessionError>,
    ) -> Result<(), Problem> {
        let restored = arrived.and_then(|arrived| self.restore_arrived(taking, arrived));
        restored.map_err(|error| {
            self.void_successor(taking, &error.to_string());
            error.problem()
        })
    }

    fn restore_arrived(
        &mut self,
        taking: &TakingOver,
        arrived: Arrived,
    ) -> Result<(), SuccessionError> {
        let Arrived {
            state,
            saved,
            lent,
            console,
        } = arrived;
        let machine = self
            .machine
            .as_ref()
            .ok_or_else(|| MachineError::BadState(MACHINE_GONE.into()))?;
        machine.inherit(lent)?;
        let age = Duration::from_nanos(boot_time_ns().saturating_sub(state.sampled_at_ns));
        machine.restore(saved, age)?;
        self.handle.console.go_on_from(&console, state.console_end);
        self.counted = state.counted;
        self.before_hand_over = state.then;
        taking.ready(&state)?;
        self.enter(VmmState::Paused {
            reason: PauseReason::HandOver,
        });
        Ok(())
    }

    /// Nothing of the machine here may ever run; its predecessor has it.
    fn void_successor(&mut self, taking: &TakingOver, reason: &str) {
        match taking.void(reason) {
            Ok(()) => {
                tracing::info!(reason, "the machine is not taken over");
                self.drop_machine();
                self.enter(VmmState::Stopped {
                    reason: StopReason::IncomingAborted,
                });
            }
            Err(error) => tracing::error!(%error, reason, "the machine runs here already"),
        }
    }

    /// Whether this very attempt is the latest: the thread of an earlier one may still be ending, and has no say, also
    /// where both have the same name.
    fn is_current_succession(&self, attempt: &Arc<Yielding>) -> bool {
        matches!(&self.succession, Succession::Yielding(latest) if Arc::ptr_eq(latest, attempt))
    }

    /// Whether the machine's state has been handed to a successor: nothing but the agent's word lets it run here.
    pub(super) fn has_yielded(&self) -> bool {
        matches!(&self.succession, Succession::Yielding(yielding) if !yielding.hand_over().may_run())
    }

    /// Lets a guest that was paused for its successor go on here as it was, if it may. One that stands still for a
    /// migration is none of this one's business.
    fn resume_after_succession(&mut self) {
        if self
            .migration_status()
            .is_some_and(|status| !status.phase.is_final())
        {
            return;
        }
        let may_run = match &self.succession {
            Succession::Yielding(yielding) => yielding.hand_over().may_run(),
            _ => false,
        };
        let handing_over = VmmState::Paused {
            reason: PauseReason::HandOver,
        };
        if !may_run || *self.state.borrow() != handing_over {
            return;
        }
        if let Ok(state) = self.go_on(self.before_hand_over) {
            self.enter(state);
        }
    }

    fn hand_over_to_successor(&mut self) -> Result<Handed, MachineError> {
        let handing_over = VmmState::Paused {
            reason: PauseReason::HandOver,
        };
        let machine = self
            .machine
            .as_ref()
            .filter(|_| *self.state.borrow() == handing_over)
            .ok_or_else(|| MachineError::BadState(MACHINE_GONE.into()))?;
        // From here on the successor may take what this machine held.
        machine.step_aside()?;
        let (saved, sampled) = machine.save()?;
        Ok(Handed {
            saved,
            sampled,
            lent: machine.lend()?,
            counted: self.count(),
            console: self.handle.console.held(),
        })
    }
}

fn ending() -> Problem {
    Problem::internal("this VMM is ending")
}

fn refused(error: HandOverError) -> Problem {
    SuccessionError::from(error).problem()
}

/// Listens where only this process's user may connect.
fn listen(path: &Path) -> io::Result<UnixListener> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let listener = UnixListener::bind(path)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
    Ok(listener)
}

/// The driver, as the thread of one succession knows it.
struct Predecessor {
    driver: DriverHandle,
    yielding: Arc<Yielding>,
}

impl Predecessor {
    /// Lets the driver take a step of this succession, if it is still the latest one.
    fn step<T: Send + 'static>(
        &self,
        step: impl FnOnce(&mut Driver) -> Result<T, MachineError> + Send + 'static,
    ) -> Result<T, MachineError> {
        let attempt = self.yielding.clone();
        let done = self.driver.call_blocking(move |driver| {
            if driver.is_current_succession(&attempt) && attempt.is_under_way() {
                step(driver)
            } else {
                Err(MachineError::BadState(
                    "the succession was called off".into(),
                ))
            }
        });
        done.unwrap_or_else(|| Err(MachineError::BadState("this VMM is ending".into())))
    }
}

impl PredecessorMachine for Predecessor {
    fn pause(&self) -> Result<Arrival, MachineError> {
        self.step(Driver::pause_for_hand_over)
    }

    fn save(&self) -> Result<Handed, MachineError> {
        self.step(Driver::hand_over_to_successor)
    }

    fn resume(&self) {
        let attempt = self.yielding.clone();
        self.driver.post(move |driver| {
            if driver.is_current_succession(&attempt) {
                driver.resume_after_succession();
            }
        });
    }
}
