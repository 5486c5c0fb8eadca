//! A network of the pool.

use godwit_wire::id::NetworkId;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};

/// A network as stored. Its leases are not in here: each is a key of its own, taken and freed with the VM that
/// has it (see [`View::lease`](crate::view::View::lease)).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Network {
    /// What hosts are told.
    pub network: godwit_wire::network::Network,
    /// When it was created.
    pub created_at: Timestamp,
    /// When this record last changed.
    pub changed_at: Timestamp,
}

impl Network {
    /// Identity.
    pub const fn id(&self) -> NetworkId {
        self.network.network
    }

    /// Unique among networks.
    pub fn name(&self) -> &str {
        &self.network.name
    }
}
