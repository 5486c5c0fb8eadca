//! One VMM process: started by this agent or taken over from its predecessor.
//!
//! ```text
//! spawn ──▶ child ────┐
//!                     ├──▶ running ──ends by itself, or kill──▶ exited (how: known for a child only)
//! find ───▶ adopted ──┘
//! ```
//!
//! Signals go through a pidfd, so they can never hit a process that took over the same number.

use crate::procfs::{self, Alive};
use crate::record::{ProcessId, Seat, VmDirectory};
use crate::sys::{self, AfterAgent};
use godwit_wire::vmm_api::VMM_ENVIRONMENT;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use std::fmt;
use std::fs::OpenOptions;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;
use tokio::process::Command;
use tokio::sync::watch;

/// How long a killed process may take until none of its threads can run guest code.
pub(crate) const KILL_TIME: Duration = Duration::from_secs(2);
/// How long it may take after that to be gone: the kernel gives back all of the guest's memory first.
pub(crate) const EXIT_TIME: Duration = Duration::from_secs(120);
/// Pause between two looks at the threads of a killed process: threads end without announcing it to anybody.
const THREADS_LOOK: Duration = Duration::from_millis(5);
/// Lines of a VMM's log quoted when it does not start.
const LOG_LINES_QUOTED: usize = 5;
/// Bytes of a VMM's log looked at for that.
const LOG_TAIL_BYTES: u64 = 4096;

/// How a process ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Exit {
    /// As the kernel reports it for a child.
    Status(std::process::ExitStatus),
    /// Not our child: only that it ended is known.
    Unknown,
}

impl fmt::Display for Exit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Status(status) => status.fmt(f),
            Self::Unknown => f.write_str("unknown (it was started by an earlier agent)"),
        }
    }
}

/// A VMM process. Dropping it leaves the process alone.
#[derive(Clone, Debug)]
pub(crate) struct VmmProcess {
    id: ProcessId,
    pidfd: Arc<OwnedFd>,
    exit: watch::Receiver<Option<Exit>>,
}

