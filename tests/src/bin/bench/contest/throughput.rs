//! How fast an idle guest full of incompressible data moves: over 1 to 16 lanes, with and without TLS, against plain
//! TCP on the same number of connections and against everything QEMU has.

use super::qemu_with;
use crate::peer::{Mode, Qemu};
use crate::report::{Op, Report, Samples, mean};
use crate::shuttle::{Link, Shuttle};
use crate::tcp::{self, Buffers};
use godwit_tests::linux::LinuxGuest;
use godwit_wire::migration::MigrationPolicy;
use godwit_wire::unit::Mib;

const MEMORY: Mib = Mib(4096);
/// Random data in the guest; the rest is its kernel and a reserve.
const FILL: Mib = Mib(3700);
const RUNS: usize = 3;
const LANES: [u8; 5] = [1, 2, 4, 8, 16];
/// What migrations reach of plain TCP, and of QEMU's best.
const TCP_GOAL: f64 = 0.9;
const TLS_GOAL: f64 = 0.8;
const QEMU_GOAL: f64 = 1.5;

pub(super) async fn measure(report: &mut Report, linux: &LinuxGuest) -> anyhow::Result<()> {
    report.option("throughput_guest", format!("{MEMORY}, {FILL} of it random"));
    let mut ours = Shuttle::take_off(Some(linux), MEMORY, FILL).await?;
    let mut qemu = qemu_with(report, "throughput", linux, MEMORY, FILL).await?;
    ours.fly(MigrationPolicy::default(), Link::Plain).await?;
    if let Some(qemu) = &mut qemu {
        qemu.fly(Mode::Lifted).await?;
    }
    let (mut rates, mut ratios) = (Samples::default(), Samples::default());
    if let Some(qemu) = &mut qemu {
        // Slow by its own choice, so once is enough.
        fly_peer(qemu, &[Mode::Defaults], &mut rates).await?;
    }
    for _ in 0..RUNS {
        for lanes in LANES {
            fly_beside_tcp(&mut ours, lanes, &mut rates, &mut ratios).await?;
        }
        if let Some(qemu) = &mut qemu {
            fly_peer(qemu, &Mode::UNLIMITED, &mut rates).await?;
        }
    }
    ours.verify().await?;
    rates.report(report, "throughput", "MB/s");
    ratios.report(report, "throughput_ratio_to_tcp", "ratio");
    judge(report, &rates, &ratios);
    Ok(())
}

/// Plain and encrypted, between two measurements of plain TCP on as many connections.
async fn fly_beside_tcp(
    ours: &mut Shuttle,
    lanes: u8,
    rates: &mut Samples,
    ratios: &mut Samples,
) -> anyhow::Result<()> {
    const YARDSTICKS: [(Buffers, &str); 2] = [
        (Buffers::Reused, "tcp"),
        (Buffers::Distinct, "tcp_memory_to_memory"),
    ];
    let yardsticks = || -> anyhow::Result<Vec<f64>> {
        YARDSTICKS
            .iter()
            .map(|(buffers, _)| tcp::mb_per_s(lanes, *buffers))
            .collect()
    };
    let before = yardsticks()?;
    let mut flights = Vec::new();
    for (link, name) in [(Link::Plain, "godwit"), (Link::Tls, "godwit_tls")] {
        let policy = MigrationPolicy {
            lanes,
            ..Default::default()
        };
        let landing = ours.fly(policy, link).await?;
        let (rate, progress) = (landing.mb_per_s(), &landing.status.progress);
        println!(
            "  {name} {lanes}: {:.3} s, prefault_ms={} rounds={} blackout={:?}",
            landing.seconds, progress.prefault_ms, progress.round, progress.blackout
        );
        rates.push(format!("{name}_{lanes}"), rate);
        flights.push((name, rate));
    }
    let after = yardsticks()?;
    for ((_, yardstick), (before, after)) in YARDSTICKS.iter().zip(before.iter().zip(&after)) {
        rates.push(format!("{yardstick}_{lanes}"), *before);
        rates.push(format!("{yardstick}_{lanes}"), *after);
        for (name, rate) in &flights {
            let ratio = rate / mean(&[*before, *after]);
            ratios.push(format!("{name}_to_{yardstick}_{lanes}"), ratio);
        }
    }
    Ok(())
}

async fn fly_peer(qemu: &mut Qemu, modes: &[Mode], rates: &mut Samples) -> anyhow::Result<()> {
    for mode in modes {
        rates.push(mode.label(), qemu.fly(*mode).await?.mb_per_s());
    }
    Ok(())
}

fn judge(report: &mut Report, rates: &Samples, ratios: &Samples) {
    for (yardstick, lanes) in ["tcp", "tcp_memory_to_memory"]
        .iter()
        .flat_map(|name| LANES.map(|lanes| (name, lanes)))
    {
        for (name, goal) in [("godwit", TCP_GOAL), ("godwit_tls", TLS_GOAL)] {
            let ratio = format!("{name}_to_{yardstick}_{lanes}");
            let median = ratios.median(&ratio);
            report.figure(
                format!("throughput_{ratio}"),
                median,
                "ratio",
                Op::AtLeast,
                goal,
            );
        }
    }
    let best = |labels: Vec<String>| {
        labels
            .iter()
            .map(|label| rates.median(label))
            .fold(f64::NAN, f64::max)
    };
    let theirs = best(Mode::UNLIMITED.map(Mode::label).into());
    if theirs.is_nan() {
        return;
    }
    for name in ["godwit", "godwit_tls"] {
        let ours = best(LANES.map(|lanes| format!("{name}_{lanes}")).into());
        report.figure(
            format!("throughput_{name}_ratio_to_qemu_best"),
            ours / theirs,
            "ratio",
            Op::AtLeast,
            QEMU_GOAL,
        );
    }
}
