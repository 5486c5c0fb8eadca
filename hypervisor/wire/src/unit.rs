//! Numbers that carry their unit.

use serde::{Deserialize, Serialize};
use std::fmt;

/// Bytes in one guest page. x86-64 tracks dirty memory at this grain.
pub const PAGE_BYTES: u64 = 4096;

/// A count of bytes; a plain number in JSON.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
#[serde(transparent)]
pub struct Bytes(pub u64);

/// A count of mebibytes (2^20 bytes); a plain number in JSON.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
#[serde(transparent)]
pub struct Mib(pub u64);

impl Mib {
    /// The same amount in bytes; saturates instead of wrapping, because sizes come from outside.
    pub const fn bytes(self) -> Bytes {
        Bytes(self.0.saturating_mul(1 << 20))
    }
}

impl Bytes {
    /// Whole mebibytes, rounded down.
    pub const fn mib(self) -> Mib {
        Mib(self.0 >> 20)
    }

    /// Whole pages, rounded up.
    pub const fn pages(self) -> u64 {
        self.0.div_ceil(PAGE_BYTES)
    }
}

impl fmt::Display for Mib {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} MiB", self.0)
    }
}

impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
        let mut value = self.0 as f64;
        let mut unit = 0;
        while value >= 1024.0 && unit + 1 < UNITS.len() {
            value /= 1024.0;
            unit += 1;
        }
        if unit == 0 {
            write!(f, "{} B", self.0)
        } else {
            write!(f, "{value:.1} {}", UNITS[unit])
        }
    }
}
