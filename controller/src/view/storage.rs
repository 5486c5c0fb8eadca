//! Pools, disks and networks as the records and the hosts' reports together show them.

use super::View;
use crate::model::{Disk, DisksOnDelete, Image, MovingDisk, Network, Snapshot, Vm, Work};
use godwit_wire::devices::{DiskAccess, DiskSource, NicAttach};
use godwit_wire::id::{DiskId, HostId, ImageId, NetworkId, PoolId, SnapshotId, VmId};
use godwit_wire::machine::MachineSpec;
use godwit_wire::storage::PoolReport;
use godwit_wire::unit::Bytes;
use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv4Addr;
use std::sync::Arc;

/// A storage pool, put together from what hosts report.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pool {
    /// Identity.
    pub id: PoolId,
    /// The name its first host gives it.
    pub name: String,
    /// Hosts that see it, by id.
    pub hosts: Vec<PoolHost>,
}

/// A host that sees a pool.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PoolHost {
    /// Which host.
    pub host: HostId,
    /// What it says.
    pub report: PoolReport,
    /// Whether its heartbeats come.
    pub heard: bool,
}

impl Pool {
    /// Whether several hosts see the same directory.
    pub fn is_shared(&self) -> bool {
        self.hosts.len() > 1
    }

    /// Hosts that can work on it now.
    pub fn able_hosts(&self) -> impl Iterator<Item = HostId> + '_ {
        self.hosts
            .iter()
            .filter(|host| host.heard && host.report.trouble.is_none())
            .map(|host| host.host)
    }

    /// Room in all and room left, as the most recent host that answers says.
    pub fn room(&self) -> (Bytes, Bytes) {
        let said = self.hosts.iter().find(|host| host.heard);
        said.or(self.hosts.first())
            .map_or((Bytes(0), Bytes(0)), |host| {
                (host.report.total_bytes, host.report.free_bytes)
            })
    }
}

/// A disk of a pool in a machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Attachment {
    /// The pool.
    pub pool: PoolId,
    /// The disk.
    pub disk: DiskId,
    /// Whether the guest may write.
    pub access: DiskAccess,
}

/// The pools' disks that a machine has.
pub fn attachments(spec: &MachineSpec) -> impl Iterator<Item = Attachment> + '_ {
    spec.devices
        .disks
        .iter()
        .filter_map(|disk| match disk.source {
            DiskSource::Volume { pool, disk: id } => Some(Attachment {
                pool,
                disk: id,
                access: disk.access,
            }),
            DiskSource::File { .. } => None,
        })
}

/// The addresses that a machine has.
pub fn leases(spec: &MachineSpec) -> impl Iterator<Item = (NetworkId, Ipv4Addr)> + '_ {
    spec.devices.nics.iter().filter_map(|nic| match nic.attach {
        NicAttach::Network { network } => Some((network, nic.address?)),
        NicAttach::Tap { .. } => None,
    })
}

/// What the VMs' specs say about disks and networks.
#[derive(Debug, Default)]
pub(super) struct StorageIndex {
    users: BTreeMap<DiskId, Vec<(VmId, DiskAccess)>>,
    leases: BTreeMap<(NetworkId, Ipv4Addr), VmId>,
    plugged: BTreeMap<NetworkId, Vec<VmId>>,
}

impl StorageIndex {
    pub(super) fn add(&mut self, vm: &Vm) {
        for attached in attachments(&vm.spec) {
            let users = self.users.entry(attached.disk).or_default();
            users.push((vm.id, attached.access));
        }
        for lease in leases(&vm.spec) {
            self.leases.insert(lease, vm.id);
        }
        for nic in &vm.spec.devices.nics {
            if let NicAttach::Network { network } = nic.attach {
                let plugged = self.plugged.entry(network).or_default();
                if plugged.last() != Some(&vm.id) {
                    plugged.push(vm.id);
                }
            }
        }
    }
}

impl View {
    /// The image with this name or id.
    pub fn find_image(&self, name_or_id: &str) -> Option<&Arc<Image>> {
        let id: ImageId = match name_or_id.parse() {
            Ok(id) => id,
            Err(_) => *self.index.names.images.get(name_or_id)?,
        };
        self.images.get(&id)
    }

    /// The disk with this name or id.
    pub fn find_disk(&self, name_or_id: &str) -> Option<&Arc<Disk>> {
        let id: DiskId = match name_or_id.parse() {
            Ok(id) => id,
            Err(_) => *self.index.names.disks.get(name_or_id)?,
        };
        self.disks.get(&id)
    }

    /// The snapshots of a VM, oldest first.
    pub fn snapshots_of(&self, vm: VmId) -> impl Iterator<Item = &Arc<Snapshot>> {
        self.snapshots
            .values()
            .filter(move |snapshot| snapshot.vm == vm)
    }

    /// The snapshot of a VM with this name or id.
    pub fn find_snapshot(&self, vm: VmId, name_or_id: &str) -> Option<&Arc<Snapshot>> {
        let id: Option<SnapshotId> = name_or_id.parse().ok();
        self.snapshots_of(vm)
            .find(|snapshot| Some(snapshot.id) == id || snapshot.name == name_or_id)
    }

    /// The network with this name or id.
    pub fn find_network(&self, name_or_id: &str) -> Option<&Arc<Network>> {
        let id: NetworkId = match name_or_id.parse() {
            Ok(id) => id,
            Err(_) => *self.index.names.networks.get(name_or_id)?,
        };
        self.networks.get(&id)
    }

