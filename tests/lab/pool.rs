//! A pool of emulated hosts: the server and the shared storage on one of them, agents on the others, driven with
//! the `godwit` command line as an operator would.

use anyhow::{Context, bail, ensure};
use godwit_tests::cluster::free_address;
use godwit_tests::lab::images::make_ext4;
use godwit_tests::lab::machine::{Blueprint, COMMAND_PATIENCE, Cpu, Machine, Role, Site};
use godwit_tests::program;
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;
use tokio::process::Command;
use tokio::time::{Instant, timeout};

const CONTROL: &str = "control";
const CONTROL_NUMBER: u8 = 1;
/// Hosts follow from here on.
const FIRST_HOST_NUMBER: u8 = 11;
/// Where hosts mount the shared storage pool.
const SHARED: &str = "/shared";
/// What operators call that pool.
pub(crate) const SHARED_POOL: &str = "shared";
const STORE_SIZE: &str = "2G";
/// A command of the operator ends within this time, `--wait` included.
const CLI_PATIENCE: Duration = Duration::from_secs(180);
/// Something that takes the pool a few seconds on an idle machine.
pub(crate) const POOL_PATIENCE: Duration = Duration::from_secs(180);
/// A host that has not added its VMMs' logs within this time is stuck.
const LOGS_PATIENCE: Duration = Duration::from_secs(20);
const COLLECT_LOGS: &str = "for log in /state/host/vms/*/vmm.log; do echo \"--- $log\"; tail -n 100 $log; done >&4; \
free -m >&4; ps >&4";
/// How often a resource is looked at while waiting for it to change.
const LOOK_AGAIN: Duration = Duration::from_millis(250);
/// Seconds after which NFS gives up the locks of a client it no longer hears; the least Linux accepts.
const NFS_LEASE_S: u32 = 10;

/// The pool.
pub(crate) struct Pool {
    site: Site,
    control: Machine,
    hosts: BTreeMap<String, Machine>,
    joined: u8,
    api_port: u16,
    token: String,
    ca_file: PathBuf,
}

impl Pool {
    /// Powers on the control machine and starts the server.
    pub(crate) async fn start(site: Site) -> anyhow::Result<Self> {
        let store = site.sockets.join("store.img");
        make_ext4(&store, None, STORE_SIZE)?;
        let api_port = free_address()?.port();
        let blueprint = Blueprint {
            name: CONTROL.into(),
            number: CONTROL_NUMBER,
            cpu: Cpu::Max,
            memory_mib: 768,
            role: Role::Control { store, api_port },
        };
        let mut control = Machine::boot(&site, blueprint).await?;
        serve_store(&mut control)
            .await
            .context("the shared storage pool")?;
        let (token, ca) = start_server(&mut control).await.context("the server")?;
        let ca_file = site.sockets.join("ca.pem");
        std::fs::write(&ca_file, ca)?;
        Ok(Self {
            site,
            control,
            hosts: BTreeMap::new(),
            joined: 0,
            api_port,
            token,
            ca_file,
        })
    }

    /// Sees to it that these hosts are up; those that are not there yet are powered on together.
    pub(crate) async fn need_hosts(&mut self, names: &[&str]) -> anyhow::Result<()> {
        let missing: Vec<_> = names
            .iter()
            .filter(|name| !self.hosts.contains_key(**name))
            .collect();
        let mut booting = Vec::new();
        for name in missing {
            booting.push(Machine::boot(
                &self.site,
                self.next_blueprint(name, Cpu::Max),
            ));
            self.joined += 1;
        }
        let booted = futures_util::future::try_join_all(booting).await?;
        for machine in booted {
            self.join(machine).await?;
        }
        Ok(())
    }

    /// Powers on one more host with a CPU of its own.
    pub(crate) async fn add_host(&mut self, name: &str, cpu: Cpu) -> anyhow::Result<()> {
        let blueprint = self.next_blueprint(name, cpu);
        self.joined += 1;
        let machine = Machine::boot(&self.site, blueprint).await?;
        self.join(machine).await
    }

