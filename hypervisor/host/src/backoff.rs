//! How long to wait before trying again.

use std::time::Duration;

/// Grows from a first pause to a longest one, each with up to a quarter of jitter, so that a hundred agents do not
/// come back to a restarted server at the same instant.
#[derive(Clone, Debug)]
pub(crate) struct Backoff {
    first: Duration,
    longest: Duration,
    failures: u32,
}

impl Backoff {
    pub(crate) const fn new(first: Duration, longest: Duration) -> Self {
        Self {
            first,
            longest,
            failures: 0,
        }
    }

    /// The next pause. `random` is any number.
    pub(crate) fn next(&mut self, random: u64) -> Duration {
        let doubled = self.first.saturating_mul(1 << self.failures.min(16));
        self.failures = self.failures.saturating_add(1);
        let pause = doubled.min(self.longest);
        pause - pause.mul_f64((random % 1024) as f64 / 4096.0)
    }

    /// How often it has failed in a row.
    pub(crate) fn failures(&self) -> u32 {
        self.failures
    }

    /// It worked.
    pub(crate) fn reset(&mut self) {
        self.failures = 0;
    }
}

/// A random number for jitter.
pub(crate) fn random() -> u64 {
    uuid::Uuid::new_v4().as_u64_pair().0
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn pauses_grow_and_never_exceed_the_longest(randoms in proptest::collection::vec(any::<u64>(), 1..40)) {
            let longest = Duration::from_secs(1);
            let mut backoff = Backoff::new(Duration::from_millis(100), longest);
            for (count, random) in randoms.into_iter().enumerate() {
                let pause = backoff.next(random);
                prop_assert!(pause <= longest);
                let least = Duration::from_millis(75 << count.min(3));
                prop_assert!(pause >= least, "{pause:?} < {least:?}");
            }
        }
    }
}
