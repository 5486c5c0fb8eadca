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

use crate::host_memory::HostMemory;
use crate::peer::{self, Mode, Qemu};
use crate::report::{Owed, Report};
use anyhow::Context;
use godwit_tests::linux::LinuxGuest;
use godwit_wire::unit::Mib;

/// Measures the chosen sections.
pub(crate) async fn measure(report: &mut Report, linux: Option<&LinuxGuest>) -> anyhow::Result<()> {
    let linux = linux.context("the peers move the Linux guest, and there is none here")?;
    introduce_peers(report);
    let _memory = HostMemory::prepare(report);
    if report.begins("throughput", Owed::Figure) {
        let outcome = throughput::measure(report, linux).await;
        report.ends(outcome);
    }
    if report.begins("downtime", Owed::Figure) {
        let outcome = downtime::measure(report, linux).await;
        report.ends(outcome);
    }
    if report.begins("hand-over", Owed::Figure) {
        let outcome = hand_over::measure(report, linux).await;
        report.ends(outcome);
    }
    if report.begins("dirtying", Owed::Figure) {
        let outcome = dirtying::measure(report, linux).await;
        report.ends(outcome);
    }
    if report.begins("return", Owed::Figure) {
        let outcome = homecoming::measure(report, linux).await;
        report.ends(outcome);
    }
    if report.begins("zero", Owed::Figure) {
        let outcome = zero::measure(report, linux).await;
        report.ends(outcome);
    }
    Ok(())
}

/// Says which peers take part and how. A section that misses one says so itself.
fn introduce_peers(report: &mut Report) {
    if let Some(version) = Qemu::version() {
        report.option("qemu_version", version);
        for mode in [&[Mode::Defaults][..], &Mode::UNLIMITED].concat() {
            report.option(mode.label(), mode.settings());
        }
    }
    peer::cloud_hypervisor(report);
}

/// QEMU with a guest full of random data. Where it is not installed, the report says so.
async fn qemu_with(
    report: &mut Report,
    section: &str,
    linux: &LinuxGuest,
    memory: Mib,
    fill: Mib,
) -> anyhow::Result<Option<Qemu>> {
    if Qemu::version().is_none() {
        report.peer_is_missing("qemu", peer::QEMU_MISSING);
        return Ok(None);
    }
    report.option(format!("qemu_options_{section}"), Qemu::options(memory));
    let mut qemu = Qemu::boot(linux, memory).await.context("QEMU")?;
    qemu.fill(fill).await?;
    Ok(Some(qemu))
}
