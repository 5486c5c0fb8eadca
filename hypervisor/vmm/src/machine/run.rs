//! The machine as a whole.

use super::vcpu::{EventSink, Gate, Vcpu};
use super::{MachineError, MachineEvent, boot};
use crate::devices::{COM1_IRQ, Console, PortBus, SavedSerial, SerialPort};
use crate::kvm::{self, ClockAdvance, DirtyLogSource, KvmError, VcpuState, VmFd, VmState};
use crate::memory::{GuestRam, LeasePage};
use godwit_wire::lease::LeaseState;
use godwit_wire::machine::MachineSpec;
use godwit_wire::vmm_api::VcpuInfo;
use kvm_ioctls::Kvm;
use serde::{Deserialize, Serialize};
use std::path::Path;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use vmm_sys_util::eventfd::EventFd;

/// Layout of [`SavedMachine`].
const SAVED_VERSION: u32 = 1;

/// What a machine is made from.
#[derive(Clone)]
pub struct MachineParts {
    /// The machine.
    pub spec: MachineSpec,
    /// Where its serial output goes; outlives the machine.
    pub console: Console,
    /// Where it reports what the guest does by itself.
    pub events: Arc<dyn Fn(MachineEvent) + Send + Sync>,
}

impl std::fmt::Debug for MachineParts {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("MachineParts")
            .field("spec", &self.spec)
            .finish_non_exhaustive()
    }
}

/// Everything but memory, with all vCPUs stopped.
#[derive(Debug, Serialize, Deserialize)]
pub struct SavedMachine {
    version: u32,
    vm: VmState,
    vcpus: Vec<VcpuState>,
    serial: SavedSerial,
}

/// A machine whose vCPUs wait or run.
pub struct Machine {
    // Dropped in this order: the watch and the vCPUs stop before the VM and its memory go.
    lease_watch: Option<LeaseWatch>,
    vcpus: Vec<Vcpu>,
    gate: Arc<Gate>,
    bus: PortBus,
    msrs: Arc<[u32]>,
    dirty_log: DirtyLogSource,
    vm: Arc<VmFd>,
    kvm: Arc<Kvm>,
    ram: GuestRam,
    spec: MachineSpec,
}

impl std::fmt::Debug for Machine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Machine")
            .field("spec", &self.spec)
            .finish_non_exhaustive()
    }
}

impl Machine {
    /// Builds the whole machine: memory mapped, vCPUs and devices created, nothing running.
    pub fn build(parts: &MachineParts, lease: Option<&Path>) -> Result<Self, MachineError> {
        let spec = &parts.spec;
        let lease = lease.map(LeasePage::open).transpose()?;
        let kvm = Arc::new(kvm::open()?);
        let ram = GuestRam::new(spec.memory_mib)?;
        let vm = Arc::new(kvm::create_vm(&kvm)?);
        let dirty_log = DirtyLogSource::new(vm.clone(), ram.slots());
        ram.give_to(&vm)?;
        let serial = SerialPort::new(irq_line(&vm)?, parts.console.clone());
        let bus = PortBus::new(serial);
        let gate = Arc::new(Gate {
            stop: true.into(),
            lease,
        });
        let mut fds = Vec::new();
        for index in 0..spec.vcpus {
            let fd = vm
                .create_vcpu(u64::from(index))
                .map_err(KvmError::during("KVM_CREATE_VCPU"))?;
            let cpuid = kvm::guest_cpuid(&kvm, spec.cpu, index, spec.vcpus)?;
            fd.set_cpuid2(&cpuid)
                .map_err(KvmError::during("KVM_SET_CPUID2"))?;
            fds.push(fd);
        }
        let msrs: Arc<[u32]> = kvm::readable_msrs(&kvm, &fds[0])?.into();
        let events: EventSink = parts.events.clone();
        let vcpus = (0..)
            .zip(fds)
            .map(|(index, fd)| Vcpu::start(index, fd, bus.clone(), gate.clone(), events.clone()))
            .collect::<Result<Vec<_>, _>>()?;
        let lease_watch = match gate.lease {
            Some(_) => Some(LeaseWatch::start(
                gate.clone(),
                vcpus.iter().map(|vcpu| vcpu.kick().clone()).collect(),
            )?),
            None => None,
        };
        Ok(Self {
            lease_watch,
            vcpus,
            gate,
            bus,
            msrs,
            dirty_log,
            vm,
            kvm,
            ram,
            spec: spec.clone(),
        })
    }

