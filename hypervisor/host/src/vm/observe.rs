//! Looking at a VMM: once a second its state and counters, its process's use of CPU and memory, and now and then how
//! fast its guest dirties memory.

use super::driver::News;
use crate::procfs;
use godwit_channel::client::NO_BODY;
use godwit_channel::uds::UdsClient;
use godwit_wire::id::VmId;
use godwit_wire::migration::MigrationStatus;
use godwit_wire::usage::VmUsage;
use godwit_wire::vmm_api::{DirtyRate, DirtyRateRequest, VmmInfo, VmmState};
use http::Method;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use tokio::sync::{Mutex, OwnedMutexGuard, mpsc, watch};
use tokio::time::Instant;
use tokio_util::task::AbortOnDropHandle;

/// Time between two looks.
const STEADY: Duration = Duration::from_secs(1);
/// The same while a guest has been asked to stop.
const HURRIED: Duration = Duration::from_millis(100);
/// Looks without an answer after which the log says so: a VMM that starts or ends need not answer.
const LOOKS_UNTIL_SILENT: u32 = 3;
/// How long a look may take.
const LOOK_TIMEOUT: Duration = Duration::from_secs(2);
/// Time between two samples of the dirty rate: taking one makes the guest fault on every page it writes.
const DIRTY_RATE_EVERY: Duration = Duration::from_secs(30);
/// Until the first of them.
const DIRTY_RATE_FIRST: Duration = Duration::from_secs(5);
/// How long such a sample watches.
const DIRTY_RATE_WINDOW: Duration = Duration::from_millis(200);
/// How long a migration's news are waited for; also how often its figures are refreshed.
const MIGRATION_WAIT_MS: u64 = godwit_wire::host_api::HEARTBEAT_BUSY_MS;
/// Pause after a VMM did not tell about its migration.
const MIGRATION_RETRY: Duration = Duration::from_millis(100);

/// What a look showed.
#[derive(Debug)]
pub(super) struct Observation {
    pub(super) info: VmmInfo,
    pub(super) usage: VmUsage,
    turn: u64,
}

/// Keeps looking until it is dropped.
#[derive(Debug)]
pub(super) struct Observer {
    /// Grows with every command: what was seen before a command says nothing about what it did.
    turn: Arc<AtomicU64>,
    /// Of the VMM that is looked at.
    pid: i32,
    /// Held by whoever uses the VM's dirty log: a sample, or a migration.
    dirty_log: Arc<Mutex<()>>,
    /// How many migrations wait for it.
    dirty_log_needed: Arc<watch::Sender<u32>>,
    pace: watch::Sender<Duration>,
    _task: AbortOnDropHandle<()>,
}

impl Observer {
    pub(super) fn start(vm: VmId, vmm: UdsClient, pid: i32, news: mpsc::Sender<News>) -> Self {
        let turn = Arc::new(AtomicU64::new(0));
        let dirty_log = Arc::new(Mutex::new(()));
        let dirty_log_needed = Arc::new(watch::Sender::new(0));
        let (pace, paces) = watch::channel(STEADY);
        let looker = Looker {
            vm,
            vmm,
            pid,
            news,
            turn: turn.clone(),
            dirty_log: dirty_log.clone(),
            dirty_log_needed: dirty_log_needed.clone(),
            before: None,
        };
        let task = tokio::spawn(looker.keep_looking(paces));
        Self {
            turn,
            pid,
            dirty_log,
            dirty_log_needed,
            pace,
            _task: AbortOnDropHandle::new(task),
        }
    }

    /// A command is about to change the state.
    pub(super) fn command_sent(&self) {
        self.turn.fetch_add(1, Ordering::AcqRel);
    }

    /// Whether it is of this VMM, not of one before it, and no command was sent since.
    pub(super) fn is_current(&self, observation: &Observation) -> bool {
        i32::try_from(observation.info.pid) == Ok(self.pid)
            && observation.turn == self.turn.load(Ordering::Acquire)
    }

    /// The guest has been asked to stop: look more often.
    pub(super) fn hurry(&self) {
        self.pace.send_replace(HURRIED);
    }

    /// The state has changed without a command: look at once.
    pub(super) fn look_now(&self) {
        self.pace.send_modify(|_| {});
    }

    /// Keeps samples away from the dirty log as long as the guard lives; one under way is given up. The VMM, which
    /// may still be watching, lets the migration have the log.
    pub(super) async fn reserve_dirty_log(&self) -> OwnedMutexGuard<()> {
        self.dirty_log_needed.send_modify(|waiting| *waiting += 1);
        let guard = self.dirty_log.clone().lock_owned().await;
        self.dirty_log_needed.send_modify(|waiting| *waiting -= 1);
        guard
    }

    /// The same without waiting, for a migration found under way: nothing else can hold it.
    pub(super) fn try_reserve_dirty_log(&self) -> Option<OwnedMutexGuard<()>> {
        self.dirty_log.clone().try_lock_owned().ok()
    }
}

struct Looker {
    vm: VmId,
    vmm: UdsClient,
    pid: i32,
    news: mpsc::Sender<News>,
    turn: Arc<AtomicU64>,
    dirty_log: Arc<Mutex<()>>,
    dirty_log_needed: Arc<watch::Sender<u32>>,
    before: Option<Sample>,
}

