//! An emulated host: a QEMU process without KVM, whose CPU offers SVM to the kernel in it.

use super::images::Images;
use super::packages::Packages;
use super::shell::{READY, Shell};
use super::switch::Switch;
use anyhow::{Context, bail};
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;
use tokio::net::UnixListener;
use tokio::process::Child;

/// From power-on to the command loop; some seconds on an idle machine.
const BOOT_PATIENCE: Duration = Duration::from_secs(120);
/// A command on an emulated host that does not wait for anything ends within this time.
pub const COMMAND_PATIENCE: Duration = Duration::from_secs(60);
/// `mitigations=off` and no self-tests: the emulated host is not attacked, and its time is precious.
const CMDLINE: &str = "console=ttyS0 quiet panic=-1 tsc=reliable mitigations=off cryptomgr.notests \
8250.nr_uarts=1 init_on_alloc=0 rdinit=/init";

/// CPU of an emulated host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cpu {
    /// All that the emulation offers; without the string instructions that emulation makes slow, and without
    /// five-level paging, which nested paging does not know.
    Max,
    /// An older one, without AVX2 and what came with it: less than x86-64-v3.
    WithoutAvx2,
}

impl Cpu {
    const fn model(self) -> &'static str {
        match self {
            Self::Max => "max,-erms,-fsrm,-la57",
            Self::WithoutAvx2 => "max,-erms,-fsrm,-la57,-avx2,-fma,-bmi1,-bmi2",
        }
    }
}

/// What an emulated host is for.
#[derive(Clone, Debug)]
pub enum Role {
    /// Runs guests.
    Host,
    /// Runs the server and holds the shared storage pool.
    Control {
        /// Disk of the shared pool.
        store: PathBuf,
        /// Port of this machine behind which the server's API is.
        api_port: u16,
    },
}

/// How an emulated host is built.
#[derive(Clone, Debug)]
pub struct Blueprint {
    pub name: String,
    /// Last byte of its address 10.77.0.x.
    pub number: u8,
    pub cpu: Cpu,
    pub memory_mib: u32,
    pub role: Role,
}

impl Blueprint {
    /// Its address on the lab's network.
    pub fn address(&self) -> String {
        format!("10.77.0.{}", self.number)
    }
}

/// Where emulated hosts get their parts from.
#[derive(Debug)]
pub struct Site {
    pub packages: Packages,
    pub images: Images,
    pub switch: Switch,
    /// Sockets; whatever process names it is killed at the end.
    pub sockets: PathBuf,
    /// Console logs.
    pub logs: PathBuf,
}

/// A running emulated host; dropping it cuts its power.
#[derive(Debug)]
pub struct Machine {
    pub blueprint: Blueprint,
    pub shell: Shell,
    qemu: Child,
}

impl Machine {
    /// Powers a host on and waits for its command loop.
    pub async fn boot(site: &Site, blueprint: Blueprint) -> anyhow::Result<Self> {
        let name = blueprint.name.clone();
        let socket = site.sockets.join(format!("{name}.sock"));
        let _ = std::fs::remove_file(&socket);
        let listener = UnixListener::bind(&socket)?;
        let mut command = site.packages.qemu();
        add_platform(&mut command, site, &blueprint);
        add_devices(&mut command, site, &blueprint, &socket);
        let log = File::create(site.logs.join(format!("{name}.qemu.log")))?;
        let mut qemu = command
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .kill_on_drop(true)
            .spawn()
            .context("QEMU cannot be started")?;
        let (stream, _) = tokio::select! {
            accepted = listener.accept() => accepted?,
            status = qemu.wait() => bail!(
                "QEMU of {name} ended with {}; see {name}.qemu.log",
                status?
            ),
        };
        let (from, to) = stream.into_split();
        let mut shell = Shell::new(&name, from, to);
        shell.wait_for(READY, BOOT_PATIENCE).await?;
        Ok(Self {
            blueprint,
            shell,
            qemu,
        })
    }

    /// Runs a command on it that must succeed; what it printed.
    pub async fn run(&mut self, command: &str) -> anyhow::Result<String> {
        self.shell.run(command, COMMAND_PATIENCE).await
    }

    /// Pulls the plug: nothing in it gets to say or write another byte.
    pub async fn cut_power(mut self) -> anyhow::Result<()> {
        Ok(self.qemu.kill().await?)
    }
}

fn add_platform(command: &mut tokio::process::Command, site: &Site, blueprint: &Blueprint) {
    let (role, name) = (
        match blueprint.role {
            Role::Host => "host",
            Role::Control { .. } => "control",
        },
        &blueprint.name,
    );
    let cmdline = format!(
        "{CMDLINE} lab.name={name} lab.role={role} lab.address={}/24",
        blueprint.address()
    );
    command
        .args(["-M", "q35", "-accel", "tcg,thread=multi"])
        .args(["-nodefaults", "-display", "none", "-no-reboot"])
        .args(["-cpu", blueprint.cpu.model()])
        // QEMU 10.0 emulates several CPUs on as many threads, and then guests in the host die now and then: the emulation
        // takes page tables for absent that KVM reads whole, or fails an assertion of its own (`iotlb_to_section`). With
        // one CPU neither was seen, and guests have as many as they like.
        .args(["-smp", "1"])
        .args(["-m", &blueprint.memory_mib.to_string()])
        .arg("-serial")
        .arg(prefixed(
            "file:",
            &site.logs.join(format!("{name}.console.log")),
        ))
        .arg("-kernel")
        .arg(&site.packages.kernel.image)
        .arg("-initrd")
        .arg(&site.images.host_initrd)
        .args(["-append", &cmdline]);
}

fn add_devices(
    command: &mut tokio::process::Command,
    site: &Site,
    blueprint: &Blueprint,
    socket: &Path,
) {
    let (name, number) = (&blueprint.name, blueprint.number);
    let path = |path: &Path| path.display().to_string();
    let data = path(&site.images.data_disk);
    let log = path(&site.logs.join(format!("{name}.log")));
    let mut add = |option: &str, value: String| {
        command.arg(option).arg(value);
    };
    add(
        "-drive",
        format!("file={data},if=none,id=data,format=raw,readonly=on"),
    );
    add("-device", "virtio-blk-pci,drive=data".into());
    let switch = path(site.switch.path());
    add(
        "-netdev",
        format!("stream,id=lan,server=off,addr.type=unix,addr.path={switch}"),
    );
    add(
        "-device",
        format!("virtio-net-pci,netdev=lan,mac=52:54:00:77:00:{number:02x}"),
    );
    add("-device", "virtio-serial-pci".into());
    for (id, backend) in [
        ("shell", format!("socket,id=shell,path={}", path(socket))),
        ("log", format!("file,id=log,path={log}")),
    ] {
        add("-chardev", backend);
        add("-device", format!("virtserialport,chardev={id},name={id}"));
    }
    add("-device", "virtio-rng-pci".into());
    if let Role::Control { store, api_port } = &blueprint.role {
        let store = path(store);
        add(
            "-drive",
            format!("file={store},if=none,id=store,format=raw,cache=unsafe"),
        );
        add("-device", "virtio-blk-pci,drive=store".into());
        add(
            "-netdev",
            format!("user,id=way-in,hostfwd=tcp:127.0.0.1:{api_port}-:7070"),
        );
        add("-device", "virtio-net-pci,netdev=way-in".into());
    }
}

fn prefixed(prefix: &str, path: &Path) -> std::ffi::OsString {
    let mut text = std::ffi::OsString::from(prefix);
    text.push(path);
    text
}
