//! Which pages the guest has written.
//!
//! With `KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2` reading the log and clearing it are two steps: a slice is cleared
//! just before its pages are copied, so a write during the copy marks the page again, and nothing is protected
//! long before its turn. `INITIALLY_SET` makes switching the log on cheap: every page starts as dirty.

use super::{DirtyLogging, KvmError, ioctl, map_memory};
use kvm_ioctls::VmFd;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// One bit per page of one memory slot.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DirtyBitmap {
    words: Vec<u64>,
    pages: u64,
}

impl DirtyBitmap {
    /// A bitmap of `pages` pages from the kernel's words; bits past the end are dropped.
    pub fn new(mut words: Vec<u64>, pages: u64) -> Self {
        words.resize(pages.div_ceil(64) as usize, 0);
        if let (Some(last), rest @ 1..) = (words.last_mut(), pages % 64) {
            *last &= (1 << rest) - 1;
        }
        Self { words, pages }
    }

    /// Pages covered.
    pub const fn pages(&self) -> u64 {
        self.pages
    }

    /// Number of dirty pages.
    pub fn count(&self) -> u64 {
        self.words
            .iter()
            .map(|word| u64::from(word.count_ones()))
            .sum()
    }

    /// Counts the dirty pages of `other`, a bitmap of the same slot, as dirty here too.
    pub fn merge(&mut self, other: &Self) {
        assert_eq!(self.pages, other.pages, "bitmaps of one slot have one size");
        for (word, more) in self.words.iter_mut().zip(&other.words) {
            *word |= more;
        }
    }

    /// Counts the pages of `other`, whose first page is this bitmap's page `first`, a multiple of 64, as dirty here
    /// too.
    pub fn merge_at(&mut self, first: u64, other: &Self) {
        assert!(
            first.is_multiple_of(64) && first + other.pages <= self.pages,
            "the other bitmap lies within this one, word by word"
        );
        for (word, more) in self.words[(first / 64) as usize..]
            .iter_mut()
            .zip(&other.words)
        {
            *word |= more;
        }
    }

    /// Counts the pages of `other`, a bitmap of the same slot, as clean.
    pub fn subtract(&mut self, other: &Self) {
        assert_eq!(self.pages, other.pages, "bitmaps of one slot have one size");
        for (word, fewer) in self.words.iter_mut().zip(&other.words) {
            *word &= !fewer;
        }
    }

    /// Maximal runs of dirty pages within `range`, as (first page, number).
    pub fn runs(&self, range: std::ops::Range<u64>) -> Runs<'_> {
        Runs {
            bitmap: self,
            next: range.start,
            end: range.end.min(self.pages),
        }
    }

    /// The first dirty page from `page` on.
    pub fn next_dirty(&self, page: u64) -> Option<u64> {
        let (index, bit) = ((page / 64) as usize, page % 64);
        let first = self.words.get(index)? >> bit << bit;
        let rest = self.words[index + 1..].iter().copied();
        std::iter::once(first)
            .chain(rest)
            .zip(index as u64..)
            .find(|(word, _)| *word != 0)
            .map(|(word, index)| index * 64 + u64::from(word.trailing_zeros()))
    }

    fn is_set(&self, page: u64) -> bool {
        self.words[(page / 64) as usize] >> (page % 64) & 1 == 1
    }

    /// The words that hold the bits of `range`, which begins with a word's first.
    pub fn words(&self, range: std::ops::Range<u64>) -> &[u64] {
        &self.words[(range.start / 64) as usize..range.end.div_ceil(64) as usize]
    }
}

/// The words of a page set that hold the bits of `pages`, as (index of the word, its bits that are meant).
pub fn words_of(pages: std::ops::Range<u64>) -> impl Iterator<Item = (usize, u64)> {
    let mut page = pages.start;
    std::iter::from_fn(move || {
        if page >= pages.end {
            return None;
        }
        let (bit, number) = (page % 64, (64 - page % 64).min(pages.end - page));
        let word = (page / 64) as usize;
        page += number;
        Some((word, (u64::MAX >> (64 - number)) << bit))
    })
}

/// See [`DirtyBitmap::runs`].
#[derive(Debug)]
pub struct Runs<'a> {
    bitmap: &'a DirtyBitmap,
    next: u64,
    end: u64,
}

