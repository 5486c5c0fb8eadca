use super::*;
use crate::device::Start;
use crate::memory::GuestMemory;
use crate::mock::{Buffer, MockDriver, NEXT, WRITE};
use rustix::fs::{MemfdFlags, SeekFrom};
use std::fs::File;
use std::time::Duration;
use virtio_queue::desc::split::Descriptor;
use vm_memory::{Bytes as _, FileOffset, GuestAddress, GuestMemoryBackend};

const LONG: Duration = Duration::from_secs(20);
const MEMORY: u64 = 8 << 20;
const PAGES: u64 = MEMORY / PAGE_BYTES;
const INFLATE: usize = 0;
const DEFLATE: usize = 1;
const STATISTICS: usize = 2;
const REPORT: usize = 4;

/// What the hook was told.
type Discarded = Arc<Mutex<Vec<(u64, u64)>>>;

struct Machine {
    driver: MockDriver<Balloon>,
    control: BalloonControl,
    file: Arc<File>,
    discarded: Discarded,
}

fn memory_on(file: &Arc<File>) -> GuestMemory {
    rustix::fs::ftruncate(&**file, MEMORY).unwrap();
    GuestMemory::from_ranges_with_files([(
        GuestAddress(0),
        MEMORY as usize,
        Some(FileOffset::from_arc(file.clone(), 0)),
    )])
    .unwrap()
}

fn hooked() -> (Balloon, BalloonControl, Discarded) {
    let (mut balloon, control) = Balloon::new(Bytes(MEMORY));
    let discarded = Discarded::default();
    let theirs = discarded.clone();
    balloon.on_discard(Arc::new(move |address, bytes| {
        theirs.lock().unwrap().push((address, bytes));
    }));
    (balloon, control, discarded)
}

/// A machine whose upper 4 MiB are full of ones.
fn machine_on(file: File) -> Machine {
    let file = Arc::new(file);
    let memory = memory_on(&file);
    for address in (MEMORY / 2..MEMORY).step_by(4096) {
        memory
            .write_slice(&[1; 4096], GuestAddress(address))
            .unwrap();
    }
    let (balloon, control, discarded) = hooked();
    let mut driver = MockDriver::over(balloon, memory);
    driver.activate(Start::Working).unwrap();
    Machine {
        driver,
        control,
        file,
        discarded,
    }
}

fn machine() -> Machine {
    machine_on(File::from(
        rustix::fs::memfd_create("balloon-test", MemfdFlags::CLOEXEC).unwrap(),
    ))
}

impl Machine {
    fn name_pages(&mut self, queue: usize, frames: &[u32]) {
        let bytes: Vec<u8> = frames
            .iter()
            .flat_map(|frame| frame.to_le_bytes())
            .collect();
        let buffer = self.driver.place(&bytes);
        let buffers = [Buffer::Readable(buffer, bytes.len() as u32)];
        assert_eq!(self.driver.request(queue, &buffers, LONG).unwrap().len, 0);
    }

    fn counter(&self, name: &str) -> u64 {
        let metrics = self.driver.device().metrics();
        metrics.iter().find(|(known, _)| *known == name).unwrap().1
    }

    fn is_hole(&self, frame: u64) -> bool {
        let at = frame * PAGE_BYTES;
        rustix::fs::seek(&*self.file, SeekFrom::Hole(at)) == Ok(at)
    }

    fn first_bytes(&self, frame: u64) -> Vec<u8> {
        self.driver.bytes(GuestAddress(frame * PAGE_BYTES), 8)
    }
}

#[test]
fn inflated_pages_go_back_to_the_host_in_runs_and_read_as_zeros() {
    let mut machine = machine();
    let first = (PAGES / 2) as u32;
    machine.name_pages(
        INFLATE,
        &[first + 2, first, first + 1, first + 1, first + 9],
    );

    let base = u64::from(first);
    for frame in [base, base + 1, base + 2, base + 9] {
        assert!(machine.is_hole(frame));
        assert_eq!(machine.first_bytes(frame), [0; 8]);
    }
    assert_eq!(machine.first_bytes(base + 3), [1; 8]);
    assert_eq!(
        *machine.discarded.lock().unwrap(),
        [
            (base * PAGE_BYTES, 3 * PAGE_BYTES),
            ((base + 9) * PAGE_BYTES, PAGE_BYTES)
        ]
    );
    assert_eq!(machine.counter("discarded_bytes"), 4 * PAGE_BYTES);
}

