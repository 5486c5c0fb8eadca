//! Guest memory of which pages are missing: whoever touches one waits until it has been filled.
//!
//! ```text
//! expected ──discard──▶ not there ──arm──▶ waited for ──fill──▶ there
//! ```
//!
//! A page that is not expected and not there (never touched, or given back by a balloon) is zero.

use super::userfault::{Filled, UserFault};
use super::{GuestRam, RamError};
use crate::kvm::{DirtyBitmap, LoggedSlot, words_of};
use godwit_wire::devices::MemoryBacking;
use godwit_wire::unit::PAGE_BYTES;
use rustix::event::{PollFd, PollFlags, poll};
use std::io;
use std::os::fd::AsFd;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// Memory cannot be waited for.
#[derive(Debug, thiserror::Error)]
pub enum AbsentError {
    /// The kernel does not offer it, or not to this process.
    #[error("pages cannot be waited for: userfaultfd is not to be had")]
    Unavailable(#[source] io::Error),
    /// Pages of 2 MiB would have to arrive whole.
    #[error("pages of 2 MiB cannot be waited for")]
    HugePages,
    /// The kernel keeps a page that was given up, as it may with a part of a huge page.
    #[error("a page at {0:#x} or behind it cannot be given up")]
    StillThere(u64),
    /// Filling or discarding failed.
    #[error(transparent)]
    Ram(#[from] RamError),
    /// The kernel does not do what it offered.
    #[error("a page at {address:#x} cannot be filled")]
    Fill {
        /// Guest physical address.
        address: u64,
        /// What went wrong.
        #[source]
        source: io::Error,
    },
}

/// Which pages of one slot are expected.
#[derive(Debug)]
struct Expected {
    slot: LoggedSlot,
    words: Vec<AtomicU64>,
}

/// Guest memory that arrives while it is being used.
#[derive(Debug)]
pub struct Absent {
    ram: GuestRam,
    fault: UserFault,
    expected: Vec<Expected>,
    left: AtomicU64,
    armed: AtomicBool,
    /// Taken by whoever fills zeros for unexpected pages, and by the end of it all: in between nothing may change.
    ending: Mutex<()>,
}

impl Absent {
    /// Checks that pages of `ram` can be waited for.
    pub fn new(ram: &GuestRam) -> Result<Self, AbsentError> {
        if ram.backing() == MemoryBacking::Huge2M {
            return Err(AbsentError::HugePages);
        }
        let expected = ram.slots().into_iter().map(|slot| Expected {
            slot,
            words: (0..(slot.bytes / PAGE_BYTES).div_ceil(64))
                .map(|_| AtomicU64::new(0))
                .collect(),
        });
        Ok(Self {
            ram: ram.clone(),
            fault: UserFault::new(ram.backing()).map_err(AbsentError::Unavailable)?,
            expected: expected.collect(),
            left: AtomicU64::new(0),
            armed: AtomicBool::new(false),
            ending: Mutex::new(()),
        })
    }

    /// Expects the `pages` pages of `map`, the first of which is at `address`, and forgets what is there of them.
    /// Says how many of them were not expected before. Only before [`Self::arm`].
    pub fn expect(&self, address: u64, map: &DirtyBitmap) -> Result<u64, AbsentError> {
        self.ram.slice(address, map.pages() * PAGE_BYTES)?;
        let mut more = 0;
        for (first, pages) in map.runs(0..map.pages()) {
            let start = address + first * PAGE_BYTES;
            self.ram.discard(start, pages)?;
            if !self.ram.is_absent(start, pages)? {
                return Err(AbsentError::StillThere(start));
            }
            more += self.each_word(start, pages, |word, mask| {
                u64::from((mask & !word.fetch_or(mask, Ordering::Relaxed)).count_ones())
            });
        }
        self.left.fetch_add(more, Ordering::Relaxed);
        Ok(more)
    }

    /// From here on expected pages are waited for.
    pub fn arm(&self) -> Result<(), AbsentError> {
        for Expected { slot, .. } in &self.expected {
            self.fault
                .register(slot.host_address, slot.bytes)
                .map_err(AbsentError::Unavailable)?;
        }
        self.armed.store(true, Ordering::SeqCst);
        Ok(())
    }

    /// Number of pages still expected.
    pub fn left(&self) -> u64 {
        self.left.load(Ordering::SeqCst)
    }

    /// Whether the page at `address` is still expected.
    pub fn is_expected(&self, address: u64) -> bool {
        self.each_word(address, 1, |word, mask| {
            u64::from(word.load(Ordering::SeqCst) & mask != 0)
        }) != 0
    }

    /// What is still expected, per slot.
    pub fn missing(&self) -> Vec<(LoggedSlot, DirtyBitmap)> {
        self.expected
            .iter()
            .map(|Expected { slot, words }| {
                let words = words.iter().map(|word| word.load(Ordering::SeqCst));
                (
                    *slot,
                    DirtyBitmap::new(words.collect(), slot.bytes / PAGE_BYTES),
                )
            })
            .collect()
    }

    /// Fills pages from `address` on. Those that are there already stay as they are: the guest may have changed them.
    pub fn fill(&self, address: u64, content: &[u8]) -> Result<(), AbsentError> {
        self.fill_by(address, content.len() as u64, |host, at| {
            self.fault.copy(host, &content[at as usize..])
        })
    }

    /// The same with zeros.
    pub fn fill_zeros(&self, address: u64, pages: u64) -> Result<(), AbsentError> {
        let bytes = pages.saturating_mul(PAGE_BYTES);
        self.fill_by(address, bytes, |host, at| self.fault.zero(host, bytes - at))
    }

    fn fill_by(
        &self,
        address: u64,
        bytes: u64,
        fill: impl Fn(u64, u64) -> io::Result<Filled>,
    ) -> Result<(), AbsentError> {
        let host = self.host_address(address, bytes)?;
        let mut at = 0;
        while at < bytes {
            let filled = fill(host + at, at).map_err(|source| AbsentError::Fill {
                address: address + at,
                source,
            })?;
            let done = match filled {
                Filled::Bytes(done) => done,
                Filled::Present => PAGE_BYTES,
            };
            self.arrived(address + at, done / PAGE_BYTES);
            at += done;
        }
        Ok(())
    }

    fn arrived(&self, address: u64, pages: u64) {
        let fewer = self.each_word(address, pages, |word, mask| {
            u64::from((mask & word.fetch_and(!mask, Ordering::SeqCst)).count_ones())
        });
        self.left.fetch_sub(fewer, Ordering::SeqCst);
    }

    /// The next page somebody waits for and that is expected. Pages that nobody sends are filled on the way. Waits
    /// until there is one, or until something can be read from `stop`: then `None`.
    pub fn next_wanted(&self, stop: impl AsFd) -> Result<Option<u64>, AbsentError> {
        loop {
            let mut waiting = [
                PollFd::new(&self.fault, PollFlags::IN),
                PollFd::new(&stop, PollFlags::IN),
            ];
            match poll(&mut waiting, None) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(AbsentError::Unavailable(error.into())),
            }
            if !waiting[1].revents().is_empty() {
                return Ok(None);
            }
            let Some(host) = self.fault.take_fault().map_err(AbsentError::Unavailable)? else {
                continue;
            };
            let Some(address) = self.guest_address(host) else {
                continue;
            };
            if self.is_expected(address) {
                return Ok(Some(address));
            }
            self.settle(address)?;
        }
    }

    /// Lets go on who waits for a page that is not expected: it has arrived meanwhile, or it is zero.
    pub fn settle(&self, address: u64) -> Result<(), AbsentError> {
        let _ending = self.ending.lock().unwrap_or_else(|e| e.into_inner());
        if !self.armed.load(Ordering::SeqCst) {
            return Ok(());
        }
        let host = self.host_address(address, PAGE_BYTES)?;
        let settled = match self.fault.zero(host, PAGE_BYTES) {
            Ok(Filled::Present) => self.fault.wake(host, PAGE_BYTES),
            Ok(Filled::Bytes(_)) => Ok(()),
            Err(error) => Err(error),
        };
        settled.map_err(|source| AbsentError::Fill { address, source })
    }

    /// Nobody waits for anything any more. With pages still expected this gives up on them: they read as zeros, so
    /// the guest must never run again.
    pub fn end(&self) {
        let _ending = self.ending.lock().unwrap_or_else(|e| e.into_inner());
        if !self.armed.swap(false, Ordering::SeqCst) {
            return;
        }
        for Expected { slot, .. } in &self.expected {
            if let Err(error) = self.fault.unregister(slot.host_address, slot.bytes) {
                tracing::error!(%error, "guest memory is still waited for");
            }
        }
    }

    fn host_address(&self, address: u64, bytes: u64) -> Result<u64, RamError> {
        self.ram.slice(address, bytes)?;
        let slot = self.slot_of(|slot| slot.guest_address, address);
        let slot = slot.ok_or(RamError::OutOfRange { address, bytes })?.slot;
        Ok(slot.host_address + (address - slot.guest_address))
    }

    fn guest_address(&self, host: u64) -> Option<u64> {
        let slot = self.slot_of(|slot| slot.host_address, host)?.slot;
        Some(slot.guest_address + (host - slot.host_address))
    }

    fn slot_of(&self, start: impl Fn(&LoggedSlot) -> u64, address: u64) -> Option<&Expected> {
        self.expected.iter().find(|expected| {
            let start = start(&expected.slot);
            (start..start + expected.slot.bytes).contains(&address)
        })
    }

    /// Visits the words that hold the bits of these pages, and adds up what `visit` makes of each.
    fn each_word(&self, address: u64, pages: u64, visit: impl Fn(&AtomicU64, u64) -> u64) -> u64 {
        let Some(Expected { slot, words }) = self.slot_of(|slot| slot.guest_address, address)
        else {
            return 0;
        };
        let first = (address - slot.guest_address) / PAGE_BYTES;
        words_of(first..first + pages)
            .map(|(word, mask)| visit(&words[word], mask))
            .sum()
    }
}

impl Drop for Absent {
    fn drop(&mut self) {
        self.end();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use godwit_wire::unit::Mib;
    use std::sync::Arc;
    use std::sync::mpsc;

    fn absent() -> Option<(GuestRam, Arc<Absent>)> {
        let ram = GuestRam::new(Mib(16)).unwrap();
        match Absent::new(&ram) {
            Ok(absent) => Some((ram, Arc::new(absent))),
            Err(error) => {
                godwit_devices::skip::skip(format!("no userfaultfd: {error:?}"));
                None
            }
        }
    }

    /// Pages 3, 4 and 70 of the first 128.
    fn some_pages() -> DirtyBitmap {
        DirtyBitmap::new(vec![0b11000, 1 << 6], 128)
    }

    #[test]
    fn a_missing_page_is_waited_for_and_the_rest_is_zero() {
        let Some((ram, absent)) = absent() else {
            return;
        };
        ram.write(3 * PAGE_BYTES, &[1]).unwrap();
        assert_eq!(absent.expect(0, &some_pages()).unwrap(), 3);
        assert_eq!(absent.expect(0, &some_pages()).unwrap(), 0);
        absent.arm().unwrap();
        assert_eq!(absent.left(), 3);
        let (stop, _keep) = rustix::pipe::pipe().unwrap();
        let (wanted, asked) = mpsc::channel();
        let theirs = absent.clone();
        let server = std::thread::spawn(move || {
            while let Some(address) = theirs.next_wanted(&stop).unwrap() {
                wanted.send(address).unwrap();
            }
        });
        let memory = ram.clone();
        let reader = std::thread::spawn(move || {
            let mut bytes = [9; 2];
            // One that nobody sends, and one that is expected.
            memory.read(8 * PAGE_BYTES, &mut bytes[..1]).unwrap();
            memory.read(4 * PAGE_BYTES, &mut bytes[1..]).unwrap();
            bytes
        });
        assert_eq!(asked.recv().unwrap(), 4 * PAGE_BYTES);
        absent
            .fill(3 * PAGE_BYTES, &[5; 2 * PAGE_BYTES as usize])
            .unwrap();
        assert_eq!(reader.join().unwrap(), [0, 5]);
        assert_eq!(absent.left(), 1);
        // A second copy of a page does not undo what was written since.
        ram.write(3 * PAGE_BYTES, &[6]).unwrap();
        absent
            .fill(3 * PAGE_BYTES, &[5; PAGE_BYTES as usize])
            .unwrap();
        let mut byte = [0];
        ram.read(3 * PAGE_BYTES, &mut byte).unwrap();
        assert_eq!(byte, [6]);
        absent.fill_zeros(70 * PAGE_BYTES, 1).unwrap();
        assert_eq!(absent.left(), 0);
        assert!(absent.missing().iter().all(|(_, map)| map.count() == 0));
        absent.end();
        drop(_keep);
        server.join().unwrap();
    }

    #[test]
    fn giving_up_lets_everybody_go_on() {
        let Some((ram, absent)) = absent() else {
            return;
        };
        absent.expect(0, &some_pages()).unwrap();
        absent.arm().unwrap();
        let memory = ram.clone();
        let reader = std::thread::spawn(move || {
            let mut byte = [9];
            memory.read(70 * PAGE_BYTES, &mut byte).unwrap();
            byte
        });
        let (stop, _keep) = rustix::pipe::pipe().unwrap();
        assert_eq!(absent.next_wanted(&stop).unwrap(), Some(70 * PAGE_BYTES));
        absent.end();
        assert_eq!(reader.join().unwrap(), [0]);
    }

    #[test]
    fn memory_that_is_not_there_cannot_be_missing() {
        let Some((_, absent)) = absent() else {
            return;
        };
        let end = 16 << 20;
        assert!(absent.expect(end - 64 * PAGE_BYTES, &some_pages()).is_err());
        assert!(absent.fill_zeros(end, 1).is_err());
        assert!(absent.fill(u64::MAX - 4095, &[0; 4096]).is_err());
    }
}
