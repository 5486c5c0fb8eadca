//! Disks keep what guests write.

use super::{IMAGE, need_image};
use crate::guest::{Guest, GuestKernel};
use crate::pool::Pool;
use anyhow::{Context, ensure};
use serde_json::Value;

const DATA_MIB: u32 = 16;
/// Leaves space behind that was written and is free again.
const WASTE: &str = "dd if=/dev/urandom of=/disk/waste bs=64k count=128 conv=fsync 2>/dev/null && rm /disk/waste && sync";
/// Tells the disk what is free: everything but `/disk/data`, which is then read anew from the disk.
const TRIM: &str = "fstrim /disk && sync && echo 3 >/proc/sys/vm/drop_caches && md5sum </disk/data";
/// Discards that the guest's kernel has seen done (Documentation/admin-guide/iostats.rst, field 12).
const DISCARDS: &str = "awk '{ print $12 }' /sys/block/vda/stat";

/// ext4 on virtio-blk: written, trimmed, stopped, started, read.
pub(crate) async fn keeps_data(pool: &mut Pool) -> anyhow::Result<()> {
    need_image(pool).await?;
    let options = ["--image", IMAGE];
    let mut guest =
        Guest::create(pool, "keeper", "host-1", GuestKernel::default(), &options).await?;
    mount(&mut guest).await?;
    let sum = write_data(&mut guest).await?;
    trim(pool, &mut guest, &sum).await?;
    pool.godwit(&["vm", "stop", "keeper", "--timeout-s", "120", "--wait"])
        .await?;
    guest.wait_for_state(pool, "stopped").await?;
    pool.godwit(&["vm", "start", "keeper", "--wait"]).await?;
    let mut guest = Guest::attach(pool, "keeper").await?;
    guest.wait_for_boot().await?;
    check_data(&mut guest, &sum).await?;
    guest.delete(pool).await
}

/// Gives back what the file system does not use; the file in it stays as it is.
async fn trim(pool: &mut Pool, guest: &mut Guest, sum: &str) -> anyhow::Result<()> {
    guest.run(WASTE).await?;
    let found = guest.run(TRIM).await?;
    ensure!(
        found == sum,
        "the trimmed disk holds {found} instead of {sum}"
    );
    let seen: u64 = guest.run(DISCARDS).await?.trim().parse()?;
    let done = count_discards(pool, guest).await?;
    ensure!(
        seen > 0 && done >= seen,
        "the guest discarded {seen} times and its disk {done} times"
    );
    Ok(())
}

/// What the VMM has counted for the guest's only disk.
async fn count_discards(pool: &mut Pool, guest: &Guest) -> anyhow::Result<u64> {
    let vm = guest.show(pool).await?;
    let id = vm["id"].as_str().context("an id")?;
    let host = vm["host_name"].as_str().context("a host")?;
    let socket = format!("/state/host/vms/{id}/vmm.sock");
    let ask = format!("curl -sS --fail-with-body --unix-socket {socket} http://localhost/v1/info");
    let info: Value = serde_json::from_str(&pool.on_host(host, &ask).await?)?;
    let devices = info["devices"].as_array().context("devices")?;
    let disk = devices.iter().find(|device| device["name"] == "root");
    let disk = disk.with_context(|| format!("no disk: {info:#}"))?;
    disk["counters"]["discards"].as_u64().context("a count")
}

/// Mounts the guest's first disk.
pub(crate) async fn mount(guest: &mut Guest) -> anyhow::Result<()> {
    guest.run("mount -t ext4 /dev/vda /disk").await?;
    Ok(())
}

/// Writes random data, down to the disk; its checksum.
pub(crate) async fn write_data(guest: &mut Guest) -> anyhow::Result<String> {
    let write = format!(
        "dd if=/dev/urandom of=/disk/data bs=64k count={} conv=fsync 2>/dev/null && sync",
        DATA_MIB * 16
    );
    guest.run(&write).await?;
    guest.run("md5sum </disk/data").await
}

/// Mounts the disk of a guest that has started anew and compares.
pub(crate) async fn check_data(guest: &mut Guest, sum: &str) -> anyhow::Result<()> {
    mount(guest).await?;
    let found = guest.run("md5sum </disk/data").await?;
    ensure!(found == sum, "the disk holds {found} instead of {sum}");
    Ok(())
}
