//! Our guest, which flies from VMM to VMM.

use crate::host_memory::warm;
use anyhow::Context;
use godwit_tests::kept::HeldMemory;
use godwit_tests::linux::{AGENT_CMDLINE, LinuxGuest};
use godwit_tests::migration::Flight;
use godwit_tests::serial::Serial;
use godwit_tests::succession::Succession;
use godwit_tests::test_dir::TestDir;
use godwit_tests::vmm::{self, BOOT_PATIENCE, Vmm, new_vm};
use godwit_wire::machine::Boot;
use godwit_wire::migration::{MigrationPolicy, MigrationStatus};
use godwit_wire::succession::SuccessionBlackout;
use godwit_wire::unit::Mib;
use godwit_wire::vmm_api::CreateRequest;
use std::time::Instant;

/// The Linux guest's arguments, ours and the peers'. A paravirtual KVM may have no pages of 1 GiB, and the kernel would
/// use them as soon as there is that much memory.
pub(crate) fn linux_cmdline() -> String {
    format!("{AGENT_CMDLINE} nogbpages")
}

/// So many flights tell what a blackout costs; the server waits for as many.
const TELLING: usize = 3;

/// Whether its connections are encrypted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Link {
    Plain,
    Tls,
}

/// How a guest flies.
enum Way<'a> {
    Plain,
    Tls,
    Home(&'a HeldMemory),
}

/// A guest that flies back and forth.
pub(crate) struct Shuttle {
    dir: TestDir,
    here: Vmm,
    request: CreateRequest,
    fill: Mib,
    flights: usize,
    /// What the flights so far showed of the cost of a blackout, as the store remembers it.
    fixed_costs_us: Vec<u64>,
}

/// What one flight took.
#[derive(Clone, Debug)]
pub(crate) struct Landing {
    /// From the order to the source until the source knows that the guest runs at the target.
    pub(crate) seconds: f64,
    /// The source's last word.
    pub(crate) status: MigrationStatus,
    /// Longest gap that the guest itself saw.
    pub(crate) guest_blackout_ms: f64,
}

impl Landing {
    /// By what went over the wire.
    pub(crate) fn mb_per_s(&self) -> f64 {
        self.status.progress.transferred_bytes.0 as f64 / self.seconds / 1e6
    }

    /// From the pause at the source to the news that the target runs.
    pub(crate) fn downtime_ms(&self) -> anyhow::Result<f64> {
        let downtime_us = self.status.progress.downtime_us;
        Ok(downtime_us.context("the source knows the downtime")? as f64 / 1e3)
    }
}

impl Shuttle {
    /// Boots a guest with one vCPU, Linux if it can be had, and writes random data over `fill` of its memory.
    pub(crate) async fn take_off(
        linux: Option<&LinuxGuest>,
        memory: Mib,
        fill: Mib,
    ) -> anyhow::Result<Self> {
        let mut spec = match linux {
            Some(linux) => vmm::linux(linux, 1, memory),
            None => vmm::pilot(1, memory),
        };
        if let Boot::Linux { cmdline, .. } = &mut spec.boot {
            *cmdline = linux_cmdline();
        }
        let request = new_vm(spec);
        let dir = TestDir::new();
        let here = Vmm::boot(&dir, "vmm-0", &request).await?;
        here.serial()
            .await?
            .wait_for(vmm::greeting(&request.spec), BOOT_PATIENCE)
            .await?;
        let shuttle = Self {
            dir,
            here,
            request,
            fill,
            flights: 0,
            fixed_costs_us: Vec::new(),
        };
        shuttle
            .shell()
            .await?
            .command(&format!("fill {}", fill.0))
            .await
            .context("fill")?;
        Ok(shuttle)
    }

    /// The guest's console.
    pub(crate) async fn shell(&self) -> anyhow::Result<Serial> {
        self.here.shell().await
    }

    /// Moves the guest into a fresh VMM.
    pub(crate) async fn fly(
        &mut self,
        policy: MigrationPolicy,
        link: Link,
    ) -> anyhow::Result<Landing> {
        match link {
            Link::Plain => self.fly_by(policy, Way::Plain).await,
            Link::Tls => self.fly_by(policy, Way::Tls).await,
        }
    }

    /// The guest's memory, to be kept when it has left.
    pub(crate) fn memory(&self) -> anyhow::Result<HeldMemory> {
        HeldMemory::of(&self.here)
    }

    /// Moves the guest home to memory that was kept of it, encrypted.
    pub(crate) async fn fly_home(
        &mut self,
        policy: MigrationPolicy,
        kept: &HeldMemory,
    ) -> anyhow::Result<Landing> {
        self.fly_by(policy, Way::Home(kept)).await
    }

    async fn fly_by(&mut self, policy: MigrationPolicy, way: Way<'_>) -> anyhow::Result<Landing> {
        self.flights += 1;
        let there = Vmm::start(&self.dir, &format!("vmm-{}", self.flights)).await?;
        self.shell().await?.command("ticks reset").await?;
        let (here, request) = (&self.here, &self.request);
        let mut flight = match way {
            Way::Plain => Flight::prepare(here, &there, request).await?,
            Way::Tls => Flight::prepare_encrypted(here, &there, request).await?,
            Way::Home(kept) => Flight::prepare_home(here, &there, request, kept.place()?).await?,
        };
        self.fixed_costs_us.sort_unstable();
        let shown = &self.fixed_costs_us;
        flight.fixed_cost_us = (shown.len() >= TELLING).then(|| shown[shown.len() / 2]);
        warm(self.fill);
        let start = Instant::now();
        flight.send(policy).await?;
        let status = flight.land().await?;
        self.fixed_costs_us.extend(status.progress.fixed_cost_us());
        let seconds = start.elapsed().as_secs_f64();
        self.request.epoch = self.request.epoch.next();
        self.here = there;
        let ticks = self.shell().await?.command("ticks").await?;
        Ok(Landing {
            seconds,
            status,
            guest_blackout_ms: ticks.number("max_blackout_us") as f64 / 1e3,
        })
    }

    /// Lets a fresh VMM take the guest over on this host; gives what its blackout consisted of, and the longest gap that
    /// the guest itself saw, in milliseconds.
    pub(crate) async fn change_vmm(&mut self) -> anyhow::Result<(SuccessionBlackout, f64)> {
        self.flights += 1;
        let there = Vmm::start(&self.dir, &format!("vmm-{}", self.flights)).await?;
        self.shell().await?.command("ticks reset").await?;
        let status = Succession::of(&self.dir, &self.here, &there, &self.request)
            .complete()
            .await?;
        self.here = there;
        let ticks = self.shell().await?.command("ticks").await?;
        let blackout = status
            .blackout
            .context("the successor knows the blackout")?;
        Ok((blackout, ticks.number("max_blackout_us") as f64 / 1e3))
    }

    /// What flew that often must still be whole.
    pub(crate) async fn verify(&self) -> anyhow::Result<()> {
        let reply = self.shell().await?.command("verify").await?;
        println!("after {} migrations: {reply}", self.flights);
        Ok(())
    }
}