#[test]
fn a_discarded_page_is_sent_again_by_a_migration() {
    let mut machine = machine();
    let frame = PAGES - 1;
    let region = machine.driver.memory().iter().next().unwrap();
    vm_memory::MmapRegion::bitmap(region).reset();
    machine.name_pages(INFLATE, &[frame as u32]);
    let dirty = machine.driver.dirty_pages();
    assert!(dirty.contains(&frame));
    assert!(!dirty.contains(&(frame - 1)));
}

#[test]
fn pages_that_are_no_memory_are_counted_and_nothing_else() {
    let mut machine = machine();
    machine.name_pages(INFLATE, &[PAGES as u32, u32::MAX, (PAGES - 1) as u32]);
    machine.name_pages(DEFLATE, &[PAGES as u32, u32::MAX]);
    assert_eq!(machine.counter("foreign_pages"), 2);
    assert!(machine.is_hole(PAGES - 1));
    assert_eq!(machine.driver.needs_reset(), None);
}

#[test]
fn a_request_without_end_is_refused() {
    let mut machine = machine();
    let buffer = machine.driver.allocate(4 * 16 * 1024 + 4);
    let buffers = [Buffer::Readable(buffer, 4 * 16 * 1024 + 4)];
    machine.driver.submit(INFLATE, &buffers).unwrap();
    machine.driver.kick(INFLATE);
    assert!(machine.driver.wait_needs_reset(LONG).is_some());
    assert_eq!(machine.driver.poll_used(INFLATE), None);
}

#[test]
fn buffers_that_are_not_all_memory_are_refused_and_no_page_is_given_back() {
    let misdeeds = [
        ("page numbers outside memory", INFLATE, MEMORY, 4, 0),
        ("page numbers past the end", INFLATE, MEMORY - 4, 8, 0),
        ("free memory outside memory", REPORT, MEMORY, 4096, WRITE),
        (
            "free memory past the end",
            REPORT,
            MEMORY - 4096,
            8192,
            WRITE,
        ),
    ];
    for (name, queue, address, len, flags) in misdeeds {
        let mut machine = machine();
        let driver = &mut machine.driver;
        driver.write_descriptor(queue, 0, Descriptor::new(address, len, flags, 0));
        driver.offer(queue, 0);
        driver.kick(queue);
        let why = driver.wait_needs_reset(LONG);
        assert!(why.is_some_and(|why| why.contains("memory")), "{name}");
        assert_eq!(driver.poll_used(queue), None, "{name}");
        assert!(machine.discarded.lock().unwrap().is_empty(), "{name}");
        assert_eq!(machine.first_bytes(PAGES - 1), [1; 8], "{name}");
        assert!(!machine.is_hole(PAGES - 1), "{name}");

        machine.driver.reset();
        machine.driver.activate(Start::Working).unwrap();
        machine.name_pages(INFLATE, &[(PAGES - 1) as u32]);
        assert!(machine.is_hole(PAGES - 1), "{name}");
    }
}

#[test]
fn a_chain_that_loops_stops_every_queue_until_a_reset() {
    let mut machine = machine();
    let driver = &mut machine.driver;
    driver.write_descriptor(DEFLATE, 3, Descriptor::new(0x8000, 4, NEXT, 3));
    driver.offer(DEFLATE, 3);
    driver.kick(DEFLATE);
    assert!(driver.wait_needs_reset(LONG).is_some());

    driver.reset();
    driver.activate(Start::Working).unwrap();
    machine.name_pages(INFLATE, &[(PAGES - 1) as u32]);
    assert!(machine.is_hole(PAGES - 1));
}

#[test]
fn reported_memory_is_given_back_where_whole_pages_are_free() {
    for queue in [3, REPORT] {
        let mut machine = machine();
        let start = MEMORY / 2 + 100;
        let buffers = [
            Buffer::Writable(GuestAddress(start), 3 * 4096),
            Buffer::Writable(GuestAddress(MEMORY - 4096), 4096),
        ];
        assert!(machine.driver.request(queue, &buffers, LONG).is_some());
        let first = MEMORY / 2 / PAGE_BYTES;
        let holes =
            [first, first + 1, first + 2, first + 3, PAGES - 1].map(|frame| machine.is_hole(frame));
        assert_eq!(holes, [false, true, true, false, true]);
    }
}

