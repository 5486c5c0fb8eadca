//! Stock kernels boot, and tell the time by the clock that goes with them when they move.

use crate::guest::{Guest, GuestKernel};
use crate::pool::Pool;
use anyhow::{Context, ensure};

/// Fails where a driver has no device, and says then what there is.
const DRIVERS: &str = "for driver in virtio_rng virtio_balloon; do ls -d /sys/bus/virtio/drivers/$driver/virtio* || \
{ ls /sys/bus/pci/devices /sys/bus/virtio/devices /sys/bus/virtio/drivers; dmesg | grep -iE 'pci|acpi|mcfg|virtio' | tail -n 60; exit 1; }; done";
const CLOCK: &str = "cat /sys/devices/system/clocksource/clocksource0/current_clocksource";

pub(crate) async fn with_one_vcpu(pool: &mut Pool) -> anyhow::Result<()> {
    boots(pool, GuestKernel::Backports, 1).await
}

pub(crate) async fn with_four_vcpus(pool: &mut Pool) -> anyhow::Result<()> {
    boots(pool, GuestKernel::Backports, 4).await?;
    boots(pool, GuestKernel::Stable, 4).await
}

async fn boots(pool: &mut Pool, kernel: GuestKernel, vcpus: u8) -> anyhow::Result<()> {
    let number = vcpus.to_string();
    let mut guest = Guest::create(pool, "boots", "host-1", kernel, &["--vcpus", &number]).await?;
    let found = guest.run("nproc").await?;
    ensure!(found.trim() == number, "{found} CPUs instead of {vcpus}");
    let release = guest.run("uname -r").await?;
    ensure!(release.contains("cloud"), "no stock kernel: {release}");
    let clock = guest.run(CLOCK).await?;
    ensure!(clock.trim() == "kvm-clock", "its clock is {clock}");
    guest.run(DRIVERS).await.context("rng and balloon")?;
    let oops = guest
        .run("dmesg | grep -ciE 'oops|bug:|call trace' || true")
        .await?;
    ensure!(
        oops.trim() == "0",
        "the kernel complains: {}",
        guest.run("dmesg | tail -n 100").await?
    );
    guest.delete(pool).await
}
