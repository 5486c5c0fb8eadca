//! The command line of `godwit vmm`.

use super::device_args::DeviceArgs;
use godwit_wire::machine::{Boot, CpuBaseline, MachineSpec, MachineType};
use godwit_wire::unit::Mib;
use std::path::PathBuf;

/// Run one virtual machine in this process.
///
/// With `--kernel` or `--pilot` the machine boots at once, its serial console on this terminal (or on
/// `--serial-socket`), and the process ends with it; with `--restore` it goes on from where it was saved. Without, the process waits for commands on `--api-socket`.
#[derive(Clone, Debug, clap::Args)]
pub struct VmmArgs {
    /// UNIX socket to serve the API on (HTTP + JSON).
    #[arg(long, value_name = "PATH", required_unless_present_any = ["kernel", "pilot", "restore"])]
    pub api_socket: Option<PathBuf>,
    /// UNIX socket to offer the serial console on.
    #[arg(long, value_name = "PATH")]
    pub serial_socket: Option<PathBuf>,
    /// x86-64 Linux kernel to boot: bzImage (vmlinuz) or uncompressed ELF (vmlinux).
    #[arg(long, value_name = "PATH", conflicts_with = "pilot")]
    pub kernel: Option<PathBuf>,
    /// Initial RAM disk.
    #[arg(long, value_name = "PATH", requires = "kernel")]
    pub initrd: Option<PathBuf>,
    /// Kernel command line.
    #[arg(
        long,
        value_name = "TEXT",
        default_value = "console=ttyS0",
        requires = "kernel"
    )]
    pub cmdline: String,
    /// Boot the built-in pilot guest.
    #[arg(long)]
    pub pilot: bool,
    /// Restore the machine that was saved to this directory and let it run.
    #[arg(long, value_name = "DIR", conflicts_with_all = ["kernel", "pilot"])]
    pub restore: Option<PathBuf>,
    /// Check all of the snapshot's memory before the machine runs, also if its file was left alone since.
    #[arg(long, requires = "restore")]
    pub verify: bool,
    /// Number of vCPUs.
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub vcpus: u8,
    /// Guest memory in MiB.
    #[arg(long, value_name = "MIB", default_value_t = 128)]
    pub memory_mib: u64,
    /// CPU features the guest sees: x86-64-v2, x86-64-v3, x86-64-v4 or host.
    #[arg(long, value_name = "LEVEL", default_value = "host", value_parser = parse_baseline)]
    pub cpu: CpuBaseline,
    /// Disks, network cards and the rest.
    #[command(flatten)]
    pub devices: DeviceArgs,
    /// End when the process that started this one ends.
    #[arg(long, hide = true)]
    pub die_with_parent: bool,
}

fn parse_baseline(text: &str) -> Result<CpuBaseline, String> {
    [
        CpuBaseline::V2,
        CpuBaseline::V3,
        CpuBaseline::V4,
        CpuBaseline::Host,
    ]
    .into_iter()
    .find(|baseline| baseline.name() == text)
    .ok_or_else(|| "choose x86-64-v2, x86-64-v3, x86-64-v4 or host".to_owned())
}

impl VmmArgs {
    /// The machine to boot at once, if the command line names one.
    pub(super) fn spec(&self) -> Option<MachineSpec> {
        let absolute = |path: &PathBuf| std::path::absolute(path).unwrap_or_else(|_| path.clone());
        let boot = match (&self.kernel, self.pilot) {
            (Some(kernel), _) => Boot::Linux {
                kernel: absolute(kernel),
                initrd: self.initrd.as_ref().map(absolute),
                cmdline: self.cmdline.clone(),
            },
            (None, true) => Boot::Pilot,
            (None, false) => return None,
        };
        Some(MachineSpec {
            machine_type: MachineType::Godwit2,
            vcpus: self.vcpus,
            memory_mib: Mib(self.memory_mib),
            boot,
            cpu: self.cpu,
            devices: self.devices.devices(),
        })
    }
}
