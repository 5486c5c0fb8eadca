//! Bringing the memory of a snapshot in on demand.
//!
//! ```text
//!            a page is touched               its piece is read, checked, put in place
//!   waiting ───────────────────▶ on its way ─────────────────────────────────────────▶ there
//!      │         the filler's turn    ▲  │ damaged, unreadable
//!      └──────────────────────────────┘  └──────────▶ never: whoever touched it waits, the guest has a fault
//! ```
//!
//! Guest memory stays the one shared file that migration, dirty logs and discarding work with; userfaultfd holds up
//! whoever touches what is not there. The snapshot's file is only ever read. It could have been mapped privately
//! instead, but then an edit of the file would show in a running guest and nothing would notice; here every piece is
//! checked between the disk and the guest.
//!
//! **What is checked when.** A machine must not begin from a damaged snapshot and find out an hour later, nor should it
//! wait until gigabytes have been read that nobody has touched. So the manifest remembers which file was written and
//! when: if it is still that one, unchanged, the machine starts at once and each piece is checked as it comes in.
//! Otherwise (it was copied, edited or restored from a backup) all of it is read and checked first. What decays on
//! the disk under an unchanged file is found when it is brought in: the guest stops with a fault that names the place,
//! and never sees it. An operator who wants to be sure first asks for [`VerifyMemory::Full`].
//!
//! All of memory comes in sooner or later, in the background, so that the machine soon depends on no file any more.
//! Where userfaultfd is not to be had, memory is read before the machine starts.

use super::manifest::PIECE_BYTES;
use super::{Snapshot, SnapshotError};
use crate::memory::{Claim, GuestRam, Pending, Watched};
use godwit_wire::vmm_api::VerifyMemory;
use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// Told what is wrong when memory cannot be brought in. By then nobody may run who would miss it; it does not return
/// before that.
pub type OnLoss = Box<dyn Fn(SnapshotError) + Send + Sync>;

/// Memory that is being brought in. Dropping it ends that; the machine must be gone by then.
#[derive(Debug)]
pub struct Filler {
    shared: Arc<Shared>,
}

struct Shared {
    snapshot: Snapshot,
    memory: Watched,
    pending: Arc<Pending>,
    pieces_per_unit: usize,
    on_loss: OnLoss,
    lost: AtomicBool,
    stop: AtomicBool,
    wake: OwnedFd,
}

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Shared")
            .field("left", &self.pending.left())
            .finish_non_exhaustive()
    }
}

/// Makes the snapshot's memory that of `ram`, which nothing has touched. `None`: all of it is there already.
pub fn bring_memory(
    snapshot: Snapshot,
    ram: &GuestRam,
    verify: VerifyMemory,
    on_loss: OnLoss,
) -> Result<Option<Filler>, SnapshotError> {
    let memory = match Watched::new(ram) {
        Ok(memory) => memory,
        Err(error) => {
            tracing::info!(%error, "no userfaultfd: memory is read before the machine starts");
            snapshot.load_memory(ram)?;
            return Ok(None);
        }
    };
    if verify == VerifyMemory::Full || !snapshot.memory_is_untouched() {
        snapshot.verify_memory()?;
    }
    let filler = Filler::start(snapshot, memory, ram, on_loss)?;
    filler.fill_rest()?;
    Ok(Some(filler))
}

fn thread_failed(source: io::Error) -> SnapshotError {
    SnapshotError::Fill {
        what: "no thread can be had to bring memory in",
        source,
    }
}

impl Filler {
    /// Brings in what is touched.
    fn start(
        snapshot: Snapshot,
        memory: Watched,
        ram: &GuestRam,
        on_loss: OnLoss,
    ) -> Result<Self, SnapshotError> {
        let unit_bytes = ram.page_bytes().max(PIECE_BYTES);
        let pieces_per_unit = (unit_bytes / PIECE_BYTES) as usize;
        let units = snapshot.pieces().div_ceil(pieces_per_unit);
        let pending = Arc::new(Pending::new(
            unit_bytes,
            (0..units).map(|unit| {
                let pieces = unit * pieces_per_unit..(unit + 1) * pieces_per_unit;
                pieces
                    .take_while(|piece| *piece < snapshot.pieces())
                    .any(|piece| !snapshot.is_zero(piece))
            }),
        ));
        let wake = eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC)
            .map_err(|error| thread_failed(error.into()))?;
        let shared = Arc::new(Shared {
            snapshot,
            memory,
            pending: pending.clone(),
            pieces_per_unit,
            on_loss,
            lost: AtomicBool::new(false),
            stop: AtomicBool::new(false),
            wake,
        });
        ram.expect(pending);
        let filler = Self {
            shared: shared.clone(),
        };
        spawn("fill-touched", move || shared.serve_touches())?;
        Ok(filler)
    }

    /// Brings in everything else meanwhile.
    fn fill_rest(&self) -> Result<(), SnapshotError> {
        let shared = self.shared.clone();
        spawn("fill-rest", move || shared.serve_rest())
    }
}

