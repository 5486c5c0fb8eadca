//! A large guest that has touched little of its memory.

use super::qemu_with;
use crate::peer::Mode;
use crate::report::{Op, Report, Samples};
use crate::shuttle::{Link, Shuttle};
use godwit_tests::linux::LinuxGuest;
use godwit_wire::migration::MigrationPolicy;
use godwit_wire::unit::Mib;

const MEMORY: Mib = Mib(8192);
/// Random data in the guest.
const FILL: Mib = Mib(256);
const RUNS: usize = 5;
const MODES: [Mode; 3] = [Mode::Lifted, Mode::Multifd(2), Mode::Multifd(4)];
const GOAL: f64 = 0.3;

pub(super) async fn measure(report: &mut Report, linux: &LinuxGuest) -> anyhow::Result<()> {
    report.option("zero_guest", format!("{MEMORY}, {FILL} of it random"));
    let mut ours = Shuttle::take_off(Some(linux), MEMORY, FILL).await?;
    let mut qemu = qemu_with(report, "zero", linux, MEMORY, FILL).await?;
    let mut seconds = Samples::default();
    for run in 0..=RUNS {
        let landing = ours.fly(MigrationPolicy::default(), Link::Plain).await?;
        println!("  run {run}: {:?}", landing.status.progress);
        let mut flown = vec![("godwit".to_owned(), landing.seconds)];
        if let Some(qemu) = &mut qemu {
            for mode in MODES {
                flown.push((mode.label(), qemu.fly(mode).await?.seconds));
            }
        }
        // The first warms up.
        if run > 0 {
            flown
                .into_iter()
                .for_each(|(name, took)| seconds.push(name, took));
        }
    }
    ours.verify().await?;
    seconds.report(report, "zero", "s");
    let best = MODES.map(|mode| seconds.median(&mode.label()));
    let best = best.into_iter().fold(f64::NAN, f64::min);
    if !best.is_nan() {
        report.figure(
            "zero_time_ratio_to_qemu_best",
            seconds.median("godwit") / best,
            "ratio",
            Op::AtMost,
            GOAL,
        );
    }
    Ok(())
}
