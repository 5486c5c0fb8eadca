//! Filled memory: pages whose contents can be proved, and the table of what they must hold.

use core::arch::asm;
use core::cell::UnsafeCell;
use core::mem::MaybeUninit;
use core::ptr;
use core::slice;
use core::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use crate::paging;
use crate::pure::memory_map::MemoryMap;
use crate::pure::page_pattern::{
    self, HEADER_WORDS, Header, REPEATED_WORDS, SEQUENCE_WORDS, Verdict, next_word,
};

/// All memory that can be filled. One vCPU writes pages at a time; `dirtier` sees to that.
pub struct Memory {
    pages: MemoryMap,
    /// Each page's last written generation, kept apart from the pages, so that a page that is
    /// whole but old is found out.
    generations: &'static [AtomicU32],
    filled_pages: AtomicU64,
    writes: AtomicU64,
}

/// What a look at every filled page found.
#[derive(Default)]
pub struct Findings {
    pub pages: u64,
    pub torn: u64,
    pub stale: u64,
    pub misplaced: u64,
    pub first_bad_page: Option<u64>,
}

struct Cell(UnsafeCell<MaybeUninit<Memory>>);

// SAFETY: written once by the boot vCPU before others start, and only shared afterwards.
unsafe impl Sync for Cell {}

static MEMORY: Cell = Cell(UnsafeCell::new(MaybeUninit::uninit()));

unsafe extern "C" {
    static __image_end: u8;
}

/// Maps memory and sets aside the generation table. Called once, on the boot vCPU.
pub fn init(ram: &MemoryMap) -> &'static Memory {
    let floor = (&raw const __image_end).addr() as u64;
    let mut pages = ram.usable(floor, u64::MAX);
    let mapped_end = paging::map(&mut pages);
    let mut pages = pages.usable(floor, mapped_end);
    let generations = take_generation_table(&mut pages);
    let memory = Memory {
        pages,
        generations,
        filled_pages: AtomicU64::new(0),
        writes: AtomicU64::new(0),
    };
    // SAFETY: no other vCPU runs yet, and this is called once.
    unsafe { (*MEMORY.0.get()).write(memory) }
}

/// The memory that `init` set up.
pub fn get() -> &'static Memory {
    // SAFETY: other vCPUs are started, and the shell is run, only after `init`.
    unsafe { (*MEMORY.0.get()).assume_init_ref() }
}

fn take_generation_table(pages: &mut MemoryMap) -> &'static [AtomicU32] {
    let entries = pages.pages();
    match pages.take(entries * size_of::<AtomicU32>() as u64) {
        // SAFETY: the range is mapped RAM taken for this alone, and any bytes are a valid number.
        Some(table) => unsafe {
            slice::from_raw_parts(
                ptr::with_exposed_provenance(table as usize),
                entries as usize,
            )
        },
        None => &[],
    }
}

impl Memory {
    pub fn capacity_pages(&self) -> u64 {
        self.pages.pages().min(self.generations.len() as u64)
    }

    pub fn filled_pages(&self) -> u64 {
        self.filled_pages.load(Ordering::Relaxed)
    }

    /// Page writes since the guest started.
    pub fn writes(&self) -> u64 {
        self.writes.load(Ordering::Relaxed)
    }

    /// Writes the pages from `first` up to `end`, which may not exceed the capacity.
    pub fn fill(&self, first: u64, end: u64) {
        for page in first..end {
            if page >= self.filled_pages() {
                self.generations[page as usize].store(0, Ordering::Relaxed);
                self.write_page(page);
                self.filled_pages.store(page + 1, Ordering::Relaxed);
            } else {
                self.write_page(page);
            }
        }
    }

    /// Writes a page's next generation.
    pub fn write_page(&self, page: u64) {
        let Some(address) = self.pages.page_address(page) else {
            return;
        };
        let slot = &self.generations[page as usize];
        let generation = slot.load(Ordering::Relaxed).wrapping_add(1);
        let header = Header {
            page,
            generation: generation.into(),
        };
        // SAFETY: the page is mapped RAM that only this module uses, through raw pointers, and
        // one vCPU at a time writes pages.
        unsafe { write_pattern(ptr::with_exposed_provenance_mut(address as usize), header) };
        slot.store(generation, Ordering::Relaxed);
        self.writes.store(self.writes() + 1, Ordering::Relaxed);
    }

    /// Checks every filled page. Nobody may write meanwhile.
    pub fn verify(&self) -> Findings {
        let mut findings = Findings {
            pages: self.filled_pages(),
            ..Findings::default()
        };
        for page in 0..findings.pages {
            let count = match self.check_page(page) {
                Verdict::Intact => continue,
                Verdict::Torn => &mut findings.torn,
                Verdict::Stale => &mut findings.stale,
                Verdict::Misplaced => &mut findings.misplaced,
            };
            *count += 1;
            findings.first_bad_page.get_or_insert(page);
        }
        findings
    }

    fn check_page(&self, page: u64) -> Verdict {
        let Some(address) = self.pages.page_address(page) else {
            return Verdict::Misplaced;
        };
        let generation = self.generations[page as usize].load(Ordering::Relaxed);
        let expected = Header {
            page,
            generation: generation.into(),
        };
        // SAFETY: the page is mapped RAM, and nobody writes it meanwhile.
        let (found, matches) =
            unsafe { read_pattern(ptr::with_exposed_provenance(address as usize)) };
        page_pattern::judge(expected, found, matches)
    }
}

/// # Safety
/// `page` must be the start of a mapped page that nobody else uses meanwhile.
unsafe fn write_pattern(page: *mut u64, header: Header) {
    // SAFETY: the header, the sequence and the repeated words make up one page, which the caller
    // vouches for; the direction flag is clear in compiled code.
    unsafe {
        page.write_volatile(header.page);
        page.add(1).write_volatile(header.generation);
        let mut word = header.first_word();
        for index in HEADER_WORDS..HEADER_WORDS + SEQUENCE_WORDS {
            page.add(index).write_volatile(word);
            word = next_word(word);
        }
        asm!(
            "rep stosq",
            inout("rdi") page.add(HEADER_WORDS + SEQUENCE_WORDS) => _,
            inout("rcx") REPEATED_WORDS => _,
            in("rax") word,
            options(nostack, preserves_flags)
        );
    }
}

/// Returns the page's header and whether the rest of the page matches it.
///
/// # Safety
/// `page` must be the start of a mapped page that nobody writes meanwhile.
unsafe fn read_pattern(page: *const u64) -> (Header, bool) {
    // SAFETY: as in `write_pattern`.
    unsafe {
        let header = Header {
            page: page.read_volatile(),
            generation: page.add(1).read_volatile(),
        };
        let mut word = header.first_word();
        let mut differences = 0;
        for index in HEADER_WORDS..HEADER_WORDS + SEQUENCE_WORDS {
            differences |= page.add(index).read_volatile() ^ word;
            word = next_word(word);
        }
        let repeated_match: u8;
        asm!(
            "repe scasq",
            "sete {matches}",
            matches = out(reg_byte) repeated_match,
            inout("rdi") page.add(HEADER_WORDS + SEQUENCE_WORDS) => _,
            inout("rcx") REPEATED_WORDS => _,
            in("rax") word,
            options(nostack, readonly)
        );
        (header, differences == 0 && repeated_match != 0)
    }
}

impl Findings {
    pub fn is_clean(&self) -> bool {
        self.first_bad_page.is_none()
    }
}
