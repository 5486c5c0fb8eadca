//! The pool's processes: started in order, watched, and taken down without leaving anything.

use super::DemoError;
use crate::READY_PREFIX;
use crate::client::{Client, ClientError, ConnectOptions, StreamItem};
use crate::resource::{Event, Host, HostState, JoinToken, List};
use rustix::process::{Pid, Signal, kill_process};
use std::collections::BTreeSet;
use std::fs;
use std::io::{self, Read, Seek, SeekFrom};
use std::net::{SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::time::Duration;
use tempfile::TempDir;
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::{Child, Command};

/// Guest memory each host offers: the other hosts can hold one host's VMs too.
const GUEST_MEMORY_MIB: u64 = 768;
/// How long the server may take to answer.
const SERVER_START: Duration = Duration::from_secs(20);
/// How long the hosts may take to join.
const HOSTS_JOIN: Duration = Duration::from_secs(30);
/// How long a process may take to end by itself.
const END: Duration = Duration::from_secs(15);
/// How long the kernel may take to end a process that was killed.
const KILLED: Duration = Duration::from_secs(5);
/// Part of each log that is shown when something went wrong.
const LOG_TAIL_BYTES: u64 = 4 << 10;
const LOG_TAIL_LINES: usize = 12;

/// What the demo was asked for.
#[derive(Debug)]
pub(super) struct PoolPlan {
    pub(super) hosts: u8,
    pub(super) api: SocketAddr,
    pub(super) state_dir: Option<PathBuf>,
}

/// Why the pool does not run.
#[derive(Debug, thiserror::Error)]
pub enum PoolError {
    /// The directory cannot be used.
    #[error("cannot use the directory {path}\n  remedy: choose another one with --state-dir")]
    Directory {
        /// The directory.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A process could not be started.
    #[error("cannot start {name}")]
    Start {
        /// Which.
        name: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A process ended that was to go on.
    #[error("{name} ended unexpectedly ({status}); its log is {log}")]
    Ended {
        /// Which.
        name: String,
        /// How.
        status: ExitStatus,
        /// Its log.
        log: PathBuf,
    },
}

/// The pool.
#[derive(Debug)]
pub(super) struct Pool {
    plan: PoolPlan,
    directory: PathBuf,
    /// Removed at the end; `None` when the operator named a directory.
    temporary: Option<TempDir>,
    processes: Vec<Process>,
    client: Client,
}

#[derive(Debug)]
struct Process {
    name: String,
    child: Child,
    log: PathBuf,
}

impl Pool {
    /// Prepares the directory; nothing runs yet.
    pub(super) fn new(plan: PoolPlan) -> Result<Self, DemoError> {
        let unusable = |path: &Path| {
            let path = path.to_owned();
            move |source| PoolError::Directory { path, source }
        };
        let (directory, temporary) = match &plan.state_dir {
            Some(directory) => {
                fs::create_dir_all(directory).map_err(unusable(directory))?;
                (
                    fs::canonicalize(directory).map_err(unusable(directory))?,
                    None,
                )
            }
            None => {
                let parent = std::env::temp_dir();
                let temporary = tempfile::Builder::new()
                    .prefix("godwit-demo-")
                    .tempdir()
                    .map_err(unusable(&parent))?;
                (temporary.path().to_owned(), Some(temporary))
            }
        };
        let client = client(&format!("http://{}", plan.api))?;
        Ok(Self {
            plan,
            directory,
            temporary,
            processes: Vec::new(),
            client,
        })
    }

    pub(super) fn host_count(&self) -> u8 {
        self.plan.hosts
    }

    pub(super) fn client(&self) -> &Client {
        &self.client
    }

    /// Starts the server, then the hosts, and waits until all of them are up.
    pub(super) async fn start(&mut self) -> Result<(), DemoError> {
        self.start_server().await?;
        for number in 1..=self.plan.hosts {
            self.start_host(number).await?;
        }
        let hosts = usize::from(self.plan.hosts);
        tokio::select! {
            joined = tokio::time::timeout(HOSTS_JOIN, wait_for_hosts(&self.client, hosts)) => match joined {
                Ok(joined) => joined.map_err(DemoError::api("waiting for the hosts")),
                Err(_) => {
                    Err(DemoError::TooSlow { what: "joining of all hosts".to_owned(), limit_s: HOSTS_JOIN.as_secs() })
                }
            },
            death = a_death(&mut self.processes) => Err(death.into()),
        }
    }

    async fn start_server(&mut self) -> Result<(), DemoError> {
        let mut api = self.plan.api;
        // Port 0 is free by definition; any other may have been taken by somebody.
        if let Err(error) = TcpListener::bind(api) {
            println!("{api} cannot be used ({error}); taking a free port.");
            api.set_port(0);
        }
        let state = self.directory.join("server");
        let token = self.directory.join("api-token");
        let mut command = self.command("server", &state);
        command
            .args(["--api", &api.to_string(), "--agents", "127.0.0.1:0"])
            .arg("--token-file")
            .arg(token)
            .stdout(Stdio::piped());
        let server = self.spawn("server", "server", command)?;
        let stdout = server.child.stdout.take().expect("stdout is piped");
        let ready = async {
            let mut lines = BufReader::new(stdout).lines();
            while let Ok(Some(line)) = lines.next_line().await {
                if let Some(address) = line.strip_prefix(READY_PREFIX) {
                    return Some(address.trim_end_matches('/').to_owned());
                }
            }
            None
        };
        match tokio::time::timeout(SERVER_START, ready).await {
            Ok(Some(address)) => {
                self.client = client(&address)?;
                Ok(())
            }
            Ok(None) => Err(a_death(&mut self.processes).await.into()),
            Err(_) => Err(DemoError::TooSlow {
                what: "the server's start".to_owned(),
                limit_s: SERVER_START.as_secs(),
            }),
        }
    }

    async fn start_host(&mut self, number: u8) -> Result<(), DemoError> {
        let name = format!("host-{number}");
        let state = self.directory.join(&name);
        let mut command = self.command("host", &state);
        // A host that has joined before does not need the token, only the address.
        let token: JoinToken = self
            .client
            .post("/v1/join-tokens", &serde_json::json!({}))
            .await
            .map_err(DemoError::api("making a join token"))?;
        // Not as an argument: those are for everyone on this machine to see.
        command
            .env("GODWIT_JOIN_TOKEN", &token.token)
            .args(["--server", &token.server]);
        command.args([
            "--name",
            &name,
            "--listen",
            "127.0.0.1:0",
            "--on-exit",
            "kill-vms",
        ]);
        command
            .args(["--guest-memory-mib", &GUEST_MEMORY_MIB.to_string()])
            .stdout(Stdio::null());
        self.spawn(&name, &name, command)?;
        Ok(())
    }

    fn command(&self, role: &str, state: &Path) -> Command {
        let program = std::env::current_exe().unwrap_or_else(|_| "godwit".into());
        let mut command = Command::new(program);
        command.arg(role);
        if role == "host" {
            command.arg("run");
        }
        // A process group of its own: Ctrl-C reaches the demo alone, which then ends the others in order.
        command
            .arg("--state-dir")
            .arg(state)
            .arg("--die-with-parent")
            .stdin(Stdio::null())
            .process_group(0);
        command
    }

    fn spawn(
        &mut self,
        name: &str,
        log_name: &str,
        mut command: Command,
    ) -> Result<&mut Process, PoolError> {
        let log = self.directory.join(format!("{log_name}.log"));
        let failed = |source| PoolError::Start {
            name: name.to_owned(),
            source,
        };
        let file = fs::File::options()
            .create(true)
            .append(true)
            .open(&log)
            .map_err(failed)?;
        let child = command.stderr(file).spawn().map_err(failed)?;
        self.processes.push(Process {
            name: name.to_owned(),
            child,
            log,
        });
        Ok(self.processes.last_mut().expect("just pushed"))
    }

    /// Waits until a process ends that was to go on.
    pub(super) async fn wait_for_a_death(&mut self) -> DemoError {
        a_death(&mut self.processes).await.into()
    }

    /// Shows the end of every log.
    pub(super) fn print_log_tails(&self) {
        for process in &self.processes {
            let Ok(tail) = tail(&process.log) else {
                continue;
            };
            if !tail.is_empty() {
                eprintln!("--- last lines of {}", process.log.display());
                eprintln!("{tail}");
            }
        }
    }

    /// Ends every process and removes every file; what could not be ended or removed is told.
    pub(super) async fn tear_down(mut self) -> Vec<String> {
        for process in &self.processes {
            if let Some(pid) = process
                .child
                .id()
                .and_then(|pid| Pid::from_raw(pid.cast_signed()))
            {
                // An error says that it has ended already.
                let _ = kill_process(pid, Signal::TERM);
            }
        }
        let mut left = Vec::new();
        for process in &mut self.processes {
            if tokio::time::timeout(END, process.child.wait())
                .await
                .is_err()
            {
                left.push(format!(
                    "{} did not end within {} s and was killed",
                    process.name,
                    END.as_secs()
                ));
                let _ = process.child.start_kill();
                let _ = tokio::time::timeout(KILLED, process.child.wait()).await;
            }
        }
        for (pid, command) in processes_using(&self.directory) {
            left.push(format!(
                "process {pid} outlived the demo and was killed: {command}"
            ));
            if let Some(pid) = Pid::from_raw(pid) {
                let _ = kill_process(pid, Signal::KILL);
            }
        }
        if let Some(temporary) = self.temporary.take() {
            let path = temporary.path().to_owned();
            if let Err(error) = temporary.close() {
                left.push(format!("{} could not be removed: {error}", path.display()));
            }
        }
        left
    }
}

fn client(server: &str) -> Result<Client, DemoError> {
    Client::new(&ConnectOptions::local(server))
        .map_err(DemoError::api("preparing to ask the server"))
}

async fn wait_for_hosts(client: &Client, count: usize) -> Result<(), ClientError> {
    let revision = client
        .get::<List<Event>>("/v1/events?limit=1")
        .await?
        .revision;
    let is_up = |host: &Host| host.state == HostState::Up;
    let mut up: BTreeSet<_> = client
        .list::<Host>("/v1/hosts")
        .await?
        .items
        .into_iter()
        .filter(is_up)
        .map(|host| host.id)
        .collect();
    let mut follow = client.follow(revision);
    while up.len() < count {
        if let StreamItem::Host(host) = follow.next().await?
            && is_up(&host)
        {
            up.insert(host.id);
        }
    }
    Ok(())
}

/// Waits until one of the processes ends.
async fn a_death(processes: &mut [Process]) -> PoolError {
    let deaths = processes.iter_mut().map(|process| {
        Box::pin(async {
            let status = process.child.wait().await.unwrap_or_default();
            PoolError::Ended {
                name: process.name.clone(),
                status,
                log: process.log.clone(),
            }
        })
    });
    futures_util::future::select_all(deaths).await.0
}

fn tail(log: &Path) -> io::Result<String> {
    let mut file = fs::File::open(log)?;
    let length = file.metadata()?.len();
    file.seek(SeekFrom::Start(length.saturating_sub(LOG_TAIL_BYTES)))?;
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes)?;
    let text = String::from_utf8_lossy(&bytes);
    let lines: Vec<&str> = text.lines().collect();
    Ok(lines[lines.len().saturating_sub(LOG_TAIL_LINES)..].join("\n"))
}

/// Processes whose command line names `directory`: only this demo's own do.
fn processes_using(directory: &Path) -> Vec<(i32, String)> {
    let needle = directory.to_string_lossy();
    let own = std::process::id().cast_signed();
    let Ok(entries) = fs::read_dir("/proc") else {
        return Vec::new();
    };
    entries
        .filter_map(|entry| {
            let entry = entry.ok()?;
            let pid: i32 = entry.file_name().to_str()?.parse().ok()?;
            let command = fs::read(entry.path().join("cmdline")).ok()?;
            let command = String::from_utf8_lossy(&command).replace('\0', " ");
            let is_ours = pid != own
                && command
                    .split(' ')
                    .any(|word| word.starts_with(needle.as_ref()));
            is_ours.then_some((pid, command))
        })
        .collect()
}
