//! What the VMM itself costs: memory beside the guest's, and time to the guest's first byte.

use crate::report::{Op, Report, maximum};
use anyhow::Context;
use godwit_tests::linux::LinuxGuest;
use godwit_tests::tap::Tap;
use godwit_tests::test_dir::TestDir;
use godwit_tests::vmm::{self, BOOT_PATIENCE, Vmm, new_vm};
use godwit_wire::devices::{
    Disk, DiskAccess, DiskFormat, DiskLimits, DiskSource, MacAddress, Nic, NicAttach, NicLimits,
    OnIoError,
};
use godwit_wire::machine::{Boot, MachineSpec};
use godwit_wire::unit::Mib;
use std::time::{Duration, Instant};
use tokio::io::AsyncReadExt;
use tokio::net::UnixStream;

const WARM_UP: usize = 1;
const RUNS: usize = 10;
const MEMORY: Mib = Mib(128);
const DISK_BYTES: u64 = 64 << 20;
const FIRST_BYTE_PATIENCE: Duration = Duration::from_secs(20);
/// Says something before the console driver is up.
const EARLY_CMDLINE: &str = "earlycon=uart8250,io,0x3f8 console=ttyS0 panic=-1 rdinit=/guest-agent";

pub(crate) async fn measure(report: &mut Report, linux: Option<&LinuxGuest>) -> anyhow::Result<()> {
    let pilot = vmm::pilot(1, MEMORY);
    let overheads = repeat(memory_overhead_mib, &spec_with_a_greeting(linux)).await?;
    report.raw("vmm_memory_overhead_mib", "MiB", &overheads);
    report.figure(
        "vmm_memory_overhead_mib",
        maximum(&overheads),
        "MiB",
        Op::AtMost,
        8.0,
    );

    let pilot_times = repeat(first_byte_ms, &pilot).await?;
    let median = report.raw("pilot_api_to_first_serial_byte_ms", "ms", &pilot_times);
    report.figure(
        "pilot_api_to_first_serial_byte_ms",
        median,
        "ms",
        Op::AtMost,
        150.0,
    );
    if let Some(linux) = linux {
        let boot = Boot::Linux {
            kernel: linux.kernel.clone(),
            initrd: Some(linux.initrd.clone()),
            cmdline: EARLY_CMDLINE.to_owned(),
        };
        let times = repeat(
            first_byte_ms,
            &MachineSpec {
                boot,
                ..vmm::linux(linux, 1, MEMORY)
            },
        )
        .await?;
        let median = report.raw("linux_api_to_first_serial_byte_ms", "ms", &times);
        report.figure(
            "linux_api_to_first_serial_byte_ms",
            median,
            "ms",
            Op::AtMost,
            150.0,
        );
    }
    Ok(())
}

/// Memory beside the guest's of a machine with one disk and one network card.
pub(crate) async fn measure_with_devices(
    report: &mut Report,
    linux: Option<&LinuxGuest>,
) -> anyhow::Result<()> {
    let dir = TestDir::new();
    let (disk, tap) = (dir.join("disk.img"), Tap::new("ov")?);
    std::fs::File::create(&disk)?.set_len(DISK_BYTES)?;
    let mut spec = spec_with_a_greeting(linux);
    spec.devices.disks.push(Disk {
        name: "disk".into(),
        source: DiskSource::File {
            path: disk,
            format: DiskFormat::Raw,
        },
        access: DiskAccess::ReadWrite,
        limits: DiskLimits::default(),
        on_error: OnIoError::default(),
    });
    spec.devices.nics.push(Nic {
        name: "nic".into(),
        mac: MacAddress::local(1),
        attach: NicAttach::Tap {
            tap: tap.name.clone(),
        },
        address: None,
        queue_pairs: 1,
        limits: NicLimits::default(),
    });
    let overheads = repeat(memory_overhead_mib, &spec).await?;
    report.raw("vmm_memory_overhead_disk_nic_mib", "MiB", &overheads);
    report.figure(
        "vmm_memory_overhead_disk_nic_mib",
        maximum(&overheads),
        "MiB",
        Op::AtMost,
        8.0,
    );
    Ok(())
}

fn spec_with_a_greeting(linux: Option<&LinuxGuest>) -> MachineSpec {
    match linux {
        Some(linux) => vmm::linux(linux, 1, MEMORY),
        None => vmm::pilot(1, MEMORY),
    }
}

async fn repeat(
    measure: impl AsyncFn(&MachineSpec) -> anyhow::Result<f64>,
    spec: &MachineSpec,
) -> anyhow::Result<Vec<f64>> {
    let mut values = Vec::new();
    for run in 0..WARM_UP + RUNS {
        let value = measure(spec).await?;
        if run >= WARM_UP {
            values.push(value);
        }
    }
    Ok(values)
}

/// Resident memory of the VMM of a booted guest, less the guest's own.
async fn memory_overhead_mib(spec: &MachineSpec) -> anyhow::Result<f64> {
    let dir = TestDir::new();
    let vmm = Vmm::boot(&dir, "vmm", &new_vm(spec.clone())).await?;
    vmm.serial()
        .await?
        .wait_for(vmm::greeting(spec), BOOT_PATIENCE)
        .await?;
    let kib = resident_kib_outside_guest_ram(vmm.process.pid())?;
    Ok(kib as f64 / 1024.0)
}

/// Guest RAM is the memfd mapping; everything else that is resident is overhead, shared library pages included.
fn resident_kib_outside_guest_ram(pid: u32) -> anyhow::Result<u64> {
    let smaps = std::fs::read_to_string(format!("/proc/{pid}/smaps")).context("smaps")?;
    let (mut total, mut in_guest_ram) = (0, false);
    for line in smaps.lines() {
        if let Some(resident) = line.strip_prefix("Rss:") {
            let kib: u64 = resident
                .trim()
                .trim_end_matches("kB")
                .trim()
                .parse()
                .context("Rss")?;
            total += if in_guest_ram { 0 } else { kib };
        } else if line
            .split_whitespace()
            .next()
            .is_some_and(|word| !word.ends_with(':'))
        {
            in_guest_ram = line.contains("/memfd:");
        }
    }
    Ok(total)
}

/// Milliseconds from the call that builds the machine to the first byte on its serial port.
async fn first_byte_ms(spec: &MachineSpec) -> anyhow::Result<f64> {
    let dir = TestDir::new();
    let vmm = Vmm::start(&dir, "vmm").await?;
    let request = new_vm(spec.clone());
    let start = Instant::now();
    vmm.create(&request).await?;
    let mut console = UnixStream::connect(vmm.serial_socket()).await?;
    vmm.command("boot", request.epoch).await?;
    let first = tokio::time::timeout(FIRST_BYTE_PATIENCE, console.read_u8()).await;
    first
        .context("the guest stays silent")?
        .context("the console was closed")?;
    Ok(start.elapsed().as_secs_f64() * 1000.0)
}
