//! A fake host: fake VMMs, a fake server, and a real registry between them.

use crate::agent::adopt_all;
use crate::args::PortRange;
use crate::board::Board;
use crate::control::ControlPlane;
use crate::kept::KeptMemories;
use crate::network::Networks;
use crate::process::VmmProcess;
use crate::procfs;
use crate::record::tests::spec;
use crate::record::{ProcessId, StateDirectory};
use crate::storage::{Origin, PoolPlace, Storage};
use crate::sys::AfterAgent;
use crate::vm::{Command, Context, Registry};
use axum::extract::{Path, State};
use axum::routing::{any, post};
use axum::{Json, Router};
use godwit_channel::pki::{Authority, HostRequest};
use godwit_channel::problem::{Answer, JsonBody, Refusal};
use godwit_channel::{tls, uds};
use godwit_wire::devices::Attachments;
use godwit_wire::host_api::{CommitReply, Resolution, StartVm, StopMode, StopVm, VmReport};
use godwit_wire::id::{Epoch, Generation, HostId, MigrationId, VmId};
use godwit_wire::machine::{CpuBaseline, CpuFacts};
use godwit_wire::migration::{MigrationPhase, MigrationProgress, MigrationRole, MigrationStatus};
use godwit_wire::problem::Problem;
use godwit_wire::succession::{
    SuccessionBlackout, SuccessionPhase, SuccessionRole, SuccessionStatus,
};
use godwit_wire::unit::Bytes;
use godwit_wire::vmm_api::{Counters, IncomingReady, PauseReason, StopReason, VmmInfo, VmmState};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path as FilePath, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::net::unix::pipe;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use uuid::Uuid;

/// Longest a test waits for something that should happen at once.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

/// Where VMs arrive; nobody listens there, because the VMMs are not real ones.
pub(crate) const MIGRATION_PORTS: PortRange = PortRange {
    first: 49_152,
    last: 49_215,
};

pub(crate) fn start(epoch: u64, generation: u64) -> StartVm {
    StartVm {
        networks: Vec::new(),
        name: "guest".into(),
        epoch: Epoch(epoch),
        generation: Generation(generation),
        spec: spec(),
        lease: Default::default(),
        restore: None,
    }
}

pub(crate) fn graceful(epoch: u64, generation: u64, timeout_ms: u64) -> StopVm {
    StopVm {
        epoch: Epoch(epoch),
        generation: Generation(generation),
        mode: StopMode::Graceful { timeout_ms },
    }
}

pub(crate) fn kill_now(epoch: u64, generation: u64) -> StopVm {
    StopVm {
        epoch: Epoch(epoch),
        generation: Generation(generation),
        mode: StopMode::Kill,
    }
}

pub(crate) struct Host {
    pub(crate) root: Arc<tempfile::TempDir>,
    pub(crate) registry: Arc<Registry>,
    pub(crate) fakes: Fakes,
    pub(crate) server: Server,
}

impl Host {
    pub(crate) async fn new() -> Self {
        let root = Arc::new(tempfile::tempdir().unwrap());
        let fakes = Fakes::start(root.path());
        let server = Server::start().await;
        Self::with(root, fakes, server).await
    }

    async fn with(root: Arc<tempfile::TempDir>, fakes: Fakes, server: Server) -> Self {
        let state = StateDirectory::new(root.path().join("state"));
        state.create().unwrap();
        let registry = Registry::new(Arc::new(Context {
            host: server.host,
            state,
            boot_id: procfs::boot_id().unwrap(),
            program: root.path().join("vmm"),
            after_agent: AfterAgent::LivesOn,
            migration_address: [127, 0, 0, 1].into(),
            migration_ports: Some(MIGRATION_PORTS),
            control: server.control.clone(),
            board: Board::default(),
            storage: Storage::new(
                vec![PoolPlace {
                    name: "default".into(),
                    directory: root.path().join("pool"),
                    origin: Origin::Ours,
                }],
                server.host,
            ),
            networks: Networks::new(server.host, [127, 0, 0, 1].into()),
            kept: Arc::new(KeptMemories::new(crate::kept::tests::policy())),
            runtime: tokio::runtime::Handle::current(),
        }));
        adopt_all(&registry).await.unwrap();
        Self {
            root,
            registry,
            fakes,
            server,
        }
    }

