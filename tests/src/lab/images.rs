//! The files that emulated hosts and their guests boot from.
//!
//! An emulated host gets an initramfs (busybox, modules, init) and one read-only disk, shared by all of them, with
//! `godwit`, the libraries it loads, and the guests' kernels, initramfs and disk image under `/data`.

use super::modules::{Module, copy_with_libraries, in_order};
use super::packages::{Kernel, Packages, run};
use crate::initramfs::Initramfs;
use crate::{linux, program};
use anyhow::Context;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

const HOST_INIT: &str = include_str!("init-host.sh");
const GUEST_INIT: &str = include_str!("init-guest.sh");
const DHCP: &str = include_str!("init-dhcp.sh");
const POWER_BUTTON: &str = include_str!("init-power-button.sh");

const HOST_MODULES: [&str; 3] = ["virtio_blk", "virtio_net", "tun"];
/// Modules of hosts that run guests, and of the one that serves the shared storage pool.
const ROLE_MODULES: [(&str, &[&str]); 2] = [
    (
        "host",
        &[
            "kvm_amd",
            "nfsv4",
            "bridge",
            "vxlan",
            "8021q",
            "nf_tables",
            "nft_meta_bridge",
        ],
    ),
    ("control", &["nfsd"]),
];
/// Modules of guests.
const GUEST_MODULES: [&str; 7] = [
    "virtio_pci",
    "virtio_blk",
    "virtio_net",
    "virtio_rng",
    "virtio_balloon",
    "button",
    "evdev",
];
/// Programs of this machine that the agent calls on its host (Debian: iproute2, nftables).
const HOST_PROGRAMS: [&str; 4] = ["ip", "bridge", "nft", "curl"];
/// Where they may be.
const PROGRAM_FOLDERS: [&str; 4] = ["/usr/sbin", "/usr/bin", "/sbin", "/bin"];

/// Where the guests' files are on an emulated host.
pub const GUEST_KERNEL: &str = "/data/guest/vmlinuz";
/// The kernel of Debian's stable release.
pub const GUEST_STABLE_KERNEL: &str = "/data/guest/vmlinuz-stable";
/// Initramfs for [`GUEST_KERNEL`].
pub const GUEST_INITRD: &str = "/data/guest/initrd";
/// Initramfs for [`GUEST_STABLE_KERNEL`].
pub const GUEST_STABLE_INITRD: &str = "/data/guest/initrd-stable";
/// An empty ext4 file system as a raw disk image.
pub const GUEST_DISK: &str = "/data/guest/disk.raw";

/// What the guest's disk holds.
const GUEST_DISK_SIZE: &str = "64M";
/// Room for everything on the hosts' disk; sparse.
const DATA_DISK_SIZE: &str = "1G";

/// The built files.
#[derive(Clone, Debug)]
pub struct Images {
    /// Initramfs of emulated hosts.
    pub host_initrd: PathBuf,
    /// The read-only disk of emulated hosts.
    pub data_disk: PathBuf,
}

impl Images {
    /// Builds them anew in `folder`: that takes a second or two, and they are never stale. `add` puts what else the
    /// hosts need into the tree that becomes `/data`.
    pub fn build(
        packages: &Packages,
        folder: &Path,
        add: impl FnOnce(&Path) -> anyhow::Result<()>,
    ) -> anyhow::Result<Self> {
        let _ = fs::remove_dir_all(folder);
        let tree = folder.join("data");
        fs::create_dir_all(tree.join("guest"))?;
        fs::create_dir_all(tree.join("bin"))?;
        let host_initrd = folder.join("host.cpio");
        fs::write(&host_initrd, host_initramfs(packages)?)?;

        fill_programs(&tree).context("programs for the hosts")?;
        let agent = fs::read(linux::build_agent(folder)?)?;
        for (kernel, suffix) in [(&packages.kernel, ""), (&packages.stable_kernel, "-stable")] {
            fs::copy(&kernel.image, tree.join(format!("guest/vmlinuz{suffix}")))?;
            let initrd = guest_initramfs(packages, kernel, &agent)?;
            fs::write(tree.join(format!("guest/initrd{suffix}")), initrd)?;
        }
        make_ext4(&tree.join("guest/disk.raw"), None, GUEST_DISK_SIZE)?;
        add(&tree)?;

        let data_disk = folder.join("data.img");
        make_ext4(&data_disk, Some(&tree), DATA_DISK_SIZE)?;
        fs::remove_dir_all(&tree)?;
        Ok(Self {
            host_initrd,
            data_disk,
        })
    }
}

