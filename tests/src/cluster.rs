//! A pool of real processes: one server, some host agents and the VMMs they start, driven through REST.

use crate::http::Client;
use crate::process::Process;
use crate::program;
use crate::serial::Serial;
use crate::test_dir::TestDir;
use anyhow::{Context, ensure};
use godwit_wire::vmm_api::{VmmInfo, VmmState};
use serde_json::{Value, json};
use std::net::{IpAddr, SocketAddr, TcpListener};
use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

/// A process of the cluster is ready within this time.
const START_PATIENCE: Duration = Duration::from_secs(30);
/// An operation ends within this time.
pub const OPERATION_PATIENCE: Duration = Duration::from_secs(120);
/// A VMM that does not answer within this time is dead or frozen.
const VMM_PATIENCE: Duration = Duration::from_secs(1);
/// Where the VMMs of a VM listen, in its directory.
pub const VMM_SOCKETS: [&str; 2] = ["vmm.sock", "vmm-2.sock"];
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
    command_line: Vec<String>,
}

impl Cluster {
    /// A server without hosts.
    pub async fn start_server() -> anyhow::Result<Self> {
        Self::start_server_in(TestDir::new(), IpAddr::from([127, 0, 0, 1])).await
    }

    /// A server without hosts that agents reach at `ip`.
    pub async fn start_server_in(dir: TestDir, ip: IpAddr) -> anyhow::Result<Self> {
        let (api_address, agents_address) =
            (free_address()?, SocketAddr::new(ip, free_address()?.port()));
        let mut cluster = Self {
            dir,
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
                .join_host(&format!("host-{number}"), memory_mib)
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

    /// Lets a host join and waits until it is up.
    pub async fn join_host(&mut self, name: &str, memory_mib: u64) -> anyhow::Result<()> {
        self.join_host_in(name, memory_mib, IpAddr::from([127, 0, 0, 1]), &[])
            .await
    }

    /// Lets a host join that listens at `ip` and whose agent is started by the command `wrapper`.
    pub async fn join_host_in(
        &mut self,
        name: &str,
        memory_mib: u64,
        ip: IpAddr,
        wrapper: &[&str],
    ) -> anyhow::Result<()> {
        let token: Value = self.api.post("/v1/join-tokens", &json!({})).await?;
        let token = token["token"].as_str().context("a join token")?;
        let state_dir = self.dir.join(name);
        let mut command_line: Vec<String> = wrapper.iter().map(ToString::to_string).collect();
        command_line.push(program::godwit().display().to_string());
        command_line.extend(["host", "run", "--state-dir"].map(str::to_owned));
        command_line.push(state_dir.display().to_string());
        let server = format!("https://{}", self.agents_address);
        let (listen, memory) = (format!("{ip}:0"), memory_mib.to_string());
        let options = [
            "--server", &server, "--join", token, "--name", name, "--listen", &listen,
        ];
        command_line.extend(options.map(str::to_owned));
        command_line.extend(["--guest-memory-mib".to_owned(), memory]);
        self.hosts.push(Host {
            name: name.to_owned(),
            state_dir,
            agent: None,
            command_line,
        });
        self.revive_agent(name)?;
        self.wait_for_host(name, "up").await
    }

    /// Starts a host's agent, for the first time or again with the state it had.
    pub fn revive_agent(&mut self, name: &str) -> anyhow::Result<()> {
        let log = self.dir.join(format!("{name}.log"));
        let host = self
            .hosts
            .iter_mut()
            .find(|host| host.name == name)
            .context("no such host")?;
        let mut command = Command::new(&host.command_line[0]);
        command.args(&host.command_line[1..]);
        host.agent = Some(Process::start(&mut command, &log)?);
        Ok(())
    }

    /// A host's agent.
    ///
    /// # Panics
    /// When it is down.
    pub fn agent(&self, name: &str) -> &Process {
        let host = self
            .hosts
            .iter()
            .find(|host| host.name == name)
            .expect("the test knows its hosts");
        host.agent.as_ref().expect("the agent runs")
    }

    /// Kills a host's agent (SIGKILL); its VMs run on.
    pub fn kill_agent(&mut self, name: &str) {
        let host = self
            .hosts
            .iter_mut()
            .find(|host| host.name == name)
            .expect("the test knows its hosts");
        host.agent = None;
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
            "host": host,
            "start": true,
        });
        let _: Value = self.api.post("/v1/vms", &vm).await?;
        self.wait_for_vm(name, OPERATION_PATIENCE, |vm| vm["state"] == "running")
            .await
    }

