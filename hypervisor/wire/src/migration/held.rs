//! What a target holds of some pages: the payload of a `Held` frame.

use super::FrameHeader;
use super::frame::map_bytes;

/// Bytes of the hash of one page.
pub const PAGE_HASH_BYTES: usize = 16;

/// A `Held` frame that contradicts itself or the question.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HeldError {
    /// About other pages than were asked for.
    #[error(
        "what is held of {pages} pages at {address:#x} was told, and {asked_pages} at {asked:#x} were asked for"
    )]
    OtherPages {
        /// Address in the answer.
        address: u64,
        /// Pages in the answer.
        pages: u32,
        /// Address in the question.
        asked: u64,
        /// Pages in the question.
        asked_pages: u32,
    },
    /// Fewer bytes than a map of the pages has.
    #[error("a map of {pages} pages has {map} bytes and {bytes} were sent")]
    ShortMap {
        /// Pages that were asked for.
        pages: u32,
        /// Bytes that their map has.
        map: usize,
        /// Bytes that came.
        bytes: usize,
    },
    /// The map names pages past the end.
    #[error("a page is held beyond the {0} that were asked for")]
    TooFar(u32),
    /// Another number of hashes than of pages.
    #[error("{pages} pages are held and their hashes have {bytes} bytes")]
    OtherHashes {
        /// Pages in the map.
        pages: u32,
        /// Bytes behind the map.
        bytes: usize,
    },
}

/// Which pages of a slice a target holds, with their hashes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HeldPages {
    words: Vec<u64>,
    /// Pages in the words before each.
    before: Vec<u32>,
    hashes: Vec<[u8; PAGE_HASH_BYTES]>,
}

impl HeldPages {
    /// None of `pages` pages, to be noted one by one.
    pub fn none_of(pages: u32) -> Self {
        Self {
            words: vec![0; pages.div_ceil(64) as usize],
            before: Vec::new(),
            hashes: Vec::new(),
        }
    }

    /// Notes that page `page` is held; pages must be noted in order.
    ///
    /// # Panics
    /// When the page is not one of those this was made for.
    pub fn note(&mut self, page: u32, hash: [u8; PAGE_HASH_BYTES]) {
        self.words[page as usize / 64] |= 1 << (page % 64);
        self.hashes.push(hash);
    }

    /// The payload of a frame.
    pub fn encode(&self) -> Vec<u8> {
        let words = self.words.iter().flat_map(|word| word.to_le_bytes());
        words.chain(self.hashes.iter().flatten().copied()).collect()
    }

    /// Reads the payload behind `header`, which answers `asked`.
    pub fn decode(
        asked: &FrameHeader,
        header: &FrameHeader,
        payload: &[u8],
    ) -> Result<Self, HeldError> {
        let pages = asked.pages;
        if (header.address, header.pages) != (asked.address, pages) {
            return Err(HeldError::OtherPages {
                address: header.address,
                pages: header.pages,
                asked: asked.address,
                asked_pages: pages,
            });
        }
        let map = map_bytes(pages) as usize;
        let Some((map, hashes)) = payload.split_at_checked(map) else {
            let bytes = payload.len();
            return Err(HeldError::ShortMap { pages, map, bytes });
        };
        let (words, _) = map.as_chunks::<8>();
        let words: Vec<u64> = words.iter().map(|word| u64::from_le_bytes(*word)).collect();
        if words.last().is_some_and(|last| past_the_end(*last, pages)) {
            return Err(HeldError::TooFar(pages));
        }
        let mut held = 0;
        let mut before = Vec::with_capacity(words.len());
        for word in &words {
            before.push(held);
            held += word.count_ones();
        }
        let (hashes, odd) = hashes.as_chunks::<PAGE_HASH_BYTES>();
        if hashes.len() != held as usize || !odd.is_empty() {
            return Err(HeldError::OtherHashes {
                pages: held,
                bytes: hashes.len() * PAGE_HASH_BYTES + odd.len(),
            });
        }
        Ok(Self {
            words,
            before,
            hashes: hashes.to_vec(),
        })
    }

    /// The hash of page `page` of a decoded answer, if it is held.
    pub fn hash(&self, page: u32) -> Option<[u8; PAGE_HASH_BYTES]> {
        let word = *self.words.get(page as usize / 64)?;
        let bit = page % 64;
        if word >> bit & 1 == 0 {
            return None;
        }
        let below = (word & ((1 << bit) - 1)).count_ones();
        let rank = self.before.get(page as usize / 64)? + below;
        self.hashes.get(rank as usize).copied()
    }
}

/// Whether the last word of a map of `pages` pages has bits that mean none of them.
const fn past_the_end(last: u64, pages: u32) -> bool {
    match pages % 64 {
        0 => false,
        rest => last >> rest != 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn told(asked: &FrameHeader, payload: &[u8]) -> Result<HeldPages, HeldError> {
        let header = FrameHeader::held(asked.address, asked.pages, payload.len() as u32);
        HeldPages::decode(asked, &header, payload)
    }

    proptest! {
        #[test]
        fn every_held_page_is_found_by_its_number(
            pages in 1u32..300,
            held in prop::collection::btree_set(0u32..300, 0..200),
        ) {
            let mut answer = HeldPages::none_of(pages);
            let held: Vec<u32> = held.into_iter().filter(|page| *page < pages).collect();
            for page in &held {
                answer.note(*page, u128::from(*page).to_le_bytes());
            }
            let asked = FrameHeader::compare(0x4000, pages);
            let read = told(&asked, &answer.encode()).unwrap();
            for page in 0..pages + 70 {
                let hash = held.contains(&page).then(|| u128::from(page).to_le_bytes());
                prop_assert_eq!(read.hash(page), hash);
            }
        }

        #[test]
        fn any_payload_is_read_or_refused(
            pages in 1u32..200, payload in prop::collection::vec(any::<u8>(), 0..400),
        ) {
            let asked = FrameHeader::compare(0, pages);
            if let Ok(read) = told(&asked, &payload) {
                prop_assert!((pages..pages + 64).all(|page| read.hash(page).is_none()));
            }
        }
    }

    #[test]
    fn an_answer_that_does_not_add_up_is_refused() {
        let asked = FrameHeader::compare(0x4000, 3);
        let elsewhere = FrameHeader::held(0x5000, 3, 8);
        assert!(matches!(
            HeldPages::decode(&asked, &elsewhere, &[0; 8]),
            Err(HeldError::OtherPages { .. })
        ));
        let short = HeldError::ShortMap {
            pages: 3,
            map: 8,
            bytes: 7,
        };
        assert_eq!(told(&asked, &[0; 7]), Err(short));
        let mut far = vec![0; 8 + 16];
        far[0] = 0b1000;
        assert_eq!(told(&asked, &far), Err(HeldError::TooFar(3)));
        let mut one = vec![0; 8 + 15];
        one[0] = 1;
        assert!(matches!(
            told(&asked, &one),
            Err(HeldError::OtherHashes { pages: 1, .. })
        ));
    }
}
