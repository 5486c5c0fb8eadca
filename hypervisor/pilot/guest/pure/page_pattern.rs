//! What a filled page holds, and what a page that holds something else proves.
//!
//! ```text
//!   word 0          the page's number
//!   word 1          its generation: how often it was written
//!   words 2..256    a sequence that starts from both
//!   words 256..512  the sequence's next word, repeated
//! ```
//! A page that is partly old, partly another page's, partly shifted or partly missing never
//! passes. Half of it compresses, much like the memory of an ordinary guest.

use super::constants::PAGE_BYTES;

pub const PAGE_WORDS: usize = PAGE_BYTES as usize / 8;
pub const HEADER_WORDS: usize = 2;
pub const REPEATED_WORDS: usize = PAGE_WORDS / 2;
pub const SEQUENCE_WORDS: usize = PAGE_WORDS - REPEATED_WORDS - HEADER_WORDS;

/// What a page says about itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    pub page: u64,
    pub generation: u64,
}

impl Header {
    /// The sequence's first word (the finalizer of SplitMix64, a bijection: two generations of one
    /// page, or two pages of one generation, never share it).
    pub const fn first_word(self) -> u64 {
        let mut word = self.page.rotate_left(32) ^ self.generation ^ 0x9e37_79b9_7f4a_7c15;
        word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        word ^ (word >> 31)
    }
}

/// The word after `word` in every sequence (Knuth's MMIX generator, a bijection too).
pub const fn next_word(word: u64) -> u64 {
    word.wrapping_mul(6_364_136_223_846_793_005)
        .wrapping_add(1_442_695_040_888_963_407)
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    Intact,
    /// Header and body do not belong together: part of the page is missing, old or foreign.
    Torn,
    /// A whole page, but an older or newer write than the last one.
    Stale,
    /// A whole page that belongs elsewhere.
    Misplaced,
}

/// Judges a page by its header, given whether the whole rest of it matches that header.
pub fn judge(expected: Header, found: Header, body_matches: bool) -> Verdict {
    if !body_matches {
        Verdict::Torn
    } else if found.page != expected.page {
        Verdict::Misplaced
    } else if found.generation != expected.generation {
        Verdict::Stale
    } else {
        Verdict::Intact
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn write(header: Header) -> [u64; PAGE_WORDS] {
        let mut page = [0; PAGE_WORDS];
        page[0] = header.page;
        page[1] = header.generation;
        let mut word = header.first_word();
        for slot in &mut page[HEADER_WORDS..HEADER_WORDS + SEQUENCE_WORDS] {
            *slot = word;
            word = next_word(word);
        }
        page[HEADER_WORDS + SEQUENCE_WORDS..].fill(word);
        page
    }

    fn check(expected: Header, page: &[u64; PAGE_WORDS]) -> Verdict {
        let found = Header {
            page: page[0],
            generation: page[1],
        };
        judge(expected, found, *page == write(found))
    }

    #[test]
    fn a_zeroed_page_is_torn() {
        let expected = Header {
            page: 0,
            generation: 1,
        };
        assert_eq!(check(expected, &[0; PAGE_WORDS]), Verdict::Torn);
    }

    proptest! {
        #[test]
        fn a_page_just_written_is_intact(page in 0_u64..1 << 32, generation in 1_u64..1 << 32) {
            let header = Header { page, generation };
            prop_assert_eq!(check(header, &write(header)), Verdict::Intact);
        }

        #[test]
        fn an_older_write_is_stale(page in 0_u64..1 << 32, generation in 2_u64..1 << 32) {
            let older = Header { page, generation: generation - 1 };
            prop_assert_eq!(check(Header { page, generation }, &write(older)), Verdict::Stale);
        }

        #[test]
        fn another_page_is_misplaced(page in 0_u64..1 << 32, generation in 1_u64..1 << 32) {
            let neighbour = Header { page: page + 1, generation };
            prop_assert_eq!(check(Header { page, generation }, &write(neighbour)), Verdict::Misplaced);
        }

        #[test]
        fn a_page_torn_between_two_writes_never_passes(
            page in 0_u64..1 << 32, generation in 2_u64..1 << 32, cut in 1_usize..PAGE_WORDS,
        ) {
            let expected = Header { page, generation };
            let mut torn = write(expected);
            torn[cut..].copy_from_slice(&write(Header { page, generation: generation - 1 })[cut..]);
            prop_assert_ne!(check(expected, &torn), Verdict::Intact);
        }

        #[test]
        fn one_lost_bit_never_passes(
            page in 0_u64..1 << 32, generation in 1_u64..1 << 32,
            word in 0_usize..PAGE_WORDS, bit in 0_u32..64,
        ) {
            let expected = Header { page, generation };
            let mut damaged = write(expected);
            damaged[word] ^= 1 << bit;
            prop_assert_ne!(check(expected, &damaged), Verdict::Intact);
        }
    }
}
