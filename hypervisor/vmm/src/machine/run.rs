//! The machine as a whole.

use super::devices::PciDevices;
use super::memory_bus::MemoryBus;
use super::power_button::PowerButton;
use super::throttle::Throttle;
use super::vcpu::{Buses, EventSink, Gate, Vcpu, thread_cpu_time};
use super::{MachineError, MachineEvent, boot};
use crate::devices::{COM1_IRQ, Console, GuestInput, PortBus, SavedSerial, SerialPort};
use crate::kvm::{self, ClockAdvance, DirtyLogSource, KvmError, VcpuState, VmFd, VmState};
use crate::memory::{GuestRam, LeasePage};
use godwit_devices::block::DiskContent;
use godwit_devices::device::Plug;
use godwit_devices::net::FrameTimes;
use godwit_devices::pci::SavedFunction;
use godwit_wire::cpu::{GuestCpu, TscScaling};
use godwit_wire::devices::Attachments;
use godwit_wire::id::{Epoch, VmId};
use godwit_wire::lease::LeaseState;
use godwit_wire::machine::{MachineSpec, MachineType};
use godwit_wire::unit::{Bytes, Mib};
use godwit_wire::vmm_api::{DeviceInfo, VcpuInfo};
use kvm_ioctls::Kvm;
use serde::{Deserialize, Serialize};
use std::fs::File;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use vmm_sys_util::eventfd::EventFd;

/// Layout of [`SavedMachine`]: 1 has no devices on a PCI bus, and is what machines without one are saved as.
const SAVED_VERSION: u32 = 2;
const SAVED_VERSION_WITHOUT_PCI: u32 = 1;

/// Times vCPUs are let run on because their state cannot be read where they stand (see [`kvm::is_settled`]),
const MAX_SETTLING: u32 = 200;
/// each time for this long,
const SETTLING: Duration = Duration::from_micros(100);
/// and every so many times all of them together.
const SETTLE_TOGETHER: u32 = 4;

/// What a machine is made from.
#[derive(Clone)]
pub struct MachineParts {
    /// The machine.
    pub spec: MachineSpec,
    /// Whose it is: writable disks are locked in its name.
    pub vm: VmId,
    /// Where this host has what the spec names.
    pub attachments: Attachments,
    /// Memory to use instead of fresh memory; what is in it is of no account.
    pub memory: Option<GuestRam>,
    /// Where its serial output goes; outlives the machine.
    pub console: Console,
    /// Where it reports what the guest and its devices do by themselves.
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
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    functions: Vec<SavedFunction>,
}