impl Iterator for Runs<'_> {
    type Item = (u64, u64);

    fn next(&mut self) -> Option<(u64, u64)> {
        while self.next < self.end && !self.bitmap.is_set(self.next) {
            let word = self.bitmap.words[(self.next / 64) as usize] >> (self.next % 64);
            // A word without further bits is skipped whole.
            self.next += if word == 0 {
                64 - self.next % 64
            } else {
                u64::from(word.trailing_zeros())
            };
        }
        if self.next >= self.end {
            return None;
        }
        let first = self.next;
        while self.next < self.end && self.bitmap.is_set(self.next) {
            self.next += 1;
        }
        Some((first, self.next - first))
    }
}

/// A memory slot as the log sees it.
#[derive(Clone, Copy, Debug)]
pub struct LoggedSlot {
    /// KVM's slot number.
    pub slot: u32,
    /// First guest physical address.
    pub guest_address: u64,
    /// Where it is mapped in this process.
    pub host_address: u64,
    /// Length.
    pub bytes: u64,
}

/// A machine's dirty log, which one user at a time may switch on: a second one would switch it off under the first.
/// Whoever needs it ([`start`](Self::start)) makes whoever only watches ([`start_watching`](Self::start_watching)) let
/// go.
#[derive(Clone, Debug)]
pub struct DirtyLogSource {
    vm: Arc<VmFd>,
    slots: Arc<[LoggedSlot]>,
    turn: Arc<(Mutex<Turn>, Condvar)>,
}

/// Whose turn it is.
#[derive(Clone, Copy, Debug, Default)]
struct Turn {
    taken: bool,
    /// How many wait who need the log.
    needed_by: u32,
}

/// What a watcher of the log shall do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Watch {
    /// Go on.
    GoOn,
    /// Let go: somebody needs the log.
    LetGo,
}

/// The dirty log of all of a machine's memory, switched on while this value lives.
#[derive(Debug)]
pub struct DirtyLog {
    source: DirtyLogSource,
    protocol: Protocol,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Protocol {
    /// Reading leaves the bits; they are cleared in slices. All pages start dirty.
    Manual,
    /// Reading clears. All pages start clean.
    ReadAndClear,
}

impl DirtyLogSource {
    /// Asks KVM for the manual protocol. Done once for `vm` with memory in `slots`, before the first vCPU runs.
    pub fn new(vm: Arc<VmFd>, slots: Vec<LoggedSlot>) -> Self {
        let cap = kvm_bindings::kvm_enable_cap {
            cap: kvm_bindings::KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2,
            args: [
                u64::from(
                    kvm_bindings::KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE
                        | kvm_bindings::KVM_DIRTY_LOG_INITIALLY_SET,
                ),
                0,
                0,
                0,
            ],
            ..Default::default()
        };
        // An older KVM lacks it; `start` finds out which protocol is in force.
        let _ = vm.enable_cap(&cap);
        Self {
            vm,
            slots: slots.into(),
            turn: Arc::default(),
        }
    }

    /// Switches the log on, as soon as nobody else uses it; a watcher lets go at once. Every page counts as dirty until
    /// it has been cleared once.
    pub fn start(&self) -> Result<DirtyLog, KvmError> {
        let mut turn = self.turn();
        turn.needed_by += 1;
        self.turn.1.notify_all();
        turn = self
            .turn
            .1
            .wait_while(turn, |turn| turn.taken)
            .unwrap_or_else(PoisonError::into_inner);
        turn.needed_by -= 1;
        turn.taken = true;
        drop(turn);
        self.switch_on()
    }

    /// The same for one who can do without: `None` when somebody else needs the log or `patience` was not enough.
    pub fn start_watching(&self, patience: Duration) -> Result<Option<DirtyLog>, KvmError> {
        let (mut turn, _) = self
            .turn
            .1
            .wait_timeout_while(self.turn(), patience, |turn| {
                turn.taken && turn.needed_by == 0
            })
            .unwrap_or_else(PoisonError::into_inner);
        if turn.taken || turn.needed_by > 0 {
            return Ok(None);
        }
        turn.taken = true;
        drop(turn);
        self.switch_on().map(Some)
    }

    /// Whoever calls this has the turn.
    fn switch_on(&self) -> Result<DirtyLog, KvmError> {
        let manual = u64::from(kvm_bindings::KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2);
        let offered = self.vm.check_extension_raw(manual);
        let protocol = if offered & 2 != 0 {
            Protocol::Manual
        } else {
            Protocol::ReadAndClear
        };
        // From here on dropping the log gives it back, also when switching it on fails half way.
        let log = DirtyLog {
            source: self.clone(),
            protocol,
        };
        self.switch(DirtyLogging::On)?;
        Ok(log)
    }

