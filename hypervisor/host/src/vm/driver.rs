//! The driver task: receives commands and news, one at a time.

use super::Command;
use super::handover::Handover;
use super::ledger::Refusal;
use super::observe::{Observation, Observer};
use super::registry::{Adopted, Context, Doom, Handle, MAX_WAITING_COMMANDS, Registry};
use super::room::RoomKeeper;
use super::stop::{Stopping, being_destroyed};
use crate::admission::Fence;
use crate::process::{Exit, VmmProcess};
use crate::record::{End, Purpose, Seat, VmDirectory, VmRecord};
use crate::storage::Room;
use godwit_channel::CallError;
use godwit_channel::uds::UdsClient;
use godwit_wire::host_api::{CommitReply, DeviceCounters, Resolution, VmReport};
use godwit_wire::id::{Epoch, Generation, VmId};
use godwit_wire::migration::MigrationStatus;
use godwit_wire::problem::Problem;
use godwit_wire::usage::VmUsage;
use godwit_wire::vmm_api::{DeviceInfo, IncomingReady, PauseReason, StopReason, VmmState};
use std::future::Future;
use std::sync::Arc;
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;

/// News that may wait for a driver; whoever brings more waits.
const MAX_WAITING_NEWS: usize = 32;

/// What is brought to a driver by its own tasks.
#[derive(Debug)]
pub(super) enum News {
    Observed(Box<Observation>),
    Migration(Box<MigrationStatus>),
    Verdict(CommitReply),
    Resolution(Resolution),
    /// Room where the disk is on which the machine waits.
    Room(Room),
}

/// A VM that is here, in whatever state.
#[derive(Debug)]
pub(super) struct Holding {
    pub(super) record: VmRecord,
    /// `None` when the machine is no more; the record says how it ended.
    pub(super) live: Option<Live>,
    /// The migration under way.
    pub(super) handover: Option<Handover>,
    /// The latest migration's last status.
    pub(super) migration: Option<MigrationStatus>,
    pub(super) usage: VmUsage,
    /// Counters of its devices, as last seen.
    pub(super) devices: Option<Vec<DeviceCounters>>,
}

/// A machine with its process.
#[derive(Debug)]
pub(super) struct Live {
    pub(super) process: VmmProcess,
    pub(super) vmm: UdsClient,
    pub(super) state: VmmState,
    pub(super) stopping: Option<Stopping>,
    pub(super) observer: Observer,
}

#[derive(Debug)]
pub(super) struct Driver {
    pub(super) vm: VmId,
    pub(super) context: Arc<Context>,
    pub(super) directory: VmDirectory,
    pub(super) fence: Fence,
    pub(super) fence_kept: FenceKept,
    pub(super) holding: Option<Holding>,
    /// Why the latest generation failed, should it be asked again.
    pub(super) refusal: Option<Refusal>,
    pub(super) news: mpsc::Sender<News>,
    /// How the latest incoming migration was prepared, should it be asked again. Only in memory: it has the token.
    pub(super) prepared: Option<(Generation, IncomingReady)>,
    pub(super) doom: watch::Receiver<Doom>,
    /// Orders to destroy that were carried out.
    pub(super) destructions: u64,
    /// The VMM killed last; the kernel may still be giving back its memory.
    pub(super) former: Option<VmmProcess>,
    /// Lets the machine run again when its pool has room.
    pub(super) room: RoomKeeper,
}

/// Where the fence of a VM that is not here is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum FenceKept {
    /// Where the next driver finds it.
    OnDisk,
    /// Only in this driver, which therefore stays.
    InMemory,
}

/// What wakes a driver.
enum Wake {
    Command(Box<Command>),
    News(News),
    Exited(Exit),
    Timer,
}