    /// Another agent on the same state; the former one's tasks keep running, but nobody asks them any more.
    pub(crate) async fn restart(self) -> Self {
        self.registry.abort_drivers().await;
        Self::with(self.root.clone(), self.fakes.clone(), self.server.clone()).await
    }

    pub(crate) async fn start(
        &mut self,
        vm: VmId,
        epoch: u64,
        generation: u64,
    ) -> Result<VmReport, Problem> {
        self.registry
            .ask(vm, |reply| Command::Start(start(epoch, generation), reply))
            .await
    }

    pub(crate) async fn destroy(&mut self, vm: VmId, epoch: u64) -> Result<(), Problem> {
        self.registry
            .ask(vm, |reply| Command::Destroy(Epoch(epoch), reply))
            .await
    }

    pub(crate) fn report(&self, vm: VmId) -> Option<VmReport> {
        self.registry
            .context()
            .board
            .reports()
            .into_iter()
            .find(|report| report.vm == vm)
    }

    /// Waits until the VM is reported like this.
    pub(crate) async fn until(&self, vm: VmId, wanted: impl Fn(&VmReport) -> bool) {
        let happens = async {
            while !self.report(vm).is_some_and(|report| wanted(&report)) {
                self.registry.context().board.changed().await;
            }
        };
        if tokio::time::timeout(PATIENCE, happens).await.is_err() {
            panic!("still {:?}", self.report(vm));
        }
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        if Arc::strong_count(&self.root) == 1 {
            self.fakes.kill_all();
        }
    }
}

/// A script stands in for each VMM process; it tells the test its arguments, and the test serves its API.
#[derive(Clone)]
pub(crate) struct Fakes {
    shared: Arc<Mutex<Shared>>,
    asked: watch::Sender<u64>,
    called: watch::Sender<Vec<String>>,
    root: PathBuf,
    _listener: Arc<JoinHandle<()>>,
}

#[derive(Default)]
struct Shared {
    machines: BTreeMap<VmId, Arc<Machine>>,
    /// Every one there ever was, oldest first.
    born: Vec<Arc<Machine>>,
    scripted: BTreeMap<&'static str, Scripted>,
    spawned: usize,
    next_machine: NextMachine,
}

#[derive(Clone, Copy, Default)]
enum NextMachine {
    #[default]
    Works,
    Refused,
    Hangs,
}

/// What becomes of the next call of a path.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Scripted {
    /// The VMM does not know the path.
    Unknown,
    Refused,
    Hangs,
}

struct Machine {
    process: VmmProcess,
    inner: Mutex<Inner>,
    phase: watch::Sender<u64>,
}

struct Inner {
    vm: Option<VmId>,
    epoch: Epoch,
    state: VmmState,
    migration: Option<MigrationStatus>,
    succession: Option<SuccessionStatus>,
    calls: Vec<String>,
    /// What the latest `incoming` or `outgoing` said.
    handover: Value,
    committed: Option<(MigrationId, Epoch)>,
    /// The limit that its migration was given last.
    paced: Option<Value>,
    heeds_stop: bool,
    attachments: Attachments,
}

