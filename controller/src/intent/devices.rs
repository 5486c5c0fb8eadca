//! Devices, disks, images and networks as operators ask for them: by name, with the details left to the controller.

use crate::model::AfterSnapshot;
use godwit_wire::devices::{
    CloudInit, ConsoleKind, DiskAccess, DiskFormat, DiskLimits, MacAddress, MemoryBacking,
    NicLimits, OnIoError, Vsock,
};
use godwit_wire::id::{DiskId, HostId, NetworkId, PoolId, VmId};
use godwit_wire::network::{Subnet, Transport};
use godwit_wire::storage::{DiskOrigin, ImportSource};
use godwit_wire::unit::Bytes;
use std::net::Ipv4Addr;

/// An image to be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NewImage {
    /// Unique among images.
    pub name: String,
    /// Where to keep it; `None` leaves that to the controller when there is only one choice.
    pub pool: Option<PoolId>,
    /// The host that has the file; `None` takes any that has the pool.
    pub host: Option<HostId>,
    /// Where it comes from.
    pub source: ImportSource,
    /// Format of the source; `None` looks at it.
    pub format: Option<DiskFormat>,
    /// SHA-256 it must have, in hexadecimal.
    pub sha256: Option<String>,
}

/// A disk to be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NewDisk {
    /// Unique among disks.
    pub name: String,
    /// Where to keep it; `None` takes the origin's pool, or the only choice there is.
    pub pool: Option<PoolId>,
    /// Size; `None` takes the origin's.
    pub bytes: Option<Bytes>,
    /// Format; `None` takes what suits the origin.
    pub format: Option<DiskFormat>,
    /// What it is made from.
    pub from: DiskOrigin,
}

/// A snapshot to be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NewSnapshot {
    /// The VM to save.
    pub vm: VmId,
    /// Unique among the VM's snapshots.
    pub name: String,
    /// Where to keep it; `None` takes the pool of the VM's first disk, or the only choice there is.
    pub pool: Option<PoolId>,
    /// What the VM does once it is saved.
    pub then: AfterSnapshot,
}

/// A network to be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NewNetwork {
    /// Unique among networks.
    pub name: String,
    /// How frames get from host to host.
    pub transport: Transport,
    /// Largest frame payload; `None` takes what suits the transport.
    pub mtu: Option<u16>,
    /// Addresses to give to VMs.
    pub subnet: Option<Subnet>,
}

/// What a VM shall have besides CPUs and memory. `None` means nothing at creation, and no change later.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NewDevices {
    /// Disks, in the order the guest finds them.
    pub disks: Option<Vec<NewVmDisk>>,
    /// Network cards, in the order the guest finds them.
    pub nics: Option<Vec<NewNic>>,
    /// What cloud-init finds; an empty instance id and host name become the VM's id and name.
    pub cloud_init: Option<CloudInit>,
    /// Sockets between guest and host.
    pub vsock: Option<Vsock>,
    /// Which console the serial stream talks to.
    pub console: Option<ConsoleKind>,
    /// How the host backs guest memory.
    pub memory_backing: Option<MemoryBacking>,
}

impl NewDevices {
    /// Whether nothing is asked for.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

/// A disk of a VM to be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NewVmDisk {
    /// Name of the device; `None` numbers it.
    pub name: Option<String>,
    /// Which disk.
    pub source: NewDiskSource,
    /// Whether the guest may write.
    pub access: DiskAccess,
    /// Rate limits.
    pub limits: DiskLimits,
    /// What an I/O error does.
    pub on_error: OnIoError,
}

/// Which disk a VM shall have.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NewDiskSource {
    /// One that exists.
    Existing(DiskId),
    /// One that is made with the VM, and goes with it unless asked otherwise.
    New {
        /// As in [`NewDisk::pool`].
        pool: Option<PoolId>,
        /// As in [`NewDisk::bytes`].
        bytes: Option<Bytes>,
        /// As in [`NewDisk::format`].
        format: Option<DiskFormat>,
        /// As in [`NewDisk::from`].
        from: DiskOrigin,
    },
}

/// A network card of a VM to be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NewNic {
    /// Name of the device; `None` numbers it.
    pub name: Option<String>,
    /// What it is plugged into.
    pub network: NetworkId,
    /// Its Ethernet address; `None` makes one from the VM's id.
    pub mac: Option<MacAddress>,
    /// Its address.
    pub address: NicAddress,
    /// Queue pairs; `None` takes one.
    pub queue_pairs: Option<u8>,
    /// Rate limits.
    pub limits: NicLimits,
}

/// Which address a network card gets.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum NicAddress {
    /// The lowest free one, if the network has addresses to give.
    #[default]
    Auto,
    /// This one.
    Fixed(Ipv4Addr),
    /// None: the guest sees to it.
    Unmanaged,
}
