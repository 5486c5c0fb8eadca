//! Disks whose content goes with the guest, at the source: what of them is to be sent, and how fast the guest may write
//! them meanwhile.

use crate::kvm::DirtyBitmap;
use godwit_devices::block::{CLUSTER_BYTES, LeavingDisk};
use godwit_wire::migration::TravellingDisk;
use godwit_wire::unit::Bytes;
use std::ops::Range;
use std::time::Duration;

/// Most clusters that a lane takes at a time (128 MiB).
const MAX_SLICE_CLUSTERS: u64 = 2048;
/// Fewest (1 MiB).
const MIN_SLICE_CLUSTERS: u64 = 16;
/// Slices for each lane, so that all of them end at about the same time.
const SLICES_PER_LANE: u64 = 16;

/// What slowed disks may write together, whatever is taken from them: this share of what the link carries. It is small
/// enough for the rest to shrink from round to round, and lets a guest's writes through within moments.
const LEAST_SHARE_OF_LINK: u64 = 16;

/// A piece of one disk that has changed clusters.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct DiskSlice {
    pub(super) disk: usize,
    pub(super) clusters: Range<u64>,
}

/// Cuts what has changed into slices for `lanes` lanes.
pub(super) fn cut(changed: &[DirtyBitmap], lanes: usize) -> Vec<DiskSlice> {
    let total: u64 = changed.iter().map(DirtyBitmap::count).sum();
    let step = (total / (lanes.max(1) as u64 * SLICES_PER_LANE))
        .clamp(MIN_SLICE_CLUSTERS, MAX_SLICE_CLUSTERS);
    let mut slices = Vec::new();
    for (disk, bitmap) in changed.iter().enumerate() {
        let mut from = 0;
        while let Some(first) = bitmap.next_dirty(from) {
            from = (first + step).min(bitmap.pages());
            let clusters = first..from;
            slices.push(DiskSlice { disk, clusters });
        }
    }
    slices
}

/// Bytes of changed clusters.
pub(super) fn bytes_of(changed: &[DirtyBitmap]) -> u64 {
    changed.iter().map(DirtyBitmap::count).sum::<u64>() * CLUSTER_BYTES
}

/// All of every disk.
pub(super) fn first_round(disks: &[LeavingDisk]) -> Vec<DirtyBitmap> {
    let all = |disk: &LeavingDisk| {
        let words = vec![u64::MAX; disk.clusters().div_ceil(64) as usize];
        DirtyBitmap::new(words, disk.clusters())
    };
    disks.iter().map(all).collect()
}

/// What the guest has changed and is not sent since. What is sent in a round is cleared piece by piece as it is read.
pub(super) fn changed(disks: &[LeavingDisk]) -> Vec<DirtyBitmap> {
    let changed = |disk: &LeavingDisk| DirtyBitmap::new(disk.changed(), disk.clusters());
    disks.iter().map(changed).collect()
}

/// What the target is told of them.
pub(super) fn told(disks: &[LeavingDisk]) -> Vec<TravellingDisk> {
    let told = |disk: &LeavingDisk| TravellingDisk {
        name: disk.name().to_owned(),
        bytes: Bytes(disk.bytes()),
    };
    disks.iter().map(told).collect()
}

/// Size of all of them.
pub(super) fn size(disks: &[LeavingDisk]) -> u64 {
    disks.iter().map(LeavingDisk::bytes).sum()
}

/// How fast the guest writes each disk when nobody slows it down.
#[derive(Debug)]
pub(super) struct WriteRates {
    disks: Vec<WriteRate>,
    percent: u8,
}

#[derive(Clone, Copy, Debug)]
struct WriteRate {
    /// Bytes written up to the latest round.
    written: u64,
    /// Bytes per second in the latest round in which it was not slowed down.
    free: u64,
    /// Whether it is slowed down.
    slowed: bool,
}

impl WriteRates {
    pub(super) fn new(disks: &[LeavingDisk]) -> Self {
        let rate = |disk: &LeavingDisk| WriteRate {
            written: disk.written_bytes(),
            free: 0,
            slowed: false,
        };
        Self {
            disks: disks.iter().map(rate).collect(),
            percent: 0,
        }
    }

    /// How much of its rate of writes the guest loses.
    pub(super) const fn percent(&self) -> u8 {
        self.percent
    }

