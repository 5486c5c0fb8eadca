//! Bodies of the VMM's API, and the messages by which one VMM process hands a machine to another.

use crate::input::Input;
use godwit_wire::machine::MachineSpec;
use godwit_wire::succession::{
    OfferSuccession, PrepareSuccession, SuccessionCommand, ToPredecessor, ToSuccessor,
};
use godwit_wire::vmm_api::{
    BalloonRequest, Command, CreateRequest, DirtyRateRequest, IncomingRequest, MigrationCommand,
    OutgoingRequest, ResizeDisk, RestoreRequest, SnapshotRequest,
};
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::fmt::Debug;

/// The first byte chooses the request or message.
pub fn run(data: &[u8]) {
    let mut input = Input::new(data);
    let kind = input.u8();
    let body = input.rest();
    match kind % 15 {
        0 => judge(read::<CreateRequest>(body).map(|request| request.spec)),
        1 => judge(read::<IncomingRequest>(body).map(|request| request.spec)),
        2 => drop(read::<SnapshotRequest>(body)),
        3 => drop(read::<RestoreRequest>(body)),
        4 => drop(read::<OutgoingRequest>(body)),
        5 => drop(read::<MigrationCommand>(body)),
        6 => drop(read::<ResizeDisk>(body)),
        7 => drop(read::<BalloonRequest>(body)),
        8 => drop(read::<DirtyRateRequest>(body)),
        9 => drop(read::<Command>(body)),
        10 => drop(read::<OfferSuccession>(body)),
        11 => drop(read::<PrepareSuccession>(body)),
        12 => drop(read::<SuccessionCommand>(body)),
        13 => drop(read::<ToPredecessor>(body)),
        _ => judge(match read::<ToSuccessor>(body) {
            Some(ToSuccessor::Offer(offer)) => Some(offer.spec),
            _ => None,
        }),
    }
}

fn judge(spec: Option<MachineSpec>) {
    let Some(spec) = spec else {
        return;
    };
    for problem in spec.problems("spec") {
        assert!(problem.field.starts_with("spec"), "{problem:?}");
    }
}

/// What was understood is understood again when it is written down.
pub(crate) fn read<T: Serialize + DeserializeOwned + PartialEq + Debug>(body: &[u8]) -> Option<T> {
    let value: T = serde_json::from_slice(body).ok()?;
    let text = serde_json::to_vec(&value).expect("words can be written");
    let again: T = serde_json::from_slice(&text).expect("what was written can be read");
    assert_eq!(value, again);
    Some(value)
}
