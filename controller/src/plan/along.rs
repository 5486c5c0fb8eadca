//! Where the disks of a VM go that move along with it to a host which does not see their storage pools.

use crate::model::rejection::DiskTie;
use crate::model::{DiskState, DisksOnMove, Rejection, Vm};
use crate::view::{View, attachments};
use godwit_wire::devices::{DiskAccess, DiskFormat, DiskSource};
use godwit_wire::id::{DiskId, ImageId, PoolId, VmId};
use godwit_wire::unit::Bytes;
use std::collections::BTreeMap;

/// A storage pool as a host sees it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PoolPicture {
    /// The name that the host gives it.
    pub name: String,
    /// What keeps the host from using it.
    pub trouble: Option<String>,
    /// Room that is neither taken nor promised to disks on their way.
    pub free: Bytes,
}

/// What may move along with a VM.
#[derive(Clone, Debug, PartialEq)]
pub struct Along {
    /// Only into this pool: its id, or the name that the target gives it.
    pub pool: Option<String>,
    /// All disks of the VM that are in pools, in the order of the machine.
    pub disks: Vec<PooledDisk>,
}

/// A disk of a VM that may move along.
#[derive(Clone, Debug, PartialEq)]
pub struct PooledDisk {
    /// Which disk.
    pub disk: DiskId,
    /// Its name in the machine.
    pub name: String,
    /// The pool it is in.
    pub pool: PoolId,
    /// Name of that pool.
    pub pool_name: String,
    /// Size the guest sees.
    pub bytes: Bytes,
    /// Format.
    pub format: DiskFormat,
    /// The image it is a thin copy of.
    pub base: Option<ImageId>,
    /// What keeps it where it is.
    pub tie: Option<DiskTie>,
}

/// Pools that disks may go to.
type Pools<'a> = BTreeMap<PoolId, &'a PoolPicture>;

/// Where a disk goes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Destination<'a> {
    /// The disk.
    pub disk: &'a PooledDisk,
    /// The pool at the target.
    pub pool: PoolId,
}

/// What may move along with a VM that moves like this; `None` when its disks stay.
pub fn along(view: &View, vm: &Vm, disks: &DisksOnMove) -> Option<Along> {
    let DisksOnMove::Along { pool } = disks else {
        return None;
    };
    let pooled = attachments(&vm.spec).map(|attached| {
        let record = view.disks.get(&attached.disk);
        let is_it = |source: &DiskSource| matches!(source, DiskSource::Volume { disk, .. } if *disk == attached.disk);
        let mut devices = vm.spec.devices.disks.iter();
        let named = devices.find(|device| is_it(&device.source));
        PooledDisk {
            disk: attached.disk,
            name: named.map(|device| device.name.clone()).unwrap_or_default(),
            pool: attached.pool,
            pool_name: view.pool_name(attached.pool),
            bytes: record.and_then(|disk| disk.bytes).unwrap_or(Bytes(0)),
            format: record.map_or(DiskFormat::Raw, |disk| disk.format),
            base: record.and_then(|disk| disk.base()),
            tie: tie(view, vm.id, attached.disk, attached.access),
        }
    });
    Some(Along {
        pool: pool.clone(),
        disks: pooled.collect(),
    })
}

fn tie(view: &View, vm: VmId, disk: DiskId, access: DiskAccess) -> Option<DiskTie> {
    let others = view.users_of(disk).iter().find(|(user, _)| *user != vm);
    if let Some((other, _)) = others {
        let name = view.vms.get(other).map(|vm| vm.name.clone());
        return Some(DiskTie::Shared {
            vm: name.unwrap_or_else(|| other.to_string()),
        });
    }
    if access == DiskAccess::ReadOnly {
        return Some(DiskTie::ReadOnly);
    }
    let ready = view
        .disks
        .get(&disk)
        .is_some_and(|disk| disk.state == DiskState::Ready && disk.bytes.is_some());
    (!ready).then_some(DiskTie::NotReady)
}

/// Where each disk goes whose pool a host with these pools does not see: into a pool of the same name if that has room for all of the
/// disk, else into the roomiest; ties go to the smaller id, so that the same picture gives the same answer.
pub fn destinations<'a>(
    seen: &BTreeMap<PoolId, PoolPicture>,
    along: &'a Along,
) -> Result<Vec<Destination<'a>>, Rejection> {
    let wanted = |id: &PoolId, pool: &PoolPicture| {
        let asked = along.pool.as_ref();
        asked.is_none_or(|asked| pool.name == *asked || id.to_string() == *asked)
    };
    let pools: Pools<'_> = seen
        .iter()
        .filter(|(id, pool)| wanted(id, pool))
        .map(|(id, pool)| (*id, pool))
        .collect();
    let mut free: BTreeMap<PoolId, u64> = pools
        .iter()
        .filter(|(_, pool)| pool.trouble.is_none())
        .map(|(id, pool)| (*id, pool.free.0))
        .collect();
    let mut found = Vec::new();
    for disk in &along.disks {
        if seen.contains_key(&disk.pool) {
            continue;
        }
        if let Some(tie) = &disk.tie {
            return Err(Rejection::DiskTied {
                disk: disk.name.clone(),
                name: disk.pool_name.clone(),
                tie: tie.clone(),
            });
        }
        let pool =
            roomiest(&pools, &free, disk).ok_or_else(|| refused(&pools, &free, along, disk))?;
        if let Some(left) = free.get_mut(&pool) {
            *left -= disk.bytes.0;
        }
        found.push(Destination { disk, pool });
    }
    Ok(found)
}

