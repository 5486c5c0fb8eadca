//! What is shown with stock Linux guests, in the order in which it runs.

mod boot;

mod power;

mod disk;

mod snapshot;

mod network;

mod migration;

mod busy;

mod failover;

mod debian;

use crate::pool::{Pool, SHARED_POOL};
use crate::scenario::{Extent, Needs, Scenario};
use futures_util::FutureExt;
use godwit_tests::lab::images::GUEST_DISK;
use std::time::Duration;

/// The image of the guests' disks: an empty ext4 file system.
const IMAGE: &str = "blank-ext4";
/// The guests' network, and what it is made with.
const NETWORK: &str = "lab";
const NETWORK_OPTIONS: [&str; 4] = ["--vxlan", "77", "--subnet", "10.78.0.0/24"];

/// Emulated hosts on a busy machine are slow: what is shown is that nothing is lost, not how short the blackout is.
pub(crate) const DOWNTIME_LIMIT_MS: &str = "5000";

const MINUTE: Duration = Duration::from_secs(60);

/// All of them.
pub(crate) const SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "boot-1",
        shows: "a stock kernel boots with 1 vCPU and tells the time by kvm-clock",
        extent: Extent::Core,
        needs: Needs::Nothing,
        bound: MINUTE.saturating_mul(5),
        run: |pool| boot::with_one_vcpu(pool).boxed_local(),
    },
    Scenario {
        name: "boot-4",
        shows: "stock kernels of two Debian releases boot with 4 vCPUs",
        extent: Extent::Full,
        needs: Needs::Nothing,
        bound: MINUTE.saturating_mul(8),
        run: |pool| boot::with_four_vcpus(pool).boxed_local(),
    },
    Scenario {
        name: "power",
        shows: "poweroff, reboot, and stop from outside",
        extent: Extent::Full,
        needs: Needs::Nothing,
        bound: MINUTE.saturating_mul(8),
        run: |pool| power::off_and_on(pool).boxed_local(),
    },
    Scenario {
        name: "disk",
        shows: "ext4 on virtio-blk is trimmed and keeps what was written over stop and start",
        extent: Extent::Core,
        needs: Needs::Nothing,
        bound: MINUTE.saturating_mul(8),
        run: |pool| disk::keeps_data(pool).boxed_local(),
    },
    Scenario {
        name: "snapshot",
        shows: "a running guest is saved, killed, and goes on on another host from what was saved",
        extent: Extent::Full,
        needs: Needs::Nothing,
        bound: MINUTE.saturating_mul(8),
        run: |pool| snapshot::goes_on(pool).boxed_local(),
    },
    Scenario {
        name: "network",
        shows: "DHCP, ping and a TCP stream between guests on two hosts, over a VXLAN and over a VLAN",
        extent: Extent::Full,
        needs: Needs::Nothing,
        bound: MINUTE.saturating_mul(12),
        run: |pool| network::between_hosts(pool).boxed_local(),
    },
    Scenario {
        name: "migrate-memory",
        shows: "a guest that rewrites its memory moves live, and not a byte is lost",
        extent: Extent::Full,
        needs: Needs::Nothing,
        bound: MINUTE.saturating_mul(8),
        run: |pool| migration::of_busy_memory(pool).boxed_local(),
    },
    Scenario {
        name: "migrate-ahead",
        shows: "a guest that outruns its link moves ahead of its memory (post-copy), and not a byte is lost",
        extent: Extent::Full,
        needs: Needs::Nothing,
        bound: MINUTE.saturating_mul(8),
        run: |pool| migration::ahead_of_memory(pool).boxed_local(),
    },
    Scenario {
        name: "migrate-refused",
        shows: "a host whose CPU lacks what the guest sees is refused before anything begins",
        extent: Extent::Full,
        needs: Needs::Nothing,
        bound: MINUTE.saturating_mul(8),
        run: |pool| migration::to_a_lesser_cpu(pool).boxed_local(),
    },
    Scenario {
        name: "migrate-busy",
        shows: "a guest moves live with an open TCP connection while it writes its disk; all of it verified",
        extent: Extent::Full,
        needs: Needs::Nothing,
        bound: MINUTE.saturating_mul(12),
        run: |pool| busy::moves(pool).boxed_local(),
    },
    Scenario {
        name: "debian",
        shows: "a whole Debian with systemd and cloud-init, made, booted and moved as the README says",
        extent: Extent::Full,
        needs: Needs::Debian,
        bound: MINUTE.saturating_mul(45),
        run: |pool| debian::as_the_readme_says(pool).boxed_local(),
    },
    Scenario {
        name: "power-cut",
        shows: "a host loses its power; its guest starts elsewhere from the shared disk",
        extent: Extent::Full,
        needs: Needs::Nothing,
        bound: MINUTE.saturating_mul(10),
        run: |pool| failover::after_a_power_cut(pool).boxed_local(),
    },
];

/// Sees to it that the image of the guests' disks is in the shared storage pool.
async fn need_image(pool: &mut Pool) -> anyhow::Result<()> {
    if has(&pool.godwit(&["image", "list"]).await?, IMAGE) {
        return Ok(());
    }
    let from = [
        "--host",
        "host-1",
        "--host-path",
        GUEST_DISK,
        "--format",
        "raw",
    ];
    let mut import = vec!["image", "import", IMAGE, "--pool", SHARED_POOL, "--wait"];
    import.extend(from);
    pool.godwit(&import).await?;
    Ok(())
}

/// Sees to it that the guests' network is there.
async fn need_network(pool: &mut Pool) -> anyhow::Result<()> {
    if has(&pool.godwit(&["network", "list"]).await?, NETWORK) {
        return Ok(());
    }
    let mut create = vec!["network", "create", NETWORK];
    create.extend(NETWORK_OPTIONS);
    pool.godwit(&create).await?;
    Ok(())
}

fn has(list: &serde_json::Value, name: &str) -> bool {
    let items = list.get("items").unwrap_or(list).as_array();
    items.is_some_and(|items| items.iter().any(|item| item["name"] == name))
}
