//! A pool of real processes: one server, some host agents and the VMMs they start, driven through REST.

use crate::http::Client;
use crate::process::Process;
use crate::program;
use crate::test_dir::TestDir;
use anyhow::{Context, ensure};
use serde_json::{Value, json};
use std::net::{SocketAddr, TcpListener};
use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

/// A process of the cluster is ready within this time.
const START_PATIENCE: Duration = Duration::from_secs(30);
/// An operation ends within this time.
pub const OPERATION_PATIENCE: Duration = Duration::from_secs(120);
/// How often a resource is looked at while waiting for it to change.
const LOOK_AGAIN: Duration = Duration::from_millis(50);

/// A server, its hosts and their VMs.
#[derive(Debug)]
pub struct Cluster {
    /// Where everything lives.
    pub dir: TestDir,
    /// The server; `None` while it is down.
    pub server: Option<Process>,
    /// The hosts, in the order of their names.
    pub hosts: Vec<Host>,
    /// REST.
    pub api: Client,
    /// Where REST and the console are served.
    pub api_address: SocketAddr,
    /// Where the server listens for agents.
    pub agents_address: SocketAddr,
}

/// A host agent.
#[derive(Debug)]
pub struct Host {
    /// `host-1` and so on.
    pub name: String,
    /// Its state directory.
    pub state_dir: PathBuf,
    /// Its process; `None` while it is down.
    pub agent: Option<Process>,
    /// How to start it again.
    arguments: Vec<String>,
}

impl Cluster {
    /// A server without hosts.
    pub async fn start_server() -> anyhow::Result<Self> {
        let (api_address, agents_address) = (free_address()?, free_address()?);
        let mut cluster = Self {
            dir: TestDir::new(),
            server: None,
            hosts: Vec::new(),
            api: Client::tcp(api_address),
            api_address,
            agents_address,
        };
        cluster.revive_server().await?;
        Ok(cluster)
    }

    /// A server with `count` hosts that are up, each offering `memory_mib` to guests.
    pub async fn start(count: usize, memory_mib: u64) -> anyhow::Result<Self> {
        let mut cluster = Self::start_server().await?;
        for number in 1..=count {
            cluster
                .join_host(
                    &format!("host-{number}"),
                    cluster.agents_address,
                    memory_mib,
                )
                .await?;
        }
        Ok(cluster)
    }

    /// Starts the server, for the first time or again with the state it had.
    pub async fn revive_server(&mut self) -> anyhow::Result<()> {
        let mut command = Command::new(program::godwit());
        command
            .arg("server")
            .arg("--state-dir")
            .arg(self.dir.join("server"));
        command.args([
            "--api",
            &self.api_address.to_string(),
            "--agents",
            &self.agents_address.to_string(),
        ]);
        let mut server = Process::start(&mut command, &self.dir.join("server.log"))?;
        let deadline = Instant::now() + START_PATIENCE;
        while let Err(error) = self
            .api
            .send(hyper::Method::GET, "/healthz", None::<&()>)
            .await
        {
            ensure!(
                server.exit_status().is_none() && Instant::now() < deadline,
                "server: {error:#}"
            );
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        self.server = Some(server);
        Ok(())
    }

    /// Kills the server (SIGKILL).
    pub fn kill_server(&mut self) {
        self.server = None;
    }

    /// Lets a host join that reaches the server at `server`, and waits until it is up.
    pub async fn join_host(
        &mut self,
        name: &str,
        server: SocketAddr,
        memory_mib: u64,
    ) -> anyhow::Result<()> {
        let token: Value = self.api.post("/v1/join-tokens", &json!({})).await?;
        let token = token["token"].as_str().context("a join token")?;
        let state_dir = self.dir.join(name);
        let arguments = [
            "host",
            "--state-dir",
            state_dir.to_str().context("the path is text")?,
            "--server",
            &format!("https://{server}"),
            "--join",
            token,
            "--name",
            name,
            "--listen",
            "127.0.0.1:0",
            "--guest-memory-mib",
            &memory_mib.to_string(),
        ]
        .map(str::to_owned);
        let host = Host {
            name: name.to_owned(),
            state_dir,
            agent: None,
            arguments: arguments.to_vec(),
        };
        self.hosts.push(host);
        self.revive_agent(self.hosts.len() - 1)?;
        self.wait_for_host(name, "up").await
    }

    /// Starts a host's agent, for the first time or again with the state it had.
    pub fn revive_agent(&mut self, index: usize) -> anyhow::Result<()> {
        let log = self.dir.join(format!("{}.log", self.hosts[index].name));
        let host = &mut self.hosts[index];
        let mut command = Command::new(program::godwit());
        command.args(&host.arguments);
        host.agent = Some(Process::start(&mut command, &log)?);
        Ok(())
    }

    /// Creates and starts a pilot VM on `host`; waits until it runs.
    pub async fn create_pilot(
        &self,
        name: &str,
        host: &str,
        vcpus: u8,
        memory_mib: u64,
    ) -> anyhow::Result<Value> {
        let vm = json!({
            "name": name,
            "spec": { "vcpus": vcpus, "memory_mib": memory_mib, "boot": { "kind": "pilot" } },
            "host": self.host(host).await?["id"],
            "start": true,
        });
        let _: Value = self.api.post("/v1/vms", &vm).await?;
        self.wait_for_vm(name, OPERATION_PATIENCE, |vm| vm["state"] == "running")
            .await
    }

    /// A VM as REST shows it.
    pub async fn vm(&self, name: &str) -> anyhow::Result<Value> {
        self.api.get(&format!("/v1/vms/{name}")).await
    }

    /// A host as REST shows it.
    pub async fn host(&self, name: &str) -> anyhow::Result<Value> {
        self.api.get(&format!("/v1/hosts/{name}")).await
    }

    /// Waits until a host is in `state`.
    pub async fn wait_for_host(&self, name: &str, state: &str) -> anyhow::Result<()> {
        self.wait_for(&format!("/v1/hosts/{name}"), OPERATION_PATIENCE, |host| {
            host["state"] == state
        })
        .await?;
        Ok(())
    }

    /// Waits until a VM satisfies `accept`.
    pub async fn wait_for_vm(
        &self,
        name: &str,
        patience: Duration,
        accept: impl Fn(&Value) -> bool,
    ) -> anyhow::Result<Value> {
        self.wait_for(&format!("/v1/vms/{name}"), patience, accept)
            .await
    }

    /// Waits until the resource at `path` satisfies `accept`; a server that is down is asked again.
    pub async fn wait_for(
        &self,
        path: &str,
        patience: Duration,
        accept: impl Fn(&Value) -> bool,
    ) -> anyhow::Result<Value> {
        let deadline = Instant::now() + patience;
        loop {
            let seen = self.api.get::<Value>(path).await;
            match &seen {
                Ok(resource) if accept(resource) => return seen,
                _ => ensure!(
                    Instant::now() < deadline,
                    "{path} after {patience:?}: {seen:#?}"
                ),
            }
            tokio::time::sleep(LOOK_AGAIN).await;
        }
    }
}

impl Host {
    /// Kills the agent (SIGKILL); its VMs run on.
    pub fn kill_agent(&mut self) {
        self.agent = None;
    }

    /// UNIX socket of a file called `name` in the directory of VM `id`.
    pub fn vm_file(&self, id: &str, name: &str) -> PathBuf {
        self.state_dir.join("vms").join(id).join(name)
    }
}

/// An address nobody listens on at the moment.
pub fn free_address() -> anyhow::Result<SocketAddr> {
    Ok(TcpListener::bind("127.0.0.1:0")?.local_addr()?)
}
