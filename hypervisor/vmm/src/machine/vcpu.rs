//! One thread per vCPU.
//!
//! ```text
//!            call(f)                 run                      stop requested, lease over,
//!   waiting ────────▶ waiting     waiting ──────▶ running ──────────────────────────────▶ waiting
//!                                                          guest reset, power-off, fault
//! ```
//!
//! While waiting the thread executes calls (save, restore, …) on its vCPU; while running it is in `KVM_RUN` or
//! handles an exit. It looks at the stop flag after every interruption, and at the lease each time before it enters
//! the guest: a process that was frozen past its lease therefore never runs guest code again, whatever the
//! rest of it does.

use super::MachineError;
use super::memory_bus::MemoryBus;
use super::throttle::{Handle, Hold};
use crate::devices::{PortBus, PowerEvent};
use crate::kvm::{Kick, Kickable, KvmError, VcpuExit, VcpuFd};
use crate::memory::LeasePage;
use godwit_devices::device::DeviceEvent;
use godwit_wire::lease::LeaseState;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU64, Ordering};
use std::sync::mpsc::{self, Receiver, Sender};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// How long a vCPU may take to answer, before the machine counts as broken. Entering the kernel's slowest
/// ioctls takes milliseconds.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);
/// A vCPU that has not stopped after this long is kicked again.
const KICK_AGAIN: Duration = Duration::from_millis(50);

/// What a vCPU reports by itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum MachineEvent {
    /// The guest restarts or ends its machine.
    Power(PowerEvent),
    /// The lease is over; the vCPU has stopped.
    LeaseExpired,
    /// A device reports something.
    Device(DeviceEvent),
    /// KVM cannot go on with this vCPU.
    Fault(String),
}

/// Where vCPUs report to.
pub(super) type EventSink = Arc<dyn Fn(MachineEvent) + Send + Sync>;

/// Counters of one vCPU.
#[derive(Debug, Default)]
pub struct VcpuStats {
    /// Exits to this process.
    pub exits: AtomicU64,
    /// Port exits.
    pub io_exits: AtomicU64,
    /// MMIO exits.
    pub mmio_exits: AtomicU64,
    /// Kernel's id of the thread.
    pub thread: AtomicI32,
}

/// What all vCPUs of a machine look at before they enter the guest.
#[derive(Debug, Default)]
pub(super) struct Gate {
    pub(super) stop: AtomicBool,
    pub(super) lease: Option<LeasePage>,
}

impl Gate {
    /// Whether the lease, if there is one, allows guest code to run now.
    pub(super) fn lease_allows(&self) -> bool {
        self.lease
            .as_ref()
            .is_none_or(|lease| matches!(lease.state(), LeaseState::Held { .. }))
    }
}

type Call = Box<dyn FnOnce(&mut VcpuFd) + Send>;

enum Command {
    Call(Call),
    Run,
}

/// Everything outside the CPU that guest code reaches.
#[derive(Clone, Debug)]
pub(super) struct Buses {
    pub(super) ports: PortBus,
    pub(super) memory: MemoryBus,
}

/// A vCPU thread.
pub(super) struct Vcpu {
    index: u8,
    commands: Option<Sender<Command>>,
    kick: Kick,
    hold: Arc<Hold>,
    pub(super) stats: Arc<VcpuStats>,
    thread: Option<JoinHandle<()>>,
}

/// User and system time of a thread of this process.
pub(super) fn thread_cpu_time(thread: i32) -> Duration {
    let stat =
        std::fs::read_to_string(format!("/proc/self/task/{thread}/schedstat")).unwrap_or_default();
    let ns = stat.split_whitespace().next();
    Duration::from_nanos(ns.and_then(|ns| ns.parse().ok()).unwrap_or_default())
}