    /// Loads what the spec boots and puts the first vCPU at its entry. For a machine that has never run.
    pub fn load(&self, builtin: &'static [u8]) -> Result<(), MachineError> {
        let entry = boot::load(&self.spec, builtin, &self.ram)?;
        self.vcpus[0]
            .call(move |vcpu| entry.enter(vcpu))?
            .wait()??;
        Ok(())
    }

    /// Whether the lease allows the guest to run.
    pub fn lease_allows(&self) -> bool {
        self.gate.lease_allows()
    }

    /// Lets all vCPUs run. They stop by themselves if the lease does not allow it.
    pub fn run(&self) -> Result<(), MachineError> {
        self.gate.stop.store(false, Ordering::SeqCst);
        if let Some(watch) = &self.lease_watch {
            watch.wake();
        }
        self.vcpus.iter().try_for_each(Vcpu::run)
    }

    /// Stops all vCPUs; returns when none runs and no I/O is half done.
    pub fn pause(&self) -> Result<(), MachineError> {
        self.gate.stop.store(true, Ordering::SeqCst);
        for vcpu in &self.vcpus {
            vcpu.kick().kick();
        }
        let answers = self
            .vcpus
            .iter()
            .map(|vcpu| vcpu.call(|_| ()))
            .collect::<Result<Vec<_>, _>>()?;
        let stopped = answers.into_iter().try_for_each(super::vcpu::Answer::wait);
        if stopped.is_err() {
            // Some have stopped and some have not: none may be left behind in between.
            self.run()?;
        }
        stopped
    }

    /// Saves everything but memory, and when guest time was sampled. vCPUs must be paused.
    pub fn save(&self) -> Result<(SavedMachine, Instant), MachineError> {
        let (at, sampled) = (ClockAdvance::now(0), Instant::now());
        let clock_ns = self
            .vm
            .get_clock()
            .map_err(KvmError::during("KVM_GET_CLOCK"))?
            .clock;
        let answers = self
            .vcpus
            .iter()
            .map(|vcpu| {
                let (kvm, msrs) = (self.kvm.clone(), self.msrs.clone());
                vcpu.call(move |fd| VcpuState::save(&kvm, fd, &msrs, &at))
            })
            .collect::<Result<Vec<_>, _>>()?;
        let vcpus = answers
            .into_iter()
            .map(|answer| Ok(answer.wait()??))
            .collect::<Result<Vec<_>, MachineError>>()?;
        let saved = SavedMachine {
            version: SAVED_VERSION,
            vm: VmState::save(&self.vm, clock_ns)?,
            vcpus,
            serial: self.bus.serial().save(),
        };
        Ok((saved, sampled))
    }

    /// Makes this machine, which has never run, what was saved. `age` is the time since guest time was sampled.
    pub fn restore(&self, saved: SavedMachine, age: Duration) -> Result<(), MachineError> {
        if saved.version != SAVED_VERSION {
            return Err(MachineError::BadState(format!(
                "it has version {} and this program knows {SAVED_VERSION}",
                saved.version
            )));
        }
        if saved.vcpus.len() != self.vcpus.len() {
            return Err(MachineError::BadState(format!(
                "it has {} vCPUs and this machine {}",
                saved.vcpus.len(),
                self.vcpus.len()
            )));
        }
        let advance = ClockAdvance::now(age.as_nanos() as u64);
        saved.vm.restore(&self.vm, advance.elapsed_ns())?;
        let answers = self
            .vcpus
            .iter()
            .zip(saved.vcpus)
            .map(|(vcpu, state)| {
                let kvm = self.kvm.clone();
                vcpu.call(move |fd| {
                    let restored = state.restore(&kvm, fd, &advance);
                    // Tells the guest's watchdogs that it stood still; fails where it has no kvmclock.
                    let _ = fd.kvmclock_ctrl();
                    restored
                })
            })
            .collect::<Result<Vec<_>, _>>()?;
        for answer in answers {
            answer.wait()??;
        }
        // Last, because it raises the interrupts that were pending: the chips they go through must be there. One
        // too many does no harm.
        self.bus
            .serial()
            .restore(&saved.serial, irq_line(&self.vm)?)
            .map_err(|error| MachineError::BadState(error.to_string()))
    }

