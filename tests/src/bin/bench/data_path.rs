//! The data paths of disks and network cards without a guest: a driver fills the rings as fast as the device empties
//! them, and the processor time of the device alone is counted.

use crate::report::Report;
use anyhow::{Context, bail, ensure};
use godwit_devices::block::{Block, BlockConfig, IoMode};
use godwit_devices::device::Start;
use godwit_devices::mock::{Buffer, MockDriver, recorded_events};
use godwit_devices::net::{Net, NetConfig};
use godwit_tests::tap::Tap;
use godwit_tests::test_dir::TestDir;
use godwit_wire::devices::{DiskAccess, DiskFormat, DiskLimits, MacAddress, NicLimits, OnIoError};
use godwit_wire::id::VmId;
use rustix::param::clock_ticks_per_second;
use rustix::time::{ClockId, clock_gettime};
use std::fs::File;
use std::net::UdpSocket;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
use vm_memory::Bytes;

const WARM_UP: usize = 1;
const RUNS: usize = 5;
const FILE_BYTES: u64 = 512 << 20;
const MEMORY_BYTES: u64 = 64 << 20;
/// Bytes that pass in one run.
const RUN_BYTES: u64 = 512 << 20;
/// Requests in one run, at most.
const RUN_REQUESTS: u64 = 60_000;
/// A device that answers nothing for this long is broken.
const PATIENCE: Duration = Duration::from_secs(10);
/// Header of a frame (virtio 1.2, 5.1.6).
const NET_HEADER_BYTES: u32 = 12;
const FRAMES: u64 = 100_000;
const MAC: MacAddress = MacAddress([0x52, 0, 0, 0, 0, 9]);

/// One pattern of requests.
struct Pattern {
    name: &'static str,
    bytes: u32,
    depth: usize,
    write: Direction,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Direction {
    Read,
    Write,
}

const PATTERNS: [Pattern; 4] = [
    Pattern {
        name: "read_4k_qd32",
        bytes: 4096,
        depth: 32,
        write: Direction::Read,
    },
    Pattern {
        name: "write_4k_qd32",
        bytes: 4096,
        depth: 32,
        write: Direction::Write,
    },
    Pattern {
        name: "read_128k_qd8",
        bytes: 128 << 10,
        depth: 8,
        write: Direction::Read,
    },
    Pattern {
        name: "write_128k_qd8",
        bytes: 128 << 10,
        depth: 8,
        write: Direction::Write,
    },
];

impl Pattern {
    fn requests(&self) -> u64 {
        (RUN_BYTES / u64::from(self.bytes)).min(RUN_REQUESTS)
    }