fn spawn(name: &str, work: impl FnOnce() + Send + 'static) -> Result<(), SnapshotError> {
    std::thread::Builder::new()
        .name(name.into())
        .spawn(work)
        .map(drop)
        .map_err(thread_failed)
}

impl Drop for Filler {
    fn drop(&mut self) {
        self.shared.end();
    }
}

impl Shared {
    fn end(&self) {
        self.stop.store(true, Ordering::Release);
        // A full counter wakes as well.
        let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
    }

    fn goes_on(&self) -> bool {
        !self.stop.load(Ordering::Acquire) && !self.lost.load(Ordering::Acquire)
    }

    fn serve_rest(self: Arc<Self>) {
        let mut buffer = Vec::new();
        for unit in 0..self.pending.units() {
            if !self.goes_on() {
                return;
            }
            if self.pending.claim(unit) == Claim::Mine && !self.bring(unit, &mut buffer) {
                return;
            }
        }
        if self.pending.left() == 0 {
            self.complete();
        }
    }

    fn serve_touches(self: Arc<Self>) {
        let mut buffer = Vec::new();
        while self.goes_on() {
            if let Err(error) = self.wait_for_touch() {
                return self.lose(fill_failed(error));
            }
            while self.goes_on() {
                match self.memory.next_touch() {
                    Ok(Some(offset)) => {
                        if !self.serve_touch(offset, &mut buffer) {
                            return;
                        }
                    }
                    Ok(None) => break,
                    Err(error) => return self.lose(fill_failed(error)),
                }
            }
        }
    }