impl VmmProcess {
    /// Starts `program vmm` with its sockets in a seat of `directory`, in a session of its own, its output in the log
    /// there.
    pub(crate) fn spawn(
        program: &Path,
        directory: &VmDirectory,
        seat: Seat,
        after_agent: AfterAgent,
    ) -> io::Result<Self> {
        let log = OpenOptions::new()
            .create(true)
            .append(true)
            .mode(0o600)
            .open(directory.log())?;
        let mut command = Command::new(program);
        command
            .arg("vmm")
            .arg("--api-socket")
            .arg(directory.api_socket(seat))
            .arg("--serial-socket")
            .arg(directory.serial_socket(seat))
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log);
        let (name, value) = VMM_ENVIRONMENT;
        match std::env::var(name) {
            // What an operator has set stays, and comes last, so it wins.
            Ok(theirs) => command.env(name, format!("{value}:{theirs}")),
            Err(_) => command.env(name, value),
        };
        sys::detach(&mut command, after_agent);
        let mut child = command.spawn()?;
        let pid = child
            .id()
            .and_then(|pid| i32::try_from(pid).ok())
            .ok_or(io::ErrorKind::NotFound)?;
        // The child is not reaped before `wait`, so the number is still its own.
        let pidfd = Arc::new(open(pid)?);
        let Some(stat) = procfs::process_stat(pid) else {
            // Without it nobody could tell this process from another with its number.
            child.start_kill()?;
            return Err(io::Error::other(format!("/proc/{pid}/stat cannot be read")));
        };
        let (exited, exit) = watch::channel(None);
        tokio::spawn(async move {
            let how = child.wait().await.map_or(Exit::Unknown, Exit::Status);
            exited.send_replace(Some(how));
        });
        Ok(Self {
            id: ProcessId {
                pid,
                start_ticks: stat.start_ticks,
            },
            pidfd,
            exit,
        })
    }

    /// The process with this id, if it still runs. Must be called inside a tokio runtime.
    pub(crate) fn find(id: ProcessId) -> io::Result<Option<Self>> {
        let pidfd = match open(id.pid) {
            Ok(pidfd) => Arc::new(pidfd),
            Err(error) if error.raw_os_error() == Some(rustix::io::Errno::SRCH.raw_os_error()) => {
                return Ok(None);
            }
            Err(error) => return Err(error),
        };
        // Looked at after the pidfd was taken: if the start time fits, the pidfd is of the right process.
        match procfs::process_stat(id.pid) {
            Some(stat) if stat.start_ticks == id.start_ticks && stat.alive == Alive::Yes => {}
            _ => return Ok(None),
        }
        let (exited, exit) = watch::channel(None);
        let watched = sys::watch_readable(pidfd.try_clone()?)?;
        tokio::spawn(async move {
            // A pidfd becomes readable when its process ends.
            if watched.readable().await.is_ok() {
                exited.send_replace(Some(Exit::Unknown));
            }
        });
        Ok(Some(Self { id, pidfd, exit }))
    }

    /// Processes started for `directory`, recorded or not.
    pub(crate) async fn find_strays(directory: &VmDirectory) -> io::Result<Vec<Self>> {
        let mut found = Vec::new();
        let sockets = Seat::ALL.map(|seat| directory.api_socket(seat));
        // Looking through all processes takes a while on a full host.
        let scan = move || procfs::processes_with_argument(&sockets);
        for pid in tokio::task::spawn_blocking(scan).await?? {
            if let Some(stat) = procfs::process_stat(pid) {
                found.extend(Self::find(ProcessId {
                    pid,
                    start_ticks: stat.start_ticks,
                })?);
            }
        }
        Ok(found)
    }

    pub(crate) fn id(&self) -> ProcessId {
        self.id
    }

    /// Whether the process with this number is still this one.
    pub(crate) fn is_itself(&self) -> bool {
        procfs::process_stat(self.id.pid)
            .is_some_and(|stat| stat.start_ticks == self.id.start_ticks && stat.alive == Alive::Yes)
    }

    /// Completes when the process has ended.
    pub(crate) async fn exited(&self) -> Exit {
        let mut exit = self.exit.clone();
        let how = exit
            .wait_for(Option::is_some)
            .await
            .ok()
            .and_then(|how| how.clone());
        match how {
            Some(how) => how,
            // The task that watches lives until the process ends or the runtime does.
            None => std::future::pending().await,
        }
    }

    /// Kills it and waits until it is gone, at most [`KILL_TIME`] and [`EXIT_TIME`].
    pub(crate) async fn kill(&self) -> io::Result<Exit> {
        self.kill_guest().await?;
        self.until_gone().await
    }

    /// Kills it and waits until no guest code can run in it any more, at most [`KILL_TIME`]. The process itself may
    /// take much longer to be gone.
    pub(crate) async fn kill_guest(&self) -> io::Result<()> {
        match pidfd_send_signal(&*self.pidfd, Signal::KILL) {
            Ok(()) | Err(rustix::io::Errno::SRCH) => {}
            Err(error) => return Err(error.into()),
        }
        let stopped = async {
            tokio::select! {
                biased;
                _ = self.exited() => Ok(()),
                stopped = self.until_no_guest_runs() => stopped,
            }
        };
        tokio::time::timeout(KILL_TIME, stopped)
            .await
            .unwrap_or_else(|_| Err(self.outlasted("still runs its guest", KILL_TIME)))
    }

    /// Should another process have got the same number meanwhile, its threads only delay the answer.
    async fn until_no_guest_runs(&self) -> io::Result<()> {
        while procfs::runs_guest(self.id.pid)? {
            tokio::time::sleep(THREADS_LOOK).await;
        }
        Ok(())
    }

    /// Waits until a killed process is gone, at most [`EXIT_TIME`].
    pub(crate) async fn until_gone(&self) -> io::Result<Exit> {
        tokio::time::timeout(EXIT_TIME, self.exited())
            .await
            .map_err(|_| self.outlasted("is not gone", EXIT_TIME))
    }

    fn outlasted(&self, what: &str, time: Duration) -> io::Error {
        let detail = format!(
            "process {} was killed and {what} after {time:?}",
            self.id.pid
        );
        io::Error::new(io::ErrorKind::TimedOut, detail)
    }
}

/// Kills whatever was started for `directory`; returns when no guest code can run in it any more.
pub(crate) async fn kill_strays(directory: &VmDirectory) -> io::Result<()> {
    for stray in VmmProcess::find_strays(directory).await? {
        tracing::warn!(pid = stray.id.pid, directory = %directory.path().display(), "killing a VMM left behind");
        stray.kill_guest().await?;
    }
    Ok(())
}

/// Kills whatever was started for `directory` except the process with this id; returns when no guest code can run in it
/// any more, and if it takes no longer than `let_go`, when it is gone.
pub(crate) async fn kill_all_but(
    directory: &VmDirectory,
    kept: ProcessId,
    let_go: Duration,
) -> io::Result<()> {
    for stray in VmmProcess::find_strays(directory).await? {
        // One that lives owns its number.
        if stray.id.pid == kept.pid {
            continue;
        }
        tracing::info!(pid = stray.id.pid, directory = %directory.path().display(), "ending a VMM that the VM is not in");
        stray.kill_guest().await?;
        if tokio::time::timeout(let_go, stray.exited()).await.is_err() {
            tracing::warn!(pid = stray.id.pid, "a killed VMM is not gone yet");
        }
    }
    Ok(())
}

