//! Live migration against the peers, in one run, on one machine, with the same guest.
//!
//! Each section measures one promise and stands for itself. The peers' guests and ours take turns, so that whatever
//! else the machine does meets all of them.

mod dirtying;
mod downtime;
mod hand_over;
mod homecoming;
mod throughput;
mod zero;

use crate::huge_pages::SharedHugePages;
use crate::peer::{self, Mode, Qemu};
use crate::report::{Owed, Report};
use anyhow::Context;
use godwit_tests::linux::LinuxGuest;
use godwit_wire::unit::Mib;

/// Measures the chosen sections.
pub(crate) async fn measure(report: &mut Report, linux: Option<&LinuxGuest>) -> anyhow::Result<()> {
    let linux = linux.context("the peers move the Linux guest, and there is none here")?;
    introduce_peers(report);
    let _huge_pages = SharedHugePages::advise(report);
    if report.begins("throughput", Owed::Figure) {
        throughput::measure(report, linux)
            .await
            .context("throughput")?;
    }
    if report.begins("downtime", Owed::Figure) {
        downtime::measure(report, linux).await.context("downtime")?;
    }
    if report.begins("hand-over", Owed::Figure) {
        hand_over::measure(report, linux)
            .await
            .context("hand-over")?;
    }
    if report.begins("dirtying", Owed::Figure) {
        dirtying::measure(report, linux).await.context("dirtying")?;
    }
    if report.begins("return", Owed::Figure) {
        homecoming::measure(report, linux).await.context("return")?;
    }
    if report.begins("zero", Owed::Figure) {
        zero::measure(report, linux).await.context("zero")?;
    }
    Ok(())
}

/// Says which peers take part and which do not.
fn introduce_peers(report: &mut Report) {
    match Qemu::version() {
        Some(version) => {
            report.option("qemu_version", version);
            for mode in [&[Mode::Defaults][..], &Mode::UNLIMITED].concat() {
                report.option(mode.label(), mode.settings());
            }
        }
        None => peer::is_missing(report, "qemu", "qemu-system-x86_64 is not installed"),
    }
    peer::cloud_hypervisor(report);
}

/// QEMU with a guest full of random data, if it is installed.
async fn qemu_with(
    report: &mut Report,
    section: &str,
    linux: &LinuxGuest,
    memory: Mib,
    fill: Mib,
) -> anyhow::Result<Option<Qemu>> {
    if Qemu::version().is_none() {
        return Ok(None);
    }
    report.option(format!("qemu_options_{section}"), Qemu::options(memory));
    let mut qemu = Qemu::boot(linux, memory).await.context("QEMU")?;
    qemu.fill(fill).await?;
    Ok(Some(qemu))
}
