//! A stock Linux guest of the pool and the command loop on its console.

use crate::pool::Pool;
use anyhow::Context;
use godwit_tests::lab::images::{
    GUEST_INITRD, GUEST_KERNEL, GUEST_STABLE_INITRD, GUEST_STABLE_KERNEL,
};
use godwit_tests::lab::shell::{READY, Shell};
use serde_json::Value;
use std::fs::File;
use std::io::Write;
use std::process::Stdio;
use std::time::Duration;
use tokio::process::Child;

/// From start to the command loop: some seconds for one guest on an idle machine.
const BOOT_PATIENCE: Duration = Duration::from_secs(180);
/// A command in a guest that does not wait for anything ends within this time.
const COMMAND_PATIENCE: Duration = Duration::from_secs(90);
const CMDLINE: &str = "console=ttyS0 quiet panic=-1 cryptomgr.notests 8250.nr_uarts=1 mitigations=off \
init_on_alloc=0 rdinit=/init";
/// Has `init-guest.sh` start an ordinary shell in place of the command loop.
const FOR_PEOPLE: &str = "lab.shell=people";
/// What a guest gets when nothing else is said.
const MEMORY_MIB: &str = "256";

/// Which stock kernel a guest boots.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum GuestKernel {
    /// Debian's backports.
    #[default]
    Backports,
    /// Debian's stable release.
    Stable,
}

impl GuestKernel {
    const fn files(self) -> (&'static str, &'static str) {
        match self {
            Self::Backports => (GUEST_KERNEL, GUEST_INITRD),
            Self::Stable => (GUEST_STABLE_KERNEL, GUEST_STABLE_INITRD),
        }
    }
}

/// A guest's VM by name, with its console attached.
pub(crate) struct Guest {
    pub(crate) name: String,
    pub(crate) shell: Shell,
    _console: Child,
}

impl Guest {
    /// Creates a VM on `host`, starts it and waits for its command loop.
    pub(crate) async fn create(
        pool: &Pool,
        name: &str,
        host: &str,
        kernel: GuestKernel,
        options: &[&str],
    ) -> anyhow::Result<Self> {
        Self::boot(pool, name, host, (kernel, CMDLINE), options).await
    }

    /// The same with a shell on the console that people can type at; no commands can be run from here.
    pub(crate) async fn create_for_people(
        pool: &Pool,
        name: &str,
        host: &str,
    ) -> anyhow::Result<Self> {
        let cmdline = format!("{CMDLINE} {FOR_PEOPLE}");
        Self::boot(pool, name, host, (GuestKernel::default(), &cmdline), &[]).await
    }

    async fn boot(
        pool: &Pool,
        name: &str,
        host: &str,
        (kernel, cmdline): (GuestKernel, &str),
        options: &[&str],
    ) -> anyhow::Result<Self> {
        let (image, initrd) = kernel.files();
        let mut arguments = vec!["vm", "create", name, "--host", host, "--wait"];
        arguments.extend(["--kernel", image, "--initrd", initrd, "--cmdline", cmdline]);
        arguments.extend(options);
        if !options.contains(&"--memory-mib") {
            arguments.extend(["--memory-mib", MEMORY_MIB]);
        }
        pool.godwit(&arguments).await?;
        let mut guest = Self::attach(pool, name).await?;
        guest.wait_for_boot().await?;
        Ok(guest)
    }

    /// Attaches to the console of a VM that runs. What it says is kept among the pool's logs.
    pub(crate) async fn attach(pool: &Pool, name: &str) -> anyhow::Result<Self> {
        let mut console = pool
            .command(&["vm", "console", name])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()?;
        let from = console.stdout.take().context("a pipe")?;
        let to = console.stdin.take().context("a pipe")?;
        let mut log = File::options()
            .create(true)
            .append(true)
            .open(pool.logs().join(format!("{name}.console.log")))?;
        writeln!(
            log,
            "--- attached; what the console still holds comes first"
        )?;
        Ok(Self {
            name: name.to_owned(),
            shell: Shell::logged(name, from, to, log),
            _console: console,
        })
    }

    /// Waits until a guest that has just started takes commands.
    pub(crate) async fn wait_for_boot(&mut self) -> anyhow::Result<()> {
        self.shell.wait_for(READY, BOOT_PATIENCE).await?;
        Ok(())
    }

    /// Runs a command in the guest that must succeed; what it printed.
    pub(crate) async fn run(&mut self, command: &str) -> anyhow::Result<String> {
        self.shell.run(command, COMMAND_PATIENCE).await
    }

    /// The VM as the operator sees it.
    pub(crate) async fn show(&self, pool: &Pool) -> anyhow::Result<Value> {
        pool.godwit(&["vm", "show", &self.name]).await
    }

    /// Waits until the VM is in `state`.
    pub(crate) async fn wait_for_state(&self, pool: &Pool, state: &str) -> anyhow::Result<Value> {
        pool.wait_until(&["vm", "show", &self.name], |vm| vm["state"] == state)
            .await
    }

    /// Kills the VM and forgets it.
    pub(crate) async fn delete(self, pool: &Pool) -> anyhow::Result<()> {
        pool.godwit(&["vm", "delete", &self.name, "--wait"]).await?;
        Ok(())
    }
}