impl Fakes {
    fn start(root: &FilePath) -> Self {
        let (program, fifo) = (root.join("vmm"), root.join("births"));
        let script = format!(
            "#!/bin/sh\nmkfifo \"{0}/block.$$\"\necho \"$$ $3\" > \"{0}/births\"\nread never < \"{0}/block.$$\"\n",
            root.display()
        );
        std::fs::write(&program, script).unwrap();
        std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o700)).unwrap();
        assert!(
            std::process::Command::new("mkfifo")
                .arg(&fifo)
                .status()
                .unwrap()
                .success()
        );
        let births = pipe::OpenOptions::new()
            .read_write(true)
            .open_receiver(&fifo)
            .unwrap();
        let shared = Arc::new(Mutex::new(Shared::default()));
        let asked = watch::Sender::new(0);
        let called = watch::Sender::new(Vec::new());
        let (machines, asks, calls) = (shared.clone(), asked.clone(), called.clone());
        let listener = tokio::spawn(async move {
            let mut lines = BufReader::new(births).lines();
            while let Ok(Some(line)) = lines.next_line().await {
                born(&machines, &asks, &calls, &line);
            }
        });
        Self {
            shared,
            asked,
            called,
            root: root.to_owned(),
            _listener: Arc::new(listener),
        }
    }

    fn machine(&self, vm: VmId) -> Arc<Machine> {
        self.shared.lock().unwrap().machines[&vm].clone()
    }

    pub(crate) fn spawned(&self) -> usize {
        self.shared.lock().unwrap().spawned
    }

    pub(crate) fn process(&self, vm: VmId) -> VmmProcess {
        self.machine(vm).process.clone()
    }

    pub(crate) fn refuse_next_machine(&self) {
        self.shared.lock().unwrap().next_machine = NextMachine::Refused;
    }

    pub(crate) fn hang_next_machine(&self) {
        self.shared.lock().unwrap().next_machine = NextMachine::Hangs;
    }

    pub(crate) async fn until_asked_for_a_machine(&self) {
        self.asked
            .subscribe()
            .wait_for(|asked| *asked > 0)
            .await
            .unwrap();
    }

    /// Decides what becomes of the next call of `path` by whatever VMM.
    pub(crate) fn script(&self, path: &'static str, how: Scripted) {
        self.shared.lock().unwrap().scripted.insert(path, how);
    }

    pub(crate) async fn until_called(&self, path: &str) {
        let mut called = self.called.subscribe();
        let comes = called.wait_for(|calls| calls.iter().any(|call| call == path));
        tokio::time::timeout(PATIENCE, comes)
            .await
            .expect("nobody called")
            .unwrap();
    }

    /// The latest VMM that was to be succeeded, how it is, and what it was told.
    pub(crate) fn predecessor(&self, vm: VmId) -> (VmmProcess, VmmState, Vec<String>) {
        let machine = predecessor(&self.shared, vm);
        let inner = machine.inner.lock().unwrap();
        (
            machine.process.clone(),
            inner.state.clone(),
            inner.calls.clone(),
        )
    }

    pub(crate) fn set_state(&self, vm: VmId, state: VmmState) {
        self.machine(vm).inner.lock().unwrap().state = state;
    }

    pub(crate) fn ignore_stop(&self, vm: VmId) {
        self.machine(vm).inner.lock().unwrap().heeds_stop = false;
    }

    pub(crate) fn cut_connection(&self, vm: VmId) {
        let machine = self.machine(vm);
        machine
            .inner
            .lock()
            .unwrap()
            .migration
            .as_mut()
            .unwrap()
            .connected = false;
    }

    pub(crate) fn set_phase(&self, vm: VmId, phase: MigrationPhase) {
        self.machine(vm).set_phase(phase);
    }

    /// The first frame passes a card of a VM that has moved here; no phase changes by that.
    pub(crate) fn first_frame(&self, vm: VmId, packet_gap_us: u64) {
        let machine = self.machine(vm);
        let mut inner = machine.inner.lock().unwrap();
        let status = inner.migration.as_mut().unwrap();
        status.progress.packet_gap_us = Some(packet_gap_us);
    }

    /// What its VMM was told when it was made to receive or to send.
    pub(crate) fn handover(&self, vm: VmId) -> Value {
        self.machine(vm).inner.lock().unwrap().handover.clone()
    }

    pub(crate) fn calls(&self, vm: VmId, path: &str) -> usize {
        self.machine(vm)
            .inner
            .lock()
            .unwrap()
            .calls
            .iter()
            .filter(|call| *call == path)
            .count()
    }

    /// The limit that the VM's migration was given last, while it was under way.
    pub(crate) fn paced(&self, vm: VmId) -> Option<Value> {
        self.machine(vm).inner.lock().unwrap().paced.clone()
    }

    pub(crate) fn committed(&self, vm: VmId) -> Option<(MigrationId, Epoch)> {
        self.machine(vm).inner.lock().unwrap().committed
    }

    /// Where the VMM was told to find disks and taps.
    pub(crate) fn attachments(&self, vm: VmId) -> Attachments {
        let machine = self.machine(vm);
        let inner = machine.inner.lock().unwrap();
        inner.attachments.clone()
    }

    fn kill_all(&self) {
        for entry in std::fs::read_dir(&self.root)
            .into_iter()
            .flatten()
            .flatten()
        {
            let name = entry.file_name();
            let Some(pid) = name.to_str().and_then(|name| name.strip_prefix("block.")) else {
                continue;
            };
            // Opening the other end lets the script's `read` return.
            let _ = std::fs::OpenOptions::new()
                .read(true)
                .write(true)
                .open(self.root.join(format!("block.{pid}")));
        }
        for machine in &self.shared.lock().unwrap().born {
            let pid = rustix::process::Pid::from_raw(machine.process.id().pid).unwrap();
            let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
        }
    }
}

