//! The one thread that changes the machine's state.
//!
//! API handlers, migration threads and vCPUs send it closures and events; it takes them one by one. Long work
//! (copying memory, watching dirty pages) happens on other threads, which come back here for every step that
//! changes what the machine does.

use super::admission::{Admission, Request, admit, admit_epoch};
use crate::devices::{Console, GuestInput, PowerEvent};
use crate::kvm::{self, DirtyLogSource};
use crate::machine::{Machine, MachineError, MachineEvent, MachineParts};
use crate::memory::{GuestRam, release_start_pages};
use crate::migration::{
    Incoming, Ledger, MigrationListener, Outgoing, SourceHandOver, TargetHandOver, receive_machine,
    send_machine,
};
use crate::snapshot::Filler;
use crate::succession::{TakingOver, Yielding};
use godwit_wire::devices::Attachments;
use godwit_wire::id::{Epoch, VmId};
use godwit_wire::machine::{Boot, CpuFacts, MachineSpec};
use godwit_wire::migration::{Arrival, Counted, MigrationRole, MigrationStatus};
use godwit_wire::problem::{FieldProblem, Problem};
use godwit_wire::unit::{Bytes, Mib};
use godwit_wire::vmm_api::{
    Command, Counters, CreateRequest, IncomingReady, IncomingRequest, MigrationCommand,
    OutgoingRequest, PauseReason, StopReason, VmmInfo, VmmState,
};
use std::io;
use std::path::PathBuf;
use std::sync::mpsc::{Receiver, Sender};
use std::sync::{Arc, RwLock};
use std::time::{Duration, Instant};
use tokio::sync::{mpsc as tokio_mpsc, oneshot, watch};

mod devices;
mod dirtying;
mod migrating;
mod snapshots;
mod succeeding;
mod travelling;

/// The byte that asks a guest without ACPI to stop: end of transmission, as a terminal's Ctrl-D.
const END_OF_TRANSMISSION: u8 = 4;

/// For how long a machine that restarts is tried again while somebody may still be letting go of what it needs,
const LET_GO_TIME: Duration = Duration::from_secs(15);
/// and after which pause each time.
const LET_GO_PAUSE: Duration = Duration::from_millis(100);

type Work = Box<dyn FnOnce(&mut Driver) + Send>;

enum Message {
    Work(Work),
    /// From the machine with this number; an earlier machine's events mean nothing any more.
    Event(u64, MachineEvent),
}

/// How a VMM ends.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    /// It was told to end.
    Dismissed,
    /// Its machine stopped.
    Stopped(StopReason),
    /// Its machine cannot go on.
    Fault(String),
}

/// Talks to the driver.
#[derive(Clone)]
pub(super) struct DriverHandle {
    inbox: Sender<Message>,
    console: Console,
    input: Arc<RwLock<Option<GuestInput>>>,
    state: watch::Receiver<VmmState>,
}

impl DriverHandle {
    /// Starts the driver. The receiver gives the outcome once the driver has decided to end the process.
    pub(super) fn start(
        builtin: &'static [u8],
    ) -> io::Result<(Self, tokio_mpsc::Receiver<Outcome>)> {
        let (inbox, messages) = std::sync::mpsc::channel();
        let (end, ended) = tokio_mpsc::channel(1);
        let (state_sender, state) = watch::channel(VmmState::Empty);
        let handle = Self {
            inbox,
            console: Console::default(),
            input: Arc::default(),
            state,
        };
        let driver = Driver {
            builtin,
            started: Instant::now(),
            handle: handle.clone(),
            end,
            cpu: None,
            vm: None,
            epoch: Epoch(0),
            spec: None,
            lease: None,
            attachments: Attachments::default(),
            machine: None,
            filler: None,
            keep_memory: None,
            machine_number: 0,
            resets: 0,
            state: state_sender,
            migration: Migration::None,
            snapshotting: None,
            succession: Succession::None,
            counted: Counted::default(),
            before_hand_over: Arrival::Run,
            resets_when_whole: false,
        };
        std::thread::Builder::new()
            .name("driver".into())
            .spawn(move || driver.serve(&messages))?;
        Ok((handle, ended))
    }

