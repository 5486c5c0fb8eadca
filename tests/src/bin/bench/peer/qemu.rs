//! QEMU with KVM as Debian has it, moving the same Linux guest.
//!
//! The source goes on with its guest after every migration, so one guest serves for many. What arrives is not used:
//! a QEMU that does not carry every MSR of a paravirtual KVM loses the guest there, which changes no figure.

use super::qmp::Qmp;
use crate::host_memory::warm;
use crate::shuttle::linux_cmdline;
use anyhow::{Context, bail};
use godwit_tests::linux::{AGENT_GREETING, LinuxGuest};
use godwit_tests::process::Process;
use godwit_tests::serial::{Reply, Serial};
use godwit_tests::test_dir::TestDir;
use godwit_tests::vmm::BOOT_PATIENCE;
use godwit_wire::unit::Mib;
use godwit_wire::vmm_api::VMM_ENVIRONMENT;
use serde_json::{Value, json};
use std::path::Path;
use std::process::Command;
use std::time::Duration;
use tokio::time::Instant;

pub(crate) const QEMU: &str = "qemu-system-x86_64";
/// QEMU's default `max-bandwidth`.
pub(crate) const DEFAULT_BYTES_PER_S: u64 = 128 << 20;
/// High enough never to be reached (100 GiB/s).
const UNLIMITED_BYTES_PER_S: u64 = 100 << 30;
/// A migration that nobody gives up ends within this time.
const FLIGHT_PATIENCE: Duration = Duration::from_secs(300);
/// The target lets its guest run within this time of the source's end.
const ARRIVAL_PATIENCE: Duration = Duration::from_secs(5);

/// How QEMU moves its guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mode {
    /// As it is out of the box: one connection, 128 MiB/s at most, 300 ms of downtime.
    Defaults,
    /// One connection without a bandwidth limit.
    Lifted,
    /// So many connections for pages, without a bandwidth limit.
    Multifd(u8),
    /// Post-copy from the beginning, without a bandwidth limit.
    PostCopy,
}

impl Mode {
    /// Everything that may be the fastest.
    pub(crate) const UNLIMITED: [Self; 5] = [
        Self::Lifted,
        Self::Multifd(2),
        Self::Multifd(4),
        Self::Multifd(8),
        Self::PostCopy,
    ];

    /// For names of measurements.
    pub(crate) fn label(self) -> String {
        match self {
            Self::Defaults => "qemu_defaults".into(),
            Self::Lifted => "qemu_lifted".into(),
            Self::Multifd(channels) => format!("qemu_multifd_{channels}"),
            Self::PostCopy => "qemu_post_copy".into(),
        }
    }

    /// Arguments of `migrate-set-capabilities`, at both ends.
    fn capabilities(self) -> Value {
        let state = |name: &str, state: bool| json!({ "capability": name, "state": state });
        json!({ "capabilities": [
            state("events", true),
            state("multifd", matches!(self, Self::Multifd(_))),
            state("postcopy-ram", self == Self::PostCopy),
        ] })
    }

    /// Arguments of `migrate-set-parameters`, at both ends.
    fn parameters(self) -> Value {
        match self {
            // Said all the same: a source keeps what an earlier migration was told.
            Self::Defaults => json!({ "max-bandwidth": DEFAULT_BYTES_PER_S }),
            Self::Lifted => json!({ "max-bandwidth": UNLIMITED_BYTES_PER_S }),
            Self::Multifd(channels) => json!({
                "max-bandwidth": UNLIMITED_BYTES_PER_S,
                "multifd-channels": channels,
            }),
            Self::PostCopy => json!({
                "max-bandwidth": UNLIMITED_BYTES_PER_S,
                "max-postcopy-bandwidth": 0,
            }),
        }
    }

    /// What is set, in words for the report.
    pub(crate) fn settings(self) -> String {
        let start = match self {
            Self::PostCopy => "; migrate-start-postcopy as soon as it is active",
            _ => "",
        };
        format!("{} {}{start}", self.capabilities(), self.parameters())
    }
}