/// A script has started: serve the API it would serve.
fn born(
    shared: &Arc<Mutex<Shared>>,
    asked: &watch::Sender<u64>,
    called: &watch::Sender<Vec<String>>,
    line: &str,
) {
    let (pid, socket) = line.split_once(' ').unwrap();
    let pid: i32 = pid.parse().unwrap();
    // Killed again already: nobody will ask.
    let Some(stat) = procfs::process_stat(pid) else {
        return;
    };
    let Ok(Some(process)) = VmmProcess::find(ProcessId {
        pid,
        start_ticks: stat.start_ticks,
    }) else {
        return;
    };
    let socket = PathBuf::from(socket);
    let vm: VmId = socket
        .parent()
        .unwrap()
        .file_name()
        .unwrap()
        .to_str()
        .unwrap()
        .parse()
        .unwrap();
    let machine = Arc::new(Machine {
        process: process.clone(),
        inner: Mutex::new(Inner {
            vm: None,
            epoch: Epoch(0),
            state: VmmState::Empty,
            migration: None,
            succession: None,
            calls: Vec::new(),
            handover: Value::Null,
            committed: None,
            paced: None,
            heeds_stop: true,
            attachments: Attachments::default(),
        }),
        phase: watch::Sender::new(0),
    });
    {
        let mut shared = shared.lock().unwrap();
        shared.spawned += 1;
        shared.machines.insert(vm, machine.clone());
        shared.born.push(machine.clone());
    }
    let listener = uds::Listener::bind(socket).unwrap();
    let router = Router::new()
        .route("/v1/{*path}", any(answer))
        .with_state(Api {
            machine,
            shared: shared.clone(),
            asked: asked.clone(),
            called: called.clone(),
        });
    tokio::spawn(uds::serve(listener, router, async move {
        process.exited().await;
    }));
}

#[derive(Clone)]
struct Api {
    machine: Arc<Machine>,
    shared: Arc<Mutex<Shared>>,
    asked: watch::Sender<u64>,
    called: watch::Sender<Vec<String>>,
}

impl Machine {
    fn set_phase(&self, phase: MigrationPhase) {
        let mut inner = self.inner.lock().unwrap();
        inner.enter(phase);
        self.phase
            .send_replace(inner.migration.as_ref().unwrap().sequence);
    }