impl Driver {
    pub(super) fn spawn(
        registry: &Arc<Registry>,
        vm: VmId,
        fence: Fence,
        adopted: Option<Adopted>,
    ) -> Handle {
        let (inbox, commands) = mpsc::channel(MAX_WAITING_COMMANDS);
        let (news, arriving) = mpsc::channel(MAX_WAITING_NEWS);
        let (doom, doomed) = watch::channel(Doom::default());
        let context = registry.context().clone();
        let directory = context.state.vm(vm);
        let mut driver = Self {
            vm,
            context,
            directory,
            fence,
            fence_kept: FenceKept::OnDisk,
            holding: None,
            refusal: None,
            news,
            prepared: None,
            doom: doomed,
            destructions: 0,
            former: None,
            room: RoomKeeper::default(),
        };
        if let Some(adopted) = adopted {
            driver.take_over(adopted);
        }
        // Whoever asks may be on another runtime, and VMMs must be spawned on this one (see `sys::detach`).
        let runtime = registry.context().runtime.clone();
        let task = runtime.spawn(driver.run(registry.clone(), commands, arriving));
        // A driver ends by itself; only tests make away with it.
        #[cfg(not(test))]
        drop(task);
        Handle {
            inbox,
            doom,
            #[cfg(test)]
            task,
        }
    }

    async fn run(
        mut self,
        registry: Arc<Registry>,
        mut commands: mpsc::Receiver<Command>,
        mut arriving: mpsc::Receiver<News>,
    ) {
        loop {
            self.publish();
            if self.holding.is_none()
                && self.fence_kept == FenceKept::OnDisk
                && !self.has_something_to_repeat()
            {
                // Under the lock nobody can send: a driver that has nothing leaves no command behind.
                let mut drivers = registry.drivers();
                if commands.is_empty() {
                    drivers.by_vm.remove(&self.vm);
                    drivers.ended += 1;
                    return;
                }
            }
            let wake = tokio::select! {
                biased;
                exit = exited(self.process()) => Wake::Exited(exit),
                Some(news) = arriving.recv() => Wake::News(news),
                command = commands.recv() => match command {
                    Some(command) => Wake::Command(Box::new(command)),
                    None => return,
                },
                () = sleep_until(self.next_look()) => Wake::Timer,
            };
            match wake {
                Wake::Command(command) => self.carry_out(*command).await,
                Wake::News(news) => self.take_note(news).await,
                Wake::Exited(exit) => self.process_ended(&exit).await,
                Wake::Timer => self.time_passed().await,
            }
        }
    }

    async fn carry_out(&mut self, command: Command) {
        // A caller that no longer listens is no reason not to have acted.
        match command {
            Command::Start(ask, reply) => drop(reply.send(self.start(ask).await)),
            Command::Stop(ask, reply) => self.stop(ask, reply).await,
            Command::Pause(ask, reply) => drop(reply.send(self.pause(ask).await)),
            Command::Resume(ask, reply) => drop(reply.send(self.resume(ask).await)),
            Command::Balloon(ask, reply) => drop(reply.send(self.balloon(ask).await)),
            Command::Prepare(ask, reply) => drop(reply.send(self.prepare(ask).await)),
            Command::Send(ask, reply) => drop(reply.send(self.send(ask).await)),
            Command::Cancel(ask, reply) => drop(reply.send(self.cancel(ask).await)),
            Command::Bandwidth(ask, reply) => drop(reply.send(self.set_bandwidth(ask).await)),
            Command::Upgrade(ask, reply) => drop(reply.send(self.upgrade(ask).await)),
            Command::Resize(ask, reply) => drop(reply.send(self.resize(ask).await)),
            Command::Snapshot(ask, reply) => drop(reply.send(self.save(ask).await)),
            Command::Destroy(epoch, reply) => drop(reply.send(self.destroy(epoch).await)),
            Command::ResumeAfterLease(epoch) => self.resume_after_lease(epoch).await,
            Command::KillProcess(reply) => drop(reply.send(self.kill_process().await)),
        }
    }

    async fn take_note(&mut self, news: News) {
        match news {
            News::Observed(observation) => self.observed(*observation).await,
            News::Migration(status) => self.migration_seen(*status).await,
            News::Verdict(reply) => self.verdict_given(reply).await,
            News::Resolution(resolution) => self.resolution_given(resolution).await,
            News::Room(room) => self.room_seen(room).await,
        }
    }

