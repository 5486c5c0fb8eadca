//! Disks keep what guests write.

use super::{IMAGE, need_image};
use crate::guest::{Guest, GuestKernel};
use crate::pool::Pool;
use anyhow::ensure;

const DATA_MIB: u32 = 16;

/// ext4 on virtio-blk: written, stopped, started, read.
pub(crate) async fn keeps_data(pool: &mut Pool) -> anyhow::Result<()> {
    need_image(pool).await?;
    let options = ["--image", IMAGE];
    let mut guest =
        Guest::create(pool, "keeper", "host-1", GuestKernel::default(), &options).await?;
    mount(&mut guest).await?;
    let sum = write_data(&mut guest).await?;
    pool.godwit(&["vm", "stop", "keeper", "--timeout-s", "120", "--wait"])
        .await?;
    guest.wait_for_state(pool, "stopped").await?;
    pool.godwit(&["vm", "start", "keeper", "--wait"]).await?;
    let mut guest = Guest::attach(pool, "keeper").await?;
    guest.wait_for_boot().await?;
    check_data(&mut guest, &sum).await?;
    guest.delete(pool).await
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