    fn info(&self) -> VmmInfo {
        let inner = self.inner.lock().unwrap();
        VmmInfo {
            version: "test".into(),
            pid: self.process.id().pid.try_into().unwrap(),
            vm: inner.vm,
            epoch: inner.epoch,
            spec: Some(spec()),
            state: inner.state.clone(),
            uptime_ms: 1,
            cpu: CpuFacts {
                level: CpuBaseline::V2,
                signature: "s".into(),
                model: "m".into(),
            },
            guest_resident_bytes: Bytes(0),
            guest_expected_bytes: Bytes(0),
            counters: Counters::default(),
            vcpus: Vec::new(),
            devices: Vec::new(),
            migration: inner.migration.clone(),
            succession: inner.succession.clone(),
        }
    }
}

impl Inner {
    /// What a VMM does on each phase.
    fn enter(&mut self, phase: MigrationPhase) {
        let status = self.migration.as_mut().unwrap();
        status.phase = phase;
        status.sequence += 1;
        match (status.role, phase) {
            (MigrationRole::Source, MigrationPhase::AwaitingCommit) => {
                self.state = VmmState::Paused {
                    reason: PauseReason::HandOver,
                };
            }
            (MigrationRole::Source, MigrationPhase::Completed) => {
                status.progress.downtime_us = Some(1234);
                self.state = VmmState::Stopped {
                    reason: StopReason::MigratedAway,
                };
            }
            (MigrationRole::Source, MigrationPhase::Failed | MigrationPhase::Cancelled)
            | (MigrationRole::Target, MigrationPhase::Completed) => self.state = VmmState::Running,
            _ => {}
        }
    }

    fn begin(&mut self, body: &Value, role: MigrationRole) {
        self.handover = body.clone();
        self.migration = Some(MigrationStatus {
            migration: serde_json::from_value(body["migration"].clone()).unwrap(),
            sequence: 1,
            role,
            phase: MigrationPhase::Connecting,
            progress: MigrationProgress::default(),
            connected: true,
            reason: None,
        });
    }
}