/// A machine whose vCPUs wait or run.
pub struct Machine {
    // Dropped in this order: the watch, the vCPUs and the devices stop before the VM and its memory go.
    lease_watch: Option<LeaseWatch>,
    vcpus: Vec<Vcpu>,
    pci: Option<PciDevices>,
    gate: Arc<Gate>,
    bus: PortBus,
    power_button: Option<PowerButton>,
    msrs: Arc<[u32]>,
    guest_cpu: GuestCpu,
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
        boot::check(spec)?;
        let ram = match &parts.memory {
            Some(memory) => memory.clone(),
            None => GuestRam::with_backing(spec.memory_mib, spec.devices.memory_backing)?,
        };
        Self::assemble(parts, lease, ram, Plug::Opened)
    }

    /// Builds the machine around the memory of another process of this host, whose devices will lend what a host gives
    /// only once: see [`Self::inherit`].
    pub fn succeed(
        parts: &MachineParts,
        lease: Option<&Path>,
        memory: File,
    ) -> Result<Self, MachineError> {
        let spec = &parts.spec;
        let backing = spec.devices.memory_backing;
        let ram = GuestRam::inherit(memory, spec.memory_mib, backing)?;
        Self::assemble(parts, lease, ram, Plug::Inherited)
    }

    fn assemble(
        parts: &MachineParts,
        lease: Option<&Path>,
        ram: GuestRam,
        plug: Plug,
    ) -> Result<Self, MachineError> {
        let spec = &parts.spec;
        let lease = lease.map(LeasePage::open).transpose()?;
        let kvm = Arc::new(kvm::open()?);
        let vm = Arc::new(kvm::create_vm(&kvm)?);
        let dirty_log = DirtyLogSource::new(vm.clone(), ram.slots());
        ram.give_to(&vm)?;
        let serial = SerialPort::new(irq_line(&vm)?, parts.console.clone());
        let bus = PortBus::new(serial);
        let power_button = match spec.machine_type {
            MachineType::Godwit1 => None,
            MachineType::Godwit2 => Some(PowerButton::new(&vm)?),
        };
        let pci = match spec.machine_type {
            MachineType::Godwit1 => None,
            MachineType::Godwit2 => Some(PciDevices::build(parts, &ram, vm.clone(), plug)?),
        };
        let buses = Buses {
            ports: bus.clone(),
            memory: MemoryBus::new(pci.as_ref().map(PciDevices::bus)),
        };
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
        let guest_cpu = kvm::guest_cpu(
            &kvm::guest_cpuid(&kvm, spec.cpu, 0, spec.vcpus)?,
            &fds[0],
            &msrs,
        )?;
        let events: EventSink = parts.events.clone();
        let vcpus = (0..)
            .zip(fds)
            .map(|(index, fd)| Vcpu::start(index, fd, buses.clone(), gate.clone(), events.clone()))
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
            pci,
            gate,
            bus,
            power_button,
            msrs,
            guest_cpu,
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
        if let Some(pci) = &self.pci {
            pci.show_configuration(self.vm.clone());
        }
        self.vcpus[0]
            .call(move |vcpu| entry.enter(vcpu))?
            .wait()??;
        Ok(())
    }

    /// Presses the power button; `false` if the machine has none.
    pub fn press_power_button(&self) -> Result<bool, MachineError> {
        self.power_button
            .as_ref()
            .map_or(Ok(false), |button| button.press().map(|()| true))
    }

    /// Whether the lease allows the guest to run.
    pub fn lease_allows(&self) -> bool {
        self.gate.lease_allows()
    }

    /// Takes what only one machine may hold (the locks of writable disks) under `epoch`. Before it runs, and again
    /// after [`Self::release`]; repeating it does no harm.
    pub fn claim(&self, epoch: Epoch) -> Result<(), MachineError> {
        Ok(self.pci.as_ref().map_or(Ok(()), |pci| pci.claim(epoch))?)
    }

    /// Makes sure that everything the guest has written outlives a power cut of the host. It must be paused.
    pub fn flush(&self) -> Result<(), MachineError> {
        Ok(self.pci.as_ref().map_or(Ok(()), PciDevices::flush)?)
    }

    /// Gives up what [`Self::claim`] took, because the machine may go on elsewhere. It must be paused.
    pub fn release(&self) -> Result<(), MachineError> {
        Ok(self.pci.as_ref().map_or(Ok(()), PciDevices::release)?)
    }

    /// As [`Self::release`], for a machine that goes on in another process of this host.
    pub fn step_aside(&self) -> Result<(), MachineError> {
        Ok(self.pci.as_ref().map_or(Ok(()), PciDevices::step_aside)?)
    }

    /// Descriptors of what this host gives only once, by the order of the functions on the bus, for the process that
    /// takes the machine over. It must be paused.
    pub fn lend(&self) -> Result<Vec<Vec<OwnedFd>>, MachineError> {
        Ok(self.pci.as_ref().map_or(Ok(Vec::new()), PciDevices::lend)?)
    }

    /// Takes what the machine's former process has lent, before [`Self::restore`].
    pub fn inherit(&self, lent: Vec<Vec<OwnedFd>>) -> Result<(), MachineError> {
        match &self.pci {
            Some(pci) => pci.inherit(lent),
            None if lent.is_empty() => Ok(()),
            None => Err(MachineError::BadState(
                "a machine of this type has no devices to lend anything to".into(),
            )),
        }
    }

    /// Tells guest and network that the machine runs here now. It must have arrived from another host.
    pub fn announce(&self) {
        if let Some(pci) = &self.pci {
            pci.announce();
        }
    }

    /// What slows the guest down.
    pub fn throttle(&self) -> Throttle {
        Throttle::new(self.vcpus.iter().map(Vcpu::throttle).collect())
    }

    /// Lets all vCPUs and devices run. vCPUs stop by themselves if the lease does not allow it.
    pub fn run(&self) -> Result<(), MachineError> {
        self.gate.stop.store(false, Ordering::SeqCst);
        if let Some(watch) = &self.lease_watch {
            watch.wake();
        }
        self.vcpus.iter().try_for_each(Vcpu::run)?;
        if let Some(pci) = &self.pci
            && let Err(error) = pci.resume()
        {
            self.stop_vcpus()?;
            return Err(error.into());
        }
        Ok(())
    }

    /// Makes vCPUs stop, without waiting for any: one may be waiting for memory that does not arrive. Devices go on.
    pub fn stall(&self) {
        self.gate.stop.store(true, Ordering::SeqCst);
        self.vcpus.iter().for_each(Vcpu::interrupt);
    }

    /// Stops all vCPUs and devices; returns when none runs, nothing is in flight and no I/O is half done.
    pub fn pause(&self) -> Result<(), MachineError> {
        self.stop_vcpus()?;
        if let Some(pci) = &self.pci
            && let Err(error) = pci.pause()
        {
            // Half a machine must not be left standing.
            self.run()?;
            return Err(error.into());
        }
        Ok(())
    }

    /// Stops all vCPUs where their state can be read, if they get there soon; else where they are.
    fn stop_vcpus(&self) -> Result<(), MachineError> {
        let stopped = self.interrupt_vcpus().and_then(|()| self.settle());
        if stopped.is_err() {
            // Some have stopped and some have not: none may be left behind in between. One that never stopped finds
            // nothing new in being told to run.
            self.gate.stop.store(false, Ordering::SeqCst);
            for vcpu in &self.vcpus {
                if let Err(error) = vcpu.run() {
                    tracing::error!(%error, "a vCPU does not go on");
                }
            }
        }
        stopped
    }

    fn settle(&self) -> Result<(), MachineError> {
        for attempt in 1..=MAX_SETTLING {
            let unsettled = self.unsettled()?;
            if unsettled.is_empty() {
                break;
            }
            self.gate.stop.store(false, Ordering::SeqCst);
            if attempt % SETTLE_TOGETHER == 0 {
                // One may be waiting for another that stands still.
                self.vcpus.iter().try_for_each(Vcpu::run)?;
            } else {
                unsettled.into_iter().try_for_each(Vcpu::run)?;
            }
            // Guest code announces to nobody where it is.
            std::thread::sleep(SETTLING);
            self.interrupt_vcpus()?;
        }
        Ok(())
    }

    fn unsettled(&self) -> Result<Vec<&Vcpu>, MachineError> {
        let asked = self
            .vcpus
            .iter()
            .map(|vcpu| Ok((vcpu, vcpu.call(|fd| kvm::is_settled(fd))?)))
            .collect::<Result<Vec<_>, MachineError>>()?;
        let mut unsettled = Vec::new();
        for (vcpu, answer) in asked {
            if !answer.wait()?? {
                unsettled.push(vcpu);
            }
        }
        Ok(unsettled)
    }

    fn interrupt_vcpus(&self) -> Result<(), MachineError> {
        self.gate.stop.store(true, Ordering::SeqCst);
        self.vcpus.iter().for_each(Vcpu::interrupt);
        let answers = self
            .vcpus
            .iter()
            .map(|vcpu| vcpu.call(|_| ()))
            .collect::<Result<Vec<_>, _>>()?;
        answers.into_iter().try_for_each(super::vcpu::Answer::wait)
    }

    /// Tells all vCPUs to stop and lets go of the machine as it is: some of its threads wait in the kernel for what
    /// never comes, so nobody may wait for them. Only the end of the process ends it.
    pub fn abandon(self) {
        self.gate.stop.store(true, Ordering::SeqCst);
        self.vcpus.iter().for_each(Vcpu::interrupt);
        std::mem::forget(self);
    }

    /// Saves everything but memory, and when guest time was sampled. The machine must be paused. Devices may write
    /// guest memory up to the end of this.
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
        let functions = self.pci.as_ref().map_or(Ok(Vec::new()), PciDevices::save)?;
        let saved = SavedMachine {
            version: match self.pci {
                Some(_) => SAVED_VERSION,
                None => SAVED_VERSION_WITHOUT_PCI,
            },
            vm: VmState::save(&self.vm, clock_ns)?,
            vcpus,
            serial: self.bus.serial().save(),
            functions,
        };
        Ok((saved, sampled))
    }

    /// Makes this machine, which has never run, what was saved. `age` is the time since guest time was sampled.
    pub fn restore(&self, saved: SavedMachine, age: Duration) -> Result<(), MachineError> {
        let version = match self.pci {
            Some(_) => SAVED_VERSION,
            None => SAVED_VERSION_WITHOUT_PCI,
        };
        if saved.version != version {
            return Err(MachineError::BadState(format!(
                "it has version {} and a machine of this type has {version} here",
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
        // Last, because they raise the interrupts that were pending: the chips they go through must be there. One
        // too many does no harm.
        if let Some(pci) = &self.pci {
            pci.restore(saved.functions)?;
        }
        self.bus
            .serial()
            .restore(&saved.serial, irq_line(&self.vm)?)
            .map_err(|error| MachineError::BadState(error.to_string()))
    }

    /// The log of what the guest writes.
    pub const fn dirty_log(&self) -> &DirtyLogSource {
        &self.dirty_log
    }

    /// What the guest sees of this host's CPU.
    pub const fn guest_cpu(&self) -> &GuestCpu {
        &self.guest_cpu
    }

    /// Whether the guest's clock can run at another rate than this host's.
    pub fn tsc_scaling(&self) -> TscScaling {
        kvm::tsc_scaling(&self.kvm)
    }

    /// Guest memory.
    pub const fn ram(&self) -> &GuestRam {
        &self.ram
    }

    /// What every device on the bus tells of itself.
    pub fn devices(&self) -> Vec<DeviceInfo> {
        self.pci.as_ref().map_or(Vec::new(), PciDevices::info)
    }

    /// When frames passed each network card; also for whoever outlives the machine.
    pub fn frame_times(&self) -> Vec<Arc<FrameTimes>> {
        self.pci
            .as_ref()
            .map_or(Vec::new(), PciDevices::frame_times)
    }

    /// Makes a disk larger; `false` if there is none of that name.
    pub fn resize_disk(&self, name: &str, bytes: Bytes) -> Result<bool, MachineError> {
        match &self.pci {
            Some(pci) => Ok(pci.resize_disk(name, bytes)?),
            None => Ok(false),
        }
    }

    /// A way to what is on a disk, if there is one of that name.
    pub fn disk_content(&self, name: &str) -> Option<DiskContent> {
        self.pci.as_ref().and_then(|pci| pci.disk_content(name))
    }

    /// Asks the guest to live with so much memory; `false` if the machine has no balloon.
    pub fn keep_memory(&self, memory: Mib) -> bool {
        if let Some(pci) = &self.pci {
            pci.keep_memory(memory);
        }
        self.pci.is_some()
    }

    /// Where the operator's input goes.
    pub fn input(&self) -> GuestInput {
        let console = self.pci.as_ref().and_then(PciDevices::console);
        GuestInput::new(self.serial().clone(), console)
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
                    cpu_time_ms: thread_cpu_time(vcpu.stats.thread.load(Ordering::Relaxed))
                        .as_millis() as u64,
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