/// What one migration took.
#[derive(Clone, Debug)]
pub(crate) struct Flown {
    /// From the command to the source's word that it is complete.
    pub(crate) seconds: f64,
    /// Guest memory put on the wire.
    pub(crate) transferred_bytes: u64,
    /// From the source's `STOP` to the target's `RESUME`, by the events' own times.
    pub(crate) downtime_ms: f64,
    /// What QEMU calls downtime: until the source has sent everything.
    pub(crate) reported_downtime_ms: f64,
}

impl Flown {
    pub(crate) fn mb_per_s(&self) -> f64 {
        self.transferred_bytes as f64 / self.seconds / 1e6
    }
}

/// A QEMU with a guest, which it moves into others.
pub(crate) struct Qemu {
    dir: TestDir,
    linux: LinuxGuest,
    memory: Mib,
    fill: Mib,
    _process: Process,
    qmp: Qmp,
    console: Serial,
    flights: usize,
}

impl Qemu {
    /// The version, where it is installed.
    pub(crate) fn version() -> Option<String> {
        let output = Command::new(QEMU).arg("--version").output().ok()?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        text.lines().next().map(str::to_owned)
    }

    /// Boots the guest.
    pub(crate) async fn boot(linux: &LinuxGuest, memory: Mib) -> anyhow::Result<Self> {
        let dir = TestDir::new();
        // It waits for the console to be attached: what a guest says before is lost.
        let process = start(&dir, "source", linux, memory, &["-S"])?;
        let mut qmp = Qmp::connect(&dir.join("source.qmp")).await?;
        let mut console = Serial::attach(&dir.join("source.serial")).await?;
        qmp.command("cont", json!({})).await?;
        console.wait_for(AGENT_GREETING, BOOT_PATIENCE).await?;
        Ok(Self {
            dir,
            linux: linux.clone(),
            memory,
            fill: Mib(0),
            _process: process,
            qmp,
            console,
            flights: 0,
        })
    }

    /// Every option of the command line, files and sockets by what they are.
    pub(crate) fn options(memory: Mib) -> String {
        options(
            Path::new("KERNEL"),
            Path::new("INITRD"),
            Path::new("DIR/NAME"),
            memory,
        )
        .join(" ")
            + "; the source with -S, the target with -incoming defer"
    }

    /// Writes random data over `fill` of the guest's memory.
    pub(crate) async fn fill(&mut self, fill: Mib) -> anyhow::Result<()> {
        self.fill = fill;
        self.command(&format!("fill {}", fill.0)).await?;
        Ok(())
    }

    /// Tells the guest something.
    pub(crate) async fn command(&mut self, line: &str) -> anyhow::Result<Reply> {
        self.console.command(line).await
    }

    /// Moves the guest and keeps it at the source.
    pub(crate) async fn fly(&mut self, mode: Mode) -> anyhow::Result<Flown> {
        self.fly_within(mode, FLIGHT_PATIENCE)
            .await?
            .with_context(|| format!("{mode:?} does not end"))
    }

    /// The same, but called off when it is not complete after `limit`; nothing then.
    pub(crate) async fn fly_within(
        &mut self,
        mode: Mode,
        limit: Duration,
    ) -> anyhow::Result<Option<Flown>> {
        self.flights += 1;
        let name = format!("target-{}", self.flights);
        // Killed when this returns.
        let _process = start(
            &self.dir,
            &name,
            &self.linux,
            self.memory,
            &["-incoming", "defer"],
        )?;
        let mut target = Qmp::connect(&self.dir.join(format!("{name}.qmp"))).await?;
        for end in [&mut target, &mut self.qmp] {
            end.command("migrate-set-capabilities", mode.capabilities())
                .await?;
            end.command("migrate-set-parameters", mode.parameters())
                .await?;
        }
        let flown = self.send(&mut target, mode, limit).await;
        // Whatever became of it, the guest goes on here. It runs already if nothing came of it.
        self.qmp.command("cont", json!({})).await?;
        self.command("uptime").await.context("the source's guest")?;
        flown
    }

