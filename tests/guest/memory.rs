//! Memory full of random data that can prove that no page was lost, torn, stale or misplaced.
//!
//! Every page holds its own number, its generation and words drawn from a generator seeded with both. The table
//! of generations and the count of writes lie in other pages, so a page that travelled late contradicts them.

use std::fmt;

/// Pages in one MiB.
pub(crate) const PAGES_PER_MIB: u64 = (1 << 20) / PAGE_BYTES;
const PAGE_BYTES: u64 = 4096;
const WORDS: usize = PAGE_BYTES as usize / 8;

/// What a look at every filled page found.
#[derive(Default)]
pub(crate) struct Findings {
    pages: u64,
    torn: u64,
    stale: u64,
    misplaced: u64,
    writes_lost: u64,
    writes: u64,
}

/// The filled memory; empty until the first `fill`.
#[derive(Default)]
pub(crate) struct Memory {
    pages: Vec<Page>,
    generations: Vec<u64>,
    writes: u64,
}

#[derive(Clone)]
#[repr(C, align(4096))]
struct Page([u64; WORDS]);

impl Memory {
    /// Forgets what there was and fills `mib` MiB anew.
    pub(crate) fn fill(&mut self, mib: u64) {
        *self = Self::default();
        let count = (mib * PAGES_PER_MIB) as usize;
        self.pages = vec![Page([0; WORDS]); count];
        self.generations = vec![0; count];
        (0..count).for_each(|number| self.rewrite(number));
    }

    /// Writes every word of page `number` again.
    pub(crate) fn rewrite(&mut self, number: usize) {
        self.generations[number] += 1;
        self.writes += 1;
        let mut words = Words::of(number, self.generations[number]);
        self.pages[number].0.fill_with(|| words.next());
    }

    /// Looks at every page.
    pub(crate) fn verify(&self) -> Findings {
        let mut found = Findings {
            pages: self.pages.len() as u64,
            writes: self.writes,
            ..Findings::default()
        };
        for (number, page) in self.pages.iter().enumerate() {
            let mut expected = Words::of(number, self.generations[number]);
            if page.0.iter().all(|word| *word == expected.next()) {
                continue;
            }
            match page.0 {
                [there, ..] if there != number as u64 => found.misplaced += 1,
                [_, generation, ..] if generation != self.generations[number] => found.stale += 1,
                _ => found.torn += 1,
            }
        }
        found.writes_lost = self.writes.abs_diff(self.generations.iter().sum());
        found
    }

    pub(crate) fn len_mib(&self) -> u64 {
        self.pages.len() as u64 / PAGES_PER_MIB
    }
}

impl Findings {
    pub(crate) fn is_clean(&self) -> bool {
        self.torn + self.stale + self.misplaced + self.writes_lost == 0
    }
}

impl fmt::Display for Findings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            pages,
            torn,
            stale,
            misplaced,
            writes_lost,
            writes,
        } = self;
        write!(
            f,
            "verified_pages={pages} torn={torn} stale={stale} misplaced={misplaced} writes_lost={writes_lost} \
             writes={writes}"
        )
    }
}

/// The words of one page: number, generation, then SplitMix64 seeded with both (incompressible).
struct Words {
    head: [u64; 2],
    given: usize,
    state: u64,
}

impl Words {
    fn of(number: usize, generation: u64) -> Self {
        let number = number as u64;
        let state = number.wrapping_mul(0xd6e8_feb8_6659_fd93) ^ generation.rotate_left(32);
        Self {
            head: [number, generation],
            given: 0,
            state,
        }
    }

    fn next(&mut self) -> u64 {
        self.given += 1;
        if self.given <= 2 {
            return self.head[self.given - 1];
        }
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.state ^ (self.state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }
}
