//! What the two ends of a migration prove themselves with. Both are made for one migration and die with it.

use serde::{Deserialize, Serialize};
use std::fmt;

/// A secret that the target gives out when it is prepared and that every connection to it must name.
#[derive(Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct MigrationToken(pub String);

impl fmt::Debug for MigrationToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("MigrationToken(…)")
    }
}

/// A key and its certificate for one end of one migration, signed by the pool's CA; all in PEM.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MigrationIdentity {
    /// The CA that the peer's certificate must come from.
    pub authority_pem: String,
    /// This end's certificate.
    pub certificate_pem: String,
    /// Its private key.
    pub key_pem: String,
}

impl fmt::Debug for MigrationIdentity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MigrationIdentity").finish_non_exhaustive()
    }
}