    /// Offset of request number `nth`: scattered for small ones, in order for large ones.
    fn offset(&self, nth: u64) -> u64 {
        let slots = FILE_BYTES / u64::from(self.bytes);
        let slot = if self.bytes <= 4096 {
            nth.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 20
        } else {
            nth
        };
        slot % slots * u64::from(self.bytes)
    }
}

/// What a run took.
struct Cost {
    requests: u64,
    bytes: u64,
    wall_s: f64,
    /// Processor time of the device: everything but the driver.
    cpu_s: f64,
    /// The part of it spent outside the kernel.
    own_share: f64,
}

pub(crate) fn measure_block(report: &mut Report) -> anyhow::Result<()> {
    let dir = TestDir::new();
    let path = dir.join("disk.img");
    let file = File::options()
        .create_new(true)
        .read(true)
        .write(true)
        .open(&path)?;
    let piece = vec![0x5a; 1 << 20];
    for at in (0..FILE_BYTES).step_by(piece.len()) {
        file.write_all_at(&piece, at)?;
    }
    for pattern in &PATTERNS {
        for (mode, label) in [(IoMode::Automatic, "uring"), (IoMode::Threads, "threads")] {
            let costs = repeat(|| through_the_device(&path, mode, pattern))?;
            tell(report, &format!("blk_{}_{label}", pattern.name), &costs);
        }
        let costs = repeat(|| plain_calls(&file, pattern))?;
        tell(
            report,
            &format!("blk_{}_plain_pread_pwrite", pattern.name),
            &costs,
        );
    }
    Ok(())
}

fn through_the_device(path: &Path, mode: IoMode, pattern: &Pattern) -> anyhow::Result<Cost> {
    let config = BlockConfig {
        name: "disk".into(),
        path: path.to_owned(),
        format: DiskFormat::Raw,
        access: DiskAccess::ReadWrite,
        limits: DiskLimits::default(),
        on_error: OnIoError::Report,
        lock: None,
        vm: VmId::fresh(),
    };
    let (events, _) = recorded_events();
    let mut driver = MockDriver::new(Block::open_with(config, events, mode)?, MEMORY_BYTES);
    driver.activate(Start::Working)?;
    let slots: Vec<_> = (0..pattern.depth)
        .map(|_| {
            (
                driver.allocate(16),
                driver.allocate(pattern.bytes),
                driver.allocate(1),
            )
        })
        .collect();
    let mut slot_of_head = vec![0; 1 << 16];
    let (requests, mut sent, mut done) = (pattern.requests(), 0, 0);
    let mut free: Vec<usize> = (0..slots.len()).collect();
    let meter = Meter::start();
    while done < requests {
        let before = sent;
        while sent < requests
            && let Some(slot) = free.pop()
        {
            let (header, data, status) = slots[slot];
            let kind = u32::from(pattern.write == Direction::Write);
            let mut bytes = [0; 16];
            bytes[..4].copy_from_slice(&kind.to_le_bytes());
            bytes[8..].copy_from_slice(&(pattern.offset(sent) / 512).to_le_bytes());
            driver.memory().write_slice(&bytes, header)?;
            let data = match pattern.write {
                Direction::Read => Buffer::Writable(data, pattern.bytes),
                Direction::Write => Buffer::Readable(data, pattern.bytes),
            };
            let chain = [
                Buffer::Readable(header, 16),
                data,
                Buffer::Writable(status, 1),
            ];
            let head = driver.submit(0, &chain).context("the ring has room")?;
            slot_of_head[usize::from(head)] = slot;
            sent += 1;
        }
        if sent > before {
            driver.kick(0);
        }
        let mut used = Some(
            driver
                .wait_used(0, PATIENCE)
                .context("the disk is silent")?,
        );
        while let Some(chain) = used {
            let slot = slot_of_head[usize::from(chain.head)];
            ensure!(driver.bytes(slots[slot].2, 1) == [0], "a request failed");
            free.push(slot);
            done += 1;
            used = driver.poll_used(0);
        }
    }
    Ok(meter.stop(
        requests,
        requests * u64::from(pattern.bytes),
        Whose::AllButThisThread,
    ))
}

/// The same pattern by one thread with one call a request: what the kernel alone costs.
fn plain_calls(file: &File, pattern: &Pattern) -> anyhow::Result<Cost> {
    let mut buffer = vec![0; pattern.bytes as usize];
    let requests = pattern.requests();
    let meter = Meter::start();
    for nth in 0..requests {
        match pattern.write {
            Direction::Read => file.read_exact_at(&mut buffer, pattern.offset(nth))?,
            Direction::Write => file.write_all_at(&buffer, pattern.offset(nth))?,
        }
    }
    Ok(meter.stop(
        requests,
        requests * u64::from(pattern.bytes),
        Whose::ThisThread,
    ))
}

pub(crate) fn measure_net(report: &mut Report) -> anyhow::Result<()> {
    for (bytes, name) in [(64, "net_transmit_64"), (1514, "net_transmit_1514")] {
        let costs = repeat(|| transmit(bytes))?;
        tell(report, name, &costs);
    }
    let costs = repeat(receive)?;
    tell(report, "net_receive_1514", &costs);
    Ok(())
}

fn card(tap: &Tap) -> anyhow::Result<MockDriver<Net>> {
    let config = NetConfig {
        name: "nic".into(),
        mac: MAC,
        tap: tap.name.clone(),
        mtu: 1500,
        queue_pairs: 1,
        limits: NicLimits::default(),
        address: None,
    };
    let mut driver = MockDriver::new(Net::open(config)?, MEMORY_BYTES);
    driver.activate(Start::Working)?;
    Ok(driver)
}

const RECEIVE: usize = 0;
const TRANSMIT: usize = 1;

fn transmit(frame_bytes: u32) -> anyhow::Result<Cost> {
    let tap = Tap::new("tx")?;
    let mut driver = card(&tap)?;
    let mut frame = vec![0; (NET_HEADER_BYTES + frame_bytes) as usize];
    // To nobody, in a protocol for experiments: the host's stack drops it at once.
    frame[12..18].copy_from_slice(&[0x52, 0, 0, 0, 0, 1]);
    frame[18..24].copy_from_slice(&MAC.0);
    frame[24..26].copy_from_slice(&[0x88, 0xb5]);
    let frame = driver.place(&frame);
    let (mut sent, mut done) = (0, 0);
    let meter = Meter::start();
    while done < FRAMES {
        let before = sent;
        while sent < FRAMES
            && driver
                .submit(
                    TRANSMIT,
                    &[Buffer::Readable(frame, NET_HEADER_BYTES + frame_bytes)],
                )
                .is_some()
        {
            sent += 1;
        }
        if sent > before {
            driver.kick(TRANSMIT);
        }
        driver
            .wait_used(TRANSMIT, PATIENCE)
            .context("the card is silent")?;
        done += 1;
        while driver.poll_used(TRANSMIT).is_some() {
            done += 1;
        }
    }
    Ok(meter.stop(
        FRAMES,
        FRAMES * u64::from(frame_bytes),
        Whose::AllButThisThread,
    ))
}

/// The host's stack sends datagrams to a neighbour behind the tap, as fast as it can.
fn receive() -> anyhow::Result<Cost> {
    const BUFFER_BYTES: u32 = 2048;
    const PAYLOAD_BYTES: usize = 1472;
    let tap = Tap::new("rx")?;
    let subnet = format!("10.214.{}", std::process::id() & 0xff);
    tap.address(&format!("{subnet}.1/24"))?;
    tap.neighbour(&format!("{subnet}.2"), &MAC.to_string())?;
    let mut driver = card(&tap)?;
    let mut buffer_of_head = vec![None; 1 << 16];
    loop {
        let buffer = driver.allocate(BUFFER_BYTES);
        match driver.submit(RECEIVE, &[Buffer::Writable(buffer, BUFFER_BYTES)]) {
            Some(head) => buffer_of_head[usize::from(head)] = Some(buffer),
            None => break,
        }
    }
    driver.kick(RECEIVE);
    let socket = UdpSocket::bind((format!("{subnet}.1"), 0))?;
    socket.connect((format!("{subnet}.2"), 9))?;
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let sender = scope.spawn(|| {
            let payload = [0; PAYLOAD_BYTES];
            while !over.load(Ordering::Relaxed) {
                // A full queue drops the datagram or says so: both are what a fast sender does.
                let _ = socket.send(&payload);
            }
            Cpu::of_this_thread()
        });
        let received = receive_frames(&mut driver, &buffer_of_head);
        over.store(true, Ordering::Relaxed);
        let sender = sender.join();
        let (meter, bytes) = received?;
        let Ok(sender) = sender else {
            bail!("the sender panicked")
        };
        Ok(meter.stop(FRAMES, bytes, Whose::AllButThisThreadAnd(sender)))
    })
}