    async fn time_passed(&mut self) {
        if self
            .live()
            .and_then(|live| live.stopping.as_ref())
            .is_some_and(Stopping::is_over)
        {
            self.kill_after_patience().await;
        }
        self.advance_handover().await;
    }

    /// Whether a failure may still be asked about.
    fn has_something_to_repeat(&self) -> bool {
        self.refusal
            .as_ref()
            .is_some_and(|refusal| Instant::now() < refusal.forgotten_at())
    }

    fn next_look(&self) -> Option<Instant> {
        let Some(holding) = &self.holding else {
            return self.refusal.as_ref().map(Refusal::forgotten_at);
        };
        let stop = holding
            .live
            .as_ref()
            .and_then(|live| live.stopping.as_ref())
            .map(Stopping::deadline);
        let handover = holding.handover.as_ref().and_then(Handover::look_again_at);
        stop.into_iter().chain(handover).min()
    }

    fn process(&self) -> Option<VmmProcess> {
        self.live().map(|live| live.process.clone())
    }

    pub(super) fn live(&self) -> Option<&Live> {
        self.holding.as_ref()?.live.as_ref()
    }

    pub(super) fn live_mut(&mut self) -> Option<&mut Live> {
        self.holding.as_mut()?.live.as_mut()
    }

    fn publish(&self) {
        let holding = self.holding.as_ref();
        let machine = holding.filter(|holding| holding.live.is_some());
        let memory = machine.map(|holding| holding.record.spec.memory_mib);
        self.context.kept.promise(self.vm, memory);
        if let Some(report) = self.report() {
            self.context.board.publish(report);
        }
    }

    /// What the server is told.
    pub(super) fn report(&self) -> Option<VmReport> {
        let holding = self.holding.as_ref()?;
        let state = match (&holding.live, &holding.record.end) {
            (Some(live), _) => Some(live.state.clone()),
            (None, Some(End::Stopped { reason })) => Some(VmmState::Stopped {
                reason: reason.clone(),
            }),
            (None, Some(End::Lost) | None) => None,
        };
        Some(VmReport {
            vm: self.vm,
            epoch: holding.record.epoch,
            generation: holding.record.generation,
            state,
            usage: holding.usage,
            migration: holding.migration.clone(),
            devices: holding.live.as_ref().and(holding.devices.clone()),
        })
    }

    /// The report, of a VM that is known to be here.
    pub(super) fn answer(&self) -> Result<VmReport, Problem> {
        self.report()
            .ok_or_else(|| Problem::not_found("VM", self.vm))
    }

    /// Waits for a VMM's answer, but not longer than the VM may stay.
    pub(super) async fn vmm_answer<T>(
        &mut self,
        call: impl Future<Output = Result<T, CallError>>,
    ) -> Result<T, Problem> {
        let answer = async { call.await.map_err(CallError::into_problem) };
        self.unless_doomed(answer).await
    }

    /// Waits for something, but not longer than the VM may stay.
    pub(super) async fn unless_doomed<T>(
        &mut self,
        work: impl Future<Output = Result<T, Problem>>,
    ) -> Result<T, Problem> {
        let epoch = self
            .holding
            .as_ref()
            .map_or(Epoch(u64::MAX), |holding| holding.record.epoch);
        let carried_out = self.destructions;
        let mut doom = self.doom.clone();
        tokio::select! {
            biased;
            Ok(_) = doom.wait_for(|doom| doom.orders > carried_out && doom.epoch >= epoch) => {
                Err(being_destroyed(self.vm))
            }
            done = work => done,
        }
    }

