//! Host memory that was touched a moment ago.
//!
//! A host may itself be a guest whose free memory goes back to its own host after a while; touching it again then costs
//! several times what copying into it does. Whoever moves next would pay for who rested before, so all start alike.

use godwit_wire::unit::Mib;
use std::hint::black_box;

/// What a guest takes beside the data it was filled with.
const GUEST_ITSELF: Mib = Mib(256);

/// Touches as much memory as the target of a guest with `fill` of data will take, and frees it.
pub(crate) fn warm(fill: Mib) {
    let bytes = fill.bytes().0 + GUEST_ITSELF.bytes().0;
    drop(black_box(vec![0x5a_u8; bytes as usize]));
}
