//! The driver's part in snapshots. Copying memory and checking it happens outside the driver's thread; each step that
//! stops the guest or makes a machine happens in it.

use super::*;
use crate::machine::SavedMachine;
use crate::snapshot::{Filler, OnLoss, Snapshot, SnapshotError, Writer, bring_memory};
use godwit_wire::cpu::GuestCpu;
use godwit_wire::vmm_api::{RestoreRequest, SnapshotInfo, SnapshotRequest};
use std::time::SystemTime;

/// How long the driver may take to stop a machine whose memory cannot be had.
const LOSS_PATIENCE: Duration = Duration::from_secs(10);
/// What the process ends with when it takes longer.
const EXIT_LOST: i32 = 70;

/// What a snapshot needs of the machine before anything stops.
struct Subject {
    writer: Writer,
    log: DirtyLogSource,
}

/// A machine that was read.
struct Brought {
    state: SavedMachine,
    filler: Option<Filler>,
}

/// What the guest stood still for.
struct Still {
    writer: Writer,
    saved: SavedMachine,
    saved_at_unix_ns: u64,
    pause: Duration,
    identity: (MachineSpec, CpuFacts, GuestCpu),
}

/// Refuses what needs all of a machine's memory while that is still being read from a snapshot.
pub(super) fn admit_whole_memory(machine: &Machine) -> Result<(), Problem> {
    if machine.ram().expected() == Bytes(0) {
        return Ok(());
    }
    Err(Problem::conflict(
        "memory-arriving",
        "memory of the snapshot that the machine goes on from is still being read",
    )
    .with_remedy("repeat this when all of it is there"))
}

impl DriverHandle {
    /// Saves the machine to a directory; it goes on as it was. Blocks for as long as that takes.
    pub(in crate::process) fn snapshot(
        &self,
        request: &SnapshotRequest,
    ) -> Result<SnapshotInfo, Problem> {
        let ending = || Problem::internal("this VMM is ending");
        let begin = request.clone();
        let subject = self
            .call_blocking(move |driver| driver.begin_snapshot(&begin))
            .ok_or_else(ending)??;
        let taken = self.take(subject);
        // Also after a failure: the next one may be asked for.
        self.call_blocking(|driver| driver.snapshotting = None)
            .ok_or_else(ending)?;
        let (bytes, pause) = taken?;
        Ok(SnapshotInfo {
            directory: request.directory.clone(),
            bytes,
            pause_us: pause.as_micros() as u64,
        })
    }

    fn take(&self, subject: Subject) -> Result<(Bytes, Duration), Problem> {
        let Subject { mut writer, log } = subject;
        let refused = |error: SnapshotError| error.problem();
        let log = log.start().map_err(|error| refused(error.into()))?;
        writer.copy_running(&log).map_err(refused)?;
        let still = self
            .call_blocking(move |driver| driver.stand_still(writer, &log))
            .ok_or_else(|| Problem::internal("this VMM is ending"))??;
        let bytes = still
            .writer
            .finish(&still.saved, still.saved_at_unix_ns, still.identity)
            .map_err(refused)?;
        Ok((bytes, still.pause))
    }

    /// Builds the machine that a snapshot holds; it is paused then. Blocks for as long as that takes.
    pub(in crate::process) fn restore(&self, request: RestoreRequest) -> Result<VmmInfo, Problem> {
        let ending = || Problem::internal("this VMM is ending");
        let snapshot = Snapshot::open(&request.directory).map_err(|error| error.problem())?;
        let manifest = snapshot.manifest().clone();
        let verify = request.verify;
        let ram = self
            .call_blocking(move |driver| driver.begin_restore(request, &manifest))
            .ok_or_else(ending)??;
        let (age, since) = (snapshot.age(), Instant::now());
        let brought = snapshot.state().and_then(|state| {
            let filler = bring_memory(snapshot, &ram, verify, self.on_loss())?;
            Ok(Brought { state, filler })
        });
        self.call_blocking(move |driver| driver.finish_restore(brought, age + since.elapsed()))
            .ok_or_else(ending)?
    }

    /// Stops the guest for good when its memory cannot be brought in. Nobody may wait for that without end, least of
    /// all a driver that itself waits for the memory: then the process ends.
    fn on_loss(&self) -> OnLoss {
        let handle = self.clone();
        Box::new(move |error| {
            let detail = error.chain();
            let (done, stopped) = std::sync::mpsc::sync_channel(1);
            let lost = detail.clone();
            handle.post(move |driver| {
                driver.lose_memory(lost);
                let _ = done.send(());
            });
            if stopped.recv_timeout(LOSS_PATIENCE).is_err() {
                tracing::error!(%detail, "guest memory is lost: the process ends");
                std::process::exit(EXIT_LOST);
            }
        })
    }
}

impl Driver {
    /// Refuses what must not happen while a snapshot is being taken.
    pub(super) fn admit_without_snapshot(&self) -> Result<(), Problem> {
        match &self.snapshotting {
            None => Ok(()),
            Some(directory) => Err(Problem::conflict(
                "snapshotting",
                format!("a snapshot is being written to {}", directory.display()),
            )
            .with_remedy("repeat this when it is done")),
        }
    }

