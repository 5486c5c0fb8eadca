//! `bench NAME`: measures the figures of an issue, prints what it saw and writes `target/bench/NAME.json`.
//!
//! Started by `tests/run bench NAME`, which builds everything with optimisation first.

mod boot;
mod migration;
mod overhead;
mod report;
mod rest;

use anyhow::{Context, bail};
use godwit_tests::linux::LinuxGuest;
use report::Report;
use std::process::ExitCode;

fn main() -> ExitCode {
    let name = std::env::args().nth(1).unwrap_or_default();
    let runtime = tokio::runtime::Runtime::new().expect("a runtime can be built");
    match runtime.block_on(run(&name)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench {name}: {error:#}");
            ExitCode::FAILURE
        }
    }
}

async fn run(name: &str) -> anyhow::Result<()> {
    let report = match name {
        "first-flight" => first_flight().await?,
        _ => bail!("no such bench; there is: first-flight"),
    };
    report.finish(name)
}

/// A running guest crosses hosts: how fast, how unnoticed, and how light the machine under it is.
async fn first_flight() -> anyhow::Result<Report> {
    let mut report = Report::default();
    let linux = LinuxGuest::prepare();
    report.option("guest", if linux.is_ok() { "linux" } else { "pilot" });
    let linux = linux
        .map_err(|reason| println!("no Linux guest: {reason}"))
        .ok();

    boot::measure(&mut report, linux.as_ref())
        .await
        .context("boot")?;
    overhead::measure(&mut report, linux.as_ref())
        .await
        .context("overhead")?;
    migration::measure(&mut report, linux.as_ref())
        .await
        .context("migration")?;
    rest::measure(&mut report).await.context("REST")?;
    Ok(report)
}
