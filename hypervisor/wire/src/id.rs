//! Identities and the two counters that order commands.

use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;
use uuid::Uuid;

macro_rules! id {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(pub Uuid);

        impl $name {
            /// A fresh id that sorts by creation time (UUID version 7).
            pub fn fresh() -> Self {
                Self(Uuid::now_v7())
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }

        impl FromStr for $name {
            type Err = uuid::Error;

            fn from_str(text: &str) -> Result<Self, Self::Err> {
                Uuid::parse_str(text).map(Self)
            }
        }
    };
}

id!(
    /// A virtual machine, the same wherever it runs.
    VmId
);
id!(
    /// A host of the pool; assigned when it joins.
    HostId
);
id!(
    /// One attempt to move one VM. A second attempt has a new id, so late messages cannot be confused.
    MigrationId
);
id!(
    /// One attempt to let another process of a host take a machine over.
    SuccessionId
);
id!(
    /// A durable operation of the controller.
    OperationId
);
id!(
    /// A maintenance of one host.
    MaintenanceId
);

id!(
    /// A saved machine in a storage pool.
    SnapshotId
);
id!(
    /// A storage pool, the same on every host that sees its directory.
    PoolId
);
id!(
    /// An image that disks are made from.
    ImageId
);
id!(
    /// A disk of a storage pool.
    DiskId
);
id!(
    /// A network of the pool.
    NetworkId
);

/// Ownership counter of a VM: grows by one each time the store gives the VM to a host.
///
/// Agents and VMMs refuse commands that carry an older one (DESIGN: never twice, barrier 1).
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
#[serde(transparent)]
pub struct Epoch(pub u64);

impl Epoch {
    /// The epoch that follows this one.
    pub const fn next(self) -> Self {
        Self(self.0 + 1)
    }
}

impl fmt::Display for Epoch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Order of the controller's commands to one VM within an epoch. A repeated one is answered again; an older
/// one is refused.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
#[serde(transparent)]
pub struct Generation(pub u64);

impl Generation {
    /// The generation that follows this one.
    pub const fn next(self) -> Self {
        Self(self.0 + 1)
    }
}

impl fmt::Display for Generation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}
