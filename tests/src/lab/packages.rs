//! The Debian packages the lab is made of, fetched and unpacked beside each other, never installed.
//!
//! apt gets directories and a sources list of its own, so the machine's configuration and package database stay as
//! they are, and any Debian release (or a system that merely has apt) can run the lab.

use crate::program;
use anyhow::{Context, bail, ensure};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Where packages come from; backports have the QEMU whose emulation of nested virtualization works.
const SOURCES: &str = "\
deb [signed-by=KEYRING] http://deb.debian.org/debian bookworm main
deb [signed-by=KEYRING] http://deb.debian.org/debian bookworm-backports main
deb [signed-by=KEYRING] http://deb.debian.org/debian-security bookworm-security main
";
const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";
const BACKPORTS: &str = "bookworm-backports";
const STABLE: &str = "bookworm";
/// Depends on the present stock kernel of its release.
const KERNEL_META_PACKAGE: &str = "linux-image-cloud-amd64";
/// Taken from backports, and from stable where backports have none.
const PROGRAMS: [&str; 6] = [
    "qemu-system-x86",
    "qemu-system-common",
    "qemu-system-data",
    "seabios",
    "busybox-static",
    "mmdebstrap",
];
/// Earlier ones corrupt nested guests.
const LEAST_QEMU_MAJOR: u32 = 10;
/// Says what has been fetched and unpacked: the packages of both kernels, then [`PROGRAMS`]. Where it says something
/// else, or is missing, everything is fetched anew.
const STAMP: &str = "complete";

/// The unpacked packages.
#[derive(Clone, Debug)]
pub struct Packages {
    root: PathBuf,
    /// Runs in the emulated hosts and, unless a scenario says otherwise, in the guests (backports).
    pub kernel: Kernel,
    /// The kernel of the stable release.
    pub stable_kernel: Kernel,
}

/// A stock kernel.
#[derive(Clone, Debug)]
pub struct Kernel {
    /// As `uname -r` says it.
    pub release: String,
    /// The bzImage.
    pub image: PathBuf,
    /// Directory with its modules.
    pub modules: PathBuf,
}

impl Packages {
    /// Fetches and unpacks what is not there yet.
    pub fn prepare(lab: &Path) -> anyhow::Result<Self> {
        let root = lab.join("root");
        let stamp = root.join(STAMP);
        let mut fetched = fs::read_to_string(&stamp).unwrap_or_default();
        if !fetched.ends_with(&PROGRAMS.join("\n")) {
            let _ = fs::remove_dir_all(&root);
            fs::create_dir_all(&root)?;
            let mut packages = fetch_and_unpack(&lab.join("apt"), &root)?;
            packages.extend(PROGRAMS.map(str::to_owned));
            fetched = packages.join("\n");
            fs::write(&stamp, &fetched)?;
        }
        let mut kernels = fetched
            .lines()
            .map(|package| Kernel::in_root(&root, package));
        let mut next = || kernels.next().context("the stamp names two kernels")?;
        let packages = Self {
            kernel: next()?,
            stable_kernel: next()?,
            root,
        };
        packages.check_qemu()?;
        Ok(packages)
    }

    /// QEMU with the directories it looks for firmware in.
    pub fn qemu(&self) -> tokio::process::Command {
        let mut command = tokio::process::Command::new(self.qemu_path());
        for folder in ["usr/share/qemu", "usr/share/seabios"] {
            command.arg("-L").arg(self.root.join(folder));
        }
        command
    }

    /// Where the unpacked packages' own paths begin.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// The QEMU program.
    pub fn qemu_path(&self) -> PathBuf {
        self.root.join("usr/bin/qemu-system-x86_64")
    }

    /// The static busybox.
    pub fn busybox(&self) -> anyhow::Result<Vec<u8>> {
        let path = ["bin/busybox", "usr/bin/busybox"]
            .map(|path| self.root.join(path))
            .into_iter()
            .find(|path| path.exists())
            .context("busybox-static holds a busybox")?;
        Ok(fs::read(path)?)
    }