    /// Lets the driver do `work` and gives its answer.
    pub(super) async fn call<T: Send + 'static>(
        &self,
        work: impl FnOnce(&mut Driver) -> Result<T, Problem> + Send + 'static,
    ) -> Result<T, Problem> {
        let (answer, receiver) = oneshot::channel();
        self.post(move |driver| {
            let _ = answer.send(work(driver));
        });
        receiver
            .await
            .unwrap_or_else(|_| Err(Problem::internal("this VMM is ending")))
    }

    /// [`Self::call`] from a thread that may block.
    fn call_blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce(&mut Driver) -> T + Send + 'static,
    ) -> Option<T> {
        let (answer, receiver) = oneshot::channel();
        self.post(move |driver| {
            let _ = answer.send(work(driver));
        });
        receiver.blocking_recv().ok()
    }

    fn post(&self, work: impl FnOnce(&mut Driver) + Send + 'static) {
        // Without a driver the process is ending, and whoever waits for an answer hears that.
        let _ = self.inbox.send(Message::Work(Box::new(work)));
    }

    /// What the guest wrote.
    pub(super) const fn console(&self) -> &Console {
        &self.console
    }

    /// Input for the guest's console.
    pub(super) fn type_in(&self, bytes: &[u8]) -> Result<(), Problem> {
        match &*self
            .input
            .read()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
        {
            None => Err(Problem::conflict(
                "wrong-state",
                "there is no machine to type to",
            )),
            Some(input) => input
                .send(bytes)
                .map_err(|error| Problem::conflict("serial-input-full", error.to_string())),
        }
    }

    /// Waits until the machine has stopped or cannot go on.
    pub(super) async fn wait_until_over(&self) -> Outcome {
        let over = |state: &VmmState| match state {
            VmmState::Stopped { reason } => Some(Outcome::Stopped(reason.clone())),
            VmmState::Paused {
                reason: PauseReason::Fault { detail },
            } => Some(Outcome::Fault(detail.clone())),
            _ => None,
        };
        let mut state = self.state.clone();
        match state.wait_for(|state| over(state).is_some()).await {
            Ok(state) => over(&state).unwrap_or(Outcome::Dismissed),
            Err(_) => Outcome::Dismissed,
        }
    }

    /// Drops the machine, whatever it does.
    pub(super) async fn dismiss(&self) {
        let _ = self
            .call(|driver| {
                driver.drop_unless_memory_is_missing();
                Ok(())
            })
            .await;
    }
}

/// The state of a machine that was to go on and does not. Without a lease it would have stopped by itself.
fn paused_by(machine: &Machine, problem: Problem) -> VmmState {
    let reason = if machine.lease_allows() {
        PauseReason::Fault {
            detail: problem.detail,
        }
    } else {
        PauseReason::LeaseExpired
    };
    VmmState::Paused { reason }
}

enum Migration {
    None,
    Outgoing(Arc<Outgoing>),
    Incoming(Arc<Incoming>, Epoch),
}

enum Succession {
    None,
    Yielding(Arc<Yielding>),
    TakingOver(Arc<TakingOver>),
}

/// See the module's documentation.
pub(super) struct Driver {
    builtin: &'static [u8],
    started: Instant,
    handle: DriverHandle,
    end: tokio_mpsc::Sender<Outcome>,
    cpu: Option<CpuFacts>,
    vm: Option<VmId>,
    epoch: Epoch,
    spec: Option<MachineSpec>,
    lease: Option<PathBuf>,
    attachments: Attachments,
    machine: Option<Machine>,
    /// Brings in the memory of a machine that was restored.
    filler: Option<Filler>,
    machine_number: u64,
    /// What the operator has asked the guest to live with; also after it restarts itself.
    keep_memory: Option<Mib>,
    resets: u64,
    state: watch::Sender<VmmState>,
    migration: Migration,
    /// Where a snapshot is being written to.
    snapshotting: Option<PathBuf>,
    succession: Succession,
    /// What the machine's former processes have counted.
    counted: Counted,
    /// What the guest was doing when it was paused for the hand-over under way.
    before_hand_over: Arrival,
    /// The guest has restarted itself before all of its memory was here.
    resets_when_whole: bool,
}

impl Driver {
    fn serve(mut self, messages: &Receiver<Message>) {
        while let Ok(message) = messages.recv() {
            match message {
                Message::Work(work) => work(&mut self),
                Message::Event(number, event) if number == self.machine_number => {
                    self.handle_event(event)
                }
                Message::Event(..) => {}
            }
        }
    }

