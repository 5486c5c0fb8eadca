//! `bench NAME [SECTION…]`: measures the figures of an issue, or only some of them, prints what it saw and writes
//! `target/bench/NAME.json`.
//!
//! `bench plot [JSON [SVG]]`: draws such a file.
//!
//! Started by `tests/run bench NAME`, which builds everything with optimisation first.

mod boot;
mod contest;
mod data_path;
mod huge_pages;
mod lab;
mod migration;
mod overhead;
mod peer;
mod plot;
mod report;
mod rest;
mod shuttle;
mod tcp;
mod warmth;

use anyhow::{Context, bail};
use godwit_tests::linux::LinuxGuest;
use report::{Owed, Report};
use std::process::ExitCode;

fn main() -> ExitCode {
    let mut arguments = std::env::args().skip(1);
    let name = arguments.next().unwrap_or_default();
    let sections: Vec<String> = arguments.collect();
    let runtime = tokio::runtime::Runtime::new().expect("a runtime can be built");
    match runtime.block_on(run(&name, &sections)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench {name}: {error:#}");
            ExitCode::FAILURE
        }
    }
}

async fn run(name: &str, sections: &[String]) -> anyhow::Result<()> {
    if name == "plot" {
        return plot::draw(sections);
    }
    let report = match name {
        "first-flight" => first_flight(sections).await?,
        "guests" => guests(sections).await?,
        "migration" => contest(sections).await?,
        _ => bail!("no such bench; there are: first-flight guests migration, and plot"),
    };
    report.finish(name)
}

/// A running guest crosses hosts: how fast, how unnoticed, and how light the machine under it is.
async fn first_flight(sections: &[String]) -> anyhow::Result<Report> {
    let (mut report, linux) = begin(sections);
    let linux = linux.as_ref();

    if report.begins("boot", Owed::Figure) {
        boot::measure(&mut report, linux).await.context("boot")?;
    }
    if report.begins("overhead", Owed::Figure) {
        overhead::measure(&mut report, linux)
            .await
            .context("overhead")?;
    }
    if report.begins("migration", Owed::Figure) {
        migration::measure(&mut report, linux)
            .await
            .context("migration")?;
    }
    if report.begins("rest", Owed::Figure) {
        rest::measure(&mut report).await.context("REST")?;
    }
    Ok(report)
}

/// The machine that Linux expects: how soon it boots with devices, and how fast they are.
async fn guests(sections: &[String]) -> anyhow::Result<Report> {
    let (mut report, linux) = begin(sections);
    let linux = linux.as_ref();

    if report.begins("boot", Owed::Figure) {
        boot::measure_with_devices(&mut report, linux)
            .await
            .context("boot")?;
    }
    if report.begins("overhead", Owed::Figure) {
        overhead::measure_with_devices(&mut report, linux)
            .await
            .context("overhead")?;
    }
    if report.begins("block", Owed::Values) {
        data_path::measure_block(&mut report).context("block")?;
    }
    if report.begins("net", Owed::Values) {
        data_path::measure_net(&mut report).context("net")?;
    }
    if report.begins("lab", Owed::Figure) {
        lab::measure(&mut report).await.context("lab")?;
    }
    Ok(report)
}

/// Live migration against the peers.
async fn contest(sections: &[String]) -> anyhow::Result<Report> {
    let (mut report, linux) = begin(sections);
    contest::measure(&mut report, linux.as_ref()).await?;
    Ok(report)
}

/// A report that says what it is about, and the Linux guest where it can be had.
fn begin(sections: &[String]) -> (Report, Option<LinuxGuest>) {
    let mut report = Report::of(sections);
    let linux = LinuxGuest::prepare();
    report.option("guest", if linux.is_ok() { "linux" } else { "pilot" });
    report.option(
        "sections",
        if sections.is_empty() {
            "all".to_owned()
        } else {
            sections.join(" ")
        },
    );
    let linux = linux
        .map_err(|reason| println!("no Linux guest: {reason}"))
        .ok();
    (report, linux)
}