async fn answer(
    State(api): State<Api>,
    Path(path): Path<String>,
    axum::extract::RawQuery(query): axum::extract::RawQuery,
    body: axum::body::Bytes,
) -> Answer<Value> {
    let machine = &api.machine;
    let body: Value = serde_json::from_slice(&body).unwrap_or_default();
    machine
        .inner
        .lock()
        .unwrap()
        .calls
        .push(format!("/v1/{path}"));
    let scripted = api.shared.lock().unwrap().scripted.remove(path.as_str());
    api.called.send_modify(|calls| calls.push(path.clone()));
    match scripted {
        None => {}
        Some(Scripted::Hangs) => std::future::pending().await,
        Some(Scripted::Unknown) => return Err(Refusal(Problem::not_found("path", path))),
        Some(Scripted::Refused) => {
            return Err(Refusal(Problem::conflict("scripted", "it will not")));
        }
    }
    if let Some(step) = path.strip_prefix("succession/") {
        return Ok(Json(json!(succession(&api, step, &body))));
    }
    match path.as_str() {
        "machine" | "incoming" => {
            let next = std::mem::take(&mut api.shared.lock().unwrap().next_machine);
            api.asked.send_modify(|asked| *asked += 1);
            match next {
                NextMachine::Works => {}
                NextMachine::Refused => {
                    return Err(Refusal(Problem::new(
                        422,
                        "no-kernel",
                        "No kernel",
                        "no kernel",
                    )));
                }
                NextMachine::Hangs => std::future::pending().await,
            }
            let mut inner = machine.inner.lock().unwrap();
            inner.vm = serde_json::from_value(body["vm"].clone()).unwrap();
            inner.epoch = serde_json::from_value(body["epoch"].clone()).unwrap();
            inner.attachments = serde_json::from_value(body["attachments"].clone()).unwrap();
            inner.state = VmmState::Created;
            if path == "incoming" {
                inner.state = VmmState::Incoming;
                inner.begin(&body, MigrationRole::Target);
                return Ok(Json(json!(IncomingReady {
                    address: ([127, 0, 0, 1], 9).into(),
                    token: super::credentials::token(),
                })));
            }
        }
        "boot" | "resume" => machine.inner.lock().unwrap().state = VmmState::Running,
        "pause" => {
            machine.inner.lock().unwrap().state = VmmState::Paused {
                reason: PauseReason::Requested,
            }
        }
        "stop" => {
            let mut inner = machine.inner.lock().unwrap();
            if inner.heeds_stop {
                inner.state = VmmState::Stopped {
                    reason: StopReason::GuestHalted,
                };
            }
        }
        "outgoing" => {
            let mut inner = machine.inner.lock().unwrap();
            inner.begin(&body, MigrationRole::Source);
            return Ok(Json(json!(inner.migration)));
        }
        "migration" => {
            let query = query.unwrap_or_default();
            let number = |name: &str| -> u64 {
                let field = query.split('&').find_map(|field| field.strip_prefix(name));
                field.and_then(|text| text.parse().ok()).unwrap_or(0)
            };
            let (after, wait) = (number("after="), Duration::from_millis(number("wait_ms=")));
            let known = machine
                .inner
                .lock()
                .unwrap()
                .migration
                .as_ref()
                .map_or(0, |status| status.sequence);
            if known <= after {
                let mut phase = machine.phase.subscribe();
                let _ =
                    tokio::time::timeout(wait, phase.wait_for(|sequence| *sequence > after)).await;
            }
            return Ok(Json(json!(machine.inner.lock().unwrap().migration)));
        }
        "migration/commit" => {
            let mut inner = machine.inner.lock().unwrap();
            let epoch = serde_json::from_value(body["epoch"].clone()).unwrap();
            inner.committed = Some((
                serde_json::from_value(body["migration"].clone()).unwrap(),
                epoch,
            ));
            inner.epoch = epoch;
            inner.enter(MigrationPhase::Completed);
            return Ok(Json(json!(inner.migration)));
        }
        "migration/abort" | "migration/cancel" => {
            let mut inner = machine.inner.lock().unwrap();
            inner.enter(MigrationPhase::Failed);
            return Ok(Json(json!(inner.migration)));
        }
        "migration/bandwidth" => {
            let mut inner = machine.inner.lock().unwrap();
            inner.paced = Some(body["max_bytes_per_s"].clone());
            return Ok(Json(json!(inner.migration)));
        }
        "migration/release" => return Ok(Json(json!(machine.inner.lock().unwrap().migration))),
        "dirty-rate" => return Ok(Json(json!({ "bytes_per_s": 0 }))),
        "info" => {}
        path if path.starts_with("disks/") => {}
        other => panic!("no fake answer for {other}"),
    }
    Ok(Json(json!(machine.info())))
}

/// The latest machine that was offered to a successor.
fn predecessor(shared: &Mutex<Shared>, vm: VmId) -> Arc<Machine> {
    let shared = shared.lock().unwrap();
    let offered = |machine: &&Arc<Machine>| {
        let inner = machine.inner.lock().unwrap();
        let role = inner.succession.as_ref().map(|status| status.role);
        inner.vm == Some(vm) && role == Some(SuccessionRole::Predecessor)
    };
    shared.born.iter().rev().find(offered).unwrap().clone()
}

/// What a VMM does when it is taken over, or takes a machine over.
fn succession(api: &Api, step: &str, body: &Value) -> SuccessionStatus {
    let mut inner = api.machine.inner.lock().unwrap();
    let begin = |role| SuccessionStatus {
        succession: serde_json::from_value(body["succession"].clone()).unwrap(),
        role,
        phase: SuccessionPhase::Prepared,
        blackout: None,
        reason: None,
    };
    match step {
        "offer" => inner.succession = Some(begin(SuccessionRole::Predecessor)),
        "prepare" => {
            inner.succession = Some(begin(SuccessionRole::Successor));
            inner.vm = serde_json::from_value(body["vm"].clone()).unwrap();
            inner.epoch = serde_json::from_value(body["epoch"].clone()).unwrap();
            inner.state = VmmState::Incoming;
        }
        "take" => {
            let vm = inner.vm.unwrap();
            drop(inner);
            let former = predecessor(&api.shared, vm);
            inner = api.machine.inner.lock().unwrap();
            for inner in [&mut *inner, &mut *former.inner.lock().unwrap()] {
                inner.state = VmmState::Paused {
                    reason: PauseReason::HandOver,
                };
                inner.succession.as_mut().unwrap().phase = SuccessionPhase::Ready;
            }
        }
        "commit" | "abort" => {
            inner.state = VmmState::Running;
            let status = inner.succession.as_mut().unwrap();
            if step == "commit" {
                status.phase = SuccessionPhase::Completed;
                status.blackout = Some(SuccessionBlackout {
                    total_us: 4_321,
                    ..SuccessionBlackout::default()
                });
            } else {
                status.phase = SuccessionPhase::Failed;
            }
        }
        other => panic!("no fake step {other}"),
    }
    inner.succession.clone().unwrap()
}

