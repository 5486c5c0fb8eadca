//! Disks whose content goes with the VM, and what the machines at both ends may differ in because of them.

use crate::devices::{Devices, Disk};
use crate::machine::MachineSpec;
use crate::unit::Bytes;
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;

/// The target takes disks' content and makes it durable before it is ready.
pub const DISKS_CAPABILITY: &str = "disks";

/// A disk whose content goes with the VM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TravellingDisk {
    /// Its name in the machine's spec.
    pub name: String,
    /// Its size as the guest sees it; the target's must be the same.
    pub bytes: Bytes,
}

/// The first thing in which the source's machine differs from the one the target was made for, for the operator. Where
/// the content of the disks in `travelling` comes from and goes to may differ, and nothing else.
pub fn difference(
    source: &MachineSpec,
    target: &MachineSpec,
    travelling: &BTreeSet<String>,
) -> Option<String> {
    // Named one by one, so that what is added to a machine is compared too.
    let MachineSpec {
        machine_type,
        vcpus,
        memory_mib,
        boot,
        cpu,
        devices:
            Devices {
                disks,
                nics,
                cloud_init,
                console,
                vsock,
                memory_backing,
            },
    } = source;
    let there = &target.devices;
    [
        ("its machine type", *machine_type == target.machine_type),
        ("its number of vCPUs", *vcpus == target.vcpus),
        ("its memory", *memory_mib == target.memory_mib),
        ("what it boots", *boot == target.boot),
        ("its CPU baseline", *cpu == target.cpu),
        ("its number of disks", disks.len() == there.disks.len()),
        ("its network cards", *nics == there.nics),
        ("its cloud-init seed", *cloud_init == there.cloud_init),
        ("its console", *console == there.console),
        ("its vsock", *vsock == there.vsock),
        (
            "how its memory is backed",
            *memory_backing == there.memory_backing,
        ),
    ]
    .into_iter()
    .find_map(|(what, same)| (!same).then(|| what.to_owned()))
    .or_else(|| {
        let pairs = disks.iter().zip(&there.disks);
        pairs
            .filter_map(|(ours, theirs)| difference_of_disk(ours, theirs, travelling))
            .next()
    })
}

fn difference_of_disk(
    source: &Disk,
    target: &Disk,
    travelling: &BTreeSet<String>,
) -> Option<String> {
    let Disk {
        name,
        source: place,
        access,
        limits,
        on_error,
    } = source;
    let same = *name == target.name
        && *access == target.access
        && *limits == target.limits
        && *on_error == target.on_error;
    if !same {
        Some(format!("its disk {name}"))
    } else if *place != target.source && !travelling.contains(name) {
        Some(format!("where its disk {name} is"))
    } else {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::devices::{DiskAccess, DiskSource};
    use crate::id::{DiskId, PoolId};
    use crate::machine::{Boot, CpuBaseline, MachineType};
    use crate::unit::Mib;

    fn disk(name: &str) -> Disk {
        Disk {
            name: name.into(),
            source: DiskSource::Volume {
                pool: PoolId::fresh(),
                disk: DiskId::fresh(),
            },
            access: DiskAccess::ReadWrite,
            limits: Default::default(),
            on_error: Default::default(),
        }
    }

    fn machine() -> MachineSpec {
        MachineSpec {
            machine_type: MachineType::Godwit2,
            vcpus: 1,
            memory_mib: Mib(16),
            boot: Boot::Pilot,
            cpu: CpuBaseline::Host,
            devices: Devices {
                disks: vec![disk("root"), disk("data")],
                ..Devices::default()
            },
        }
    }

    fn moved(machine: &MachineSpec, index: usize) -> MachineSpec {
        let mut moved = machine.clone();
        moved.devices.disks[index].source = disk("any").source;
        moved
    }

    #[test]
    fn only_a_travelling_disk_may_lie_elsewhere() {
        let source = machine();
        let root = BTreeSet::from(["root".to_owned()]);
        let none = BTreeSet::new();
        assert_eq!(difference(&source, &source, &none), None);
        assert_eq!(difference(&source, &moved(&source, 0), &root), None);
        assert_eq!(
            difference(&source, &moved(&source, 0), &none).as_deref(),
            Some("where its disk root is")
        );
        assert_eq!(
            difference(&source, &moved(&source, 1), &root).as_deref(),
            Some("where its disk data is")
        );
    }

    #[test]
    fn whatever_else_differs_is_named() {
        let source = machine();
        let all = BTreeSet::from(["root".to_owned(), "data".to_owned()]);
        let differing = |change: &dyn Fn(&mut MachineSpec)| {
            let mut target = moved(&source, 0);
            change(&mut target);
            difference(&source, &target, &all).unwrap()
        };
        assert_eq!(differing(&|spec| spec.vcpus = 2), "its number of vCPUs");
        assert_eq!(differing(&|spec| spec.memory_mib = Mib(32)), "its memory");
        assert_eq!(
            differing(&|spec| spec.devices.disks[1].access = DiskAccess::ReadOnly),
            "its disk data"
        );
        assert_eq!(
            differing(&|spec| spec.devices.disks.swap(0, 1)),
            "its disk root"
        );
        assert_eq!(
            differing(&|spec| drop(spec.devices.disks.pop())),
            "its number of disks"
        );
    }
}