impl Vcpu {
    /// Moves `fd` to a thread of its own.
    pub(super) fn start(
        index: u8,
        fd: VcpuFd,
        buses: Buses,
        gate: Arc<Gate>,
        events: EventSink,
    ) -> Result<Self, MachineError> {
        let (commands, inbox) = mpsc::channel();
        let (kick, stats) = (Kick::new(), Arc::new(VcpuStats::default()));
        let (thread_kick, thread_stats) = (kick.clone(), stats.clone());
        let hold = Arc::new(Hold::default());
        let thread_hold = hold.clone();
        let thread = std::thread::Builder::new()
            .name(format!("vcpu{index}"))
            .spawn(move || {
                thread_stats.thread.store(
                    rustix::thread::gettid().as_raw_nonzero().get(),
                    Ordering::Relaxed,
                );
                let vcpu = Kickable::register(fd, thread_kick);
                Runner {
                    vcpu,
                    buses,
                    gate,
                    hold: thread_hold,
                    stats: thread_stats,
                    events,
                }
                .serve(&inbox);
            })
            .map_err(|source| MachineError::Os {
                what: "a vCPU thread cannot be started",
                source,
            })?;
        Ok(Self {
            index,
            commands: Some(commands),
            kick,
            hold,
            stats,
            thread: Some(thread),
        })
    }

    /// Enters the guest.
    pub(super) fn run(&self) -> Result<(), MachineError> {
        self.send(Command::Run)
    }

    /// Interrupts the guest, so that the gate is looked at.
    pub(super) const fn kick(&self) -> &Kick {
        &self.kick
    }

    /// What it takes to keep the vCPU from running.
    pub(super) fn throttle(&self) -> Handle {
        Handle {
            hold: self.hold.clone(),
            kick: self.kick.clone(),
            stats: self.stats.clone(),
        }
    }

    /// Makes the vCPU look at the gate, wherever it is.
    pub(super) fn interrupt(&self) {
        self.kick.kick();
        self.hold.release();
    }

    /// Starts `f` on the vCPU as soon as it waits; the answer comes through the receiver.
    pub(super) fn call<T: Send + 'static>(
        &self,
        f: impl FnOnce(&mut VcpuFd) -> T + Send + 'static,
    ) -> Result<Answer<T>, MachineError> {
        let (answer, receiver) = mpsc::sync_channel(1);
        self.send(Command::Call(Box::new(move |vcpu| {
            // A caller that gave up waiting is no error.
            let _ = answer.send(f(vcpu));
        })))?;
        Ok(Answer {
            receiver,
            index: self.index,
            kick: self.kick.clone(),
        })
    }

    fn send(&self, command: Command) -> Result<(), MachineError> {
        let commands = self
            .commands
            .as_ref()
            .ok_or(MachineError::VcpuGone(self.index))?;
        commands
            .send(command)
            .map_err(|_| MachineError::VcpuGone(self.index))
    }
}