#[test]
fn linux_before_6_11_without_statistics_reports_on_queue_2() {
    let mut machine = machine();
    machine.driver.reset();
    machine.driver.accept(!STATS);
    machine.driver.activate(Start::Working).unwrap();
    let buffers = [Buffer::Writable(GuestAddress(MEMORY - 4096), 4096)];
    assert!(machine.driver.request(2, &buffers, LONG).is_some());
    assert!(machine.is_hole(PAGES - 1));
}

#[test]
fn memory_that_is_mapped_privately_is_never_punched() {
    let file = Arc::new(tempfile::tempfile().unwrap());
    rustix::fs::ftruncate(&*file, MEMORY).unwrap();
    rustix::io::pwrite(&*file, &[9; 4096], MEMORY - 4096).unwrap();
    let region = vm_memory::MmapRegion::build(
        Some(FileOffset::from_arc(file.clone(), 0)),
        MEMORY as usize,
        libc::PROT_READ | libc::PROT_WRITE,
        libc::MAP_PRIVATE | libc::MAP_NORESERVE,
    )
    .unwrap();
    let region = vm_memory::GuestRegionMmap::new(region, GuestAddress(0)).unwrap();
    let memory = GuestMemory::from_regions(vec![region]).unwrap();
    let (balloon, control, discarded) = hooked();
    let mut driver = MockDriver::over(balloon, memory);
    driver.activate(Start::Working).unwrap();
    let mut machine = Machine {
        driver,
        control,
        file,
        discarded,
    };
    machine.name_pages(INFLATE, &[(PAGES - 1) as u32]);
    assert!(machine.discarded.lock().unwrap().is_empty());
    let mut kept = [0; 4096];
    rustix::io::pread(&*machine.file, &mut kept, MEMORY - 4096).unwrap();
    assert_eq!(kept, [9; 4096]);
}

#[test]
fn the_guest_learns_the_target_and_the_operator_what_it_kept() {
    let mut machine = machine();
    machine.control.keep(Mib(6));
    assert!(machine.driver.wait_config_interrupts(1, LONG));
    let mut config = [0; 12];
    machine.driver.device().read_config(0, &mut config);
    assert_eq!(config[..4], 512u32.to_le_bytes());
    assert_eq!(config[4..], [0; 8]);

    let device = machine.driver.device_mut();
    device.write_config(4, &256u32.to_le_bytes());
    assert_eq!(machine.control.actual(), Mib(7));
    // Neither the target nor half a number can be written, and nobody gives up more than there is.
    let device = machine.driver.device_mut();
    device.write_config(0, &1u32.to_le_bytes());
    device.write_config(4, &[1, 0]);
    device.read_config(0, &mut config);
    assert_eq!(config[..8], [0, 2, 0, 0, 0, 1, 0, 0]);
    device.write_config(4, &u32::MAX.to_le_bytes());
    assert_eq!(machine.control.actual(), Mib(0));
    machine.control.keep(Mib(u64::MAX));
    assert_eq!(machine.counter("target_bytes"), 0);
}

#[test]
fn reading_the_metrics_asks_the_guest_for_new_statistics() {
    let mut machine = machine();
    let entry = |value: u64| {
        let mut bytes = 6u16.to_le_bytes().to_vec();
        bytes.extend(value.to_le_bytes());
        bytes
    };
    let buffer = machine.driver.place(&entry(1000));
    let buffers = [Buffer::Readable(buffer, 10)];
    machine.driver.submit(STATISTICS, &buffers).unwrap();
    machine.driver.kick(STATISTICS);
    // The device keeps the buffer, so its having read it shows only in the metrics.
    let shared = machine.driver.device().shared.clone();
    while shared.stats().metrics().count() == 0 {
        std::thread::yield_now();
    }
    assert_eq!(machine.counter("guest_available_bytes"), 1000);
    assert!(machine.driver.wait_used(STATISTICS, LONG).is_some());

    machine
        .driver
        .memory()
        .write_slice(&entry(2000), buffer)
        .unwrap();
    machine.driver.submit(STATISTICS, &buffers).unwrap();
    machine.driver.kick(STATISTICS);
    machine.driver.pause().unwrap();
    // Whatever the pause met, the buffer is the driver's again or still to be read.
    machine.driver.device_mut().resume().unwrap();
    while machine.counter("guest_available_bytes") != 2000 {
        std::thread::yield_now();
    }
}