    async fn send(
        &mut self,
        target: &mut Qmp,
        mode: Mode,
        limit: Duration,
    ) -> anyhow::Result<Option<Flown>> {
        target
            .command("migrate-incoming", json!({ "uri": "tcp:127.0.0.1:0" }))
            .await?;
        let waiting = target.command("query-migrate", json!({})).await?;
        let port = waiting["socket-address"][0]["port"]
            .as_str()
            .context("the target's port")?
            .to_owned();
        warm(self.fill);
        self.qmp.forget_events();
        let start = Instant::now();
        self.qmp
            .command("migrate", json!({ "uri": format!("tcp:127.0.0.1:{port}") }))
            .await?;
        if mode == Mode::PostCopy {
            self.reaches(start + limit, &["active"]).await?;
            self.qmp
                .command("migrate-start-postcopy", json!({}))
                .await?;
        }
        let ended = self
            .reaches(start + limit, &["completed", "failed", "cancelled"])
            .await;
        let seconds = start.elapsed().as_secs_f64();
        let Ok(ended) = ended else {
            self.qmp.command("migrate_cancel", json!({})).await?;
            self.reaches(Instant::now() + limit, &["cancelled"]).await?;
            return Ok(None);
        };
        let seen = self.qmp.command("query-migrate", json!({})).await?;
        if ended != "completed" {
            bail!("QEMU's migration ended {ended}: {seen}");
        }
        let number = |value: &Value| value.as_f64().unwrap_or(f64::NAN);
        Ok(Some(Flown {
            seconds,
            transferred_bytes: seen["ram"]["transferred"].as_u64().unwrap_or_default(),
            downtime_ms: self.downtime_ms(target).await?,
            reported_downtime_ms: number(&seen["downtime"]),
        }))
    }

    /// Waits until the source's migration is in one of `states`.
    async fn reaches(&mut self, deadline: Instant, states: &[&str]) -> anyhow::Result<String> {
        let state = |event: &super::qmp::Event| event.data["status"].as_str().map(str::to_owned);
        let event = self
            .qmp
            .event(deadline, |event| {
                event.name == "MIGRATION"
                    && state(event).is_some_and(|state| states.contains(&state.as_str()))
            })
            .await?;
        state(&event).context("an event of a migration has a status")
    }

    async fn downtime_ms(&mut self, target: &mut Qmp) -> anyhow::Result<f64> {
        let deadline = Instant::now() + ARRIVAL_PATIENCE;
        let stopped = self
            .qmp
            .event(deadline, |event| event.name == "STOP")
            .await
            .context("the source's guest stops")?;
        let resumed = target
            .event(deadline, |event| event.name == "RESUME")
            .await
            .context("the target's guest runs")?;
        Ok((resumed.at_us - stopped.at_us) as f64 / 1e3)
    }
}

fn start(
    dir: &TestDir,
    name: &str,
    linux: &LinuxGuest,
    memory: Mib,
    more: &[&str],
) -> anyhow::Result<Process> {
    let mut command = Command::new(QEMU);
    // What helps our copies helps its copies.
    let (name_of, value) = VMM_ENVIRONMENT;
    command
        .env(name_of, value)
        .args(options(
            &linux.kernel,
            &linux.initrd,
            &dir.join(name),
            memory,
        ))
        .args(more);
    Process::start(&mut command, &dir.join(format!("{name}.log")))
}

/// The command line; the sockets are called `sockets.serial` and `sockets.qmp`.
fn options(kernel: &Path, initrd: &Path, sockets: &Path, memory: Mib) -> Vec<String> {
    let sockets = sockets.display();
    [
        "-M",
        "microvm,rtc=off",
        "-accel",
        "kvm",
        "-cpu",
        "host,-arch-capabilities",
        "-smp",
        "1",
        "-nodefaults",
        "-no-user-config",
        "-display",
        "none",
        "-m",
        &memory.0.to_string(),
        "-kernel",
        &kernel.to_string_lossy(),
        "-initrd",
        &initrd.to_string_lossy(),
        "-append",
        &linux_cmdline(),
        "-chardev",
        &format!("socket,id=serial,path={sockets}.serial,server=on,wait=off"),
        "-serial",
        "chardev:serial",
        "-qmp",
        &format!("unix:{sockets}.qmp,server=on,wait=off"),
    ]
    .map(str::to_owned)
    .into()
}
