//! How long an idle guest stands still.

use super::qemu_with;
use crate::peer::Mode;
use crate::report::{Op, Report, Samples, quantile_of};
use crate::shuttle::{Link, Shuttle};
use godwit_tests::linux::LinuxGuest;
use godwit_wire::migration::MigrationPolicy;
use godwit_wire::unit::Mib;

const MEMORY: Mib = Mib(4096);
/// Random data in the guest. More would only lengthen what happens before the guest stands still.
const FILL: Mib = Mib(512);
const WARM_UP: usize = 2;
const RUNS: usize = 100;
/// One migration of each kind by QEMU for so many of ours.
const OURS_PER_PEER: usize = 10;

pub(super) async fn measure(report: &mut Report, linux: &LinuxGuest) -> anyhow::Result<()> {
    report.option("downtime_guest", format!("{MEMORY}, {FILL} of it random"));
    let mut ours = Shuttle::take_off(Some(linux), MEMORY, FILL).await?;
    let mut qemu = qemu_with(report, "downtime", linux, MEMORY, FILL).await?;
    let modes = [&[Mode::Defaults][..], &Mode::UNLIMITED].concat();
    for _ in 0..WARM_UP {
        ours.fly(MigrationPolicy::default(), Link::Plain).await?;
    }
    if let Some(qemu) = &mut qemu {
        qemu.fly(Mode::Lifted).await?;
    }
    let (mut downtimes, mut reported, mut parts) =
        (Samples::default(), Samples::default(), Samples::default());
    for run in 0..RUNS {
        let landing = ours.fly(MigrationPolicy::default(), Link::Plain).await?;
        downtimes.push("godwit", landing.downtime_ms()?);
        parts.push("guest_blackout", landing.guest_blackout_ms);
        let blackout = landing.status.progress.blackout.unwrap_or_default();
        for (name, part_us) in [
            ("pause", blackout.pause_us),
            ("save", blackout.save_us),
            ("pages", blackout.pages_us),
            ("restore", blackout.restore_us),
            ("commit", blackout.commit_us),
        ] {
            parts.push(name, part_us as f64 / 1e3);
        }
        if let Some(qemu) = &mut qemu
            && run % OURS_PER_PEER == 0
        {
            for mode in &modes {
                let flown = qemu.fly(*mode).await?;
                downtimes.push(mode.label(), flown.downtime_ms);
                reported.push(mode.label(), flown.reported_downtime_ms);
            }
        }
    }
    ours.verify().await?;
    downtimes.report(report, "downtime", "ms");
    reported.report(report, "downtime_as_qemu_reports_it", "ms");
    parts.report(report, "downtime_parts", "ms");
    judge(report, &downtimes, &modes);
    Ok(())
}

fn judge(report: &mut Report, downtimes: &Samples, modes: &[Mode]) {
    let ours = downtimes.values("godwit");
    let median = quantile_of(ours, 0.5);
    report.figure("downtime_p50_ms", median, "ms", Op::AtMost, 20.0);
    report.figure(
        "downtime_p99_ms",
        quantile_of(ours, 0.99),
        "ms",
        Op::AtMost,
        50.0,
    );
    for mode in modes {
        let theirs = downtimes.values(&mode.label());
        if !theirs.is_empty() {
            report.figure(
                format!("downtime_p50_ratio_to_{}", mode.label()),
                median / quantile_of(theirs, 0.5),
                "ratio",
                Op::Below,
                1.0,
            );
        }
    }
}
