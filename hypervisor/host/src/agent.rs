//! The agent as a whole: from the command line to the end.
//!
//! ```text
//! checks ──▶ joining ──▶ adopting ──▶ serving ──SIGTERM, SIGINT──▶ ending
//!   │ refuses, with the remedy         │ killed                      │ VMs run on, or are killed
//!   ▼                                  ▼                             ▼
//! nothing touched             VMs run on; the next agent adopts them
//! ```

use crate::adoption::{Adoption, Found, adopt as decide, has_started};
use crate::api::{self, Agent};
use crate::args::{HostArgs, OnExit, StoragePool, server_authority};
use crate::board::Board;
use crate::control::ControlPlane;
use crate::error::HostError;
use crate::facts::{self, HostSampler};
use crate::heartbeat::Heartbeats;
use crate::join;
use crate::kept::{KeepPolicy, KeptMemories};
use crate::lease::LeasePage;
use crate::network::Networks;
use crate::process::{self, VmmProcess};
use crate::procfs;
use crate::record::{End, Started, StateDirectory, VmDirectory, VmRecord};
use crate::storage::{Origin, PoolPlace, Storage};
use crate::sys::AfterAgent;
use crate::vm::{self, Adopted, Command, Context, Registry};
use godwit_channel::client::NO_BODY;
use godwit_channel::file::FileError;
use godwit_channel::uds::{self, UdsClient};
use godwit_channel::{tls, tls::Listener};
use godwit_wire::id::VmId;
use godwit_wire::storage::MAX_POOLS;
use godwit_wire::unit::Mib;
use godwit_wire::vmm_api::VmmInfo;
use http::Method;
use rustix::fs::FlockOperation;
use std::collections::BTreeSet;
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};
use tokio::net::TcpListener;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tracing_subscriber::EnvFilter;
use uuid::Uuid;

/// How long a VMM left by a former agent may take to answer.
const ADOPTION_TIMEOUT: Duration = Duration::from_secs(3);

/// Records are synced to disk on the runtime's own threads: one VM's must not keep another's commit waiting.
const LEAST_WORKERS: usize = 4;
/// How long drivers may take to kill their VMMs when the agent ends.
const KILL_TIMEOUT: Duration = Duration::from_secs(4);

/// Runs the host agent until it is told to end.
///
/// # Errors
/// [`HostError`], before anything was touched, with the way out of it.
pub fn run(args: HostArgs) -> Result<(), HostError> {
    if args.die_with_parent {
        let signal = Some(rustix::process::Signal::TERM);
        rustix::process::set_parent_process_death_signal(signal).map_err(|error| {
            HostError::System {
                what: "a signal at the parent's end",
                source: error.into(),
            }
        })?;
    }
    log_to_stderr();
    facts::check_kvm()?;
    let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(cores.max(LEAST_WORKERS))
        .enable_all()
        .build()
        .map_err(|source| HostError::System {
            what: "an asynchronous runtime",
            source,
        })?;
    runtime.block_on(serve(args))
}

/// `RUST_LOG` chooses what is logged. A program that has set up logging itself keeps what it has.
fn log_to_stderr() {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    let logging = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(io::stderr)
        .with_target(false);
    drop(logging.try_init());
}

/// What the agent needs to exist.
struct Ground {
    state: StateDirectory,
    boot_id: Uuid,
    program: PathBuf,
    authority: String,
    /// Held as long as the agent lives.
    _lock: File,
}