/// Counters at one moment.
#[derive(Clone, Copy)]
struct Sample {
    at: Instant,
    cpu_time: Duration,
    exits: u64,
}

impl Looker {
    async fn keep_looking(mut self, mut paces: watch::Receiver<Duration>) {
        let mut dirty_rate = 0;
        let mut next_dirty_rate = Instant::now() + DIRTY_RATE_FIRST + self.share_of(STEADY * 10);
        let mut unanswered = 0;
        loop {
            let turn = self.turn.load(Ordering::Acquire);
            match self
                .vmm
                .request_within::<VmmInfo>(LOOK_TIMEOUT, Method::GET, "/v1/info", NO_BODY)
                .await
            {
                Ok(info) => {
                    if std::mem::take(&mut unanswered) >= LOOKS_UNTIL_SILENT {
                        tracing::info!(vm = %self.vm, "the VMM answers again");
                    }
                    if info.state == VmmState::Running && Instant::now() >= next_dirty_rate {
                        dirty_rate = self.sample_dirty_rate().await.unwrap_or(dirty_rate);
                        next_dirty_rate = Instant::now() + DIRTY_RATE_EVERY;
                    }
                    let usage = VmUsage {
                        dirty_bytes_per_s: dirty_rate,
                        ..self.usage(&info)
                    };
                    let observation = Box::new(Observation { info, usage, turn });
                    if self.news.send(News::Observed(observation)).await.is_err() {
                        return;
                    }
                }
                Err(error) => {
                    unanswered += 1;
                    if unanswered == LOOKS_UNTIL_SILENT {
                        tracing::warn!(vm = %self.vm, pid = self.pid, %error, "the VMM does not answer");
                    }
                }
            }
            let pace = *paces.borrow_and_update();
            tokio::select! {
                () = tokio::time::sleep(pace) => {}
                _ = paces.changed() => {}
            }
        }
    }

    fn usage(&mut self, info: &VmmInfo) -> VmUsage {
        let cpu_time = procfs::process_stat(self.pid).map_or(Duration::ZERO, |stat| stat.cpu_time);
        let now = Sample {
            at: Instant::now(),
            cpu_time,
            exits: info.counters.exits,
        };
        let before = self.before.replace(now).unwrap_or(now);
        let elapsed_s = (now.at - before.at).as_secs_f64();
        let per_second = |amount: f64| {
            if elapsed_s > 0.0 {
                amount / elapsed_s
            } else {
                0.0
            }
        };
        VmUsage {
            cpu_percent: per_second(
                100.0 * now.cpu_time.saturating_sub(before.cpu_time).as_secs_f64(),
            ),
            rss_bytes: procfs::resident(self.pid),
            exits_per_s: per_second(now.exits.saturating_sub(before.exits) as f64),
            dirty_bytes_per_s: 0,
        }
    }

    /// `None` when a migration uses the dirty log, or the VMM refuses.
    async fn sample_dirty_rate(&self) -> Option<u64> {
        let _ours = self.dirty_log.try_lock().ok()?;
        let window_ms = u64::try_from(DIRTY_RATE_WINDOW.as_millis()).ok()?;
        let limit = DIRTY_RATE_WINDOW + LOOK_TIMEOUT;
        let request = DirtyRateRequest {
            window_ms,
            readings: 1,
        };
        let mut needed = self.dirty_log_needed.subscribe();
        let asked = self.vmm.request_within::<DirtyRate>(
            limit,
            Method::POST,
            "/v1/dirty-rate",
            Some(&request),
        );
        let rate = tokio::select! {
            rate = asked => rate,
            _ = needed.wait_for(|waiting| *waiting > 0) => return None,
        };
        match rate {
            Ok(rate) => Some(rate.bytes_per_s),
            Err(error) => {
                tracing::debug!(vm = %self.vm, %error, "the dirty rate was not sampled");
                None
            }
        }
    }

    /// Spreads the VMs of a host over a time, so that they are not all sampled at once.
    fn share_of(&self, time: Duration) -> Duration {
        time.mul_f64((self.vm.0.as_u64_pair().1 % 1000) as f64 / 1000.0)
    }
}

/// Brings every phase of a migration to the driver at once, and its figures every [`MIGRATION_WAIT_MS`], until it is
/// final.
pub(super) fn watch_migration(vmm: UdsClient, news: mpsc::Sender<News>) -> AbortOnDropHandle<()> {
    AbortOnDropHandle::new(tokio::spawn(async move {
        let mut seen = 0;
        loop {
            let path = format!("/v1/migration?after={seen}&wait_ms={MIGRATION_WAIT_MS}");
            let Ok(status) = vmm.get::<MigrationStatus>(&path).await else {
                // The driver hears of a dead process by itself; a slow one is asked again.
                tokio::time::sleep(MIGRATION_RETRY).await;
                continue;
            };
            seen = status.sequence;
            let last = status.phase.is_final();
            if news.send(News::Migration(Box::new(status))).await.is_err() || last {
                return;
            }
        }
    }))
}