fn roomiest(pools: &Pools<'_>, free: &BTreeMap<PoolId, u64>, disk: &PooledDisk) -> Option<PoolId> {
    let namesake = |id: &PoolId| {
        pools
            .get(id)
            .is_some_and(|pool| pool.name == disk.pool_name)
    };
    free.iter()
        .filter(|(_, free)| **free >= disk.bytes.0)
        .max_by_key(|(id, free)| (namesake(id), **free, std::cmp::Reverse(**id)))
        .map(|(id, _)| *id)
}

/// Why no pool of the host takes the disk.
fn refused(
    pools: &Pools<'_>,
    free: &BTreeMap<PoolId, u64>,
    along: &Along,
    disk: &PooledDisk,
) -> Rejection {
    if let (Some(name), true) = (&along.pool, pools.is_empty()) {
        return Rejection::NoSuchPool { name: name.clone() };
    }
    if let (Some((id, pool)), true) = (pools.iter().next(), free.is_empty()) {
        return Rejection::PoolInTrouble {
            pool: *id,
            name: pool.name.clone(),
            trouble: pool.trouble.clone().unwrap_or_default(),
        };
    }
    Rejection::NoRoomForDisk {
        disk: disk.name.clone(),
        needed: disk.bytes,
        free: Bytes(free.values().copied().max().unwrap_or(0)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use uuid::Uuid;

    const GIB: u64 = 1 << 30;
    const HOME: PoolId = PoolId(Uuid::from_u128(100));

    fn pool(number: u128) -> PoolId {
        PoolId(Uuid::from_u128(number))
    }

    fn disk(name: &str, gib: u64) -> PooledDisk {
        PooledDisk {
            disk: DiskId(Uuid::from_u128(u128::from(gib))),
            name: name.into(),
            pool: HOME,
            pool_name: "local".into(),
            bytes: Bytes(gib * GIB),
            format: DiskFormat::Raw,
            base: None,
            tie: None,
        }
    }

    fn all(disks: Vec<PooledDisk>) -> Along {
        Along { pool: None, disks }
    }

    type Seen = BTreeMap<PoolId, PoolPicture>;

    fn with_pools(pools: &[(u128, &str, u64)]) -> Seen {
        let picture = |name: &str, gib: u64| PoolPicture {
            name: name.into(),
            trouble: None,
            free: Bytes(gib * GIB),
        };
        pools
            .iter()
            .map(|(number, name, gib)| (pool(*number), picture(name, *gib)))
            .collect()
    }

    fn go(host: &Seen, along: &Along) -> Result<Vec<PoolId>, String> {
        destinations(host, along)
            .map(|found| found.iter().map(|to| to.pool).collect())
            .map_err(|rejection| {
                assert!(!rejection.remedy().is_empty());
                rejection.to_string()
            })
    }

    #[test]
    fn a_pool_of_the_same_name_is_preferred_to_a_roomier_one() {
        let host = with_pools(&[(1, "big", 100), (2, "local", 10)]);
        assert_eq!(go(&host, &all(vec![disk("data", 10)])), Ok(vec![pool(2)]));
        assert_eq!(go(&host, &all(vec![disk("data", 11)])), Ok(vec![pool(1)]));
    }

    #[test]
    fn otherwise_the_roomiest_is_taken_and_the_smaller_id_among_equals() {
        let host = with_pools(&[(1, "a", 20), (2, "b", 30), (3, "c", 30)]);
        assert_eq!(go(&host, &all(vec![disk("data", 10)])), Ok(vec![pool(2)]));
    }

    #[test]
    fn several_disks_share_the_room_there_is() {
        let host = with_pools(&[(1, "a", 20), (2, "b", 15)]);
        let disks = all(vec![disk("root", 12), disk("data", 10)]);
        assert_eq!(go(&host, &disks), Ok(vec![pool(1), pool(2)]));
        let disks = all(vec![disk("root", 12), disk("data", 16)]);
        expect_test::expect![
            "no storage pool of the host takes data of 16.0 GiB: the most that is free is 15.0 GiB"
        ]
        .assert_eq(&go(&host, &disks).unwrap_err());
    }

    #[test]
    fn a_disk_whose_pool_the_host_sees_stays_where_it_is() {
        let host = with_pools(&[(100, "local", 0), (1, "a", 20)]);
        assert_eq!(go(&host, &all(vec![disk("data", 10)])), Ok(vec![]));
    }

    #[test]
    fn the_pool_that_is_asked_for_is_the_only_choice() {
        let host = with_pools(&[(1, "a", 20), (2, "local", 30)]);
        let mut disks = all(vec![disk("data", 10)]);
        disks.pool = Some("a".into());
        assert_eq!(go(&host, &disks), Ok(vec![pool(1)]));
        disks.pool = Some(pool(2).to_string());
        assert_eq!(go(&host, &disks), Ok(vec![pool(2)]));
        disks.pool = Some("nowhere".into());
        assert_eq!(
            go(&host, &disks).unwrap_err(),
            "the host has no storage pool nowhere that disks could move to"
        );
    }

    #[test]
    fn a_disk_that_another_vm_reads_too_does_not_move() {
        let host = with_pools(&[(1, "a", 20)]);
        let mut shared = disk("tools", 1);
        shared.tie = Some(DiskTie::Shared { vm: "web".into() });
        assert_eq!(
            go(&host, &all(vec![shared])).unwrap_err(),
            "the host does not have the storage pool local, and tools cannot move along: web has it too"
        );
    }

    #[test]
    fn a_pool_in_trouble_takes_no_disk() {
        let mut host = with_pools(&[(1, "a", 20)]);
        host.get_mut(&pool(1)).unwrap().trouble = Some("read-only".into());
        assert_eq!(
            go(&host, &all(vec![disk("data", 1)])).unwrap_err(),
            "the host cannot use the storage pool a: read-only"
        );
    }
}