    /// Everything about this VMM.
    pub(super) fn info(&mut self) -> Result<VmmInfo, Problem> {
        let mut vcpus = Vec::new();
        let mut devices = Vec::new();
        let (mut resident, mut expected) = (Bytes(0), Bytes(0));
        if let Some(machine) = &self.machine {
            vcpus = machine.vcpu_info().0;
            (resident, expected) = (machine.ram().resident(), machine.ram().expected());
            devices = machine.devices();
        }
        let counted = self.count();
        let counters = Counters {
            exits: counted.exits,
            io_exits: counted.io_exits,
            mmio_exits: counted.mmio_exits,
            serial_rx_bytes: counted.serial_rx_bytes,
            resets: counted.resets,
            serial_tx_bytes: counted.serial_tx_bytes,
        };
        let cpu = self.cpu()?;
        Ok(VmmInfo {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            pid: std::process::id(),
            vm: self.vm,
            epoch: self.epoch,
            spec: self.spec.clone(),
            state: self.state.borrow().clone(),
            uptime_ms: self.started.elapsed().as_millis() as u64,
            cpu,
            guest_resident_bytes: resident,
            guest_expected_bytes: expected,
            counters,
            vcpus,
            devices,
            migration: self.migration_status(),
            succession: self.succession_status(),
        })
    }

    /// Counters of the machine, over all of its processes.
    fn count(&self) -> Counted {
        let mut counted = self.counted;
        counted.serial_tx_bytes = self.handle.console.written();
        // What came over a wire may be any number.
        let add = |sum: &mut u64, more: u64| *sum = sum.saturating_add(more);
        add(&mut counted.resets, self.resets);
        if let Some(machine) = &self.machine {
            let (vcpus, io_exits, mmio_exits) = machine.vcpu_info();
            let exits = vcpus.iter().map(|vcpu| vcpu.exits).sum();
            add(&mut counted.exits, exits);
            add(&mut counted.io_exits, io_exits);
            add(&mut counted.mmio_exits, mmio_exits);
            add(&mut counted.serial_rx_bytes, machine.serial().received());
        }
        counted
    }

    /// Builds the machine.
    pub(super) fn create(&mut self, request: CreateRequest) -> Result<VmmInfo, Problem> {
        self.build(
            request.vm,
            request.epoch,
            request.spec,
            request.lease,
            (request.attachments, None),
        )?;
        self.enter(VmmState::Created);
        self.info()
    }

    /// Lets the machine run from its kernel's first instruction.
    pub(super) fn boot(&mut self, command: Command) -> Result<VmmInfo, Problem> {
        if self.admit(Request::Boot, command)? == Admission::Act {
            let machine = self.machine()?;
            machine
                .load(self.builtin)
                .map_err(|error| error.problem("spec"))?;
            self.let_run(machine)?;
            self.enter(VmmState::Running);
            release_start_pages();
        }
        self.info()
    }

    /// Stops the vCPUs.
    pub(super) fn pause(&mut self, command: Command) -> Result<VmmInfo, Problem> {
        if self.admit(Request::Pause, command)? == Admission::Act {
            self.machine()?
                .pause()
                .map_err(|error| error.problem("spec"))?;
            self.enter(VmmState::Paused {
                reason: PauseReason::Requested,
            });
        }
        self.info()
    }

    /// Lets the vCPUs go on.
    pub(super) fn resume(&mut self, command: Command) -> Result<VmmInfo, Problem> {
        if self.admit(Request::Resume, command)? == Admission::Act {
            self.let_run(self.machine()?)?;
            self.enter(VmmState::Running);
        }
        self.info()
    }

    /// Asks the guest to stop; whether it does is up to it.
    pub(super) fn stop(&mut self, command: Command) -> Result<VmmInfo, Problem> {
        if self.admit(Request::Stop, command)? == Admission::Act {
            let pilot = self
                .spec
                .as_ref()
                .is_some_and(|spec| spec.boot == Boot::Pilot);
            let asked = if pilot {
                self.handle.type_in(&[END_OF_TRANSMISSION]).map(|()| true)?
            } else {
                self.machine()?
                    .press_power_button()
                    .map_err(|error| error.problem("spec"))?
            };
            if !asked {
                return Err(Problem::conflict(
                    "cannot-ask",
                    "a machine of type godwit-1 has no power button that a Linux guest would hear",
                )
                .with_remedy("shut the guest down from inside, or kill it"));
            }
        }
        self.info()
    }