async fn serve(args: HostArgs) -> Result<(), HostError> {
    let mut end = EndSignals::new()?;
    let ground = prepare(&args)?;
    let listener = TcpListener::bind(args.listen)
        .await
        .map_err(|source| HostError::Listen {
            address: args.listen,
            source,
        })?;
    let address = listener.local_addr().map_err(|source| HostError::Listen {
        address: args.listen,
        source,
    })?;
    let name = args.name.clone().unwrap_or_else(facts::host_name);
    let cpu = facts::probe_cpu(&ground.program, &ground.state).await?;
    let facts = facts::facts(
        name,
        address,
        cpu,
        args.guest_memory_mib.map(Mib),
        ground.boot_id,
    );
    let joined = tokio::select! {
        joined = join::identity(ground.state.root(), &ground.authority, args.join.as_deref(), &facts) => joined,
        () = end.wait() => return Ok(()),
    };
    let (host, identity) = joined?;
    let lease = LeasePage::open(&ground.state.lease(), ground.boot_id)?;
    tracing::info!(
        %host, name = facts.name, %address, server = ground.authority, lease = ?lease.state(crate::clock::boottime_ns()),
        guest_memory = %facts.guest_memory_mib, cpu = facts.cpu.model, "the agent is up"
    );

    let calls = tls::client(&identity)?;
    let control = ControlPlane::new(&ground.authority, &calls);
    let registry = Registry::new(Arc::new(Context {
        host,
        state: ground.state.clone(),
        boot_id: ground.boot_id,
        program: ground.program.clone(),
        after_agent: if args.die_with_parent {
            AfterAgent::Dies
        } else {
            AfterAgent::LivesOn
        },
        migration_address: address.ip(),
        migration_ports: args.migration_ports,
        control,
        board: Board::default(),
        storage: Storage::new(pool_places(&args, &ground.state)?, host),
        networks: Networks::new(host, address.ip()),
        kept: Arc::new(KeptMemories::new(keep_policy(
            &args,
            facts.guest_memory_mib,
        ))),
        runtime: tokio::runtime::Handle::current(),
    }));
    adopt_all(&registry).await?;
    let _sampling = registry.context().storage.keep_sampling();
    let _keeping = registry.context().kept.watch();
    // Only now is it known what the VMs found here need.
    let networking = registry.context().networks.keep();
    let agent = Arc::new(Agent {
        facts,
        sampler: HostSampler::new(),
        registry: registry.clone(),
    });
    let stopping = CancellationToken::new();
    let listener = Listener::new(listener, tls::server_for_server_only(&identity)?);
    let serving = tokio::spawn(tls::serve(
        listener,
        api::router(agent.clone()),
        stopping.clone().cancelled_owned(),
    ));
    let control = ControlPlane::new(&ground.authority, &calls);
    let heartbeats = Heartbeats::new(host, agent, control, lease)
        .spawn(stopping.clone())
        .map_err(|source| HostError::System {
            what: "a thread for heartbeats",
            source,
        })?;

    end.wait().await;
    tracing::info!(vms = registry.vms().len(), on_exit = ?args.on_exit, "the agent ends");
    stopping.cancel();
    if tokio::task::spawn_blocking(|| heartbeats.join())
        .await
        .is_err()
    {
        tracing::error!("the heartbeats could not be ended");
    }
    if args.on_exit == OnExit::KillVms {
        kill_all(&registry).await;
        drop(networking);
        let cleared = registry.context().networks.clear();
        if tokio::time::timeout(KILL_TIMEOUT, cleared).await.is_err() {
            tracing::warn!("taps and bridges are left; the next agent removes them");
        }
    }
    // Only an answer under way could still be lost.
    drop(serving.await);
    Ok(())
}

fn prepare(args: &HostArgs) -> Result<Ground, HostError> {
    if args.listen.ip().is_unspecified() {
        return Err(HostError::ListenUnspecified(args.listen));
    }
    let authority = server_authority(&args.server).map_err(|problem| HostError::ServerUrl {
        url: args.server.clone(),
        problem,
    })?;
    let absolute = std::path::absolute(&args.state_dir)
        .map_err(|source| FileError::new("use", &args.state_dir, source))?;
    let state = StateDirectory::new(absolute);
    check_depth(args, &state)?;
    let program = match &args.vmm_program {
        Some(program) => program.clone(),
        None => std::env::current_exe().map_err(|source| HostError::System {
            what: "the path of this program",
            source,
        })?,
    };
    state.create()?;
    // However the directory is written on the command line, VMMs find their sockets in it and are found by them.
    let canonical = std::fs::canonicalize(state.root())
        .map_err(|source| FileError::new("use", state.root(), source))?;
    let state = StateDirectory::new(canonical);
    check_depth(args, &state)?;
    let lock = lock(&state.lock(), state.root())?;
    state.prune_fences(SystemTime::now())?;
    let boot_id = procfs::boot_id().ok_or(HostError::Proc("the boot id"))?;
    Ok(Ground {
        state,
        boot_id,
        program,
        authority,
        _lock: lock,
    })
}

fn keep_policy(args: &HostArgs, guest_memory: Mib) -> KeepPolicy {
    KeepPolicy {
        keep: Duration::from_secs(args.keep_memory_minutes.saturating_mul(60)),
        most: args.keep_memory_mib.map(|most| Mib(most).bytes()),
        guest_memory: guest_memory.bytes(),
    }
}