    /// Runs a command on a host that must succeed; what it printed.
    pub(crate) async fn on_host(&mut self, name: &str, command: &str) -> anyhow::Result<String> {
        let machine = self.hosts.get_mut(name).context("the host runs")?;
        machine.run(command).await
    }

    /// Adds what the VMMs of every host have logged to the host's log, for whoever looks into a failure.
    pub(crate) async fn collect_logs(&mut self) {
        for machine in self.hosts.values_mut() {
            // A host that does not answer any more has nothing to add.
            let _ = machine.shell.run(COLLECT_LOGS, LOGS_PATIENCE).await;
        }
    }

    /// Pulls a host's plug.
    pub(crate) async fn cut_power(&mut self, name: &str) -> anyhow::Result<()> {
        let machine = self.hosts.remove(name).context("the host runs")?;
        machine.cut_power().await
    }

    /// `godwit …` on the operator's machine; its output as JSON.
    pub(crate) async fn godwit(&self, arguments: &[&str]) -> anyhow::Result<Value> {
        let mut command = self.command(arguments);
        command.args(["--output", "json"]).stdin(Stdio::null());
        let output = timeout(CLI_PATIENCE, command.output())
            .await
            .with_context(|| {
                format!("`godwit {}` after {CLI_PATIENCE:?}", arguments.join(" "))
            })??;
        ensure!(
            output.status.success(),
            "`godwit {}` failed ({}): {}{}",
            arguments.join(" "),
            output.status,
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        );
        // Some commands print several documents, or none; the last one tells how it ended.
        let documents = serde_json::Deserializer::from_slice(&output.stdout).into_iter();
        documents
            .last()
            .transpose()
            .map(Option::unwrap_or_default)
            .context("JSON")
    }

    /// `godwit …`, to be started with pipes.
    pub(crate) fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(program::godwit());
        command
            .args(arguments)
            .envs(self.environment())
            .kill_on_drop(true);
        command
    }

    /// What an operator's shell needs to talk to this pool.
    pub(crate) fn environment(&self) -> [(&'static str, String); 3] {
        [
            ("GODWIT_SERVER", self.api_url()),
            ("GODWIT_TOKEN", self.token.clone()),
            ("GODWIT_CA_FILE", self.ca_file.display().to_string()),
        ]
    }

    /// Where this pool's logs are.
    pub(crate) fn logs(&self) -> &Path {
        &self.site.logs
    }

    /// Waits until a resource, as the command `arguments` shows it, satisfies `accept`.
    pub(crate) async fn wait_until(
        &self,
        arguments: &[&str],
        accept: impl Fn(&Value) -> bool,
    ) -> anyhow::Result<Value> {
        let deadline = Instant::now() + POOL_PATIENCE;
        loop {
            let seen = self.godwit(arguments).await?;
            if accept(&seen) {
                return Ok(seen);
            }
            if Instant::now() > deadline {
                bail!(
                    "`godwit {}` after {POOL_PATIENCE:?}: {seen:#}",
                    arguments.join(" ")
                );
            }
            tokio::time::sleep(LOOK_AGAIN).await;
        }
    }

    fn api_url(&self) -> String {
        format!("https://127.0.0.1:{}", self.api_port)
    }

    fn next_blueprint(&self, name: &str, cpu: Cpu) -> Blueprint {
        Blueprint {
            name: name.to_owned(),
            number: FIRST_HOST_NUMBER + self.joined,
            cpu,
            memory_mib: 1024,
            role: Role::Host,
        }
    }

    async fn join(&mut self, mut machine: Machine) -> anyhow::Result<()> {
        let (name, address) = (machine.blueprint.name.clone(), machine.blueprint.address());
        let token = self.godwit(&["host", "token"]).await?;
        let token = token["token"].as_str().context("a join token")?.to_owned();
        allow(&mut self.control, &address).await?;
        machine.run(&mount_store(&address)).await?;
        machine
            .run(&format!(
                "daemon godwit host run --state-dir /state/host --server https://10.77.0.{CONTROL_NUMBER}:7071 \
                 --join {token} --name {name} --listen {address}:7072 --guest-memory-mib 768 \
                 --storage {SHARED_POOL}={SHARED}"
            ))
            .await?;
        self.hosts.insert(name.clone(), machine);
        self.wait_until(&["host", "list"], |hosts| {
            host_state(hosts, &name) == Some("up")
        })
        .await?;
        // A host tells of its storage after it has said that it is up.
        self.wait_until(&["pool", "list"], |pools| has_pool(pools, &name))
            .await?;
        Ok(())
    }
}