    /// Ends the machine at once, and then this process.
    pub(super) fn kill(&mut self, command: Command) -> Result<VmmInfo, Problem> {
        if self.admit(Request::Kill, command)? == Admission::Act {
            self.cancel_migration("the VM was killed");
            self.drop_unless_memory_is_missing();
            self.enter(VmmState::Stopped {
                reason: StopReason::Killed,
            });
        }
        let info = self.info();
        let _ = self.end.try_send(Outcome::Stopped(StopReason::Killed));
        info
    }

    fn build(
        &mut self,
        vm: VmId,
        epoch: Epoch,
        spec: MachineSpec,
        lease: Option<PathBuf>,
        (attachments, memory): (Attachments, Option<GuestRam>),
    ) -> Result<(), Problem> {
        admit(Request::Build, &self.state.borrow())?;
        let problems = spec.problems("spec");
        if !problems.is_empty() {
            return Err(Problem::invalid(problems));
        }
        if let Err(mismatch) = self.cpu()?.admits(spec.cpu, None) {
            return Err(Problem::invalid(vec![FieldProblem::new(
                "spec.cpu",
                mismatch.to_string(),
                "choose a lower baseline or another host",
            )]));
        }
        self.machine = Some(
            self.build_machine(vm, &spec, lease.as_deref(), (&attachments, memory))
                .map_err(|error| error.problem("spec"))?,
        );
        (self.vm, self.epoch, self.spec, self.lease) = (Some(vm), epoch, Some(spec), lease);
        self.attachments = attachments;
        self.keep_memory = None;
        self.publish_input();
        Ok(())
    }

    fn build_machine(
        &mut self,
        vm: VmId,
        spec: &MachineSpec,
        lease: Option<&std::path::Path>,
        (attachments, memory): (&Attachments, Option<GuestRam>),
    ) -> Result<Machine, MachineError> {
        let parts = MachineParts {
            memory,
            ..self.parts(vm, spec, attachments)?
        };
        Machine::build(&parts, lease)
    }

    fn parts(
        &mut self,
        vm: VmId,
        spec: &MachineSpec,
        attachments: &Attachments,
    ) -> Result<MachineParts, MachineError> {
        kvm::install_kick_handler()?;
        self.machine_number += 1;
        let (number, inbox) = (self.machine_number, self.handle.inbox.clone());
        Ok(MachineParts {
            spec: spec.clone(),
            vm,
            attachments: attachments.clone(),
            memory: None,
            console: self.handle.console.clone(),
            events: Arc::new(move |event| {
                let _ = inbox.send(Message::Event(number, event));
            }),
        })
    }

    fn handle_event(&mut self, event: MachineEvent) {
        if self.has_yielded() {
            // Its vCPUs and devices stood still, and had been heard out, before its state was saved.
            tracing::error!("a machine that is another process's reports something; it is ignored");
            return;
        }
        match event {
            MachineEvent::LeaseExpired => {
                if *self.state.borrow() != VmmState::Running {
                    return;
                }
                self.stop_vcpus();
                // One vCPU may report what another reported before the lease was renewed.
                if let Some(machine) = &self.machine
                    && machine.lease_allows()
                    && machine.run().is_ok()
                {
                    return;
                }
                tracing::warn!(epoch = %self.epoch, "the lease ran out: the guest stands still");
                self.enter(VmmState::Paused {
                    reason: PauseReason::LeaseExpired,
                });
            }
            MachineEvent::Device(event) => self.handle_device_event(event),
            MachineEvent::Fault(detail) => {
                tracing::error!(%detail, "the guest cannot go on");
                self.stop_vcpus();
                self.cancel_migration("the guest cannot go on");
                self.enter(VmmState::Paused {
                    reason: PauseReason::Fault { detail },
                });
            }
            MachineEvent::Power(PowerEvent::Off) => {
                tracing::info!("the guest powered off");
                self.cancel_migration("the guest powered off");
                self.drop_unless_memory_is_missing();
                self.enter(VmmState::Stopped {
                    reason: StopReason::GuestHalted,
                });
            }
            MachineEvent::Power(PowerEvent::Reset) => {
                tracing::info!("the guest restarts");
                self.cancel_migration("the guest restarted");
                if self.lacks_memory() {
                    self.resets_when_whole = true;
                    self.stall("the guest restarts when all of its memory is here".into());
                } else {
                    self.reset();
                }
            }
        }
    }

