//! A function as it travels. Fields are tagged by name, so that later versions can add to them.

use super::common::SavedCommon;
use super::msix::Entry;
use crate::device::{DeviceKind, SavedBody};
use serde::{Deserialize, Serialize};

/// Layout of [`SavedFunction`].
pub const SAVED_FUNCTION_VERSION: u32 = 1;

/// A virtio function with its device, saved while it is paused.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct SavedFunction {
    pub(super) version: u32,
    /// Where it sits on the bus.
    pub(super) slot: u8,
    pub(super) name: String,
    pub(super) kind: DeviceKind,
    pub(super) config: Vec<u8>,
    pub(super) vectors: Vec<Entry>,
    pub(super) pending: u64,
    pub(super) common: SavedCommon,
    pub(super) generation: u8,
    pub(super) isr: u8,
    /// Why the device had given up on its driver.
    pub(super) broken: Option<String>,
    pub(super) device: SavedBody,
}

impl SavedFunction {
    /// Where it sits on the bus.
    pub const fn slot(&self) -> u8 {
        self.slot
    }

    /// Name of its device.
    pub fn name(&self) -> &str {
        &self.name
    }
}
