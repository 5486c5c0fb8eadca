//! A host on a network cable of its own that can be pulled.
//!
//! The cable is a veth pair into an unnamed network namespace, kept open by a process whose end (the reaper's work,
//! at the latest) takes the namespace and both ends of the cable along.

use crate::process::Process;
use crate::test_dir::TestDir;
use anyhow::{Context, ensure};
use std::net::IpAddr;
use std::process::Command;
use std::time::{Duration, Instant};

const PATIENCE: Duration = Duration::from_secs(10);

/// A network namespace with one cable to the test's own.
#[derive(Debug)]
pub struct Island {
    holder: Process,
    cable: String,
    /// Address of the test's end of the cable.
    pub mainland_ip: IpAddr,
    /// Address of the namespace's end.
    pub island_ip: IpAddr,
}

impl Island {
    /// Makes a namespace and connects it.
    pub fn new(dir: &TestDir) -> anyhow::Result<Self> {
        Self::named(dir, "island")
    }

    /// The same where a test has several of them; `name` is a file in `dir`.
    ///
    /// # Errors
    /// What `unshare` or `ip` says.
    pub fn named(dir: &TestDir, name: &str) -> anyhow::Result<Self> {
        // The directory's path on the command line puts the holder within the reaper's reach.
        let mark = dir.join(name);
        let mut unshare = Command::new("unshare");
        unshare
            .args(["--net", "sh", "-c", "echo up >\"$0\"; exec tail -f \"$0\""])
            .arg(&mark);
        let holder = Process::start(&mut unshare, &dir.join(format!("{name}.log")))?;
        let deadline = Instant::now() + PATIENCE;
        while !mark.exists() {
            ensure!(
                Instant::now() < deadline,
                "unshare --net does not work here"
            );
            std::thread::sleep(Duration::from_millis(5));
        }
        // A subnet of its own for each test process, so that two of them do not meet.
        let pid = holder.pid();
        let subnet = [10, 213, (pid >> 6 & 0xff) as u8, (pid << 2 & 0xff) as u8];
        let address = |last: u8| IpAddr::from([subnet[0], subnet[1], subnet[2], subnet[3] | last]);
        let island = Self {
            cable: format!("gw{pid}"),
            holder,
            mainland_ip: address(1),
            island_ip: address(2),
        };
        island.connect()?;
        Ok(island)
    }

    /// The process that keeps the namespace open.
    pub fn holder_pid(&self) -> u32 {
        self.holder.pid()
    }

    /// The words before a command that make it run on the island.
    pub fn wrapper(&self) -> Vec<String> {
        [
            "nsenter",
            "--target",
            &self.holder.pid().to_string(),
            "--net",
        ]
        .map(str::to_owned)
        .to_vec()
    }

    /// Runs a command on the island and waits for its end.
    ///
    /// # Errors
    /// What the command says when it fails.
    pub fn run(&self, command: &[&str]) -> anyhow::Result<()> {
        let wrapper = self.wrapper();
        let words = wrapper.iter().map(String::as_str);
        let mut words = words.chain(command.iter().copied());
        let program = words.next().expect("a wrapper has words");
        run(Command::new(program).args(words))
    }

    /// Pulls the cable.
    pub fn cut(&self) -> anyhow::Result<()> {
        ip(&["link", "set", &self.cable, "down"])
    }

    /// Plugs it in again.
    pub fn mend(&self) -> anyhow::Result<()> {
        ip(&["link", "set", &self.cable, "up"])
    }

    fn connect(&self) -> anyhow::Result<()> {
        let pid = self.holder.pid().to_string();
        let cable = self.cable.as_str();
        ip(&[
            "link", "add", cable, "type", "veth", "peer", "name", "eth0", "netns", &pid,
        ])?;
        ip(&[
            "address",
            "add",
            &format!("{}/30", self.mainland_ip),
            "dev",
            cable,
        ])?;
        ip(&["link", "set", cable, "up"])?;
        let island_address = format!("{}/30", self.island_ip);
        self.run(&["ip", "link", "set", "lo", "up"])?;
        self.run(&["ip", "address", "add", &island_address, "dev", "eth0"])?;
        self.run(&["ip", "link", "set", "eth0", "up"])
    }
}

/// Whether network namespaces can be made here; the error is the reason to skip.
pub fn available() -> Result<(), String> {
    run(Command::new("unshare").args(["--net", "ip", "link"]))
        .map_err(|error| format!("no network namespaces: {error:#}"))
}

fn ip(arguments: &[&str]) -> anyhow::Result<()> {
    run(Command::new("ip").args(arguments))
}

pub(crate) fn run(command: &mut Command) -> anyhow::Result<()> {
    let output = command.output().with_context(|| format!("{command:?}"))?;
    ensure!(
        output.status.success(),
        "{command:?}: {}",
        String::from_utf8_lossy(&output.stderr).trim()
    );
    Ok(())
}
