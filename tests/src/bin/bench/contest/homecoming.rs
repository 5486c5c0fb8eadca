//! A guest that comes home after a while, with a part of its memory changed: what of it has to be sent. The peers send
//! everything.
//!
//! `GODWIT_RETURN_AFTER_S` says how long it stays away; ten minutes, as an operator would see it, is `600`.

use crate::report::{Op, Report, Samples, maximum};
use crate::shuttle::{Link, Shuttle};
use anyhow::{Context, ensure};
use godwit_tests::linux::LinuxGuest;
use godwit_wire::migration::{Compression, MigrationPolicy};
use godwit_wire::unit::Mib;
use std::time::{Duration, Instant};

const MEMORY: Mib = Mib(4096);
/// Random data in the guest.
const FILL: Mib = Mib(3072);
/// Changed while the guest is away: 5 % of all pages.
const CHANGED: Mib = Mib(MEMORY.0 / 20);
const CHANGE_MIB_PER_S: u64 = 400;
/// Several times what that takes.
const CHANGE_TIME: Duration = Duration::from_secs(2);
const CHANGE_PATIENCE: Duration = Duration::from_secs(120);
const RUNS: usize = 3;
const GOAL: f64 = 0.08;
/// How long the guest stays away, if nobody says otherwise.
const AWAY_S: u64 = 5;
const AWAY_ENV: &str = "GODWIT_RETURN_AFTER_S";
const PAGES_PER_MIB: u64 = 256;

pub(super) async fn measure(report: &mut Report, linux: &LinuxGuest) -> anyhow::Result<()> {
    let away = away()?;
    // As they are: what compression saves is not what is measured here.
    let policy = MigrationPolicy {
        compression: Compression::Off,
        ..MigrationPolicy::default()
    };
    report.option(
        "return_guest",
        format!("{MEMORY}, {FILL} of it random, {CHANGED} changed while away for {away:?}"),
    );
    let mut guest = Shuttle::take_off(Some(linux), MEMORY, FILL).await?;
    let (mut seconds, mut shares) = (Samples::default(), Vec::new());
    for run in 0..RUNS {
        let memory = guest.memory()?;
        let left = guest.fly(policy.clone(), Link::Tls).await?;
        change(&guest).await?;
        // Time itself is what is waited for.
        tokio::time::sleep(away).await;
        let returned = guest.fly_home(policy.clone(), &memory).await?;
        let progress = &returned.status.progress;
        println!("  run {run}: {progress:?}");
        seconds.push("away", left.seconds);
        seconds.push("home", returned.seconds);
        shares.push(progress.transferred_bytes.0 as f64 / MEMORY.bytes().0 as f64);
    }
    guest.verify().await?;
    seconds.report(report, "return", "s");
    report.raw("return_bytes_share", "ratio", &shares);
    report.figure(
        "return_bytes_share",
        maximum(&shares),
        "ratio",
        Op::AtMost,
        GOAL,
    );
    Ok(())
}

fn away() -> anyhow::Result<Duration> {
    let seconds = match std::env::var(AWAY_ENV) {
        Ok(text) => text
            .parse()
            .with_context(|| format!("{AWAY_ENV} is a number of seconds"))?,
        Err(_) => AWAY_S,
    };
    Ok(Duration::from_secs(seconds))
}

/// Has the guest write every page of its first [`CHANGED`] anew, and nothing more.
async fn change(guest: &Shuttle) -> anyhow::Result<()> {
    let mut shell = guest.shell().await?;
    let before = shell.command("verify").await?.number("writes");
    shell
        .command(&format!("dirty {CHANGE_MIB_PER_S} {}", CHANGED.0))
        .await?;
    let deadline = Instant::now() + CHANGE_PATIENCE;
    let enough = before + CHANGED.0 * PAGES_PER_MIB;
    loop {
        // The guest counts only when it is asked, and writes nothing meanwhile.
        tokio::time::sleep(CHANGE_TIME).await;
        if shell.command("verify").await?.number("writes") >= enough {
            break;
        }
        ensure!(Instant::now() < deadline, "the guest changes too little");
    }
    shell.command("stop").await?;
    Ok(())
}