    /// A process that ended unasked, or as expected.
    async fn process_ended(&mut self, exit: &Exit) {
        let Some(holding) = &mut self.holding else {
            return;
        };
        let Some(live) = holding.live.take() else {
            return;
        };
        let pid = live.process.id().pid;
        if let Some(stopping) = live.stopping {
            tracing::info!(vm = %self.vm, pid, %exit, "the VM has stopped");
            self.stopped(stop_reason(&live.state), stopping).await;
            return;
        }
        let end = match &live.state {
            VmmState::Stopped { reason } => End::Stopped {
                reason: reason.clone(),
            },
            _ => End::Lost,
        };
        let words = crate::process::last_words(&self.directory);
        tracing::error!(vm = %self.vm, pid, %exit, state = ?live.state, last_words = words, "the VMM process ended unasked");
        self.record_end(end);
        self.advance_handover().await;
    }

    async fn observed(&mut self, observation: Observation) {
        let Some(holding) = &mut self.holding else {
            return;
        };
        let Some(live) = &mut holding.live else {
            return;
        };
        if !live.observer.is_current(&observation) {
            return;
        }
        holding.usage = observation.usage;
        holding.devices = Some(counters(&observation.info.devices));
        if live.state != observation.info.state {
            tracing::info!(vm = %self.vm, from = ?live.state, to = ?observation.info.state, "the VM's state changed");
            live.state = observation.info.state.clone();
        }
        let stopped = matches!(live.state, VmmState::Stopped { .. });
        let stopping = live.stopping.is_some();
        self.watch_room();
        if stopped && stopping {
            self.finish_stop().await;
            return;
        }
        self.settle_succession(observation.info.succession.as_ref())
            .await;
        if let Some(status) = observation.info.migration {
            self.adopt_handover(status);
            self.advance_handover().await;
        }
    }

    /// Goes on with what a former agent has left.
    fn take_over(&mut self, adopted: Adopted) {
        let Adopted {
            record,
            process,
            info,
        } = adopted;
        let (purpose, seat) = (record.purpose, record.seat);
        if process.is_some() {
            let nics = &record.spec.devices.nics;
            let networks = &self.context.networks;
            networks.adopt(self.vm, nics, &record.networks);
        }
        self.holding = Some(Holding {
            record,
            live: None,
            handover: None,
            migration: None,
            usage: VmUsage::default(),
            devices: None,
        });
        let Some(process) = process else { return };
        let silent = || VmmState::Paused {
            reason: PauseReason::Fault {
                detail: "its VMM does not answer the agent".to_owned(),
            },
        };
        let (state, migration) =
            info.map_or_else(|| (silent(), None), |info| (info.state, info.migration));
        let live = self.watch_over(process, seat, state);
        if let Some(holding) = &mut self.holding {
            holding.live = Some(live);
        }
        match purpose {
            Purpose::Receiving { migration: id } | Purpose::Granted { migration: id } => {
                self.resume_receiving(id, migration);
            }
            Purpose::Owned => {
                if let Some(status) = migration {
                    self.adopt_handover(status);
                }
            }
        }
        // Whatever there is to do is done by the first turn of the loop.
        if let Some(handover) = self.handover_mut() {
            handover.look_now();
        }
    }

    /// A live machine with its observer.
    pub(super) fn watch_over(&self, process: VmmProcess, seat: Seat, state: VmmState) -> Live {
        let vmm = UdsClient::new(self.directory.api_socket(seat));
        let observer = Observer::start(self.vm, vmm.clone(), process.id().pid, self.news.clone());
        Live {
            process,
            vmm,
            state,
            stopping: None,
            observer,
        }
    }
}

/// What the server is told of the devices.
fn counters(devices: &[DeviceInfo]) -> Vec<DeviceCounters> {
    devices
        .iter()
        .map(|device| DeviceCounters {
            name: device.name.clone(),
            kind: device.kind.clone(),
            counters: device.counters.clone(),
        })
        .collect()
}

fn stop_reason(state: &VmmState) -> StopReason {
    match state {
        VmmState::Stopped { reason } => reason.clone(),
        _ => StopReason::Killed,
    }
}

async fn exited(process: Option<VmmProcess>) -> Exit {
    match process {
        Some(process) => process.exited().await,
        None => std::future::pending().await,
    }
}

async fn sleep_until(instant: Option<Instant>) {
    match instant {
        Some(instant) => tokio::time::sleep_until(instant).await,
        None => std::future::pending().await,
    }
}