    fn check_qemu(&self) -> anyhow::Result<()> {
        let output = Command::new(self.qemu_path()).arg("--version").output()?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let major = text
            .split("version ")
            .nth(1)
            .and_then(|version| version.split('.').next()?.parse::<u32>().ok());
        let Some(major) = major else {
            bail!(
                "the unpacked QEMU does not start here: {}\ninstall the libraries it needs, for instance with \
                 `apt-get install qemu-system-x86`",
                String::from_utf8_lossy(&output.stderr).trim()
            );
        };
        ensure!(
            major >= LEAST_QEMU_MAJOR,
            "QEMU {major} corrupts nested guests; the lab needs {LEAST_QEMU_MAJOR} or newer"
        );
        Ok(())
    }
}

impl Kernel {
    fn in_root(root: &Path, package: &str) -> anyhow::Result<Self> {
        let release = package
            .strip_prefix("linux-image-")
            .context("a kernel package")?
            .to_owned();
        Ok(Self {
            image: root.join(format!("boot/vmlinuz-{release}")),
            modules: ["lib/modules", "usr/lib/modules"]
                .map(|folder| root.join(folder).join(&release))
                .into_iter()
                .find(|path| path.exists())
                .with_context(|| format!("{package} holds modules"))?,
            release,
        })
    }
}

/// The names of the two kernel packages, that of backports first.
fn fetch_and_unpack(apt: &Path, root: &Path) -> anyhow::Result<Vec<String>> {
    eprintln!("lab: fetching Debian packages");
    ensure!(
        Path::new(KEYRING).exists(),
        "{KEYRING} is missing (Debian: debian-archive-keyring)"
    );
    let apt = Apt::set_up(apt)?;
    apt.get(&["update", "-qq"])?;
    let kernels = vec![apt.kernel_of(BACKPORTS)?, apt.kernel_of(STABLE)?];
    let mut wanted = vec!["download", "-qq", "-t", BACKPORTS];
    wanted.extend(PROGRAMS);
    wanted.extend(kernels.iter().map(String::as_str));
    apt.get(&wanted)?;
    for entry in fs::read_dir(apt.debs())? {
        run(Command::new("dpkg").arg("-x").arg(entry?.path()).arg(root))?;
    }
    fs::remove_dir_all(apt.debs())?;
    Ok(kernels)
}

/// apt with directories of its own.
struct Apt {
    folder: PathBuf,
}

impl Apt {
    fn set_up(folder: &Path) -> anyhow::Result<Self> {
        let _ = fs::remove_dir_all(folder);
        for name in ["lists/partial", "cache/archives/partial", "debs"] {
            fs::create_dir_all(folder.join(name))?;
        }
        fs::write(
            folder.join("sources.list"),
            SOURCES.replace("KEYRING", KEYRING),
        )?;
        Ok(Self {
            folder: folder.to_owned(),
        })
    }

    fn debs(&self) -> PathBuf {
        self.folder.join("debs")
    }

    fn get(&self, arguments: &[&str]) -> anyhow::Result<String> {
        run(self.command("apt-get").args(arguments))
    }

    fn kernel_of(&self, release: &str) -> anyhow::Result<String> {
        let default_release = format!("APT::Default-Release={release}");
        let text = run(self.command("apt-cache").args([
            "-o",
            &default_release,
            "depends",
            KERNEL_META_PACKAGE,
        ]))?;
        text.lines()
            .find_map(|line| line.trim().strip_prefix("Depends: linux-image-"))
            .map(|rest| format!("linux-image-{rest}"))
            .with_context(|| {
                format!("{KERNEL_META_PACKAGE} of {release} depends on no kernel: {text}")
            })
    }

    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        let folder = self.folder.display();
        command.current_dir(self.debs());
        for option in [
            format!("Dir::Etc::sourcelist={folder}/sources.list"),
            "Dir::Etc::sourceparts=/dev/null".to_owned(),
            "Dir::Etc::preferences=/dev/null".to_owned(),
            "Dir::Etc::preferencesparts=/dev/null".to_owned(),
            format!("Dir::State::lists={folder}/lists"),
            format!("Dir::Cache={folder}/cache"),
            "APT::Sandbox::User=".to_owned(),
        ] {
            command.arg("-o").arg(option);
        }
        command
    }
}

/// Runs a command to its end; what it printed, or an error that shows it.
pub fn run(command: &mut Command) -> anyhow::Result<String> {
    let output = command
        .output()
        .with_context(|| format!("{command:?} cannot be started"))?;
    ensure!(
        output.status.success(),
        "{command:?} failed with {}: {}{}",
        output.status,
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Where the lab keeps packages, images and logs.
pub fn lab_dir() -> PathBuf {
    program::target_dir().join("lab")
}
