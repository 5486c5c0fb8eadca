//! How much memory may be kept, and which VMs' is given up. Pure.

use godwit_wire::id::VmId;
use godwit_wire::unit::Bytes;
use std::time::Duration;

/// Most VMs whose memory is kept.
const MAX_KEPT: usize = 256;
/// A host keeps this share of its memory free of what is kept,
const RESERVE_SHARE: u64 = 20;
/// but at least this much.
const LEAST_RESERVE: Bytes = Bytes(512 << 20);

/// What the host's memory is wanted for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Demand {
    /// The operator's limit, if there is one.
    pub(super) most: Option<Bytes>,
    /// Memory that guests may use in all.
    pub(super) guest_memory: Bytes,
    /// What of it the VMs here have been promised, whether they use it or not.
    pub(super) promised: Bytes,
    /// What is kept now.
    pub(super) held: Bytes,
    /// Memory of the host in all, and what is available of it beside what is kept.
    pub(super) total: Bytes,
    pub(super) available: Bytes,
    /// What a VM is about to take.
    pub(super) needed: Bytes,
}

impl Demand {
    /// How much may be kept. Never what a VM has been promised: a guest must not find its memory taken when it comes to
    /// touch it. And never what the host needs to breathe.
    pub(super) fn room(&self) -> Bytes {
        let unpromised = self.guest_memory.0.saturating_sub(self.promised.0);
        let reserve = LEAST_RESERVE.0.max(self.total.0 / RESERVE_SHARE);
        let spare = self
            .held
            .0
            .saturating_add(self.available.0)
            .saturating_sub(reserve)
            .saturating_sub(self.needed.0);
        let most = self.most.map_or(u64::MAX, |most| most.0);
        Bytes(unpromised.min(spare).min(most))
    }
}

/// Memory of one VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Item {
    pub(super) vm: VmId,
    pub(super) bytes: Bytes,
    /// Since the VM left.
    pub(super) age: Duration,
}

/// What is given up: all that is older than `keep`, and, the oldest first, what does not fit into `room`.
pub(super) fn superfluous(mut items: Vec<Item>, keep: Duration, room: Bytes) -> Vec<VmId> {
    items.sort_by_key(|item| item.age);
    let (mut left, mut places) = (room.0, MAX_KEPT);
    let mut given_up = Vec::new();
    for item in items {
        if item.age < keep && item.bytes.0 <= left && places > 0 {
            left -= item.bytes.0;
            places -= 1;
        } else {
            given_up.push(item.vm);
        }
    }
    given_up
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const GIB: u64 = 1 << 30;
    const HOUR: Duration = Duration::from_secs(3600);

    fn demand() -> Demand {
        Demand {
            most: None,
            guest_memory: Bytes(60 * GIB),
            promised: Bytes(20 * GIB),
            held: Bytes(10 * GIB),
            total: Bytes(64 * GIB),
            available: Bytes(30 * GIB),
            needed: Bytes(0),
        }
    }

    fn item(gib: u64, minutes: u64) -> Item {
        Item {
            vm: VmId::fresh(),
            bytes: Bytes(gib * GIB),
            age: Duration::from_secs(60 * minutes),
        }
    }

    #[test]
    fn what_vms_were_promised_is_not_kept_from_them() {
        assert!(demand().room() > Bytes(36 * GIB));
        let full = Demand {
            promised: Bytes(58 * GIB),
            ..demand()
        };
        assert_eq!(full.room(), Bytes(2 * GIB));
        let beyond = Demand {
            promised: Bytes(70 * GIB),
            ..demand()
        };
        assert_eq!(beyond.room(), Bytes(0));
    }

    #[test]
    fn a_host_that_runs_short_and_a_vm_that_starts_come_first() {
        let short = Demand {
            available: Bytes(GIB),
            ..demand()
        };
        assert_eq!(short.room(), Bytes(11 * GIB - 64 * GIB / 20));
        let starting = Demand {
            needed: Bytes(35 * GIB),
            ..demand()
        };
        assert_eq!(starting.room(), Bytes(5 * GIB - 64 * GIB / 20));
        let limited = Demand {
            most: Some(Bytes(GIB)),
            ..demand()
        };
        assert_eq!(limited.room(), Bytes(GIB));
    }

    #[test]
    fn the_oldest_goes_first() {
        let (old, middle, young) = (item(2, 50), item(2, 30), item(2, 1));
        let items = vec![middle, old, young];
        assert_eq!(superfluous(items.clone(), HOUR, Bytes(6 * GIB)), []);
        assert_eq!(superfluous(items.clone(), HOUR, Bytes(5 * GIB)), [old.vm]);
        assert_eq!(
            superfluous(items, HOUR / 3, Bytes(6 * GIB)),
            [middle.vm, old.vm]
        );
    }

    #[test]
    fn one_that_never_fits_does_not_drive_out_those_that_do() {
        let (old, huge) = (item(2, 50), item(20, 1));
        assert_eq!(
            superfluous(vec![old, huge], HOUR, Bytes(4 * GIB)),
            [huge.vm]
        );
    }

    proptest! {
        #[test]
        fn what_stays_fits(
            sizes in prop::collection::vec((0u64..8, 0u64..120), 0..40), room in 0u64..30,
        ) {
            let items: Vec<_> = sizes.iter().map(|(gib, minutes)| item(*gib, *minutes)).collect();
            let given_up = superfluous(items.clone(), HOUR, Bytes(room * GIB));
            let stays = items.iter().filter(|item| !given_up.contains(&item.vm));
            let bytes: u64 = stays.clone().map(|item| item.bytes.0).sum();
            prop_assert!(bytes <= room * GIB);
            prop_assert!(stays.clone().all(|item| item.age < HOUR));
        }
    }
}
