//! `bench NAME [--without-peers] [SECTION…]`: measures the figures of an issue, or only some of them, prints what it saw
//! and writes `target/bench/NAME.json`. A section that fails does not keep the others from being measured; in the end the
//! bench fails, as it does for a missed goal and for a missing peer, unless `--without-peers` waives those.
//!
//! `bench plot [JSON [SVG]]`: draws such a file.
//!
//! Started by `tests/run bench NAME`, which builds everything with optimisation first.

mod boot;
mod contest;
mod data_path;
mod host_memory;
mod host_setting;
mod lab;
mod migration;
mod overhead;
mod peer;
mod plot;
mod report;
mod rest;
mod shuttle;
mod tcp;

use anyhow::bail;
use godwit_tests::linux::LinuxGuest;
use report::{Owed, Peers, Report};
use std::process::ExitCode;
use tokio::signal::unix::{SignalKind, signal};

/// Says that a peer that is not installed is no fault.
const WITHOUT_PEERS: &str = "--without-peers";

fn main() -> ExitCode {
    let mut arguments = std::env::args().skip(1);
    let name = arguments.next().unwrap_or_default();
    let sections: Vec<String> = arguments.collect();
    let runtime = tokio::runtime::Runtime::new().expect("a runtime can be built");
    // Interrupted, it still ends what it started and puts back what it changed.
    let measured = runtime.block_on(async {
        let mut terminated = signal(SignalKind::terminate())?;
        tokio::select! {
            measured = run(&name, &sections) => measured,
            _ = tokio::signal::ctrl_c() => bail!("interrupted"),
            _ = terminated.recv() => bail!("terminated"),
        }
    });
    match measured {
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
        "first-flight" => first_flight(begin(name, sections)).await,
        "guests" => guests(begin(name, sections)).await,
        "migration" => contest(begin(name, sections)).await?,
        _ => bail!("no such bench; there are: first-flight guests migration, and plot"),
    };
    report.finish()
}

/// A running guest crosses hosts: how fast, how unnoticed, and how light the machine under it is.
async fn first_flight((mut report, linux): Begun) -> Report {
    let linux = linux.as_ref();

    if report.begins("boot", Owed::FigureOfPeer) {
        let outcome = boot::measure(&mut report, linux).await;
        report.ends(outcome);
    }
    if report.begins("overhead", Owed::Figure) {
        let outcome = overhead::measure(&mut report, linux).await;
        report.ends(outcome);
    }
    if report.begins("migration", Owed::Figure) {
        let outcome = migration::measure(&mut report, linux).await;
        report.ends(outcome);
    }
    if report.begins("rest", Owed::Figure) {
        let outcome = rest::measure(&mut report).await;
        report.ends(outcome);
    }
    report
}

/// The machine that Linux expects: how soon it boots with devices, and how fast they are.
async fn guests((mut report, linux): Begun) -> Report {
    let linux = linux.as_ref();

    if report.begins("boot", Owed::FigureOfPeer) {
        let outcome = boot::measure_with_devices(&mut report, linux).await;
        report.ends(outcome);
    }
    if report.begins("overhead", Owed::Figure) {
        let outcome = overhead::measure_with_devices(&mut report, linux).await;
        report.ends(outcome);
    }
    if report.begins("block", Owed::Values) {
        let outcome = data_path::measure_block(&mut report);
        report.ends(outcome);
    }
    if report.begins("net", Owed::Values) {
        let outcome = data_path::measure_net(&mut report);
        report.ends(outcome);
    }
    if report.begins("lab", Owed::Figure) {
        let outcome = lab::measure(&mut report).await;
        report.ends(outcome);
    }
    report
}

/// Live migration against the peers.
async fn contest((mut report, linux): Begun) -> anyhow::Result<Report> {
    contest::measure(&mut report, linux.as_ref()).await?;
    Ok(report)
}

/// A report, and the Linux guest where it can be had.
type Begun = (Report, Option<LinuxGuest>);

/// A report that says what it is about.
fn begin(name: &str, sections: &[String]) -> Begun {
    let (waived, sections): (Vec<_>, Vec<_>) = sections
        .iter()
        .cloned()
        .partition(|section| section == WITHOUT_PEERS);
    let peers = if waived.is_empty() {
        Peers::Owed
    } else {
        Peers::Waived
    };
    let mut report = Report::of(&sections, peers).written_as(name);
    report.option("peers", format!("{peers:?}").to_lowercase());
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