/// The pools of the command line, or the default one.
fn pool_places(args: &HostArgs, state: &StateDirectory) -> Result<Vec<PoolPlace>, HostError> {
    if args.storage.is_empty() {
        return Ok(vec![PoolPlace {
            name: "default".to_owned(),
            directory: state.pool(),
            origin: Origin::Ours,
        }]);
    }
    let mut names = BTreeSet::new();
    for pool in &args.storage {
        if !names.insert(&pool.name) {
            return Err(HostError::StorageTwice {
                name: pool.name.clone(),
            });
        }
    }
    if args.storage.len() > MAX_POOLS {
        return Err(HostError::TooManyPools {
            count: args.storage.len(),
        });
    }
    let place = |pool: &StoragePool| PoolPlace {
        name: pool.name.clone(),
        directory: pool.directory.clone(),
        origin: Origin::Operators,
    };
    Ok(args.storage.iter().map(place).collect())
}

fn check_depth(args: &HostArgs, state: &StateDirectory) -> Result<(), HostError> {
    let bytes = state.longest_socket_path_bytes();
    if bytes <= uds::MAX_PATH_BYTES {
        return Ok(());
    }
    Err(HostError::StateDirTooDeep {
        path: args.state_dir.clone(),
        bytes,
        limit: uds::MAX_PATH_BYTES,
    })
}

/// One agent per state directory.
fn lock(path: &Path, directory: &Path) -> Result<File, HostError> {
    let file = File::create(path).map_err(|source| FileError::new("create", path, source))?;
    match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(file),
        Err(rustix::io::Errno::WOULDBLOCK) => Err(HostError::AlreadyRunning {
            path: directory.to_owned(),
        }),
        Err(error) => Err(FileError::new("lock", path, error.into()).into()),
    }
}

/// Takes over what a former agent has left, all VMs at once.
pub(crate) async fn adopt_all(registry: &Arc<Registry>) -> Result<(), HostError> {
    let mut adoptions = JoinSet::new();
    for vm in registry.context().state.known_vms()? {
        adoptions.spawn(adopt(registry.clone(), vm));
    }
    adoptions.join_all().await;
    Ok(())
}

async fn adopt(registry: Arc<Registry>, vm: VmId) {
    let directory = registry.context().state.vm(vm);
    let record = match directory.read_record() {
        Ok(Some(record)) => record,
        // Made, and the agent died before it wrote anything: there is nothing.
        Ok(None) => return forget(&registry, vm, None, "it was never written down").await,
        Err(error) => {
            registry.context().networks.spare(vm);
            return tracing::error!(%vm, %error, source = %error.source, "a VM's record cannot be read; it is left alone");
        }
    };
    let found = find(&registry, &record).await;
    let (process, found) = match found {
        Ok(found) => found,
        Err(error) => {
            registry.context().networks.spare(vm);
            return tracing::error!(%vm, %error, "a VM's process cannot be examined; it is left alone");
        }
    };
    let decision = decide(&record, registry.context().boot_id, &found);
    tracing::info!(%vm, name = record.name, epoch = %record.epoch, ?decision, "found a VM");
    match decision {
        Adoption::Live => {
            let info = match found {
                Found::Answers(info) => Some(info),
                Found::Silent | Found::NoProcess => None,
            };
            let record = confirm_start(&registry, record, info.as_deref());
            vm::adopt(
                &registry,
                Adopted {
                    record,
                    process,
                    info,
                },
            );
        }
        Adoption::StillEnded => kill_and_adopt(&registry, record, process).await,
        Adoption::Lost => kill_and_adopt(&registry, lost(record), process).await,
        Adoption::KillAndLose { reason } => {
            tracing::warn!(%vm, reason, "killing what is left of a VM");
            kill_and_adopt(&registry, lost(record), process).await;
        }
        Adoption::Forget { reason } => {
            if let Err(error) = registry.context().state.write_fence(vm, &record.fence) {
                tracing::error!(%vm, %error, source = %error.source, "a fence could not be written down");
            }
            forget(&registry, vm, process, &reason).await;
        }
    }
}

/// What the VMM says makes up for what the former agent had no time to write down.
fn confirm_start(registry: &Registry, mut record: VmRecord, info: Option<&VmmInfo>) -> VmRecord {
    if record.started == Started::Yes || !info.is_some_and(|info| has_started(&info.state)) {
        return record;
    }
    record.started = Started::Yes;
    let directory = registry.context().state.vm(record.vm);
    if let Err(error) = directory.write_record(&record) {
        tracing::error!(vm = %record.vm, %error, source = %error.source, "a VM's start could not be written down");
    }
    record
}

