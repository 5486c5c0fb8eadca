//! Who wanted something.

use serde::{Deserialize, Serialize};
use std::fmt;

/// Who asked for a change: a user, a token's name, or the controller itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Actor(String);

impl Actor {
    /// Longest name kept; the rest is cut off.
    pub const MAX_BYTES: usize = 128;

    /// The actor called `name`.
    pub fn new(name: impl Into<String>) -> Self {
        let mut name = name.into();
        if name.len() > Self::MAX_BYTES {
            let cut = (0..=Self::MAX_BYTES)
                .rev()
                .find(|at| name.is_char_boundary(*at))
                .unwrap_or(0);
            name.truncate(cut);
        }
        Self(name)
    }

    /// The controller itself: failover, reconciliation, steps of a larger operation.
    pub fn controller() -> Self {
        Self("controller".into())
    }

    /// The name.
    pub fn name(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Actor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}
