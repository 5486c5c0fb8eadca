//! Whether compressing pages is faster than sending them as they are, as one lane has measured it.

use godwit_wire::migration::Compression;
use std::time::Duration;

/// One frame in so many is tried the other way, so that a changed link or guest is noticed.
const TRIAL_INTERVAL: u32 = 64;
/// Compression must be this much faster to be worth the CPU.
const WORTHWHILE_SHARE: f64 = 0.8;
/// Weight of the newest figure in the averages.
const NEWEST: f64 = 0.25;

/// What one lane knows about its link and its pages.
#[derive(Debug)]
pub(super) struct Squeeze {
    asked: Compression,
    frames: u32,
    /// Seconds to send one byte.
    send: Option<f64>,
    /// Seconds to compress one byte, and what share of it is left.
    compress: Option<(f64, f64)>,
}

impl Squeeze {
    pub(super) const fn new(asked: Compression) -> Self {
        Self {
            asked,
            frames: 0,
            send: None,
            compress: None,
        }
    }

    /// Whether the next frame is compressed.
    pub(super) fn next(&mut self) -> bool {
        if self.asked == Compression::Off {
            return false;
        }
        self.frames = self.frames.wrapping_add(1);
        self.frames.is_multiple_of(TRIAL_INTERVAL) != self.pays()
    }

    /// Whether it would pay by what is known.
    fn pays(&self) -> bool {
        match (self.send, self.compress) {
            (Some(send), Some((compress, left))) => {
                compress + left * send < send * WORTHWHILE_SHARE
            }
            _ => false,
        }
    }

    /// `bytes` on the wire took `took`.
    pub(super) fn sent(&mut self, bytes: usize, took: Duration) {
        let now = took.as_secs_f64() / bytes.max(1) as f64;
        self.send = Some(self.send.map_or(now, |before| mix(before, now)));
    }

    /// Compressing `bytes` took `took` and left `left` of them.
    pub(super) fn compressed(&mut self, bytes: usize, left: usize, took: Duration) {
        let bytes = bytes.max(1) as f64;
        let now = (took.as_secs_f64() / bytes, left as f64 / bytes);
        self.compress = Some(
            self.compress
                .map_or(now, |before| (mix(before.0, now.0), mix(before.1, now.1))),
        );
    }
}

fn mix(before: f64, now: f64) -> f64 {
    before + (now - before) * NEWEST
}

#[cfg(test)]
mod tests {
    use super::*;

    fn measured(send_us: u64, compress_us: u64, left: usize) -> Squeeze {
        let mut squeeze = Squeeze::new(Compression::Auto);
        squeeze.sent(1_000_000, Duration::from_micros(send_us));
        squeeze.compressed(1_000_000, left, Duration::from_micros(compress_us));
        squeeze
    }

    #[test]
    fn a_slow_link_and_soft_pages_are_compressed() {
        assert!(measured(10_000, 1_000, 300_000).pays());
    }

    #[test]
    fn a_fast_link_or_hard_pages_are_not() {
        assert!(!measured(500, 1_000, 300_000).pays());
        assert!(!measured(10_000, 1_000, 990_000).pays());
    }

    #[test]
    fn the_other_way_is_tried_now_and_then() {
        let mut squeeze = measured(500, 1_000, 300_000);
        let tried = (0..TRIAL_INTERVAL * 4).filter(|_| squeeze.next()).count();
        assert_eq!(tried, 4);
        let mut never = Squeeze::new(Compression::Off);
        assert!((0..TRIAL_INTERVAL * 4).all(|_| !never.next()));
    }
}