    fn wait_for_touch(&self) -> io::Result<()> {
        let mut fds = [
            PollFd::new(&self.memory, PollFlags::IN),
            PollFd::new(&self.wake, PollFlags::IN),
        ];
        match poll(&mut fds, None) {
            Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// Whether all is well.
    fn serve_touch(self: &Arc<Self>, offset: u64, buffer: &mut Vec<u8>) -> bool {
        let unit = (offset / self.pending.unit_bytes()) as usize;
        match self.pending.claim(unit) {
            Claim::Mine => {
                if !self.bring(unit, buffer) {
                    return false;
                }
                if self.pending.left() == 0 {
                    self.complete();
                }
                true
            }
            // Whoever brings it in lets go on who waits for it, when it is settled.
            Claim::Taken => true,
            // It never had content, or it was discarded since.
            Claim::Settled => match self.memory.fill_zeros(offset) {
                Ok(()) => true,
                Err(error) => {
                    self.lose(fill_failed(error));
                    false
                }
            },
        }
    }

    /// Puts a claimed unit where it belongs; whether that went well.
    fn bring(self: &Arc<Self>, unit: usize, buffer: &mut Vec<u8>) -> bool {
        let first = unit * self.pieces_per_unit;
        let last = (first + self.pieces_per_unit).min(self.snapshot.pieces());
        let brought = self
            .snapshot
            .read_pieces(first..last, buffer)
            .and_then(|offset| {
                self.memory.fill(offset, buffer).map_err(fill_failed)?;
                self.pending.settle(unit);
                // Only now: whoever comes to wait later finds the unit settled, and gets what is not there any more
                // as zeros.
                let bytes = buffer.len() as u64;
                self.memory.let_go(offset, bytes).map_err(fill_failed)
            });
        match brought {
            Ok(()) => true,
            Err(error) => {
                self.lose(error);
                false
            }
        }
    }

    /// All is there: the kernel needs no help any more.
    fn complete(&self) {
        if let Err(error) = self.memory.end() {
            // Then touches of fresh memory go on to be served here.
            tracing::warn!(%error, "memory is complete and yet watched");
            return;
        }
        tracing::debug!("all memory of the snapshot is there");
        self.end();
    }

    /// Memory cannot be had. Whoever waits for it waits until the process ends: without the descriptor the kernel
    /// would give zeros.
    fn lose(self: &Arc<Self>, error: SnapshotError) {
        if !self.lost.swap(true, Ordering::AcqRel) {
            std::mem::forget(self.clone());
            (self.on_loss)(error);
        }
    }
}

fn fill_failed(source: io::Error) -> SnapshotError {
    SnapshotError::Fill {
        what: "guest memory cannot be put in place",
        source,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use godwit_wire::devices::MemoryBacking;
    use godwit_wire::unit::{Bytes, Mib, PAGE_BYTES};
    use std::os::unix::fs::FileExt;
    use std::sync::mpsc::{Receiver, channel};
    use std::time::{Duration, Instant};

    const SIZE: Mib = Mib(16);
    /// What is not zero: the rest of memory was never touched.
    const USED: std::ops::Range<usize> = 3 << 20..6 << 20;

    struct Bench {
        _dir: tempfile::TempDir,
        content: Vec<u8>,
        path: std::path::PathBuf,
        ram: GuestRam,
        losses: Receiver<String>,
        on_loss: Option<OnLoss>,
    }

    impl Bench {
        fn new() -> (Self, Snapshot) {
            let dir = tempfile::tempdir().unwrap();
            let mut content = vec![0; SIZE.bytes().0 as usize];
            for (at, byte) in content[USED].iter_mut().enumerate() {
                *byte = (at / 7) as u8 | 1;
            }
            let path = dir.path().join("memory");
            let snapshot = Snapshot::of_memory(&path, &content);
            let (sender, losses) = channel();
            let on_loss: OnLoss = Box::new(move |error| sender.send(error.chain()).unwrap());
            let bench = Self {
                _dir: dir,
                content,
                path,
                ram: GuestRam::with_backing(SIZE, MemoryBacking::Standard).unwrap(),
                losses,
                on_loss: Some(on_loss),
            };
            (bench, snapshot)
        }

        /// Only what is touched is brought in; `None` where the kernel does not let us.
        fn start(&mut self, snapshot: Snapshot) -> Option<Filler> {
            let on_loss = self.on_loss.take().unwrap();
            match Watched::new(&self.ram) {
                Ok(watch) => Some(Filler::start(snapshot, watch, &self.ram, on_loss).unwrap()),
                Err(error) => {
                    godwit_devices::skip::skip(format!("no userfaultfd: {error}"));
                    None
                }
            }
        }

        fn assert_page(&self, address: u64) {
            let mut page = [0; PAGE_BYTES as usize];
            self.ram.read(address, &mut page).unwrap();
            assert!(page[..] == self.content[address as usize..][..page.len()]);
        }

        /// A page can be seen a moment before its piece counts as there.
        fn waits_for(&self, left: Bytes) {
            let deadline = Instant::now() + Duration::from_secs(30);
            while self.ram.expected() != left {
                assert!(
                    Instant::now() < deadline,
                    "{:?} is left",
                    self.ram.expected()
                );
                std::thread::yield_now();
            }
        }

        fn damage(&self, offset: usize) {
            let file = std::fs::File::options().write(true).open(&self.path);
            file.unwrap()
                .write_all_at(&[!self.content[offset]], offset as u64)
                .unwrap();
        }
    }

    #[test]
    fn a_piece_comes_when_it_is_touched_and_the_rest_when_it_is_told_to() {
        let (mut bench, snapshot) = Bench::new();
        let Some(filler) = bench.start(snapshot) else {
            return;
        };
        let ram = &bench.ram;
        assert_eq!((ram.resident(), ram.expected()), (Bytes(0), Bytes(3 << 20)));
        let expected = USED.start as u64..USED.end as u64;
        assert_eq!(ram.next_touched(0).unwrap(), Some(expected.clone()));
        bench.assert_page(4 << 20);
        bench.waits_for(Bytes(2 << 20));
        assert_eq!(ram.resident(), Bytes(1 << 20));
        bench.assert_page(0);
        assert_eq!(
            ram.resident(),
            Bytes((1 << 20) + PAGE_BYTES),
            "one page of zeros"
        );
        assert_eq!(
            ram.next_touched(PAGE_BYTES).unwrap(),
            Some(3 << 20..4 << 20)
        );
        filler.fill_rest().unwrap();
        for address in (0..SIZE.bytes().0).step_by(PAGE_BYTES as usize) {
            bench.assert_page(address);
        }
        bench.waits_for(Bytes(0));
    }

    /// Whoever is seen to wait for zeros at the moment when everything has come is let go by the kernel.
    #[test]
    fn zeros_that_are_touched_while_the_last_piece_comes_lose_nothing() {
        const ROUNDS: usize = 40;
        for _ in 0..ROUNDS {
            let (mut bench, snapshot) = Bench::new();
            let Some(filler) = bench.start(snapshot) else {
                return;
            };
            let ram = bench.ram.clone();
            let toucher = std::thread::spawn(move || {
                for address in (USED.end as u64..SIZE.bytes().0).step_by(PAGE_BYTES as usize) {
                    let mut byte = [9];
                    ram.read(address, &mut byte).unwrap();
                    assert_eq!(byte, [0]);
                }
            });
            filler.fill_rest().unwrap();
            toucher.join().unwrap();
            bench.waits_for(Bytes(0));
            assert!(bench.losses.try_recv().is_err(), "nothing is lost");
        }
    }

    #[test]
    fn memory_that_was_given_back_does_not_come_again() {
        let (mut bench, snapshot) = Bench::new();
        let Some(filler) = bench.start(snapshot) else {
            return;
        };
        let ram = &bench.ram;
        ram.discard((3 << 20) + PAGE_BYTES, 400).unwrap();
        let mut page = [9; PAGE_BYTES as usize];
        ram.read((3 << 20) + PAGE_BYTES, &mut page).unwrap();
        assert_eq!(page, [0; PAGE_BYTES as usize]);
        ram.write(3 << 20, &[77]).unwrap();
        filler.fill_rest().unwrap();
        bench.assert_page(5 << 20);
        ram.read(3 << 20, &mut page).unwrap();
        assert_eq!((page[0], page[1]), (77, bench.content[USED.start + 1]));
    }

    #[test]
    fn a_checksum_of_memory_waits_for_all_of_it() {
        let (mut bench, snapshot) = Bench::new();
        let whole = GuestRam::new(SIZE).unwrap();
        snapshot.load_memory(&whole).unwrap();
        let Some(_filler) = bench.start(snapshot) else {
            return;
        };
        assert_eq!(bench.ram.hash().unwrap(), whole.hash().unwrap());
    }

    #[test]
    fn who_touches_what_was_damaged_meanwhile_never_sees_it() {
        let (mut bench, snapshot) = Bench::new();
        let Some(_filler) = bench.start(snapshot) else {
            return;
        };
        bench.damage(USED.start + 5);
        bench.assert_page(4 << 20);
        let (ram, (sender, seen)) = (bench.ram.clone(), channel());
        // It waits for ever, and ends with this process.
        std::thread::spawn(move || {
            let _ = ram.read(USED.start as u64, &mut [0]);
            sender.send(()).unwrap();
        });
        let loss = bench.losses.recv().unwrap();
        assert!(loss.contains("offset 0x300000"), "{loss}");
        assert!(seen.try_recv().is_err());
    }

    #[test]
    fn a_changed_file_is_read_before_anything_begins_and_an_untouched_one_only_if_asked() {
        let (mut bench, snapshot) = Bench::new();
        assert!(snapshot.memory_is_untouched());
        bench.damage(USED.start);
        assert!(!snapshot.memory_is_untouched());
        let refused = bring_memory(
            snapshot,
            &bench.ram,
            VerifyMemory::Changed,
            bench.on_loss.take().unwrap(),
        );
        assert!(matches!(
            refused,
            Err(SnapshotError::DamagedMemory { offset }) if offset == USED.start as u64
        ));
        let (mut bench, mut snapshot) = Bench::new();
        bench.damage(USED.start);
        snapshot.trust_memory_file();
        let on_loss = bench.on_loss.take().unwrap();
        let refused = bring_memory(snapshot, &bench.ram, VerifyMemory::Full, on_loss);
        assert!(matches!(refused, Err(SnapshotError::DamagedMemory { .. })));
    }
}
