//! A guest that dirties memory and proves it whole moves from VMM to VMM, over and over.
//!
//! ```text
//! draw a policy ─▶ fresh target ─▶ migrate ─▶ landed ─▶ only the target runs ─┐
//!       ▲                             └─────▶ stayed ─▶ only the source runs ─┤
//!       └───────────────────── the guest verifies its memory ◀────────────────┘
//! ```
//!
//! How each flight goes is drawn from a seed, so that a run that finds something can be had again. A flight may end
//! without a landing (it was called off, or the guest outran what its policy allows); then the guest must be where it
//! was. The first finding ends the soak.

use crate::linux::LinuxGuest;
use crate::migration::{Flight, status_after};
use crate::test_dir::TestDir;
use crate::vmm::{self, BOOT_PATIENCE, Vmm, new_vm};
use anyhow::{Context, bail, ensure};
use godwit_wire::migration::{
    Compression, MigrationPhase, MigrationPolicy, MigrationStatus, PostCopy, Verify,
};
use godwit_wire::unit::Mib;
use godwit_wire::vmm_api::{CreateRequest, StopReason, VmmState};
use std::fmt;
use std::fs;
use std::time::{Duration, Instant};

const MEMORY: Mib = Mib(96);
/// What the Linux guest fills and verifies,
const LINUX_FILL_MIB: u64 = 16;
/// and what it writes over and over.
const LINUX_DIRTY: &str = "dirty 48 12";
/// The pilot takes milliseconds for each page.
const PILOT_FILL_MIB: u64 = 1;
const PILOT_DIRTY: &str = "dirty 4 1";
/// One flight in so many is called off.
const CANCEL_INTERVAL: u64 = 20;
/// One flight in so many may go ahead of its memory,
const POST_COPY_INTERVAL: u64 = 3;
/// which a blackout this short makes likely.
const POST_COPY_DOWNTIME_MS: u64 = 5;
/// One flight in so many has all memory hashed at both ends.
const HASH_INTERVAL: u64 = 16;
/// So many flights without a landing for each that lands mean that something is wrong.
const MAX_STAYS_PER_LANDING: u64 = 2;
/// A VMM's state follows its migration's end within this time.
const SETTLE_PATIENCE: Duration = Duration::from_secs(10);
/// Landings between two lines of progress.
const REPORT_INTERVAL: u64 = 100;

/// What a soak did, and that it found nothing.
#[derive(Clone, Copy, Debug, Default)]
pub struct Verdict {
    /// Migrations that landed.
    pub landed: u64,
    /// Those that did not, the guest staying where it was.
    pub stayed: u64,
    /// Landings over TLS.
    pub encrypted: u64,
    /// Landings ahead of memory.
    pub ahead: u64,
    /// Bytes that the guest has found as it left them, over all its looks.
    pub verified_bytes: u64,
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            landed,
            stayed,
            encrypted,
            ahead,
            verified_bytes,
        } = self;
        write!(
            f,
            "{landed} migrations landed ({encrypted} over TLS, {ahead} ahead of memory), {stayed} stayed; {verified_bytes} bytes verified, 0 corrupt; 0 VMs lost, \
             0 ran twice"
        )
    }
}

/// Moves a guest until `landings` migrations have landed; the error is what was found.
pub async fn run(landings: u64, seed: u64) -> anyhow::Result<Verdict> {
    println!("soak: {landings} migrations, seed {seed}");
    let mut soak = Soak::take_off(seed).await?;
    let begun = Instant::now();
    while soak.verdict.landed < landings {
        let number = soak.flights + 1;
        soak.fly()
            .await
            .with_context(|| format!("flight {number} of the soak with seed {seed}"))?;
        let Verdict { landed, stayed, .. } = soak.verdict;
        ensure!(
            stayed <= (landed + 1) * MAX_STAYS_PER_LANDING,
            "{stayed} of {number} flights did not land"
        );
        if landed.is_multiple_of(REPORT_INTERVAL) {
            println!("soak: {:?} {}", begun.elapsed(), soak.verdict);
        }
    }
    Ok(soak.verdict)
}

/// A guest under way.
struct Soak {
    dir: TestDir,
    here: Vmm,
    request: CreateRequest,
    draw: Draw,
    flights: u64,
    verdict: Verdict,
}

/// How a flight goes.
#[derive(Debug)]
struct Plan {
    policy: MigrationPolicy,
    encrypted: bool,
    called_off: bool,
}

impl Soak {
    async fn take_off(seed: u64) -> anyhow::Result<Self> {
        let linux = LinuxGuest::prepare();
        let (spec, fill_mib, dirty) = match &linux {
            Ok(linux) => (vmm::linux(linux, 2, MEMORY), LINUX_FILL_MIB, LINUX_DIRTY),
            Err(_) => (vmm::pilot(2, MEMORY), PILOT_FILL_MIB, PILOT_DIRTY),
        };
        let (dir, request) = (TestDir::new(), new_vm(spec));
        let here = Vmm::boot(&dir, &name(0), &request).await?;
        let greeting = vmm::greeting(&request.spec);
        here.serial()
            .await?
            .wait_for(greeting, BOOT_PATIENCE)
            .await?;
        let mut shell = here.shell().await?;
        shell.command(&format!("fill {fill_mib}")).await?;
        shell.command(dirty).await?;
        drop(shell);
        Ok(Self {
            dir,
            here,
            request,
            draw: Draw(seed),
            flights: 0,
            verdict: Verdict::default(),
        })
    }

