//! From process start to the guest's init, Godwit against QEMU's microvm, same kernel and same RAM disk, without and
//! with a disk and a network card.

use crate::peer::QEMU_MISSING;
use crate::report::{Op, Report};
use anyhow::{Context, bail};
use godwit_tests::linux::{AGENT_CMDLINE, AGENT_GREETING, LinuxGuest};
use godwit_tests::program;
use godwit_tests::tap::Tap;
use godwit_tests::test_dir::TestDir;
use godwit_wire::vmm_api::VMM_ENVIRONMENT;
use std::process::Stdio;
use std::time::{Duration, Instant};
use tokio::io::{AsyncBufRead, AsyncBufReadExt, BufReader};
use tokio::process::Command;
use tokio::time::timeout;

const WARM_UP: usize = 2;
const RUNS: usize = 15;
const MEMORY_MIB: &str = "128";
/// Size of the disk, which the guest does not read.
const DISK_BYTES: u64 = 64 << 20;
const PATIENCE: Duration = Duration::from_secs(20);
const QEMU: &str = "qemu-system-x86_64";

pub(crate) async fn measure(report: &mut Report, linux: Option<&LinuxGuest>) -> anyhow::Result<()> {
    let Some(linux) = linux else { return Ok(()) };
    let Some((ours, theirs)) = race(report, &godwit(linux), &qemu(linux)).await? else {
        return Ok(());
    };
    let ours = report.raw("linux_boot_godwit_ms", "ms", &ours);
    let theirs = report.raw("linux_boot_qemu_microvm_ms", "ms", &theirs);
    report.figure(
        "linux_boot_ratio_to_qemu_microvm",
        ours / theirs,
        "ratio",
        Op::AtMost,
        1.0,
    );
    Ok(())
}

/// The same with one disk and one network card in the machine.
pub(crate) async fn measure_with_devices(
    report: &mut Report,
    linux: Option<&LinuxGuest>,
) -> anyhow::Result<()> {
    let Some(linux) = linux else { return Ok(()) };
    let dir = TestDir::new();
    let (disk, our_tap, their_tap) = (dir.join("disk.img"), Tap::new("bo")?, Tap::new("bt")?);
    std::fs::File::create(&disk)?.set_len(DISK_BYTES)?;
    let disk = disk.to_str().context("a path of the test is text")?;
    let mut ours = godwit(linux);
    ours.extend(["--disk", disk, "--nic", &our_tap.name].map(str::to_owned));
    let mut theirs = qemu(linux);
    theirs.extend([
        "-drive".to_owned(),
        format!("file={disk},format=raw,if=none,id=disk,cache=writeback"),
        "-device".to_owned(),
        "virtio-blk-device,drive=disk".to_owned(),
        "-netdev".to_owned(),
        format!(
            "tap,id=net,ifname={},script=no,downscript=no",
            their_tap.name
        ),
        "-device".to_owned(),
        "virtio-net-device,netdev=net".to_owned(),
    ]);
    report.option("qemu_microvm", theirs.join(" "));
    let Some((ours, theirs)) = race(report, &ours, &theirs).await? else {
        return Ok(());
    };
    let ours = report.raw("linux_boot_disk_nic_godwit_ms", "ms", &ours);
    let theirs = report.raw("linux_boot_disk_nic_qemu_microvm_ms", "ms", &theirs);
    report.figure(
        "linux_boot_disk_nic_ratio_to_qemu_microvm",
        ours / theirs,
        "ratio",
        Op::AtMost,
        0.8,
    );
    Ok(())
}

/// Boot times of two VMMs, or nothing where the second is not installed.
async fn race(
    report: &mut Report,
    ours: &[String],
    theirs: &[String],
) -> anyhow::Result<Option<(Vec<f64>, Vec<f64>)>> {
    if Command::new(QEMU).arg("--version").output().await.is_err() {
        report.peer_is_missing("qemu", QEMU_MISSING);
        return Ok(None);
    }
    let mut times = (Vec::new(), Vec::new());
    for run in 0..WARM_UP + RUNS {
        // Alternating, so that whatever else the machine does meets both alike.
        let (our, their) = (time_to_init(ours).await?, time_to_init(theirs).await?);
        if run >= WARM_UP {
            times.0.push(our);
            times.1.push(their);
        }
    }
    Ok(Some(times))
}

fn godwit(linux: &LinuxGuest) -> Vec<String> {
    words(&[
        &program::godwit().to_string_lossy(),
        "vmm",
        "--kernel",
        &linux.kernel.to_string_lossy(),
        "--initrd",
        &linux.initrd.to_string_lossy(),
        "--cmdline",
        AGENT_CMDLINE,
        "--memory-mib",
        MEMORY_MIB,
        "--vcpus",
        "1",
    ])
}

fn qemu(linux: &LinuxGuest) -> Vec<String> {
    words(&[
        QEMU,
        // Devices that the guest does not need would only slow it down.
        "-M",
        "microvm,pit=off,pic=off,rtc=off",
        "-accel",
        "kvm",
        "-cpu",
        "host,-arch-capabilities",
        "-m",
        MEMORY_MIB,
        "-smp",
        "1",
        "-nodefaults",
        "-no-user-config",
        "-no-reboot",
        "-display",
        "none",
        "-serial",
        "stdio",
        "-append",
        AGENT_CMDLINE,
        "-kernel",
        &linux.kernel.to_string_lossy(),
        "-initrd",
        &linux.initrd.to_string_lossy(),
    ])
}

fn words(words: &[&str]) -> Vec<String> {
    words.iter().map(|&word| word.to_owned()).collect()
}

/// Milliseconds from the start of the process to the first line of the guest's init program.
async fn time_to_init(words: &[String]) -> anyhow::Result<f64> {
    let (program, arguments) = words.split_first().context("a program")?;
    let mut command = Command::new(program);
    let (name, value) = VMM_ENVIRONMENT;
    // The guest runs on for ever; nothing in it is worth a graceful end.
    command
        .env(name, value)
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .kill_on_drop(true);
    let start = Instant::now();
    let mut child = command.spawn()?;
    let console = BufReader::new(child.stdout.take().context("stdout is a pipe")?);
    let found = timeout(PATIENCE, find_greeting(console)).await;
    let elapsed_ms = start.elapsed().as_secs_f64() * 1000.0;
    child.kill().await?;
    found
        .context("init does not come up")
        .flatten()
        .with_context(|| format!("{command:?}"))?;
    Ok(elapsed_ms)
}

async fn find_greeting(console: impl AsyncBufRead + Unpin) -> anyhow::Result<()> {
    let mut lines = console.lines();
    while let Some(line) = lines.next_line().await? {
        if line.contains(AGENT_GREETING) {
            return Ok(());
        }
    }
    bail!("the process ended before init came up")
}