    /// A fresh machine from the same spec, as after pressing a PC's reset button. It runs if the old one did.
    fn reset(&mut self) {
        let before = self.state.borrow().clone();
        self.drop_machine();
        let (Some(vm), Some(spec)) = (self.vm, self.spec.clone()) else {
            return;
        };
        let mut booted = self.boot_anew(vm, &spec, &before);
        // Whoever else holds the former memory (another process, a migration that is being called off) may need a
        // moment to let go, and the kernel another to have it back; so may the other process of a succession with what
        // this host gives only once.
        let let_go_by = Instant::now() + LET_GO_TIME;
        while Instant::now() < let_go_by
            && let Err(error) = &booted
            && (error.lacks_memory() || !matches!(self.succession, Succession::None))
        {
            std::thread::sleep(LET_GO_PAUSE);
            booted = self.boot_anew(vm, &spec, &before);
        }
        match booted {
            Ok((machine, state)) => {
                self.machine = Some(machine);
                self.resets += 1;
                self.publish_input();
                self.enter(state);
            }
            Err(error) => {
                let detail = error.problem("spec").detail;
                tracing::error!(%detail, "the guest restarted and cannot be booted again");
                self.enter(VmmState::Stopped {
                    reason: StopReason::Failed { detail },
                });
            }
        }
    }

    fn boot_anew(
        &mut self,
        vm: VmId,
        spec: &MachineSpec,
        before: &VmmState,
    ) -> Result<(Machine, VmmState), MachineError> {
        let (lease, attachments) = (self.lease.clone(), self.attachments.clone());
        let machine = self.build_machine(vm, spec, lease.as_deref(), (&attachments, None))?;
        if let Some(memory) = self.keep_memory {
            machine.keep_memory(memory);
        }
        machine.claim(self.epoch)?;
        machine.load(self.builtin)?;
        match before {
            VmmState::Running
            | VmmState::Paused {
                reason: PauseReason::HandOver | PauseReason::Memory { .. },
            } => {
                machine.run()?;
                Ok((machine, VmmState::Running))
            }
            still => Ok((machine, still.clone())),
        }
    }

    fn let_run(&self, machine: &Machine) -> Result<(), Problem> {
        if !machine.lease_allows() {
            return Err(Problem::conflict(
                "lease-expired",
                "this host's lease does not allow the guest to run",
            )
            .with_remedy("it runs again once the host agent has renewed its lease"));
        }
        machine
            .claim(self.epoch)
            .and_then(|()| machine.run())
            .map_err(|error| error.problem("spec"))
    }

    fn stop_vcpus(&self) {
        if self.lacks_memory() {
            if let Some(machine) = &self.machine {
                machine.stall();
            }
            return;
        }
        if let Some(machine) = &self.machine
            && let Err(error) = machine.pause()
        {
            tracing::error!(%error, "a vCPU did not stop");
        }
    }

    fn drop_machine(&mut self) {
        *self
            .handle
            .input
            .write()
            .unwrap_or_else(std::sync::PoisonError::into_inner) = None;
        self.machine = None;
        // Last: until then a vCPU may wait for what it brings.
        self.filler = None;
        // Events of the machine that is gone may still be queued; they mean nothing any more.
        self.machine_number += 1;
    }

    /// A machine that waits for memory ends with its process: see [`Self::lacks_memory`].
    fn drop_unless_memory_is_missing(&mut self) {
        if self.lacks_memory() {
            self.stop_vcpus();
        } else {
            self.drop_machine();
        }
    }

    fn publish_input(&self) {
        let input = self.machine.as_ref().map(Machine::input);
        *self
            .handle
            .input
            .write()
            .unwrap_or_else(std::sync::PoisonError::into_inner) = input;
    }

    fn enter(&self, state: VmmState) {
        tracing::debug!(?state, "state");
        self.state.send_replace(state);
    }

    fn admit(&self, request: Request, command: Command) -> Result<Admission, Problem> {
        admit_epoch(command.epoch, self.epoch)?;
        admit(request, &self.state.borrow())
    }

    fn machine(&self) -> Result<&Machine, Problem> {
        self.machine
            .as_ref()
            .ok_or_else(|| Problem::conflict("wrong-state", "there is no machine"))
    }

    fn cpu(&mut self) -> Result<CpuFacts, Problem> {
        if self.cpu.is_none() {
            let facts = kvm::open().and_then(|kvm| kvm::cpu_facts(&kvm));
            self.cpu = Some(facts.map_err(|error| MachineError::from(error).problem("spec"))?);
        }
        Ok(self.cpu.clone().expect("set above"))
    }
}
