//! Guests on different hosts reach each other.

use super::{NETWORK, need_network};
use crate::guest::{Guest, GuestKernel};
use crate::pool::Pool;
use anyhow::{Context, ensure};
use std::time::Duration;

/// Many seconds of TCP over two emulations.
const STREAM_PATIENCE: Duration = Duration::from_secs(180);
const STREAM_MIB: u32 = 4;
const PORT: u16 = 5000;
/// Keeps what comes. Its input stays open: busybox's nc would otherwise close its half at once, and the other end, an
/// nc too, would then take the connection for finished.
pub(super) const LISTEN: &str = "tail -f /dev/null 2>/dev/null | nc -l -p 5000 >/tmp/got 2>&1";

/// A network whose frames the hosts send to each other as they are, with a tag.
const VLAN: &str = "lab-vlan";
const VLAN_OPTIONS: [&str; 4] = ["--vlan", "eth0:33", "--subnet", "10.79.0.0/24"];

/// Over a VXLAN, and over a VLAN.
pub(crate) async fn between_hosts(pool: &mut Pool) -> anyhow::Result<()> {
    need_network(pool).await?;
    reach_each_other(pool, NETWORK).await.context(NETWORK)?;
    let mut create = vec!["network", "create", VLAN];
    create.extend(VLAN_OPTIONS);
    pool.godwit(&create).await?;
    reach_each_other(pool, VLAN).await.context(VLAN)?;
    pool.godwit(&["network", "delete", VLAN]).await?;
    Ok(())
}

/// Ping and a TCP stream.
async fn reach_each_other(pool: &mut Pool, network: &str) -> anyhow::Result<()> {
    let options = ["--network", network];
    let mut near = Guest::create(pool, "near", "host-1", GuestKernel::default(), &options).await?;
    let mut far = Guest::create(pool, "far", "host-2", GuestKernel::default(), &options).await?;
    get_address(&mut near).await?;
    let far_address = get_address(&mut far).await?;
    near.run(&format!("ping -c 3 -W 10 {far_address}")).await?;

    far.run(&format!("{LISTEN} & echo $! >/tmp/nc.pid")).await?;
    wait_for_listener(&mut far).await?;
    near.run(&format!(
        "dd if=/dev/urandom of=/tmp/sent bs=64k count={} 2>/dev/null",
        STREAM_MIB * 16
    ))
    .await?;
    near.shell
        .run(
            &format!("nc {far_address} {PORT} </tmp/sent"),
            STREAM_PATIENCE,
        )
        .await?;
    far.shell
        .run(
            "while kill -0 $(cat /tmp/nc.pid) 2>/dev/null; do usleep 50000; done",
            STREAM_PATIENCE,
        )
        .await?;
    let sent = near.run("md5sum </tmp/sent; wc -c </tmp/sent").await?;
    let got = far.run("md5sum </tmp/got; wc -c </tmp/got").await?;
    ensure!(sent == got, "sent {sent}, received {got}");
    near.delete(pool).await?;
    far.delete(pool).await
}

/// Asks DHCP for an address as any image would; what was given.
pub(crate) async fn get_address(guest: &mut Guest) -> anyhow::Result<String> {
    guest
        .run("ip link set eth0 up && udhcpc -i eth0 -n -q -t 20 -T 2 -s /etc/dhcp.sh")
        .await?;
    let text = guest
        .run("ip -4 -o addr show dev eth0 | sed 's,.*inet \\([0-9.]*\\)/.*,\\1,'")
        .await?;
    let address = text.lines().next().unwrap_or_default().trim().to_owned();
    (!address.is_empty())
        .then_some(address)
        .context("DHCP gave no address")
}

/// Waits until somebody listens in the guest.
pub(crate) async fn wait_for_listener(guest: &mut Guest) -> anyhow::Result<()> {
    guest
        .run(&format!(
            "until netstat -ltn | grep -q :{PORT}; do usleep 20000; done"
        ))
        .await?;
    Ok(())
}
