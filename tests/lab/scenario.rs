//! Scenarios one after another on one pool, each within its bound.

use crate::debian::Debian;
use crate::pool::Pool;
use anyhow::{Context, anyhow};
use futures_util::future::LocalBoxFuture;
use godwit_tests::lab::images::Images;
use godwit_tests::lab::machine::Site;
use godwit_tests::lab::packages::Packages;
use godwit_tests::lab::switch::Switch;
use godwit_tests::test_dir::TestDir;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// The pool is up within this time.
const POOL_BOUND: Duration = Duration::from_secs(240);

/// Something the product must do with stock Linux guests.
pub(crate) struct Scenario {
    /// Name on the command line.
    pub(crate) name: &'static str,
    /// What it shows.
    pub(crate) shows: &'static str,
    /// Whether the short core has it.
    pub(crate) extent: Extent,
    /// What must be made before its pool starts.
    pub(crate) needs: Needs,
    /// Longest time it may take, however busy the machine is.
    pub(crate) bound: Duration,
    /// What it does; it leaves the pool as it found it when it succeeds.
    pub(crate) run: for<'a> fn(&'a mut Pool) -> LocalBoxFuture<'a, anyhow::Result<()>>,
}

/// When a scenario runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Extent {
    /// With every `tests/run`.
    Core,
    /// With `tests/run lab`.
    Full,
}

/// What a scenario needs besides a pool.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Needs {
    /// Nothing that every pool does not have.
    Nothing,
    /// A whole Debian's image, and its kernel and initrd on the hosts.
    Debian,
}

/// How a scenario went.
pub(crate) struct Outcome {
    pub(crate) name: &'static str,
    pub(crate) shows: &'static str,
    pub(crate) took: Duration,
    pub(crate) result: anyhow::Result<()>,
}

/// Builds pools: one to begin with, a fresh one after each failure.
pub(crate) struct Lab {
    packages: Packages,
    images: Images,
    logs: PathBuf,
    pools: u32,
}

/// A pool with the directory it lives in, in the order in which they must be dropped.
pub(crate) struct RunningPool {
    pub(crate) pool: Pool,
    _dir: TestDir,
}

impl Lab {
    /// Fetches and builds what these scenarios need.
    pub(crate) async fn prepare(folder: &Path, scenarios: &[&Scenario]) -> anyhow::Result<Self> {
        fs::create_dir_all(folder)?;
        let packages = Packages::prepare(folder).context("Debian packages")?;
        let mut debian = None;
        if scenarios
            .iter()
            .any(|scenario| scenario.needs == Needs::Debian)
        {
            // Without it the other scenarios run all the same; those that need it fail.
            debian = Debian::prepare(folder, &packages)
                .await
                .inspect_err(|error| eprintln!("lab: no Debian image can be made: {error:#}"))
                .ok();
        }
        let images = Images::build(&packages, &folder.join("images"), |data| {
            debian
                .as_ref()
                .map_or(Ok(()), |debian| debian.copy_to(data))
        })
        .context("images")?;
        let logs = folder.join("logs");
        let _ = fs::remove_dir_all(&logs);
        Ok(Self {
            packages,
            images,
            logs,
            pools: 0,
        })
    }

    /// A pool with two hosts.
    pub(crate) async fn start_pool(&mut self) -> anyhow::Result<RunningPool> {
        self.pools += 1;
        let logs = self.logs.join(format!("pool-{}", self.pools));
        fs::create_dir_all(&logs)?;
        let dir = TestDir::new();
        let site = Site {
            packages: self.packages.clone(),
            images: self.images.clone(),
            switch: Switch::start(&dir.join("switch.sock"))?,
            sockets: dir.path().to_owned(),
            logs,
        };
        let start = async {
            let mut pool = Pool::start(site).await?;
            pool.need_hosts(&["host-1", "host-2"]).await?;
            anyhow::Ok(pool)
        };
        let pool = tokio::time::timeout(POOL_BOUND, start)
            .await
            .map_err(|_| anyhow!("the pool is not up after {POOL_BOUND:?}"))??;
        Ok(RunningPool { pool, _dir: dir })
    }

    /// Runs the scenarios in order.
    pub(crate) async fn run(&mut self, scenarios: &[&Scenario]) -> Vec<Outcome> {
        let mut pool = None;
        let mut outcomes = Vec::new();
        for scenario in scenarios {
            let started = Instant::now();
            let mut result = self.run_one(scenario, &mut pool).await;
            if result.is_err()
                && let Some(crash) = self.emulator_crash()
            {
                // The product cannot be judged on hosts whose CPUs vanished under them.
                eprintln!(
                    "lab: {}: the emulator itself crashed, so it runs once more on a fresh pool: {crash}",
                    scenario.name
                );
                pool = None;
                result = self.run_one(scenario, &mut pool).await;
            }
            let took = started.elapsed();
            match &result {
                Ok(()) => eprintln!(
                    "lab: {} passed in {:.1} s",
                    scenario.name,
                    took.as_secs_f32()
                ),
                Err(error) => {
                    eprintln!(
                        "lab: {} FAILED: {error:#}\nlab: logs are in {}",
                        scenario.name,
                        self.logs.join(format!("pool-{}", self.pools)).display()
                    );
                    if let Some(running) = &mut pool {
                        running.pool.collect_logs().await;
                    }
                    pool = None;
                }
            }
            outcomes.push(Outcome {
                name: scenario.name,
                shows: scenario.shows,
                took,
                result,
            });
        }
        outcomes
    }

    /// What QEMU said when it ended by one of its own assertions, in the latest pool.
    fn emulator_crash(&self) -> Option<String> {
        let logs = self.logs.join(format!("pool-{}", self.pools));
        let mut entries = fs::read_dir(logs).ok()?.flatten();
        entries.find_map(|entry| {
            let name = entry.file_name().into_string().ok()?;
            let said = fs::read_to_string(entry.path()).ok()?;
            let assertion = said
                .lines()
                .find(|line| line.contains("Assertion") && line.contains("failed"))?;
            name.ends_with(".qemu.log").then(|| assertion.to_owned())
        })
    }

    async fn run_one(
        &mut self,
        scenario: &Scenario,
        pool: &mut Option<RunningPool>,
    ) -> anyhow::Result<()> {
        if pool.is_none() {
            let started = Instant::now();
            *pool = Some(self.start_pool().await.context("starting a pool")?);
            eprintln!(
                "lab: pool is up after {:.1} s",
                started.elapsed().as_secs_f32()
            );
        }
        let running = pool.as_mut().context("a pool")?;
        eprintln!("lab: {}: {}", scenario.name, scenario.shows);
        tokio::time::timeout(scenario.bound, (scenario.run)(&mut running.pool))
            .await
            .map_err(|_| anyhow!("not done after {:?}", scenario.bound))?
    }
}