    /// Restarts a host's agent with another file of the same program: VMMs that run are of an older one then. Returns
    /// the new program's path.
    pub fn upgrade_agent(&mut self, name: &str, file: &str) -> anyhow::Result<PathBuf> {
        const OPTION: &str = "--vmm-program";
        let program = self.dir.join(file);
        std::fs::copy(program::godwit(), &program).context("a copy of the program")?;
        self.kill_agent(name);
        let host = self
            .hosts
            .iter_mut()
            .find(|host| host.name == name)
            .context("no such host")?;
        if let Some(at) = host.command_line.iter().position(|word| word == OPTION) {
            host.command_line.truncate(at);
        }
        let option = [OPTION.to_owned(), program.display().to_string()];
        host.command_line.extend(option);
        self.revive_agent(name)?;
        Ok(program)
    }

    /// The VMM of VM `id` on host `host`, asked directly, the one that runs if there are two; `None` if there is none
    /// that answers.
    pub async fn vmm(&self, host: &str, id: &str) -> Option<VmmInfo> {
        let mut found = self.vmms(host, id).await;
        found.sort_by_key(|vmm| vmm.state != VmmState::Running);
        found.into_iter().next()
    }

    /// Every VMM of VM `id` on host `host` that answers: two while one takes it over from the other.
    pub async fn vmms(&self, host: &str, id: &str) -> Vec<VmmInfo> {
        let mut found = Vec::new();
        for name in VMM_SOCKETS {
            let client = Client::unix(&self.vm_dir(host, id).join(name));
            let asked = tokio::time::timeout(VMM_PATIENCE, client.get("/v1/info")).await;
            found.extend(asked.ok().and_then(Result::ok));
        }
        found
    }

    /// The hosts on which VM `id` runs, its VMMs asked directly; a host twice if both of its VMMs run it.
    pub async fn running_on(&self, id: &str) -> Vec<String> {
        let mut found = Vec::new();
        for host in &self.hosts {
            let vmms = self.vmms(&host.name, id).await;
            let running = vmms.iter().filter(|vmm| vmm.state == VmmState::Running);
            found.extend(running.map(|_| host.name.clone()));
        }
        found
    }

    /// Attaches to the console of a VM, past everything it said before.
    pub async fn shell(&self, name: &str) -> anyhow::Result<Serial> {
        let vm = self.vm(name).await?;
        let (id, host) = (
            vm["id"].as_str().context("an id")?,
            vm["host_name"].as_str().context("a host")?,
        );
        let directory = self.vm_dir(host, id);
        let record: Value = serde_json::from_slice(&std::fs::read(directory.join("vm.json"))?)?;
        let socket = if record["seat"] == "second" {
            "tty-2.sock"
        } else {
            "serial.sock"
        };
        let mut serial = Serial::attach(&directory.join(socket)).await?;
        serial.sync().await?;
        Ok(serial)
    }

    /// What a host keeps about a VM.
    pub fn vm_dir(&self, host: &str, id: &str) -> PathBuf {
        self.dir.join(host).join("vms").join(id)
    }

    /// Asks for a migration; returns its operation's id.
    pub async fn migrate(&self, name: &str, target: &str) -> anyhow::Result<String> {
        let accepted: Value = self
            .api
            .post(
                &format!("/v1/vms/{name}/migrate"),
                &json!({ "target": target }),
            )
            .await?;
        Ok(accepted["operation"]["id"]
            .as_str()
            .context("an operation")?
            .to_owned())
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

    /// Waits until some host can use some storage pool: hosts tell of theirs once they are heard.
    pub async fn wait_for_pool(&self) -> anyhow::Result<()> {
        let usable = |pool: &Value| {
            let mut hosts = pool["hosts"].as_array().into_iter().flatten();
            hosts.any(|host| host["trouble"].is_null())
        };
        self.wait_for("/v1/pools", OPERATION_PATIENCE, |pools| {
            pools["items"]
                .as_array()
                .is_some_and(|all| all.iter().any(usable))
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

/// An address nobody listens on at the moment.
pub fn free_address() -> anyhow::Result<SocketAddr> {
    Ok(TcpListener::bind("127.0.0.1:0")?.local_addr()?)
}