    /// All pools that a host has reported since this server started.
    pub fn pools(&self) -> BTreeMap<PoolId, Pool> {
        let mut pools: BTreeMap<PoolId, Pool> = BTreeMap::new();
        for (host, observed) in self.observed.iter() {
            for report in &observed.pools {
                let pool = pools.entry(report.pool).or_insert_with(|| Pool {
                    id: report.pool,
                    name: report.name.clone(),
                    hosts: Vec::new(),
                });
                pool.hosts.push(PoolHost {
                    host: *host,
                    report: report.clone(),
                    heard: !observed.liveness.is_silent(),
                });
            }
        }
        pools
    }

    /// One pool, if a host has reported it.
    pub fn pool(&self, id: PoolId) -> Option<Pool> {
        self.pools().remove(&id)
    }

    /// Name of a pool, or its id while nobody reports it.
    pub fn pool_name(&self, id: PoolId) -> String {
        self.observed
            .values()
            .flat_map(|observed| &observed.pools)
            .find(|report| report.pool == id)
            .map_or_else(|| id.to_string(), |report| report.name.clone())
    }

    /// Name that a host gives a pool, or that another gives it.
    pub fn pool_name_at(&self, host: HostId, id: PoolId) -> String {
        let observed = self.observed.get(&host);
        let report = observed.and_then(|seen| seen.pools.iter().find(|report| report.pool == id));
        report.map_or_else(|| self.pool_name(id), |report| report.name.clone())
    }

    /// Whether what a migration has left of a disk in a pool is still to be erased there.
    pub fn is_erased_from(&self, disk: DiskId, pool: PoolId) -> bool {
        self.active_operations().any(|operation| {
            matches!(&operation.work, Work::EraseCopy { disk: of, pool: there, .. } if (*of, *there) == (disk, pool))
        })
    }

    /// The disk of which a migration has left a thin copy of an image that is still to be erased.
    pub fn copy_left_of(&self, image: ImageId) -> Option<DiskId> {
        self.active_operations()
            .find_map(|operation| match &operation.work {
                Work::EraseCopy { disk, base, .. } if *base == Some(image) => Some(*disk),
                _ => None,
            })
    }

    /// Whether a pool is where a disk is, or where an open migration takes it.
    pub fn belongs_in(&self, disk: DiskId, pool: PoolId) -> bool {
        let is_there = self.disks.get(&disk).is_some_and(|disk| disk.pool == pool);
        let comes = |moving: &MovingDisk| (moving.disk, moving.to) == (disk, pool);
        is_there || self.open_migrations().any(|m| m.disks.iter().any(comes))
    }

    /// Name of an image, or its id once it is gone.
    pub fn image_name(&self, id: ImageId) -> String {
        self.images
            .get(&id)
            .map_or_else(|| id.to_string(), |image| image.name.clone())
    }

    /// VMs that have a disk, and how.
    pub fn users_of(&self, disk: DiskId) -> &[(VmId, DiskAccess)] {
        self.index
            .storage
            .users
            .get(&disk)
            .map_or(&[], Vec::as_slice)
    }

    /// The VM that may write a disk.
    pub fn attached_to(&self, disk: DiskId) -> Option<VmId> {
        let writes = |user: &&(VmId, DiskAccess)| user.1 == DiskAccess::ReadWrite;
        self.users_of(disk).iter().find(writes).map(|user| user.0)
    }

    /// Disks that are based on an image.
    pub fn disks_of(&self, image: ImageId) -> impl Iterator<Item = &Arc<Disk>> {
        self.disks
            .values()
            .filter(move |disk| disk.base() == Some(image))
    }

    /// The VM that has an address.
    pub fn lease(&self, network: NetworkId, address: Ipv4Addr) -> Option<VmId> {
        self.index.storage.leases.get(&(network, address)).copied()
    }

    /// Addresses given out on a network, with the VMs that have them.
    pub fn leases_of(&self, network: NetworkId) -> impl Iterator<Item = (Ipv4Addr, VmId)> {
        let all = (network, Ipv4Addr::UNSPECIFIED)..=(network, Ipv4Addr::BROADCAST);
        let leases = self.index.storage.leases.range(all);
        leases.map(|((_, address), vm)| (*address, *vm))
    }

    /// VMs that are plugged into a network.
    pub fn plugged_into(&self, network: NetworkId) -> &[VmId] {
        self.index
            .storage
            .plugged
            .get(&network)
            .map_or(&[], Vec::as_slice)
    }

    /// The networks a machine is plugged into, as hosts are told.
    pub fn networks_of(&self, spec: &MachineSpec) -> Vec<godwit_wire::network::Network> {
        let named: BTreeSet<NetworkId> = spec
            .devices
            .nics
            .iter()
            .filter_map(|nic| match nic.attach {
                NicAttach::Network { network } => Some(network),
                NicAttach::Tap { .. } => None,
            })
            .collect();
        named
            .into_iter()
            .filter_map(|id| Some(self.networks.get(&id)?.network.clone()))
            .collect()
    }

    /// The disks that are deleted with a VM: created with it, and had by nobody else.
    pub fn disks_that_go_with(&self, vm: &Vm, disks: DisksOnDelete) -> Vec<&Arc<Disk>> {
        if disks == DisksOnDelete::Keep {
            return Vec::new();
        }
        let alone = |disk: &Disk| {
            self.users_of(disk.id)
                .iter()
                .all(|(user, _)| *user == vm.id)
        };
        attachments(&vm.spec)
            .filter_map(|attached| self.disks.get(&attached.disk))
            .filter(|disk| disk.created_with == Some(vm.id) && alone(disk))
            .collect()
    }

    /// A disk of the VM that an operation is changing; the VM must not start or move meanwhile.
    pub fn busy_disk(&self, vm: &Vm) -> Option<&Arc<Disk>> {
        attachments(&vm.spec)
            .filter_map(|attached| self.disks.get(&attached.disk))
            .find(|disk| disk.operation.is_some_and(|id| Some(id) != vm.operation))
    }
}