/// A server that answers commits and questions once the test has said what; until then it keeps them waiting.
#[derive(Clone)]
pub(crate) struct Server {
    pub(crate) host: HostId,
    pub(crate) control: ControlPlane,
    decisions: Decisions,
}

#[derive(Clone)]
struct Decisions {
    commit: watch::Sender<Option<CommitReply>>,
    resolution: watch::Sender<Option<Resolution>>,
    asked: watch::Sender<Vec<String>>,
}

impl Server {
    async fn start() -> Self {
        let authority = Authority::create().unwrap();
        let identity = authority.issue_server(&[]).unwrap();
        let config = tls::server_for_hosts_and_joiners(&identity).unwrap();
        let listener = tls::Listener::bind(([127, 0, 0, 1], 0).into(), config)
            .await
            .unwrap();
        let address = listener.local_address().unwrap().to_string();
        let decisions = Decisions {
            commit: watch::Sender::new(None),
            resolution: watch::Sender::new(None),
            asked: watch::Sender::new(Vec::new()),
        };
        let router = Router::new()
            .route("/v1/migrations/{migration}/commit", post(commit))
            .route("/v1/migrations/{migration}/resolve", post(resolve))
            .with_state(decisions.clone());
        tokio::spawn(tls::serve(listener, router, std::future::pending()));
        let host = HostId(Uuid::new_v4());
        let request = HostRequest::fresh().unwrap();
        let certificate = authority.sign_host(&request.request_pem, host).unwrap();
        let identity = request.signed(certificate, authority.certificate_pem().to_owned());
        let control = ControlPlane::new(&address, &tls::client(&identity).unwrap());
        Self {
            host,
            control,
            decisions,
        }
    }

    pub(crate) fn set_commit(&self, reply: CommitReply) {
        self.decisions.commit.send_replace(Some(reply));
    }

    pub(crate) fn set_resolution(&self, resolution: Resolution) {
        self.decisions.resolution.send_replace(Some(resolution));
    }

    pub(crate) async fn until_asked(&self, what: &str) {
        let mut asked = self.decisions.asked.subscribe();
        let comes = asked.wait_for(|asked| asked.iter().any(|question| question == what));
        tokio::time::timeout(PATIENCE, comes)
            .await
            .expect("nobody asked")
            .unwrap();
    }
}

async fn commit(
    State(decisions): State<Decisions>,
    JsonBody(_): JsonBody<Value>,
) -> Json<CommitReply> {
    decisions
        .asked
        .send_modify(|asked| asked.push("commit".into()));
    let mut reply = decisions.commit.subscribe();
    let reply = reply
        .wait_for(Option::is_some)
        .await
        .unwrap()
        .clone()
        .unwrap();
    Json(reply)
}

async fn resolve(
    State(decisions): State<Decisions>,
    JsonBody(_): JsonBody<Value>,
) -> Json<Resolution> {
    decisions
        .asked
        .send_modify(|asked| asked.push("resolve".into()));
    let mut resolution = decisions.resolution.subscribe();
    let resolution = resolution.wait_for(Option::is_some).await.unwrap().unwrap();
    Json(resolution)
}