/// A raw image with an ext4 file system that holds `tree`.
pub fn make_ext4(image: &Path, tree: Option<&Path>, size: &str) -> anyhow::Result<()> {
    let mut command = Command::new("mke2fs");
    // In reach where root's paths are not.
    command.env("PATH", path_with_sbin());
    command.args(["-q", "-t", "ext4"]);
    if let Some(tree) = tree {
        command.arg("-d").arg(tree);
    }
    run(command.arg(image).arg(size))?;
    Ok(())
}

fn path_with_sbin() -> String {
    format!(
        "{}:/usr/sbin:/sbin",
        std::env::var("PATH").unwrap_or_default()
    )
}

fn fill_programs(tree: &Path) -> anyhow::Result<()> {
    let godwit = program::godwit();
    let mut programs = vec![godwit.to_owned()];
    for name in HOST_PROGRAMS {
        let path = find_program(name)?;
        fs::copy(&path, tree.join("bin").join(name))?;
        programs.push(path);
    }
    copy_with_libraries(&programs, tree)?;
    // Symbols are for developers; the hosts have little memory.
    run(Command::new("strip")
        .arg("-o")
        .arg(tree.join("bin/godwit"))
        .arg(godwit))?;
    Ok(())
}

fn find_program(name: &str) -> anyhow::Result<PathBuf> {
    PROGRAM_FOLDERS
        .map(|folder| Path::new(folder).join(name))
        .into_iter()
        .find(|path| path.exists())
        .with_context(|| format!("{name} is missing (Debian: iproute2, nftables, curl)"))
}

fn host_initramfs(packages: &Packages) -> anyhow::Result<Vec<u8>> {
    let folders = [
        "proc",
        "sys",
        "tmp",
        "run",
        "state",
        "data",
        "shared",
        "srv",
        "root",
        "etc",
        "var",
        "var/lib",
        "var/lib/nfs",
        "var/lib/nfs/v4recovery",
    ];
    let mut archive = base(packages, &folders, HOST_INIT)?
        .symlink("lib64", "data/lib64")
        .symlink("lib/x86_64-linux-gnu", "../data/lib/x86_64-linux-gnu")
        .symlink("usr", "data/usr");
    let mut everything = Vec::new();
    for (role, names) in [("base", HOST_MODULES.as_slice())]
        .into_iter()
        .chain(ROLE_MODULES)
    {
        let modules = in_order(&packages.kernel, names)?;
        archive = archive.program(&format!("lib/modules/{role}.order"), &order(&modules));
        everything.extend(modules);
    }
    everything.sort_by(|a, b| a.name.cmp(&b.name));
    everything.dedup_by(|a, b| a.name == b.name);
    for module in everything {
        archive = archive.program(&format!("lib/modules/{}.ko", module.name), &module.content);
    }
    Ok(archive.finish())
}

/// Initramfs of a guest whose init only prints `greeting` and powers the machine off.
///
/// # Errors
/// Busybox that cannot be read.
pub fn greeting_initramfs(packages: &Packages, greeting: &str) -> anyhow::Result<Vec<u8>> {
    let init = format!("#!/bin/busybox sh\necho '{greeting}'\nexec /bin/busybox poweroff -f\n");
    Ok(base(packages, &[], &init)?.finish())
}

fn guest_initramfs(packages: &Packages, kernel: &Kernel, agent: &[u8]) -> anyhow::Result<Vec<u8>> {
    let folders = [
        "proc",
        "sys",
        "tmp",
        "root",
        "disk",
        "etc",
        "etc/acpi",
        "etc/acpi/PWRF",
    ];
    let modules = in_order(kernel, &GUEST_MODULES)?;
    let mut archive = base(packages, &folders, GUEST_INIT)?
        .program("guest-agent", agent)
        .program("etc/dhcp.sh", DHCP.as_bytes())
        .program("etc/acpi/PWRF/00000080", POWER_BUTTON.as_bytes())
        .program("lib/modules/base.order", &order(&modules));
    for module in modules {
        archive = archive.program(&format!("lib/modules/{}.ko", module.name), &module.content);
    }
    Ok(archive.finish())
}

fn base(packages: &Packages, folders: &[&str], init: &str) -> anyhow::Result<Initramfs> {
    let mut archive = Initramfs::default();
    for folder in ["bin", "dev", "lib", "lib/modules"].iter().chain(folders) {
        archive = archive.directory(folder);
    }
    Ok(archive
        .character_device("dev/console", 5, 1)
        .character_device("dev/null", 1, 3)
        .program("bin/busybox", &packages.busybox()?)
        .symlink("bin/sh", "busybox")
        .program("init", init.as_bytes()))
}

fn order(modules: &[Module]) -> Vec<u8> {
    modules
        .iter()
        .flat_map(|module| format!("{}\n", module.name).into_bytes())
        .collect()
}
