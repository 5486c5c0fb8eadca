//! The Linux test guest: a kernel, and an initial RAM disk with busybox and our `guest-agent`.
//!
//! The kernel is the one named by `GODWIT_TEST_KERNEL` (an ELF, or one compressed with xz), else the test kernel
//! beside the checkout; without either the tests that need Linux are skipped.

use crate::initramfs::Initramfs;
use crate::program;
use anyhow::{Context, ensure};
use rustix::fs::{FlockOperation, flock};
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// Names the kernel to boot test guests with.
pub const KERNEL_ENV: &str = "GODWIT_TEST_KERNEL";
const KERNEL_BESIDE_CHECKOUT: &str = "../shared/guest/linux-6.12.117-testguest.xz";
const BUSYBOX: &str = "/bin/busybox";
const AGENT_SOURCE: &str = "tests/guest/main.rs";

/// Makes `guest-agent` the init program.
pub const AGENT_CMDLINE: &str = "console=ttyS0 quiet panic=-1 rdinit=/guest-agent";
/// The same on the virtio console: the serial port stays silent.
pub const HVC_AGENT_CMDLINE: &str = "console=hvc0 quiet panic=-1 rdinit=/guest-agent";
/// Makes an interactive busybox shell the init program.
pub const SHELL_CMDLINE: &str = "console=ttyS0 quiet panic=-1 rdinit=/init";
/// The line with which the shell's init says that it is there.
pub const SHELL_GREETING: &str = "busybox shell ready";
/// The line with which `guest-agent` says that it is there.
pub const AGENT_GREETING: &str = "guest-agent ready";

/// The files a Linux test guest boots from.
#[derive(Clone, Debug)]
pub struct LinuxGuest {
    /// Uncompressed ELF kernel.
    pub kernel: PathBuf,
    /// Initial RAM disk.
    pub initrd: PathBuf,
}

impl LinuxGuest {
    /// Finds or makes the files; the error is the reason to skip.
    pub fn prepare() -> Result<Self, String> {
        crate::skip::kvm()?;
        let kernel = find_kernel()?;
        if !Path::new(BUSYBOX).exists() {
            return Err(format!("{BUSYBOX} is missing (Debian: busybox-static)"));
        }
        Self::build(&kernel)
            .map_err(|error| format!("the Linux test guest cannot be made: {error:#}"))
    }

    fn build(kernel: &Path) -> anyhow::Result<Self> {
        let folder = program::target_dir().join("guest");
        fs::create_dir_all(&folder)?;
        // Tests are processes: the first one builds, the others wait for it.
        let lock = File::create(folder.join("lock"))?;
        flock(&lock, FlockOperation::LockExclusive)?;
        let name = kernel.file_stem().context("a kernel is a file")?;
        let elf = folder.join(name).with_extension("elf");
        if is_older(&elf, &[kernel])? {
            replace(&elf, &decompressed(kernel)?)?;
        }
        let initrd = folder.join("initrd");
        let sources = agent_sources()?;
        let mut inputs: Vec<&Path> = sources.iter().map(PathBuf::as_path).collect();
        let running = std::env::current_exe()?;
        inputs.extend([Path::new(BUSYBOX), &running]);
        if is_older(&initrd, &inputs)? {
            replace(
                &initrd,
                &initramfs(&fs::read(build_agent(&folder)?)?, &fs::read(BUSYBOX)?),
            )?;
        }
        Ok(Self {
            kernel: elf,
            initrd,
        })
    }
}

fn find_kernel() -> Result<PathBuf, String> {
    if let Some(path) = std::env::var_os(KERNEL_ENV) {
        let path = PathBuf::from(path);
        return if path.exists() {
            Ok(path)
        } else {
            Err(format!(
                "{KERNEL_ENV} names {}, which is not there",
                path.display()
            ))
        };
    }
    let beside = program::checkout().join(KERNEL_BESIDE_CHECKOUT);
    if beside.exists() {
        return Ok(beside);
    }
    Err(format!(
        "no Linux test kernel: set {KERNEL_ENV} to an uncompressed x86-64 ELF kernel (vmlinux)"
    ))
}

fn decompressed(kernel: &Path) -> anyhow::Result<Vec<u8>> {
    if kernel.extension().is_none_or(|extension| extension != "xz") {
        return Ok(fs::read(kernel)?);
    }
    let output = Command::new("xz")
        .arg("-dc")
        .arg(kernel)
        .stderr(Stdio::inherit())
        .output()
        .context("xz")?;
    ensure!(
        output.status.success(),
        "xz -dc {} failed with {}",
        kernel.display(),
        output.status
    );
    Ok(output.stdout)
}

/// Compiles `guest-agent` into `folder`. The guest has no dynamic loader, so its init is linked statically.
pub fn build_agent(folder: &Path) -> anyhow::Result<PathBuf> {
    let agent = folder.join("guest-agent");
    let status = Command::new(std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into()))
        .current_dir(program::checkout())
        .args([
            "--edition",
            "2024",
            "-O",
            "-C",
            "target-feature=+crt-static",
            "-C",
            "strip=symbols",
            "-o",
        ])
        .arg(&agent)
        .arg(AGENT_SOURCE)
        .status()
        .context("rustc")?;
    ensure!(
        status.success(),
        "rustc {AGENT_SOURCE} failed with {status}"
    );
    Ok(agent)
}

fn initramfs(agent: &[u8], busybox: &[u8]) -> Vec<u8> {
    // setsid and a terminal of its own give the shell job control, as on a real console.
    let init = format!(
        "#!/bin/busybox sh\n\
         /bin/busybox mount -t proc proc /proc\n\
         /bin/busybox mount -t sysfs sysfs /sys\n\
         /bin/busybox --install -s /bin\n\
         export PATH=/bin PS1='guest# '\n\
         echo {SHELL_GREETING}\n\
         exec setsid cttyhack sh\n"
    );
    Initramfs::default()
        .directory("bin")
        .directory("dev")
        .directory("proc")
        .directory("sys")
        .character_device("dev/console", 5, 1)
        .character_device("dev/ttyS0", 4, 64)
        .program("bin/busybox", busybox)
        .symlink("bin/sh", "busybox")
        .program("guest-agent", agent)
        .program("init", init.as_bytes())
        .finish()
}

fn agent_sources() -> anyhow::Result<Vec<PathBuf>> {
    let source = program::checkout().join(AGENT_SOURCE);
    let folder = source.parent().context("the agent's folder")?;
    fs::read_dir(folder)?
        .map(|entry| Ok(entry?.path()))
        .collect()
}

fn is_older(output: &Path, inputs: &[&Path]) -> anyhow::Result<bool> {
    let Ok(made) = fs::metadata(output) else {
        return Ok(true);
    };
    let made = made.modified()?;
    for input in inputs {
        if fs::metadata(input)
            .with_context(|| input.display().to_string())?
            .modified()?
            > made
        {
            return Ok(true);
        }
    }
    Ok(false)
}

/// Running guests may have the old file open, so a new one takes its name.
fn replace(path: &Path, content: &[u8]) -> anyhow::Result<()> {
    let fresh = path.with_extension("new");
    fs::write(&fresh, content)?;
    Ok(fs::rename(&fresh, path)?)
}