    fn begin_snapshot(&mut self, request: &SnapshotRequest) -> Result<Subject, Problem> {
        admit_epoch(request.epoch, self.epoch)?;
        self.admit_without_snapshot()?;
        self.admit_without_succession()?;
        self.admit_without_migration()?;
        if !request.directory.is_absolute() {
            return Err(Problem::invalid(vec![FieldProblem::new(
                "directory",
                format!("{} is not an absolute path", request.directory.display()),
                "give the full path of the directory on the host",
            )]));
        }
        admit(Request::Snapshot, &self.state.borrow())?;
        let machine = self.machine()?;
        let writer = Writer::begin(&request.directory, machine.ram().clone())
            .map_err(|error| error.problem())?;
        let subject = Subject {
            writer,
            log: machine.dirty_log().clone(),
        };
        self.snapshotting = Some(request.directory.clone());
        Ok(subject)
    }

    /// The part for which the guest stands still. It goes on afterwards as it was, whatever became of the snapshot.
    fn stand_still(
        &mut self,
        mut writer: Writer,
        log: &crate::kvm::DirtyLog,
    ) -> Result<Still, Problem> {
        // The guest may have ended or faulted while its memory was copied.
        admit(Request::Snapshot, &self.state.borrow())?;
        let was_running = *self.state.borrow() == VmmState::Running;
        let cpu = self.cpu()?;
        let spec = self
            .spec
            .clone()
            .ok_or_else(|| Problem::internal("a machine without spec"))?;
        let machine = self.machine()?;
        let identity = (spec, cpu, machine.guest_cpu().clone());
        let began = Instant::now();
        if was_running {
            machine.pause().map_err(|error| error.problem("spec"))?;
        }
        let saved_at_unix_ns = SystemTime::now()
            .duration_since(SystemTime::UNIX_EPOCH)
            .map_or(0, |since| since.as_nanos() as u64);
        // A machine that stood still may be stopped with its snapshot: its disks must be as the guest knows them then,
        // whatever becomes of the host. One that runs on flushes them when it sees fit.
        let durable = if was_running { Ok(()) } else { machine.flush() };
        let saved = durable
            .and_then(|()| machine.save())
            .map_err(SnapshotError::from)
            .and_then(|(saved, _)| writer.copy_rest(log).map(|()| saved));
        if was_running && let Err(problem) = self.let_run(machine) {
            tracing::warn!(%problem, "the guest does not go on after its snapshot");
            self.enter(paused_by(machine, problem));
        }
        Ok(Still {
            writer,
            saved: saved.map_err(|error| error.problem())?,
            saved_at_unix_ns,
            pause: began.elapsed(),
            identity,
        })
    }

    /// Builds the machine; its memory is to be filled.
    fn begin_restore(
        &mut self,
        request: RestoreRequest,
        manifest: &crate::snapshot::Manifest,
    ) -> Result<crate::memory::GuestRam, Problem> {
        let facts = self.cpu()?;
        let unfit = |mismatch: godwit_wire::machine::CpuMismatch| {
            Problem::conflict("cpu-mismatch", mismatch.to_string())
                .with_remedy("restore it on a host with the same kind of CPU")
        };
        facts
            .admits(manifest.spec.cpu, Some(&manifest.cpu.signature))
            .map_err(unfit)?;
        self.build(
            request.vm,
            request.epoch,
            manifest.spec.clone(),
            request.lease,
            (request.attachments, None),
        )?;
        let machine = self.machine()?;
        let fits = manifest
            .guest_cpu
            .can_go_on(machine.guest_cpu(), machine.tsc_scaling());
        if let Err(mismatch) = fits {
            self.void_restore();
            return Err(unfit(mismatch));
        }
        let ram = machine.ram().clone();
        self.enter(VmmState::Incoming);
        Ok(ram)
    }

    fn finish_restore(
        &mut self,
        brought: Result<Brought, SnapshotError>,
        age: Duration,
    ) -> Result<VmmInfo, Problem> {
        match &*self.state.borrow() {
            VmmState::Incoming => {}
            VmmState::Paused {
                reason: PauseReason::Fault { detail },
            } => return Err(Problem::conflict("damaged", detail.clone())),
            _ => {
                return Err(Problem::conflict(
                    "wrong-state",
                    "the machine was ended while its memory was loaded",
                ));
            }
        }
        let restored = brought.and_then(|Brought { state, filler }| {
            self.filler = filler;
            let machine = self
                .machine
                .as_ref()
                .ok_or_else(|| MachineError::BadState("the machine is gone".into()))?;
            Ok(machine.restore(state, age)?)
        });
        if let Err(error) = restored {
            self.void_restore();
            return Err(error.problem());
        }
        self.enter(VmmState::Paused {
            reason: PauseReason::Requested,
        });
        release_start_pages();
        self.info()
    }

    /// The guest misses memory that cannot be had. vCPUs and devices that touched it wait for it in the kernel, so the
    /// machine cannot be taken apart: it is left as it is, with its disk locks, until the process ends.
    fn lose_memory(&mut self, detail: String) {
        let Some(machine) = self.machine.take() else {
            return;
        };
        tracing::error!(%detail, "guest memory is lost: the guest cannot go on");
        machine.abandon();
        self.drop_machine();
        self.cancel_migration("the guest's memory is lost");
        self.enter(VmmState::Paused {
            reason: PauseReason::Fault { detail },
        });
    }

    /// Nothing of a machine that could not be restored stays; another attempt may follow.
    fn void_restore(&mut self) {
        self.drop_machine();
        (self.vm, self.spec, self.lease) = (None, None, None);
        self.enter(VmmState::Empty);
    }
}