fn receive_frames(
    driver: &mut MockDriver<Net>,
    buffer_of_head: &[Option<vm_memory::GuestAddress>],
) -> anyhow::Result<(Meter, u64)> {
    let meter = Meter::start();
    let (mut frames, mut bytes) = (0, 0);
    while frames < FRAMES {
        let mut used = Some(
            driver
                .wait_used(RECEIVE, PATIENCE)
                .context("no frame arrives")?,
        );
        while let Some(chain) = used {
            frames += 1;
            bytes += u64::from(chain.len.saturating_sub(NET_HEADER_BYTES));
            let buffer = buffer_of_head[usize::from(chain.head)].context("a buffer of ours")?;
            driver.submit(RECEIVE, &[Buffer::Writable(buffer, 2048)]);
            used = driver.poll_used(RECEIVE);
        }
        driver.kick(RECEIVE);
    }
    Ok((meter, bytes))
}

fn repeat(run: impl Fn() -> anyhow::Result<Cost>) -> anyhow::Result<Vec<Cost>> {
    let mut costs = Vec::new();
    for nth in 0..WARM_UP + RUNS {
        let cost = run()?;
        if nth >= WARM_UP {
            costs.push(cost);
        }
    }
    Ok(costs)
}

fn tell(report: &mut Report, name: &str, costs: &[Cost]) {
    let mut raw = |what: &str, unit: &str, value: &dyn Fn(&Cost) -> f64| {
        let values: Vec<f64> = costs.iter().map(value).collect();
        report.raw(&format!("{name}_{what}"), unit, &values);
    };
    raw("requests_per_s", "1/s", &|cost| {
        cost.requests as f64 / cost.wall_s
    });
    raw("requests_per_core_s", "1/s", &|cost| {
        cost.requests as f64 / cost.cpu_s
    });
    raw("gb_per_core_s", "GB/s", &|cost| {
        cost.bytes as f64 / cost.cpu_s / 1e9
    });
    raw("own_code_share", "of device CPU", &|cost| cost.own_share);
}