fn lost(record: VmRecord) -> VmRecord {
    VmRecord {
        end: Some(End::Lost),
        process: None,
        ..record
    }
}

async fn find(registry: &Registry, record: &VmRecord) -> io::Result<(Option<VmmProcess>, Found)> {
    let directory = registry.context().state.vm(record.vm);
    let process = match record.process {
        // Only this one may be the VM's: another one may be a predecessor, whose memory a successor has changed.
        Some(id) if record.boot_id == registry.context().boot_id => VmmProcess::find(id)?,
        _ => VmmProcess::find_strays(&directory)
            .await?
            .into_iter()
            .next(),
    };
    let Some(process) = process else {
        return Ok((None, Found::NoProcess));
    };
    let vmm = UdsClient::new(directory.api_socket(record.seat));
    let info = vmm
        .request_within::<VmmInfo>(ADOPTION_TIMEOUT, Method::GET, "/v1/info", NO_BODY)
        .await;
    let found = match info {
        Ok(info) => Found::Answers(Box::new(info)),
        Err(error) => {
            tracing::warn!(vm = %record.vm, pid = process.id().pid, %error, "a VMM does not answer");
            Found::Silent
        }
    };
    Ok((Some(process), found))
}

/// Makes sure that nothing runs for a VM that is over, and goes on reporting it.
async fn kill_and_adopt(registry: &Arc<Registry>, record: VmRecord, process: Option<VmmProcess>) {
    let directory = registry.context().state.vm(record.vm);
    if let Err(error) = kill_what_is_left(&directory, process).await {
        registry.context().networks.spare(record.vm);
        tracing::error!(vm = %record.vm, %error, "what is left of a VM could not be killed; it is left alone");
        return;
    }
    if let Err(error) = directory
        .remove_sockets()
        .and_then(|()| directory.write_record(&record))
    {
        tracing::error!(vm = %record.vm, %error, source = %error.source, "a VM's end could not be written down");
    }
    vm::adopt(
        registry,
        Adopted {
            record,
            process: None,
            info: None,
        },
    );
}

/// Kills the process that was found, and whatever else was started for the VM.
async fn kill_what_is_left(directory: &VmDirectory, process: Option<VmmProcess>) -> io::Result<()> {
    if let Some(process) = process {
        process.kill_guest().await?;
    }
    process::kill_strays(directory).await
}

async fn forget(registry: &Registry, vm: VmId, process: Option<VmmProcess>, reason: &str) {
    let directory = registry.context().state.vm(vm);
    tracing::info!(%vm, reason, "forgetting a VM");
    if let Err(error) = kill_what_is_left(&directory, process).await {
        return tracing::error!(%vm, %error, "what is left of a VM could not be killed");
    }
    if let Err(error) = directory.remove() {
        tracing::error!(%vm, %error, source = %error.source, "a VM's directory could not be removed");
    }
}

async fn kill_all(registry: &Arc<Registry>) {
    if tokio::time::timeout(KILL_TIMEOUT, kill_by_drivers(registry))
        .await
        .is_err()
    {
        tracing::warn!("drivers are busy; killing their VMMs over their heads");
    }
    let state = &registry.context().state;
    for vm in state.known_vms().unwrap_or_default() {
        let directory = state.vm(vm);
        if let Err(error) = process::kill_strays(&directory).await {
            tracing::error!(%vm, %error, "a VM could not be killed");
        }
        if let Err(error) = directory.remove_sockets() {
            tracing::error!(%vm, %error, "sockets are left");
        }
    }
}

async fn kill_by_drivers(registry: &Arc<Registry>) {
    let mut kills = JoinSet::new();
    for vm in registry.vms() {
        let registry = registry.clone();
        kills.spawn(async move {
            if let Err(problem) = registry.ask(vm, Command::KillProcess).await {
                tracing::error!(%vm, %problem, "a VM could not be killed");
            }
        });
    }
    kills.join_all().await;
}

/// SIGTERM and SIGINT.
struct EndSignals {
    terminate: Signal,
    interrupt: Signal,
}

impl EndSignals {
    fn new() -> Result<Self, HostError> {
        let listen = |kind| {
            signal(kind).map_err(|source| HostError::System {
                what: "signals",
                source,
            })
        };
        Ok(Self {
            terminate: listen(SignalKind::terminate())?,
            interrupt: listen(SignalKind::interrupt())?,
        })
    }

    async fn wait(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
        }
    }
}
