//! Live migration of an idle guest of 1 GiB full of random data, back and forth between two VMM processes.

use crate::report::{Op, Report, maximum};
use crate::shuttle::{Landing, Link, Shuttle};
use crate::tcp::{self, Buffers};
use godwit_tests::linux::LinuxGuest;
use godwit_wire::migration::MigrationPolicy;
use godwit_wire::unit::Mib;

const MEMORY: Mib = Mib(1024);
/// Random data in the guest; the rest is the guest's kernel and its reserve.
const FILL: Mib = Mib(900);
const WARM_UP: usize = 2;
/// Migrations whose throughput is compared with plain TCP, measured before and after each.
const THROUGHPUT_RUNS: usize = 7;
/// Migrations whose downtime counts.
const DOWNTIME_RUNS: usize = 50;

pub(crate) async fn measure(report: &mut Report, linux: Option<&LinuxGuest>) -> anyhow::Result<()> {
    let mut shuttle = Shuttle::take_off(linux, MEMORY, FILL).await?;
    for _ in 0..WARM_UP {
        fly(&mut shuttle).await?;
    }
    throughput(report, &mut shuttle).await?;
    downtime(report, &mut shuttle).await?;
    shuttle.verify().await
}

async fn fly(shuttle: &mut Shuttle) -> anyhow::Result<Landing> {
    shuttle.fly(MigrationPolicy::default(), Link::Plain).await
}

async fn throughput(report: &mut Report, shuttle: &mut Shuttle) -> anyhow::Result<()> {
    let (mut tcp, mut distinct, mut migration, mut ratios) =
        (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    let mut before = tcp::mb_per_s(1, Buffers::Reused)?;
    for _ in 0..THROUGHPUT_RUNS {
        let flight = fly(shuttle).await?.mb_per_s();
        let after = tcp::mb_per_s(1, Buffers::Reused)?;
        distinct.push(tcp::mb_per_s(1, Buffers::Distinct)?);
        ratios.push(flight / ((before + after) / 2.0));
        migration.push(flight);
        tcp.push(after);
        before = after;
    }
    report.raw("tcp_loopback_mb_per_s", "MB/s", &tcp);
    report.raw("tcp_loopback_memory_to_memory_mb_per_s", "MB/s", &distinct);
    report.raw("migration_mb_per_s", "MB/s", &migration);
    let median = report.raw("migration_throughput_ratio_to_tcp", "ratio", &ratios);
    report.figure(
        "migration_throughput_ratio_to_tcp",
        median,
        "ratio",
        Op::AtLeast,
        0.8,
    );
    Ok(())
}

async fn downtime(report: &mut Report, shuttle: &mut Shuttle) -> anyhow::Result<()> {
    let (mut downtimes, mut blackouts, mut excesses) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..DOWNTIME_RUNS {
        let landing = fly(shuttle).await?;
        let (downtime_ms, blackout_ms) = (landing.downtime_ms()?, landing.guest_blackout_ms);
        downtimes.push(downtime_ms);
        blackouts.push(blackout_ms);
        excesses.push(blackout_ms - downtime_ms);
    }
    let median = report.raw("migration_downtime_ms", "ms", &downtimes);
    report.figure("migration_downtime_p50_ms", median, "ms", Op::AtMost, 20.0);
    report.raw("guest_blackout_ms", "ms", &blackouts);
    report.raw("guest_blackout_beyond_downtime_ms", "ms", &excesses);
    report.figure(
        "guest_blackout_beyond_downtime_max_ms",
        maximum(&excesses),
        "ms",
        Op::AtMost,
        10.0,
    );
    Ok(())
}
