//! From process start to `/init` of the stock Debian kernel, Godwit against QEMU's microvm side by side in one emulated
//! host: same bzImage, same RAM disk, same command line.

use crate::report::{Op, Report};
use anyhow::{Context, ensure};
use godwit_tests::lab::images::{GUEST_KERNEL, Images, greeting_initramfs};
use godwit_tests::lab::machine::{Blueprint, Cpu, Machine, Role, Site};
use godwit_tests::lab::modules::copy_with_libraries;
use godwit_tests::lab::packages::{Packages, lab_dir};
use godwit_tests::lab::switch::Switch;
use godwit_tests::test_dir::TestDir;
use std::fs;
use std::path::Path;
use std::time::Duration;

const WARM_UP: usize = 1;
const RUNS: usize = 7;
/// One boot, however busy the machine is.
const PATIENCE: Duration = Duration::from_secs(180);
const GREETING: &str = "init is up";
const MEMORY_MIB: u32 = 256;
const CMDLINE: &str = "console=ttyS0 quiet panic=-1 cryptomgr.notests 8250.nr_uarts=1 mitigations=off init_on_alloc=0 \
rdinit=/init";
/// Where the emulated host has the RAM disk; its kernel is the guests' one.
const INITRD: &str = "guest/initrd-greeting";
/// QEMU's machine without what the guest does not need.
const PEER_MACHINE: &str = "microvm,pit=off,pic=off,rtc=off";
/// Firmware that QEMU's machine starts with, by folder of the packages.
const PEER_FIRMWARE: [&str; 4] = [
    "usr/share/qemu/qboot.rom",
    "usr/share/qemu/linuxboot_dma.bin",
    "usr/share/qemu/pvh.bin",
    "usr/share/seabios/bios-microvm.bin",
];

pub(crate) async fn measure(report: &mut Report) -> anyhow::Result<()> {
    let lab = lab_dir();
    fs::create_dir_all(&lab)?;
    let packages = match Packages::prepare(&lab) {
        Ok(packages) => packages,
        Err(error) => {
            println!("no lab: {error:#}");
            return Ok(());
        }
    };
    let dir = TestDir::new();
    let mut host = power_on(&packages, &dir, &lab.join("logs/bench")).await?;
    let (ours, theirs) = (ours(), theirs());
    report.option("lab_guest_kernel", packages.kernel.release.clone());
    report.option("lab_godwit", ours.clone());
    report.option("lab_qemu_microvm", theirs.clone());
    let version = host.run("qemu-system-x86_64 --version").await?;
    let version = version.lines().next().unwrap_or_default();
    report.option("lab_qemu_version", version);
    let mut times = (Vec::new(), Vec::new());
    for run in 0..WARM_UP + RUNS {
        // Alternating, so that whatever else the machine does meets both alike.
        let our = time_to_init(&mut host, &ours).await?;
        let their = time_to_init(&mut host, &theirs).await?;
        if run >= WARM_UP {
            times.0.push(our);
            times.1.push(their);
        }
    }
    host.cut_power().await?;
    let ours = report.raw("lab_stock_boot_godwit_s", "s", &times.0);
    let theirs = report.raw("lab_stock_boot_qemu_microvm_s", "s", &times.1);
    report.figure(
        "lab_stock_boot_ratio_to_qemu_microvm",
        ours / theirs,
        "ratio",
        Op::AtMost,
        1.0,
    );
    Ok(())
}

/// An emulated host with both programs.
async fn power_on(packages: &Packages, dir: &TestDir, logs: &Path) -> anyhow::Result<Machine> {
    fs::create_dir_all(logs)?;
    let images = Images::build(packages, &dir.join("images"), |data| {
        fs::write(data.join(INITRD), greeting_initramfs(packages, GREETING)?)?;
        copy_peer(packages, data).context("QEMU for the emulated host")
    })?;
    let site = Site {
        packages: packages.clone(),
        images,
        switch: Switch::start(&dir.join("switch.sock"))?,
        sockets: dir.path().to_owned(),
        logs: logs.to_owned(),
    };
    let blueprint = Blueprint {
        name: "bench".into(),
        number: 11,
        cpu: Cpu::Max,
        memory_mib: 1024,
        role: Role::Host,
    };
    Machine::boot(&site, blueprint).await
}

fn copy_peer(packages: &Packages, data: &Path) -> anyhow::Result<()> {
    let qemu = packages.qemu_path();
    copy_with_libraries(std::slice::from_ref(&qemu), data)?;
    fs::copy(&qemu, data.join("bin/qemu-system-x86_64"))?;
    for file in PEER_FIRMWARE {
        let to = data.join(file);
        fs::create_dir_all(to.parent().context("a file lies in a folder")?)?;
        fs::copy(packages.root().join(file), to).with_context(|| file.to_owned())?;
    }
    Ok(())
}

fn ours() -> String {
    format!(
        "godwit vmm --kernel {GUEST_KERNEL} --initrd /data/{INITRD} --cmdline '{CMDLINE}' --memory-mib {MEMORY_MIB} \
         --vcpus 1"
    )
}

fn theirs() -> String {
    format!(
        "qemu-system-x86_64 -L /data/usr/share/qemu -L /data/usr/share/seabios -M {PEER_MACHINE} -accel kvm -cpu host -m {MEMORY_MIB} -smp 1 \
         -nodefaults -no-user-config -no-reboot -display none -serial stdio -kernel {GUEST_KERNEL} \
         -initrd /data/{INITRD} -append '{CMDLINE}'"
    )
}

/// Seconds from the start of the process to the first line of the guest's init, by the emulated host's clock (which
/// has hundredths); the guest then powers itself off, and the process has ended before this returns.
async fn time_to_init(host: &mut Machine, command: &str) -> anyhow::Result<f64> {
    let timed = format!(
        "rm -f /tmp/up /tmp/said; read start rest </proc/uptime; {command} </dev/null 2>/tmp/said | \
         {{ grep -q -m1 '{GREETING}' && cat /proc/uptime >/tmp/up; cat >/dev/null; }}; \
         read up rest </tmp/up && echo $start $up || {{ cat /tmp/said; false; }}"
    );
    let text = host.shell.run(&timed, PATIENCE).await?;
    let mut clock = text.split_whitespace().map(str::parse::<f64>);
    let mut next = || clock.next().context("two times")?.context("a time");
    let (start, up) = (next()?, next()?);
    ensure!(up > start, "{text}");
    Ok(up - start)
}