    fn turn(&self) -> MutexGuard<'_, Turn> {
        // Each change of it is one assignment.
        self.turn.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn switch(&self, logging: DirtyLogging) -> Result<(), KvmError> {
        self.slots.iter().try_for_each(|slot| {
            map_memory(
                &self.vm,
                slot.slot,
                slot.guest_address,
                slot.host_address,
                slot.bytes,
                logging,
            )
        })
    }
}

impl DirtyLog {
    /// Memory slots covered, in order of address.
    pub fn slots(&self) -> &[LoggedSlot] {
        &self.source.slots
    }

    /// Pages to send first: all.
    pub fn first_round(&self) -> Vec<DirtyBitmap> {
        self.slots()
            .iter()
            .map(|slot| {
                let pages = slot.bytes / godwit_wire::unit::PAGE_BYTES;
                DirtyBitmap::new(vec![u64::MAX; pages.div_ceil(64) as usize], pages)
            })
            .collect()
    }

    /// Pages written since they were last cleared, per slot.
    pub fn read(&self) -> Result<Vec<DirtyBitmap>, KvmError> {
        self.slots()
            .iter()
            .map(|slot| {
                let words = self
                    .source
                    .vm
                    .get_dirty_log(slot.slot, slot.bytes as usize)
                    .map_err(KvmError::during("KVM_GET_DIRTY_LOG"))?;
                Ok(DirtyBitmap::new(
                    words,
                    slot.bytes / godwit_wire::unit::PAGE_BYTES,
                ))
            })
            .collect()
    }

    /// Makes the dirty pages of `range` in slot number `index` count as clean, because they are about to be
    /// copied. `range.start` is a multiple of 64; so is its length, except at the end of the slot.
    pub fn clear(
        &self,
        index: usize,
        bitmap: &DirtyBitmap,
        range: std::ops::Range<u64>,
    ) -> Result<(), KvmError> {
        match self.protocol {
            Protocol::ReadAndClear => Ok(()),
            Protocol::Manual => {
                let pages = (range.end - range.start) as u32;
                ioctl::clear_dirty_log(
                    &self.source.vm,
                    self.slots()[index].slot,
                    range.start,
                    pages,
                    bitmap.words(range.start..range.end),
                )
            }
        }
    }

    /// Waits until `moment`, but not when somebody needs the log.
    pub fn watch_until(&self, moment: Instant) -> Watch {
        let left = moment.saturating_duration_since(Instant::now());
        let turn = &self.source.turn;
        let (turn, _) = turn
            .1
            .wait_timeout_while(self.source.turn(), left, |turn| turn.needed_by == 0)
            .unwrap_or_else(PoisonError::into_inner);
        match turn.needed_by {
            0 => Watch::GoOn,
            _ => Watch::LetGo,
        }
    }
}

impl Drop for DirtyLog {
    fn drop(&mut self) {
        // A log left on only costs speed; the next one starts afresh with every page dirty either way.
        if let Err(error) = self.source.switch(DirtyLogging::Off) {
            tracing::warn!(%error, "the dirty log could not be switched off");
        }
        self.source.turn().taken = false;
        self.source.turn.1.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn bits_past_the_end_are_dropped() {
        assert_eq!(DirtyBitmap::new(vec![u64::MAX; 2], 65).count(), 65);
        assert_eq!(DirtyBitmap::new(vec![u64::MAX], 64).count(), 64);
    }

    proptest! {
        #[test]
        fn runs_name_exactly_the_dirty_pages(words in prop::collection::vec(any::<u64>(), 1..6), cut in 0u64..64) {
            let pages = words.len() as u64 * 64 - cut;
            let bitmap = DirtyBitmap::new(words.clone(), pages);
            let mut named = vec![false; pages as usize];
            let mut last_end = None;
            for (first, number) in bitmap.runs(0..pages) {
                prop_assert!(number > 0 && last_end.is_none_or(|end| first > end));
                for page in first..first + number {
                    named[page as usize] = true;
                }
                last_end = Some(first + number);
            }
            for page in 0..pages {
                prop_assert_eq!(named[page as usize], words[(page / 64) as usize] >> (page % 64) & 1 == 1);
            }
        }
    }
}