/// The last lines a VMM wrote, for the problem of a start that failed.
pub(crate) fn last_words(directory: &VmDirectory) -> String {
    use std::io::{Read, Seek, SeekFrom};
    let mut tail = Vec::new();
    let read = std::fs::File::open(directory.log()).and_then(|mut log| {
        let length = log.metadata()?.len();
        log.seek(SeekFrom::Start(length.saturating_sub(LOG_TAIL_BYTES)))?;
        log.take(LOG_TAIL_BYTES).read_to_end(&mut tail)
    });
    if read.is_err() {
        return String::new();
    }
    let text = String::from_utf8_lossy(&tail);
    let lines: Vec<&str> = text
        .lines()
        .filter(|line| !line.trim().is_empty())
        .collect();
    lines[lines.len().saturating_sub(LOG_LINES_QUOTED)..].join(" / ")
}

fn open(pid: i32) -> io::Result<OwnedFd> {
    let pid = Pid::from_raw(pid)
        .filter(|pid| !pid.is_init())
        .ok_or(io::ErrorKind::InvalidInput)?;
    Ok(pidfd_open(pid, PidfdFlags::NONBLOCK)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::StateDirectory;
    use godwit_wire::id::VmId;
    use std::os::unix::fs::PermissionsExt;

    /// Waits for ever without a process of its own: until that has become another program it would have this one's
    /// command line.
    const BLOCKS: &str = "read never < \"$0.fifo\"";

    struct Fixture {
        _root: tempfile::TempDir,
        directory: VmDirectory,
        program: std::path::PathBuf,
    }

    /// A "VMM" that is a shell script.
    fn fixture(script: &str) -> Fixture {
        let root = tempfile::tempdir().unwrap();
        let state = StateDirectory::new(root.path().to_owned());
        let directory = state.vm(VmId::fresh());
        directory.create().unwrap();
        let program = root.path().join("program");
        std::fs::write(&program, format!("#!/bin/sh\n{script}\n")).unwrap();
        std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o700)).unwrap();
        rustix::fs::mknodat(
            rustix::fs::CWD,
            root.path().join("program.fifo"),
            rustix::fs::FileType::Fifo,
            rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR,
            0,
        )
        .unwrap();
        Fixture {
            _root: root,
            directory,
            program,
        }
    }

    #[tokio::test]
    async fn a_process_that_ends_by_itself_tells_how_and_leaves_its_last_words() {
        let fixture = fixture("echo no kernel >&2; exit 3");
        let process = VmmProcess::spawn(
            &fixture.program,
            &fixture.directory,
            Seat::First,
            AfterAgent::LivesOn,
        )
        .unwrap();
        let Exit::Status(status) = process.exited().await else {
            panic!("a child's status is known")
        };
        assert_eq!(status.code(), Some(3));
        assert_eq!(last_words(&fixture.directory), "no kernel");
    }

    #[tokio::test]
    async fn a_process_is_found_again_by_its_id_until_it_is_killed() {
        let fixture = fixture(BLOCKS);
        let process = VmmProcess::spawn(
            &fixture.program,
            &fixture.directory,
            Seat::First,
            AfterAgent::Dies,
        )
        .unwrap();
        let id = process.id();
        let adopted = VmmProcess::find(id).unwrap().unwrap();
        let imposter = ProcessId {
            start_ticks: id.start_ticks + 1,
            ..id
        };
        assert!(VmmProcess::find(imposter).unwrap().is_none());
        assert_eq!(adopted.kill().await.unwrap(), Exit::Unknown);
        process.exited().await;
        assert!(VmmProcess::find(id).unwrap().is_none());
    }

    #[tokio::test]
    async fn what_was_started_for_a_vm_is_found_without_a_record() {
        let fixture = fixture(BLOCKS);
        let process = VmmProcess::spawn(
            &fixture.program,
            &fixture.directory,
            Seat::First,
            AfterAgent::Dies,
        )
        .unwrap();
        // Between fork and exec the child still has our own command line.
        while VmmProcess::find_strays(&fixture.directory)
            .await
            .unwrap()
            .is_empty()
        {
            tokio::task::yield_now().await;
        }
        kill_strays(&fixture.directory).await.unwrap();
        process.exited().await;
        assert!(
            VmmProcess::find_strays(&fixture.directory)
                .await
                .unwrap()
                .is_empty()
        );
    }
}
