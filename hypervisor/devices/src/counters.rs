//! What devices count, and how that moves along with a machine.

use std::sync::atomic::{AtomicU64, Ordering};

/// One number that grows.
#[derive(Debug, Default)]
pub(crate) struct Counter(AtomicU64);

impl Counter {
    pub(crate) fn add(&self, count: u64) {
        self.0.fetch_add(count, Ordering::Relaxed);
    }

    pub(crate) fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }

    /// Goes on from what was saved.
    pub(crate) fn set(&self, count: u64) {
        self.0.store(count, Ordering::Relaxed);
    }
}

/// The counters of a device, and their saved form. A state from before a counter was saved has it at 0.
macro_rules! counters {
    ($($(#[$doc:meta])* $name:ident),* $(,)?) => {
        /// What the device has done; metric names are the field names.
        #[derive(Debug, Default)]
        pub(super) struct Counters { $($(#[$doc])* pub(super) $name: $crate::counters::Counter,)* }

        /// [`Counters`] as they are saved.
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
        #[serde(default)]
        pub(super) struct SavedCounters { $($name: u64,)* }

        impl Counters {
            pub(super) fn metrics(&self) -> $crate::device::DeviceMetrics {
                vec![$((stringify!($name), self.$name.get()),)*]
            }

            pub(super) fn save(&self) -> SavedCounters {
                SavedCounters { $($name: self.$name.get(),)* }
            }

            pub(super) fn restore(&self, saved: &SavedCounters) {
                $(self.$name.set(saved.$name);)*
            }
        }
    };
}

pub(crate) use counters;