#[test]
fn two_buffers_for_statistics_are_refused() {
    let mut machine = machine();
    let buffer = machine.driver.allocate(20);
    for at in [buffer.0, buffer.0 + 10] {
        let buffers = [Buffer::Readable(GuestAddress(at), 10)];
        machine.driver.submit(STATISTICS, &buffers).unwrap();
    }
    machine.driver.kick(STATISTICS);
    assert!(machine.driver.wait_needs_reset(LONG).is_some());
}

#[test]
fn a_paused_device_holds_no_buffer_of_the_driver() {
    let mut machine = machine();
    let buffer = machine.driver.allocate(10);
    let buffers = [Buffer::Readable(buffer, 10)];
    machine.driver.submit(STATISTICS, &buffers).unwrap();
    machine.driver.pause().unwrap();
    machine.driver.device_mut().resume().unwrap();
    machine.driver.pause().unwrap();
    assert!(machine.driver.poll_used(STATISTICS).is_some());
    let _ = machine.driver.device().metrics();
    assert_eq!(machine.driver.poll_used(STATISTICS), None);
}

#[test]
fn target_and_balloon_travel_with_the_machine() {
    let mut machine = machine();
    machine.control.keep(Mib(4));
    let device = machine.driver.device_mut();
    device.write_config(4, &512u32.to_le_bytes());
    let (balloon, control, _) = hooked();
    let (moved, _old) = machine.driver.move_to(balloon).unwrap();
    assert_eq!(control.actual(), Mib(6));
    let mut config = [0; 8];
    moved.device().read_config(0, &mut config);
    assert_eq!(config[..4], 1024u32.to_le_bytes());
}

#[test]
fn a_state_of_another_version_is_refused() {
    let (mut balloon, control) = Balloon::new(Bytes(MEMORY));
    for version in [STATE_VERSION - 1, STATE_VERSION + 1] {
        let saved = SavedBody::serialized(&Saved {
            version,
            health: Health::Well,
            target_pages: 1,
            actual_pages: 1,
            counters: SavedCounters::default(),
        });
        let refused = balloon.restore(saved.unwrap());
        assert!(matches!(refused, Err(DeviceError::BadState { .. })));
    }
    assert_eq!(control.actual(), Mib(8));
}

#[test]
fn a_state_with_more_pages_than_memory_is_refused() {
    let (mut balloon, control) = Balloon::new(Bytes(MEMORY));
    for (target_pages, actual_pages) in [(PAGES as u32 + 1, 0), (0, u32::MAX)] {
        let saved = SavedBody::serialized(&Saved {
            version: STATE_VERSION,
            health: Health::Well,
            target_pages,
            actual_pages,
            counters: SavedCounters::default(),
        });
        let refused = balloon.restore(saved.unwrap());
        assert!(matches!(refused, Err(DeviceError::BadState { .. })));
    }
    assert_eq!(control.actual(), Mib(8));
}

#[test]
fn the_saved_state_of_version_1_is_written_as_ever_and_read() {
    let (mut balloon, control) = Balloon::new(Bytes(MEMORY));
    control.keep(Mib(4));
    balloon.write_config(4, &512u32.to_le_bytes());
    let counters = &balloon.shared.counters;
    counters.inflated_pages.add(1);
    counters.deflated_pages.add(2);
    counters.reported_bytes.add(3);
    counters.discarded_bytes.add(4);
    counters.discard_failures.add(5);
    counters.foreign_pages.add(6);
    let state = balloon.save().unwrap();
    expect_test::expect![[r#"
        {
          "version": 1,
          "health": "well",
          "target_pages": 1024,
          "actual_pages": 512,
          "counters": {
            "inflated_pages": 1,
            "deflated_pages": 2,
            "reported_bytes": 3,
            "discarded_bytes": 4,
            "discard_failures": 5,
            "foreign_pages": 6,
          },
        }
    "#]]
    .assert_eq(&crate::golden::text_of(&state));
    let (mut target, _) = Balloon::new(Bytes(MEMORY));
    target.restore(state.clone()).unwrap();
    assert_eq!(target.save().unwrap(), state);
    let older = crate::golden::without(&state, "counters");
    target.restore(older).unwrap();
    let counters = &target.shared.counters;
    assert!(counters.metrics().iter().all(|(_, count)| *count == 0));
}
