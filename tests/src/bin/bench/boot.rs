//! From process start to the guest's init, Godwit against QEMU's microvm, same kernel and same RAM disk.

use crate::report::{Op, Report};
use anyhow::{Context, bail};
use godwit_tests::linux::{AGENT_CMDLINE, AGENT_GREETING, LinuxGuest};
use godwit_tests::program;
use std::process::Stdio;
use std::time::{Duration, Instant};
use tokio::io::{AsyncBufRead, AsyncBufReadExt, BufReader};
use tokio::process::Command;
use tokio::time::timeout;

const WARM_UP: usize = 2;
const RUNS: usize = 15;
const MEMORY_MIB: &str = "128";
const PATIENCE: Duration = Duration::from_secs(20);
const QEMU: &str = "qemu-system-x86_64";

pub(crate) async fn measure(report: &mut Report, linux: Option<&LinuxGuest>) -> anyhow::Result<()> {
    let Some(linux) = linux else { return Ok(()) };
    if Command::new(QEMU).arg("--version").output().await.is_err() {
        println!("no {QEMU}: boot times are not compared");
        return Ok(());
    }
    let (mut ours, mut theirs) = (Vec::new(), Vec::new());
    for run in 0..WARM_UP + RUNS {
        // Alternating, so that whatever else the machine does meets both alike.
        let times = (
            time_to_init(godwit(linux)).await?,
            time_to_init(qemu(linux)).await?,
        );
        if run >= WARM_UP {
            ours.push(times.0);
            theirs.push(times.1);
        }
    }
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

fn godwit(linux: &LinuxGuest) -> Command {
    let mut command = Command::new(program::godwit());
    command
        .arg("vmm")
        .arg("--kernel")
        .arg(&linux.kernel)
        .arg("--initrd")
        .arg(&linux.initrd);
    command.args([
        "--cmdline",
        AGENT_CMDLINE,
        "--memory-mib",
        MEMORY_MIB,
        "--vcpus",
        "1",
    ]);
    command
}

fn qemu(linux: &LinuxGuest) -> Command {
    let mut command = Command::new(QEMU);
    // Devices that the guest does not need would only slow it down.
    command.args([
        "-M",
        "microvm,pit=off,pic=off,rtc=off",
        "-accel",
        "kvm",
        "-cpu",
        "host,-arch-capabilities",
    ]);
    command.args([
        "-m",
        MEMORY_MIB,
        "-smp",
        "1",
        "-nodefaults",
        "-no-user-config",
        "-no-reboot",
    ]);
    command.args([
        "-display",
        "none",
        "-serial",
        "stdio",
        "-append",
        AGENT_CMDLINE,
    ]);
    command
        .arg("-kernel")
        .arg(&linux.kernel)
        .arg("-initrd")
        .arg(&linux.initrd);
    command
}

/// Milliseconds from the start of the process to the first line of the guest's init program.
async fn time_to_init(mut command: Command) -> anyhow::Result<f64> {
    // The guest runs on for ever; nothing in it is worth a graceful end.
    command
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
