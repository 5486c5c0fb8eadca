//! A machine is saved while it runs, is killed, and goes on from what was saved, on another host.

use crate::guest::{Guest, GuestKernel};
use crate::pool::{Pool, SHARED_POOL};
use anyhow::{Context, ensure};

const VM: &str = "saved";
const SNAPSHOT: &str = "warm";
const HOST: &str = "host-1";
/// It sees the same storage pool and has the same CPU.
const OTHER_HOST: &str = "host-2";
/// Memory that holds random pages.
const FILLED_MIB: u32 = 16;
const BOOT_ID: &str = "cat /proc/sys/kernel/random/boot_id";
/// Whole seconds since the kernel started.
const UPTIME: &str = "cut -d . -f 1 /proc/uptime";
/// A process whose only trace is in memory.
const COUNT: &str =
    "(i=0; while :; do i=$((i+1)); echo $i >/tmp/count; usleep 50000; done) >/dev/null 2>&1 &";
/// What it has come to. The file is empty for a moment each time it is written.
const READ_COUNT: &str = "until n=$(cat /tmp/count) && [ -n \"$n\" ]; do :; done; echo $n";

pub(crate) async fn goes_on(pool: &mut Pool) -> anyhow::Result<()> {
    let mut guest = Guest::create(pool, VM, HOST, GuestKernel::default(), &[]).await?;
    guest.run(&format!("agent fill {FILLED_MIB}")).await?;
    guest.run(COUNT).await?;
    let boot_id = guest.run(BOOT_ID).await?;
    let before = State::of(&mut guest).await?;
    pool.godwit(&[
        "vm",
        "snapshot",
        "create",
        VM,
        SNAPSHOT,
        "--pool",
        SHARED_POOL,
        "--wait",
    ])
    .await?;
    // The guest goes on; nothing of what it does from here on is in the snapshot.
    guest.run("touch /tmp/afterwards").await?;
    let after = State::of(&mut guest).await?;
    pool.godwit(&["vm", "stop", VM, "--kill", "--wait"]).await?;
    guest.wait_for_state(pool, "stopped").await?;

    pool.godwit(&[
        "vm", "snapshot", "restore", VM, SNAPSHOT, "--host", OTHER_HOST, "--wait",
    ])
    .await?;
    let vm = guest.wait_for_state(pool, "running").await?;
    ensure!(
        vm["host_name"] == OTHER_HOST,
        "it does not run on {OTHER_HOST}: {vm:#}"
    );
    let mut guest = Guest::attach(pool, VM).await?;
    let same = guest.run(BOOT_ID).await?;
    ensure!(same == boot_id, "the guest is another one: {same}");
    let restored = State::of(&mut guest).await?;
    ensure!(
        restored.count >= before.count && restored.uptime_s >= before.uptime_s,
        "it went back from {before:?} to {restored:?}"
    );
    let count = restored.count;
    guest
        .run(&format!(
            "until n=$(cat /tmp/count) && [ -n \"$n\" ] && [ $n -gt {count} ]; do usleep 50000; done"
        ))
        .await
        .context("the process does not go on")?;
    let left = guest.run("ls /tmp").await?;
    ensure!(
        !left.contains("afterwards"),
        "what was done after the snapshot is there"
    );
    let verified = guest.run("agent verify").await.context("the memory")?;
    eprintln!("lab:   before {before:?}, after {after:?}, restored {restored:?}; {verified}");

    pool.godwit(&["vm", "snapshot", "delete", VM, SNAPSHOT, "--wait"])
        .await?;
    guest.delete(pool).await
}

/// What only a guest that was not started anew can know.
#[derive(Debug)]
struct State {
    /// How far the process has come.
    count: u64,
    uptime_s: u64,
}

impl State {
    async fn of(guest: &mut Guest) -> anyhow::Result<Self> {
        Ok(Self {
            count: number(&guest.run(READ_COUNT).await?)?,
            uptime_s: number(&guest.run(UPTIME).await?)?,
        })
    }
}

fn number(text: &str) -> anyhow::Result<u64> {
    text.trim().parse().with_context(|| text.to_owned())
}
