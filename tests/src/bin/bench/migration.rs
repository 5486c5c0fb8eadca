//! Live migration of an idle guest of 1 GiB full of random data, back and forth between two VMM processes.

use crate::report::{Op, Report, maximum};
use anyhow::Context;
use godwit_tests::linux::LinuxGuest;
use godwit_tests::migration::migrate;
use godwit_tests::test_dir::TestDir;
use godwit_tests::vmm::{self, BOOT_PATIENCE, Vmm, new_vm};
use godwit_wire::migration::MigrationPolicy;
use godwit_wire::unit::Mib;
use godwit_wire::vmm_api::CreateRequest;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::time::Instant;

const MEMORY: Mib = Mib(1024);
/// Random data in the guest; the rest is the guest's kernel and its reserve.
const FILL_MIB: u64 = 900;
const WARM_UP: usize = 2;
/// Migrations whose throughput is compared with plain TCP, measured before and after each.
const THROUGHPUT_RUNS: usize = 7;
/// Migrations whose downtime counts.
const DOWNTIME_RUNS: usize = 50;
const TCP_BYTES: usize = 512 << 20;
const TCP_WRITE_BYTES: usize = 1 << 20;

/// A guest that flies back and forth.
struct Shuttle {
    dir: TestDir,
    here: Vmm,
    request: CreateRequest,
    flights: usize,
}

/// What one flight took.
struct Landing {
    mb_per_s: f64,
    downtime_ms: f64,
    blackout_ms: f64,
}

pub(crate) async fn measure(report: &mut Report, linux: Option<&LinuxGuest>) -> anyhow::Result<()> {
    let spec = match linux {
        Some(linux) => vmm::linux(linux, 1, MEMORY),
        None => vmm::pilot(1, MEMORY),
    };
    let mut shuttle = Shuttle::take_off(new_vm(spec)).await?;
    for _ in 0..WARM_UP {
        shuttle.fly().await?;
    }
    throughput(report, &mut shuttle).await?;
    downtime(report, &mut shuttle).await?;
    shuttle.verify().await
}

async fn throughput(report: &mut Report, shuttle: &mut Shuttle) -> anyhow::Result<()> {
    let (mut tcp, mut distinct, mut migration, mut ratios) =
        (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    let mut before = tcp_mb_per_s(Buffers::Reused)?;
    for _ in 0..THROUGHPUT_RUNS {
        let flight = shuttle.fly().await?.mb_per_s;
        let after = tcp_mb_per_s(Buffers::Reused)?;
        distinct.push(tcp_mb_per_s(Buffers::Distinct)?);
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
        let landing = shuttle.fly().await?;
        downtimes.push(landing.downtime_ms);
        blackouts.push(landing.blackout_ms);
        excesses.push(landing.blackout_ms - landing.downtime_ms);
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

impl Shuttle {
    async fn take_off(request: CreateRequest) -> anyhow::Result<Self> {
        let dir = TestDir::new();
        let here = Vmm::boot(&dir, "vmm-0", &request).await?;
        here.serial()
            .await?
            .wait_for(vmm::greeting(&request.spec), BOOT_PATIENCE)
            .await?;
        here.shell()
            .await?
            .command(&format!("fill {FILL_MIB}"))
            .await
            .context("fill")?;
        Ok(Self {
            dir,
            here,
            request,
            flights: 0,
        })
    }

    /// Moves the guest into a fresh VMM.
    async fn fly(&mut self) -> anyhow::Result<Landing> {
        self.flights += 1;
        let there = Vmm::start(&self.dir, &format!("vmm-{}", self.flights)).await?;
        let mut shell = self.here.shell().await?;
        shell.command("ticks reset").await?;
        drop(shell);
        let start = Instant::now();
        let status = migrate(
            &self.here,
            &there,
            &mut self.request,
            MigrationPolicy::default(),
        )
        .await?;
        let elapsed_s = start.elapsed().as_secs_f64();
        let blackout_us = there
            .shell()
            .await?
            .command("ticks")
            .await?
            .number("max_blackout_us");
        self.here = there;
        Ok(Landing {
            mb_per_s: status.progress.transferred_bytes.0 as f64 / elapsed_s / 1e6,
            downtime_ms: status
                .progress
                .downtime_us
                .context("the source knows the downtime")? as f64
                / 1e3,
            blackout_ms: blackout_us as f64 / 1e3,
        })
    }

    /// What flew that often must still be whole.
    async fn verify(&self) -> anyhow::Result<()> {
        let reply = self.here.shell().await?.command("verify").await?;
        println!("after {} migrations: {reply}", self.flights);
        Ok(())
    }
}

/// Which memory the bytes of the plain TCP transfer come from and go to.
#[derive(Clone, Copy)]
enum Buffers {
    /// One small buffer at each end, over and over: the link alone.
    Reused,
    /// As much memory as bytes at each end, as a migration has it.
    Distinct,
}

/// Plain TCP over loopback: one connection, writes of 1 MiB, from the first byte to the receiver's word that it
/// has all.
fn tcp_mb_per_s(buffers: Buffers) -> anyhow::Result<f64> {
    let memory = match buffers {
        Buffers::Reused => TCP_WRITE_BYTES,
        Buffers::Distinct => TCP_BYTES,
    };
    // Written once, so that no page fault is measured.
    let (source, mut sink) = (vec![0x5a_u8; memory], vec![0xa5_u8; memory]);
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let address = listener.local_addr()?;
    let receiver = std::thread::spawn(move || -> std::io::Result<()> {
        let (mut stream, _) = listener.accept()?;
        for write in 0..TCP_BYTES / TCP_WRITE_BYTES {
            let at = write * TCP_WRITE_BYTES % memory;
            stream.read_exact(&mut sink[at..at + TCP_WRITE_BYTES])?;
        }
        stream.write_all(&[1])
    });
    let mut stream = TcpStream::connect(address)?;
    let start = Instant::now();
    for write in 0..TCP_BYTES / TCP_WRITE_BYTES {
        let at = write * TCP_WRITE_BYTES % memory;
        stream.write_all(&source[at..at + TCP_WRITE_BYTES])?;
    }
    stream.read_exact(&mut [0])?;
    let elapsed_s = start.elapsed().as_secs_f64();
    receiver.join().expect("the receiver does not panic")?;
    Ok(TCP_BYTES as f64 / elapsed_s / 1e6)
}