impl Drop for Vcpu {
    fn drop(&mut self) {
        // The thread ends when it waits and nobody can command it any more; the gate's stop flag is set by then.
        self.commands = None;
        while self
            .thread
            .as_ref()
            .is_some_and(|thread| !thread.is_finished())
        {
            self.interrupt();
            std::thread::park_timeout(Duration::from_millis(1));
        }
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// An answer that is on its way.
pub(super) struct Answer<T> {
    receiver: Receiver<T>,
    index: u8,
    kick: Kick,
}

impl<T> Answer<T> {
    /// Waits for it.
    pub(super) fn wait(self) -> Result<T, MachineError> {
        let deadline = Instant::now() + ANSWER_TIMEOUT;
        loop {
            match self.receiver.recv_timeout(KICK_AGAIN) {
                Ok(answer) => return Ok(answer),
                Err(mpsc::RecvTimeoutError::Timeout) if Instant::now() < deadline => {
                    self.kick.kick()
                }
                Err(_) => return Err(MachineError::VcpuGone(self.index)),
            }
        }
    }
}

struct Runner {
    vcpu: Kickable,
    buses: Buses,
    gate: Arc<Gate>,
    hold: Arc<Hold>,
    stats: Arc<VcpuStats>,
    events: EventSink,
}

/// Whether the guest goes on after an exit.
enum Next {
    Enter,
    Wait,
}

/// What an exit was.
enum Served {
    /// The guest reached a device, which has answered.
    Io,
    /// KVM came back for reasons of its own.
    Interrupted,
    /// The CPU gave up (triple fault).
    Shutdown,
    /// The guest cannot go on.
    Stop(MachineEvent),
}

fn serve(exit: VcpuExit<'_>, buses: &Buses, stats: &VcpuStats) -> Served {
    stats.exits.fetch_add(1, Ordering::Relaxed);
    let count = |exits: &AtomicU64| exits.fetch_add(1, Ordering::Relaxed);
    match exit {
        VcpuExit::IoIn(port, data) => {
            count(&stats.io_exits);
            buses.ports.read(port, data);
            Served::Io
        }
        VcpuExit::IoOut(port, data) => {
            count(&stats.io_exits);
            let event = buses.ports.write(port, data);
            event.map_or(Served::Io, |event| Served::Stop(MachineEvent::Power(event)))
        }
        VcpuExit::MmioRead(address, data) => {
            count(&stats.mmio_exits);
            buses.memory.read(address, data);
            Served::Io
        }
        VcpuExit::MmioWrite(address, data) => {
            count(&stats.mmio_exits);
            buses.memory.write(address, data);
            Served::Io
        }
        VcpuExit::Intr | VcpuExit::IrqWindowOpen | VcpuExit::Hlt => Served::Interrupted,
        VcpuExit::Shutdown => Served::Shutdown,
        other => Served::Stop(MachineEvent::Fault(format!("{other:?}"))),
    }
}

impl Runner {
    fn serve(mut self, inbox: &Receiver<Command>) {
        while let Ok(command) = inbox.recv() {
            match command {
                Command::Call(f) => f(self.vcpu.vcpu()),
                Command::Run => self.run(),
            }
        }
    }

    fn run(&mut self) {
        loop {
            // In this order: a kick that comes after `accept_kicks` ends the KVM_RUN below at once, one that
            // came before has set what is looked at here.
            self.vcpu.accept_kicks();
            self.hold.wait(&self.gate.stop);
            if self.gate.stop.load(Ordering::SeqCst) {
                break;
            }
            if !self.gate.lease_allows() {
                (self.events)(MachineEvent::LeaseExpired);
                break;
            }
            if matches!(self.run_until_interrupted(), Next::Wait) {
                break;
            }
        }
        self.finish_io();
    }

    /// Lets KVM finish the I/O of the latest exit, which may come in several pieces, without running the guest
    /// further.
    fn finish_io(&mut self) {
        self.vcpu.bar_entry();
        while let Ok(exit) = self.vcpu.vcpu().run() {
            match serve(exit, &self.buses, &self.stats) {
                Served::Io => {}
                Served::Stop(event) => return (self.events)(event),
                Served::Interrupted | Served::Shutdown => return,
            }
        }
    }

    /// Handles exits until a kick, or until the guest cannot go on.
    fn run_until_interrupted(&mut self) -> Next {
        loop {
            // A process that was frozen while it handled an exit must not enter the guest past its lease.
            if !self.gate.lease_allows() {
                return Next::Enter;
            }
            let event = match self.vcpu.vcpu().run() {
                Err(error) if matches!(error.errno(), libc::EINTR | libc::EAGAIN) => {
                    return Next::Enter;
                }
                Err(error) => MachineEvent::Fault(KvmError::during("KVM_RUN")(error).to_string()),
                Ok(exit) => match serve(exit, &self.buses, &self.stats) {
                    Served::Io => continue,
                    Served::Interrupted => return Next::Enter,
                    Served::Stop(event) => event,
                    Served::Shutdown => {
                        let found = self.describe("triple fault");
                        tracing::warn!(
                            found,
                            "a vCPU cannot go on; the machine restarts as a PC would"
                        );
                        MachineEvent::Power(PowerEvent::Reset)
                    }
                },
            };
            let event = match event {
                MachineEvent::Fault(reason) => MachineEvent::Fault(self.describe(&reason)),
                event => event,
            };
            (self.events)(event);
            return Next::Wait;
        }
    }

    /// A fault with what a developer needs to find it.
    fn describe(&mut self, reason: &str) -> String {
        let vcpu = self.vcpu.vcpu();
        let rip = vcpu.get_regs().map_or(0, |regs| regs.rip);
        let cr3 = vcpu.get_sregs().map_or(0, |sregs| sregs.cr3);
        format!("{reason} at rip {rip:#x} (cr3 {cr3:#x})")
    }
}
