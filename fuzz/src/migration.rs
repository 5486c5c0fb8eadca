//! What a peer sends during a migration: frame headers and control messages.

use crate::input::Input;
use crate::vmm_api::read;
use godwit_wire::migration::{
    Codec, FRAME_HEADER_BYTES, FrameHeader, FrameKind, MAX_CONTROL_BYTES, MAX_FRAME_PAGES,
    MAX_MAPPED_PAGES, MAX_STATE_BYTES, ToSource, ToTarget,
};
use godwit_wire::unit::PAGE_BYTES;

/// The first byte chooses: a header, or a message in one direction.
pub fn run(data: &[u8]) {
    let mut input = Input::new(data);
    match input.u8() % 3 {
        0 => header(&input.array()),
        1 => {
            if let Some(ToTarget::Hello { spec, .. }) = read(input.rest()) {
                let _ = spec.problems("spec");
            }
        }
        _ => drop(read::<ToSource>(input.rest())),
    }
}

fn header(bytes: &[u8; FRAME_HEADER_BYTES]) {
    let Ok(header) = FrameHeader::decode(bytes) else {
        return;
    };
    let unsealed = FRAME_HEADER_BYTES - 4;
    assert_eq!(header.encode(&[])[..unsealed], bytes[..unsealed]);
    assert!(header.address.is_multiple_of(PAGE_BYTES));
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
        FrameKind::Missing => {
            assert!((1..=MAX_MAPPED_PAGES).contains(&header.pages));
            assert_eq!(header.length, header.pages.div_ceil(64) * 8);
        }
        FrameKind::Zero | FrameKind::Want | FrameKind::Served => assert_eq!(header.length, 0),
    }
}