/// Whether the list of storage pools says that the host `name` sees the shared one.
fn has_pool(pools: &Value, name: &str) -> bool {
    let pools = pools.get("items").unwrap_or(pools).as_array();
    let hosts = pools
        .into_iter()
        .flatten()
        .filter(|pool| pool["name"] == SHARED_POOL)
        .filter_map(|pool| pool["hosts"].as_array());
    hosts.flatten().any(|host| host["host_name"] == name)
}

/// State of the host `name` in the list of hosts.
fn host_state<'a>(hosts: &'a Value, name: &str) -> Option<&'a str> {
    let hosts = hosts.get("items").unwrap_or(hosts).as_array()?;
    let host = hosts.iter().find(|host| host["name"] == name)?;
    host["state"].as_str()
}

async fn start_server(control: &mut Machine) -> anyhow::Result<(String, String)> {
    let address = control.blueprint.address();
    control
        .run(&format!(
            "daemon godwit server --state-dir /state/server --api 0.0.0.0:7070 --agents {address}:7071 \
             --name {address} --name 127.0.0.1 --token-file /state/token"
        ))
        .await?;
    control
        .shell
        .run(
            "until [ -s /state/token ] && netstat -ltn | grep -q :7070; do usleep 50000; done",
            COMMAND_PATIENCE,
        )
        .await?;
    let token = control.run("cat /state/token").await?;
    let ca = control.run("cat /state/server/ca.pem").await?;
    Ok((token.trim().to_owned(), ca))
}

/// Serves the store's disk over NFS 4.2. The kernel's server asks a program in user space who may see what; here the
/// answers are given beforehand, through the same files.
async fn serve_store(control: &mut Machine) -> anyhow::Result<()> {
    // The name by which the exports below know all clients exists from the first client on.
    allow(control, "127.0.0.1").await?;
    for command in [
        "mount -t ext4 /dev/vdb /srv",
        "mount -t nfsd nfsd /proc/fs/nfsd",
        &format!("echo {NFS_LEASE_S} >/proc/fs/nfsd/nfsv4leasetime"),
        &format!("echo {NFS_LEASE_S} >/proc/fs/nfsd/nfsv4gracetime"),
        "echo '-3 +4 +4.1 +4.2' >/proc/fs/nfsd/versions",
        // Flags: insecure ports, no subtree check, a file system id (0: the root).
        "echo 'lab /srv 2147483647 9218 65534 65534 0' >/proc/net/rpc/nfsd.export/channel",
        r"printf 'lab 1 \\x00000000 2147483647 /srv\n' >/proc/net/rpc/nfsd.fh/channel",
        "echo 2 >/proc/fs/nfsd/threads",
        // Nobody holds locks from before: there was no before.
        "echo Y >/proc/fs/nfsd/v4_end_grace",
    ] {
        control.run(command).await?;
    }
    Ok(())
}

async fn allow(control: &mut Machine, address: &str) -> anyhow::Result<()> {
    control
        .run(&format!(
            "echo 'nfsd {address} 2147483647 lab' >/proc/net/rpc/auth.unix.ip/channel"
        ))
        .await?;
    Ok(())
}

fn mount_store(address: &str) -> String {
    format!(
        "mount -t nfs4 -o addr=10.77.0.{CONTROL_NUMBER},clientaddr={address},vers=4.2,hard \
         10.77.0.{CONTROL_NUMBER}:/ {SHARED}"
    )
}