    /// One migration, and a look at everything afterwards.
    async fn fly(&mut self) -> anyhow::Result<()> {
        self.flights += 1;
        let plan = self.draw.plan();
        let there = Vmm::start(&self.dir, &name(self.flights)).await?;
        let landing = self
            .attempt(&there, &plan)
            .await
            .with_context(|| format!("{plan:?}"))?;
        let landed = landing.is_some();
        let left = if let Some(status) = landing {
            self.request.epoch = self.request.epoch.next();
            self.verdict.landed += 1;
            self.verdict.encrypted += u64::from(plan.encrypted);
            self.verdict.ahead += u64::from(status.progress.post_copy.is_some());
            std::mem::replace(&mut self.here, there)
        } else {
            self.verdict.stayed += 1;
            there
        };
        self.judge(&left, landed)
            .await
            .with_context(|| format!("after {plan:?}"))?;
        drop(left);
        self.forget(if landed {
            self.flights - 1
        } else {
            self.flights
        })
    }

    /// The source's last word if the guest landed; an error if nobody can tell.
    async fn attempt(&self, there: &Vmm, plan: &Plan) -> anyhow::Result<Option<MigrationStatus>> {
        let flight = if plan.encrypted {
            Flight::prepare_encrypted(&self.here, there, &self.request).await?
        } else {
            Flight::prepare(&self.here, there, &self.request).await?
        };
        flight.send(plan.policy.clone()).await?;
        if plan.called_off {
            // Refused when it is too late, and then it lands.
            if flight.cancel().await.is_ok() {
                flight.source_reaches(MigrationPhase::Cancelled).await?;
                return Ok(None);
            }
        }
        let error = match flight.land().await {
            Ok(status) => return Ok(Some(status)),
            Err(error) => error,
        };
        let status = status_after(&self.here, 0).await?;
        match status.phase {
            MigrationPhase::Failed => Ok(None),
            phase => Err(error.context(format!("the source is left in {phase:?}"))),
        }
    }

    /// The guest runs here, not in the VMM that is `left` behind, and has lost nothing.
    async fn judge(&mut self, left: &Vmm, landed: bool) -> anyhow::Result<()> {
        let settled = |state: &VmmState| match state {
            VmmState::Stopped { reason } => !landed || *reason == StopReason::MigratedAway,
            VmmState::Incoming => !landed,
            _ => false,
        };
        left.wait_for_state(SETTLE_PATIENCE, settled)
            .await
            .context("the VMM that is left behind")?;
        let here = self
            .here
            .wait_for_state(SETTLE_PATIENCE, |state| *state == VmmState::Running)
            .await
            .context("the VMM that has the guest")?;
        ensure!(here.epoch == self.request.epoch, "{here:?}");
        let mut shell = self.here.shell().await?;
        let found = shell.command("verify").await.context("verify")?;
        self.verdict.verified_bytes += found.number("verified_pages") * 4096;
        let ticks = shell.command("ticks").await?;
        if ticks.number("backwards") > 0 {
            bail!("the guest's time ran backwards: {ticks}");
        }
        Ok(())
    }

    /// Thousands of VMMs leave a log and two sockets each.
    fn forget(&self, flight: u64) -> anyhow::Result<()> {
        for kind in ["log", "sock", "serial"] {
            let path = self.dir.join(format!("{}.{kind}", name(flight)));
            match fs::remove_file(&path) {
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                    return Err(error).with_context(|| path.display().to_string());
                }
                _ => {}
            }
        }
        Ok(())
    }
}

fn name(flight: u64) -> String {
    format!("vmm-{flight}")
}

/// SplitMix64.
struct Draw(u64);

impl Draw {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    fn one_in(&mut self, interval: u64) -> bool {
        self.next().is_multiple_of(interval)
    }

    fn one_of<T: Copy>(&mut self, choices: &[T]) -> T {
        choices[(self.next() % choices.len() as u64) as usize]
    }

    fn plan(&mut self) -> Plan {
        let (downtime_limit_ms, post_copy) = if self.one_in(POST_COPY_INTERVAL) {
            (POST_COPY_DOWNTIME_MS, PostCopy::Allowed)
        } else {
            (self.one_of(&[100, 300, 1000]), PostCopy::Forbidden)
        };
        let hashed = post_copy == PostCopy::Forbidden && self.one_in(HASH_INTERVAL);
        let policy = MigrationPolicy {
            downtime_limit_ms,
            post_copy,
            verify: match hashed {
                true => Verify::WholeMemory,
                false => Verify::Frames,
            },
            lanes: self.one_of(&[0, 1, 1, 2, 2, 3, 4, 8]),
            max_bandwidth_bytes_per_s: self.one_of(&[None, None, None, Some(400 << 20)]),
            max_throttle_percent: self.one_of(&[0, 50, 95]),
            compression: self.one_of(&[Compression::Auto, Compression::Off]),
            ..Default::default()
        };
        Plan {
            policy,
            encrypted: self.one_in(2),
            called_off: self.one_in(CANCEL_INTERVAL),
        }
    }
}
