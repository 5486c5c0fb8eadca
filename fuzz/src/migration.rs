//! What a peer sends during a migration: frame headers and control messages.

use crate::input::Input;
use crate::vmm_api::read;
use godwit_wire::migration::{
    Codec, FRAME_HEADER_BYTES, FrameHeader, FrameKind, HeldPages, MAX_COMPARED_PAGES,
    MAX_CONTROL_BYTES, MAX_FRAME_PAGES, MAX_FRAME_SECTORS, MAX_MAPPED_PAGES, MAX_STATE_BYTES,
    PAGE_HASH_BYTES, SECTOR_BYTES, ToSource, ToTarget, difference,
};
use godwit_wire::unit::PAGE_BYTES;

/// The first byte chooses: a header, or a message in one direction.
pub fn run(data: &[u8]) {
    let mut input = Input::new(data);
    match input.u8() % 4 {
        0 => header(&input.array()),
        1 => {
            if let Some(ToTarget::Hello { spec, disks, .. }) = read(input.rest()) {
                let _ = spec.problems("spec");
                let travelling = disks.into_iter().map(|disk| disk.name).collect();
                assert_eq!(difference(&spec, &spec, &travelling), None);
            }
        }
        2 => drop(read::<ToSource>(input.rest())),
        _ => {
            let pages = u32::from(input.u8()) + 1;
            held(pages, input.rest());
        }
    }
}

/// What a target says that it holds: read or refused, and never of pages that were not asked for.
fn held(pages: u32, payload: &[u8]) {
    let asked = FrameHeader::compare(0, pages);
    let header = FrameHeader::held(0, pages, payload.len() as u32);
    if let Ok(held) = HeldPages::decode(&asked, &header, payload) {
        let hashes = (0..pages).filter_map(|page| held.hash(page)).count();
        assert!(held.hash(pages).is_none());
        assert_eq!(
            payload.len(),
            pages.div_ceil(64) as usize * 8 + hashes * PAGE_HASH_BYTES
        );
    }
}

fn header(bytes: &[u8; FRAME_HEADER_BYTES]) {
    let Ok(header) = FrameHeader::decode(bytes) else {
        return;
    };
    let unsealed = FRAME_HEADER_BYTES - 4;
    assert_eq!(header.encode(&[])[..unsealed], bytes[..unsealed]);
    let unit = if header.kind.is_of_disk() {
        SECTOR_BYTES
    } else {
        PAGE_BYTES
    };
    assert!(header.address.is_multiple_of(unit));
    match header.kind {
        FrameKind::Control => assert!(header.length <= MAX_CONTROL_BYTES),
        FrameKind::State => assert!(header.length <= MAX_STATE_BYTES),
        FrameKind::Pages => {
            assert!((1..=MAX_FRAME_PAGES).contains(&header.pages));
            let raw = u64::from(header.pages) * PAGE_BYTES;
            match header.codec {
                Codec::Raw => assert_eq!(u64::from(header.length), raw),
                Codec::Lz4 => assert!((1..raw).contains(&u64::from(header.length))),
            }
        }
        FrameKind::DiskContent => {
            assert!((1..=MAX_FRAME_SECTORS).contains(&header.pages));
            match header.codec {
                Codec::Raw => assert_eq!(u64::from(header.length), header.content_bytes()),
                Codec::Lz4 => {
                    assert!((1..header.content_bytes()).contains(&u64::from(header.length)))
                }
            }
        }
        FrameKind::Missing => {
            assert!((1..=MAX_MAPPED_PAGES).contains(&header.pages));
            assert_eq!(header.length, header.pages.div_ceil(64) * 8);
        }
        FrameKind::Held => {
            assert!((1..=MAX_COMPARED_PAGES).contains(&header.pages));
            let map = header.pages.div_ceil(64) * 8;
            let hashes = header.pages * PAGE_HASH_BYTES as u32;
            assert!((map..=map + hashes).contains(&header.length));
        }
        FrameKind::Compare => {
            assert!((1..=MAX_COMPARED_PAGES).contains(&header.pages));
            assert_eq!(header.length, 0);
        }
        FrameKind::Zero | FrameKind::DiskZero | FrameKind::Want | FrameKind::Served => {
            assert_eq!(header.length, 0)
        }
    }
}