/// User and system time.
#[derive(Clone, Copy, Default)]
struct Cpu {
    user_s: f64,
    all_s: f64,
}

impl Cpu {
    fn of_this_process() -> Self {
        Self::new(ClockId::ProcessCPUTime, "/proc/self/stat")
    }

    fn of_this_thread() -> Self {
        Self::new(ClockId::ThreadCPUTime, "/proc/thread-self/stat")
    }

    /// All time by the clock, which is exact; the user share by the kernel's ticks.
    fn new(clock: ClockId, stat: &str) -> Self {
        let now = clock_gettime(clock);
        let stat = std::fs::read_to_string(stat).unwrap_or_default();
        // After the name in parentheses: state, then numbers, of which utime is the 12th.
        let ticks = stat
            .rsplit_once(')')
            .and_then(|(_, rest)| rest.split_whitespace().nth(11))
            .and_then(|ticks| ticks.parse::<u64>().ok())
            .unwrap_or(0);
        Self {
            user_s: ticks as f64 / clock_ticks_per_second() as f64,
            all_s: now.tv_sec as f64 + now.tv_nsec as f64 / 1e9,
        }
    }

    fn less(self, other: Self) -> Self {
        Self {
            user_s: self.user_s - other.user_s,
            all_s: self.all_s - other.all_s,
        }
    }
}

enum Whose {
    ThisThread,
    AllButThisThread,
    AllButThisThreadAnd(Cpu),
}

struct Meter {
    started: Instant,
    process: Cpu,
    thread: Cpu,
}

impl Meter {
    fn start() -> Self {
        Self {
            process: Cpu::of_this_process(),
            thread: Cpu::of_this_thread(),
            started: Instant::now(),
        }
    }

    fn stop(&self, requests: u64, bytes: u64, whose: Whose) -> Cost {
        let wall_s = self.started.elapsed().as_secs_f64();
        let process = Cpu::of_this_process().less(self.process);
        let thread = Cpu::of_this_thread().less(self.thread);
        let cpu = match whose {
            Whose::ThisThread => thread,
            Whose::AllButThisThread => process.less(thread),
            Whose::AllButThisThreadAnd(other) => process.less(thread).less(other),
        };
        Cost {
            requests,
            bytes,
            wall_s,
            cpu_s: cpu.all_s,
            own_share: (cpu.user_s / cpu.all_s).clamp(0.0, 1.0),
        }
    }
}
