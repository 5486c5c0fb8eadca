//! Live migration of stock guests between hosts.

use super::DOWNTIME_LIMIT_MS;
use crate::guest::{Guest, GuestKernel};
use crate::pool::Pool;
use anyhow::{Context, ensure};
use godwit_tests::lab::machine::Cpu;
use serde_json::Value;

/// Memory that holds random pages, and how fast the guest rewrites a part of it.
const FILLED_MIB: u32 = 64;
const DIRTY_MIB_PER_S: u32 = 8;
const WORKING_SET_MIB: u32 = 16;

pub(crate) async fn of_busy_memory(pool: &mut Pool) -> anyhow::Result<()> {
    let options = ["--vcpus", "2"];
    let mut guest =
        Guest::create(pool, "mover", "host-1", GuestKernel::default(), &options).await?;
    guest.run(&format!("agent fill {FILLED_MIB}")).await?;
    guest
        .run(&format!("agent dirty {DIRTY_MIB_PER_S} {WORKING_SET_MIB}"))
        .await?;
    let boot_id = guest.run("cat /proc/sys/kernel/random/boot_id").await?;
    for target in ["host-2", "host-1"] {
        migrate(pool, "mover", target).await?;
        guest = Guest::attach(pool, "mover").await?;
        let same = guest.run("cat /proc/sys/kernel/random/boot_id").await?;
        ensure!(same == boot_id, "the guest on {target} is another one");
    }
    guest.run("agent stop").await?;
    let verified = guest.run("agent verify").await?;
    eprintln!("lab:   {verified}");
    guest.delete(pool).await
}

/// A link that does not keep up, so that the guest goes ahead of its memory.
const NARROW: [&str; 5] = [
    "--allow-postcopy",
    "--max-bandwidth",
    "8M",
    "--compression",
    "off",
];
const RESTLESS_MIB_PER_S: u32 = 40;
const RESTLESS_SET_MIB: u32 = 40;

pub(crate) async fn ahead_of_memory(pool: &mut Pool) -> anyhow::Result<()> {
    let options = ["--vcpus", "2"];
    let mut guest =
        Guest::create(pool, "ahead", "host-1", GuestKernel::default(), &options).await?;
    guest.run(&format!("agent fill {FILLED_MIB}")).await?;
    guest
        .run(&format!(
            "agent dirty {RESTLESS_MIB_PER_S} {RESTLESS_SET_MIB}"
        ))
        .await?;
    for target in ["host-2", "host-1"] {
        let mut words = vec!["vm", "migrate", "ahead", "--to", target, "--wait"];
        words.extend(["--downtime-limit-ms", "200"]);
        words.extend(NARROW);
        pool.godwit(&words).await?;
        let memory = progress_of(pool, "ahead", target).await?["post_copy"].clone();
        eprintln!("lab:   to {target}: {memory}");
        ensure!(
            memory["owed_bytes"].as_u64() > Some(0) && memory["missing_bytes"] == 0,
            "the guest did not go ahead of its memory, or it is not whole: {memory}"
        );
        guest = Guest::attach(pool, "ahead").await?;
    }
    guest.run("agent stop").await?;
    let verified = guest.run("agent verify").await?;
    eprintln!("lab:   {verified}");
    guest.delete(pool).await
}

/// How far the latest migration of `vm` to `target` has come.
async fn progress_of(pool: &Pool, vm: &str, target: &str) -> anyhow::Result<Value> {
    let migrations = pool.godwit(&["migration", "list", "--all"]).await?;
    let items = migrations["items"].as_array().context("migrations")?;
    // Newest last.
    let migration = items
        .iter()
        .rfind(|migration| migration["vm_name"] == vm && migration["target_name"] == target)
        .context("its migration is listed")?;
    Ok(migration["progress"].clone())
}

/// The target's CPU is less than the guest was promised. Nothing that could pause the guest ever begins: there is no
/// migration on record, so no VMM was told of one, and the VM is under the epoch it had.
pub(crate) async fn to_a_lesser_cpu(pool: &mut Pool) -> anyhow::Result<()> {
    pool.add_host("old-host", Cpu::WithoutAvx2).await?;
    let options = ["--cpu", "x86-64-v3"];
    let mut guest =
        Guest::create(pool, "modern", "host-1", GuestKernel::default(), &options).await?;
    let before = guest.show(pool).await?;
    guest.run("agent ticks reset").await?;
    let refusal = pool
        .godwit(&["vm", "migrate", "modern", "--to", "old-host", "--wait"])
        .await
        .err()
        .context("the migration to a host without AVX2 was not refused")?;
    let refusal = format!("{refusal:#}");
    eprintln!("lab:   {}", refusal.lines().last().unwrap_or_default());
    ensure!(
        refusal.to_lowercase().contains("cpu"),
        "refused, but not for the CPU: {refusal}"
    );
    let ticks = guest.run("agent ticks").await?;
    eprintln!("lab:   the guest meanwhile: {ticks}");
    let vm = guest.show(pool).await?;
    ensure!(
        vm["state"] == "running" && vm["host_name"] == "host-1" && vm["epoch"] == before["epoch"],
        "it does not run on host-1 as before: {vm:#}"
    );
    let migrations = pool.godwit(&["migration", "list", "--all"]).await?;
    let items = migrations["items"].as_array().context("migrations")?;
    let begun = items
        .iter()
        .find(|migration| migration["vm_name"] == "modern");
    ensure!(begun.is_none(), "a migration began: {begun:?}");
    guest.delete(pool).await?;
    pool.cut_power("old-host").await
}

/// Connections for pages of a migration that has to use several.
const LANES: u8 = 4;

/// Moves a VM over several lanes and waits until it runs there.
pub(crate) async fn migrate(pool: &Pool, vm: &str, target: &str) -> anyhow::Result<()> {
    pool.godwit(&[
        "vm",
        "migrate",
        vm,
        "--to",
        target,
        "--downtime-limit-ms",
        DOWNTIME_LIMIT_MS,
        "--lanes",
        &LANES.to_string(),
        "--wait",
    ])
    .await?;
    let opened = progress_of(pool, vm, target).await?["opened_lanes"].clone();
    ensure!(opened == LANES, "{opened} lanes instead of {LANES}");
    pool.wait_until(&["vm", "show", vm], |vm| {
        vm["state"] == "running" && vm["host_name"] == target
    })
    .await?;
    Ok(())
}
