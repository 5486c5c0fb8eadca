//! Local hand-over of a 4 GiB guest: how long it stands still when a new VMM process takes it over on its host.

use crate::report::{Op, Report, Samples, maximum, quantile_of};
use crate::shuttle::Shuttle;
use godwit_tests::linux::LinuxGuest;
use godwit_wire::unit::Mib;

const MEMORY: Mib = Mib(4096);
/// Random data in the guest: memory that is really there.
const FILL: Mib = Mib(3072);
const WARM_UP: usize = 2;
const RUNS: usize = 30;
/// What the downtime of a migration is allowed in its worst cases.
const MAX_GOAL_MS: f64 = 50.0;

pub(super) async fn measure(report: &mut Report, linux: &LinuxGuest) -> anyhow::Result<()> {
    report.option("hand_over_guest", format!("{MEMORY}, {FILL} of it random"));
    let mut ours = Shuttle::take_off(Some(linux), MEMORY, FILL).await?;
    for _ in 0..WARM_UP {
        ours.change_vmm().await?;
    }
    let (mut totals, mut parts) = (Samples::default(), Samples::default());
    for _ in 0..RUNS {
        let (blackout, guest_blackout_ms) = ours.change_vmm().await?;
        totals.push("godwit", blackout.total_us as f64 / 1e3);
        parts.push("guest_blackout", guest_blackout_ms);
        for (name, part_us) in [
            ("pause", blackout.pause_us),
            ("save", blackout.save_us),
            ("restore", blackout.restore_us),
            ("commit", blackout.commit_us),
        ] {
            parts.push(name, part_us as f64 / 1e3);
        }
    }
    ours.verify().await?;
    totals.report(report, "local_hand_over", "ms");
    parts.report(report, "local_hand_over_parts", "ms");
    let median = quantile_of(totals.values("godwit"), 0.5);
    report.figure("local_hand_over_p50_ms", median, "ms", Op::AtMost, 20.0);
    let longest = maximum(totals.values("godwit"));
    report.figure(
        "local_hand_over_max_ms",
        longest,
        "ms",
        Op::AtMost,
        MAX_GOAL_MS,
    );
    Ok(())
}