    /// A round has taken so long.
    pub(super) fn observe(&mut self, disks: &[LeavingDisk], took: Duration) {
        for (disk, rate) in disks.iter().zip(&mut self.disks) {
            let before = std::mem::replace(&mut rate.written, disk.written_bytes());
            if !rate.slowed {
                rate.free = super::link_rate::per_second(rate.written - before, took);
            }
        }
    }

    /// Takes `percent` of their rates from the disks that the guest has `changed` in the latest round, in which the link
    /// carried `link_bytes_per_s`. Others are not what keeps the migration from ending.
    pub(super) fn slow(
        &mut self,
        disks: &[LeavingDisk],
        changed: &[DirtyBitmap],
        percent: u8,
        link_bytes_per_s: u64,
    ) {
        self.percent = percent;
        let limits = limits(&self.disks, changed, percent, link_bytes_per_s);
        for ((disk, rate), limit) in disks.iter().zip(&mut self.disks).zip(limits) {
            if let Some(limit) = limit {
                rate.slowed = true;
                disk.limit_writes(limit);
            }
        }
    }
}

/// What each disk may write per second; `None` leaves one as it is.
fn limits(
    rates: &[WriteRate],
    changed: &[DirtyBitmap],
    percent: u8,
    link_bytes_per_s: u64,
) -> Vec<Option<u64>> {
    let busy = |changed: &&DirtyBitmap| changed.count() > 0;
    let number = changed.iter().filter(busy).count().max(1) as u64;
    let least = link_bytes_per_s / LEAST_SHARE_OF_LINK / number;
    let limit = |(rate, changed): (&WriteRate, &DirtyBitmap)| {
        busy(&changed).then(|| left_of(rate.free, percent).max(least))
    };
    rates.iter().zip(changed).map(limit).collect()
}

fn left_of(rate: u64, percent: u8) -> u64 {
    let left = u128::from(rate) * u128::from(100 - percent.min(100)) / 100;
    u64::try_from(left).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn what_is_taken_from_a_rate_is_a_share_of_it() {
        assert_eq!(left_of(1_000, 25), 750);
        assert_eq!(left_of(1_000, 100), 0);
        assert_eq!(left_of(u64::MAX, 0), u64::MAX);
    }

    #[test]
    fn only_disks_that_change_are_slowed_and_keep_a_share_of_the_link() {
        let rate = |free| WriteRate {
            written: 0,
            free,
            slowed: false,
        };
        let rates = [rate(1_000), rate(1_000_000), rate(0)];
        let idle = DirtyBitmap::new(vec![0], 10);
        let busy = DirtyBitmap::new(vec![1], 10);
        let changed = [idle.clone(), busy.clone(), busy];
        let least = 32_000 / LEAST_SHARE_OF_LINK / 2;
        assert_eq!(
            limits(&rates, &changed, 50, 32_000),
            [None, Some(500_000), Some(least)]
        );
        let one = [idle.clone(), changed[1].clone(), idle];
        assert_eq!(
            limits(&rates, &one, 100, 32_000),
            [None, Some(2 * least), None]
        );
    }

    proptest! {
        #[test]
        fn the_slices_hold_every_changed_cluster_once(
            words in prop::collection::vec(prop_oneof![3 => Just(0), 1 => Just(u64::MAX), 2 => any::<u64>()], 1..100),
            cut_off in 0u64..64,
            lanes in 1usize..16,
        ) {
            let clusters = words.len() as u64 * 64 - cut_off;
            let changed = DirtyBitmap::new(words, clusters);
            let slices = cut(&[DirtyBitmap::new(Vec::new(), 7), changed.clone()], lanes);
            let mut taken = vec![0u8; clusters as usize];
            for slice in &slices {
                prop_assert_eq!(slice.disk, 1);
                prop_assert!(slice.clusters.end - slice.clusters.start <= MAX_SLICE_CLUSTERS);
                for (first, number) in changed.runs(slice.clusters.clone()) {
                    (first..first + number).for_each(|cluster| taken[cluster as usize] += 1);
                }
            }
            for cluster in 0..clusters {
                let dirty = changed.runs(cluster..cluster + 1).next().is_some();
                prop_assert_eq!(taken[cluster as usize], u8::from(dirty));
            }
        }
    }
}
