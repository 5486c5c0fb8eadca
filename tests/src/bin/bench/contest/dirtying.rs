//! A guest that dirties memory faster than the link carries it: whether it arrives, when, and whether its blackout
//! was foreseen. Both sides have the same link, the one that QEMU's default bandwidth limit makes.

use super::qemu_with;
use crate::peer::{DEFAULT_BYTES_PER_S, Mode};
use crate::report::{Op, Report, Samples, maximum};
use crate::shuttle::{Link, Shuttle};
use godwit_tests::linux::LinuxGuest;
use godwit_wire::migration::{Compression, MigrationPolicy};
use godwit_wire::unit::Mib;
use std::time::Duration;

const MEMORY: Mib = Mib(1024);
/// Random data in the guest.
const FILL: Mib = Mib(768);
/// Written by the guest, over and over.
const DIRTY_MIB_PER_S: u64 = 160;
const WORKING_SET: Mib = Mib(512);
const LINK_BYTES_PER_S: u64 = DEFAULT_BYTES_PER_S;
/// So many show what a blackout costs beside sending the rest, before it is to be foreseen.
const WARM_UP: usize = 3;
const RUNS: usize = 10;
const PEER_RUNS: usize = 2;
/// A peer that has not arrived after so many times our time has lost.
const LOST_AFTER: f64 = 3.0;
/// It is called off a little later, so that what it is given as its time is beyond that, however it is rounded.
const CALLED_OFF_AFTER: f64 = 3.05;
/// How far the blackout may be from what was predicted, and for which share of the runs.
const PREDICTION_TOLERANCE: f64 = 0.2;
const PREDICTION_SHARE: f64 = 0.9;

pub(super) async fn measure(report: &mut Report, linux: &LinuxGuest) -> anyhow::Result<()> {
    let policy = MigrationPolicy {
        max_bandwidth_bytes_per_s: Some(LINK_BYTES_PER_S),
        compression: Compression::Off,
        ..Default::default()
    };
    report.option(
        "dirtying_guest",
        format!(
            "{MEMORY}, {FILL} of it random, {DIRTY_MIB_PER_S} MiB/s over {WORKING_SET}; link {} MiB/s",
            LINK_BYTES_PER_S >> 20
        ),
    );
    report.option("dirtying_policy", serde_json::to_string(&policy)?);
    let dirty = format!("dirty {DIRTY_MIB_PER_S} {}", WORKING_SET.0);
    let mut ours = Shuttle::take_off(Some(linux), MEMORY, FILL).await?;
    for _ in 0..WARM_UP {
        ours.fly(MigrationPolicy::default(), Link::Plain).await?;
    }
    ours.shell().await?.command(&dirty).await?;
    let mut seen = Samples::default();
    let (mut blackouts, mut errors) = (Samples::default(), Vec::new());
    for run in 0..RUNS {
        let landing = match ours.fly(policy.clone(), Link::Plain).await {
            Ok(landing) => landing,
            Err(error) => {
                println!("run {run} did not arrive: {error:#}");
                continue;
            }
        };
        let progress = &landing.status.progress;
        let predicted_us = progress.blackout.unwrap_or_default().predicted_us;
        let (predicted_ms, actual_ms) = (predicted_us as f64 / 1e3, landing.downtime_ms()?);
        seen.push("godwit", landing.seconds);
        blackouts.push("predicted", predicted_ms);
        blackouts.push("actual", actual_ms);
        blackouts.push("as_the_guest_saw_it", landing.guest_blackout_ms);
        errors.push((predicted_ms - actual_ms).abs() / actual_ms);
        println!(
            "  run {run}: rounds={} throttle_percent={} blackout={:?}",
            progress.round, progress.throttle_percent, progress.blackout
        );
    }
    ours.shell().await?.command("stop").await?;
    ours.verify().await?;
    drop(ours);
    fly_peer(report, linux, &dirty, &mut seen).await?;
    seen.report(report, "dirtying", "s");
    blackouts.report(report, "dirtying_blackout", "ms");
    report.raw("dirtying_prediction_error", "ratio", &errors);
    judge(report, &policy, &seen, (&blackouts, &errors));
    Ok(())
}

/// QEMU with its defaults, called off when it has lost. Then it needs longer than the time it is given here.
async fn fly_peer(
    report: &mut Report,
    linux: &LinuxGuest,
    dirty: &str,
    seen: &mut Samples,
) -> anyhow::Result<()> {
    let Some(mut qemu) = qemu_with(report, "dirtying", linux, MEMORY, FILL).await? else {
        return Ok(());
    };
    qemu.command(dirty).await?;
    let limit = Duration::from_secs_f64((seen.median("godwit") * CALLED_OFF_AFTER).max(1.0));
    let mut called_off = 0;
    for _ in 0..PEER_RUNS {
        let flown = qemu.fly_within(Mode::Defaults, limit).await?;
        if flown.is_none() {
            println!("QEMU had not arrived after {limit:?} and was called off");
            called_off += 1;
        }
        seen.push(
            "qemu_defaults",
            flown.map_or(limit.as_secs_f64(), |flown| flown.seconds),
        );
    }
    report.option(
        "dirtying_qemu_called_off",
        format!(
            "{called_off} of {PEER_RUNS} after {limit:?}; the ratio is a lower bound where one was"
        ),
    );
    Ok(())
}

fn judge(
    report: &mut Report,
    policy: &MigrationPolicy,
    seen: &Samples,
    (blackouts, errors): (&Samples, &[f64]),
) {
    let share = |count: usize| count as f64 / RUNS as f64;
    let arrived = share(errors.len());
    report.figure("dirtying_arrived_share", arrived, "ratio", Op::AtLeast, 1.0);
    report.figure(
        "dirtying_blackout_max_ms",
        maximum(blackouts.values("actual")),
        "ms",
        Op::AtMost,
        policy.downtime_limit_ms as f64,
    );
    let foreseen = errors
        .iter()
        .filter(|error| **error <= PREDICTION_TOLERANCE);
    report.figure(
        "dirtying_blackout_foreseen_share",
        share(foreseen.count()),
        "ratio",
        Op::AtLeast,
        PREDICTION_SHARE,
    );
    if !seen.values("qemu_defaults").is_empty() {
        report.figure(
            "dirtying_qemu_time_ratio",
            seen.median("qemu_defaults") / seen.median("godwit"),
            "ratio",
            Op::AtLeast,
            LOST_AFTER,
        );
    }
}