    /// The log of what the guest writes.
    pub const fn dirty_log(&self) -> &DirtyLogSource {
        &self.dirty_log
    }

    /// Guest memory.
    pub const fn ram(&self) -> &GuestRam {
        &self.ram
    }

    /// COM1.
    pub const fn serial(&self) -> &SerialPort {
        self.bus.serial()
    }

    /// Figures of every vCPU and (port, MMIO) exits in all.
    pub fn vcpu_info(&self) -> (Vec<VcpuInfo>, u64, u64) {
        let (mut io, mut mmio) = (0, 0);
        let infos = (0..)
            .zip(&self.vcpus)
            .map(|(index, vcpu)| {
                io += vcpu.stats.io_exits.load(Ordering::Relaxed);
                mmio += vcpu.stats.mmio_exits.load(Ordering::Relaxed);
                VcpuInfo {
                    index,
                    cpu_time_ms: thread_cpu_ms(vcpu.stats.thread.load(Ordering::Relaxed)),
                    exits: vcpu.stats.exits.load(Ordering::Relaxed),
                }
            })
            .collect();
        (infos, io, mmio)
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.gate.stop.store(true, Ordering::SeqCst);
    }
}

/// An eventfd that raises COM1's interrupt.
fn irq_line(vm: &VmFd) -> Result<EventFd, MachineError> {
    let os = |source| MachineError::Os {
        what: "an eventfd cannot be had",
        source,
    };
    let irq = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC).map_err(os)?;
    vm.register_irqfd(&irq, COM1_IRQ)
        .map_err(KvmError::during("KVM_IRQFD"))?;
    Ok(irq)
}

/// User and system time of a thread of this process.
fn thread_cpu_ms(thread: i32) -> u64 {
    let stat =
        std::fs::read_to_string(format!("/proc/self/task/{thread}/schedstat")).unwrap_or_default();
    stat.split_whitespace()
        .next()
        .and_then(|ns| ns.parse::<u64>().ok())
        .map_or(0, |ns| ns / 1_000_000)
}

/// Interrupts vCPUs when the lease is over. It runs on its own thread, so neither a busy driver nor a dead agent
/// keeps the guest alive.
struct LeaseWatch {
    shared: Arc<(Mutex<Watching>, Condvar)>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug, PartialEq, Eq)]
enum Watching {
    Yes,
    No,
}

/// How soon an expired lease is looked at again; vCPUs that were let run meanwhile check it themselves.
const EXPIRED_RECHECK: Duration = Duration::from_millis(250);

impl LeaseWatch {
    fn start(gate: Arc<Gate>, kicks: Vec<kvm::Kick>) -> Result<Self, MachineError> {
        let shared = Arc::new((Mutex::new(Watching::Yes), Condvar::new()));
        let theirs = shared.clone();
        let thread = std::thread::Builder::new()
            .name("lease".into())
            .spawn(move || watch_lease(&gate, &kicks, &theirs))
            .map_err(|source| MachineError::Os {
                what: "the lease thread cannot be started",
                source,
            })?;
        Ok(Self {
            shared,
            thread: Some(thread),
        })
    }

    fn wake(&self) {
        self.shared.1.notify_all();
    }
}

fn watch_lease(gate: &Gate, kicks: &[kvm::Kick], shared: &(Mutex<Watching>, Condvar)) {
    let Some(lease) = &gate.lease else { return };
    let mut watching = shared.0.lock().unwrap_or_else(PoisonError::into_inner);
    while *watching == Watching::Yes {
        let wait = match lease.state() {
            LeaseState::Held { remaining } => remaining,
            LeaseState::Expired => {
                if !gate.stop.load(Ordering::SeqCst) {
                    for kick in kicks {
                        kick.kick();
                    }
                }
                EXPIRED_RECHECK
            }
        };
        watching = shared
            .1
            .wait_timeout(watching, wait)
            .unwrap_or_else(PoisonError::into_inner)
            .0;
    }
}

impl Drop for LeaseWatch {
    fn drop(&mut self) {
        *self.shared.0.lock().unwrap_or_else(PoisonError::into_inner) = Watching::No;
        self.wake();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
