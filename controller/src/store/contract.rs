//! The contract every engine keeps.

use serde::{Deserialize, Serialize};
use std::fmt;
use std::time::Duration;

/// Longest value.
pub const MAX_VALUE_BYTES: usize = 4 << 20;
/// Longest key.
pub const MAX_KEY_BYTES: usize = 256;
/// Most compares and writes in one transaction.
pub const MAX_TXN_OPERATIONS: usize = 10_000;

/// State of the whole store: grows by one with every transaction that writes. 0 is the empty store.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
#[serde(transparent)]
pub struct Revision(pub u64);

impl fmt::Display for Revision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// A key with its value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Key.
    pub key: String,
    /// Value.
    pub value: Vec<u8>,
    /// Revision that wrote it last.
    pub revision: Revision,
}

/// A condition of a transaction.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Compare {
    /// The key does not exist.
    Absent {
        /// Key.
        key: String,
    },
    /// The key was last written by this revision.
    Unchanged {
        /// Key.
        key: String,
        /// Revision that wrote it last.
        revision: Revision,
    },
}

/// A write of a transaction.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Write {
    /// Sets a key.
    Put {
        /// Key.
        key: String,
        /// Value.
        value: Vec<u8>,
    },
    /// Removes a key; removing what is not there is fine.
    Delete {
        /// Key.
        key: String,
    },
}

/// All writes happen if all compares hold, otherwise nothing does.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Txn {
    /// Conditions.
    pub compares: Vec<Compare>,
    /// Writes; a key at most once.
    pub writes: Vec<Write>,
}

/// How a transaction ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TxnOutcome {
    /// It is on disk, under this revision.
    Committed(Revision),
    /// A compare did not hold; nothing was written.
    Conflict,
}

/// A write seen by a watcher.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Change {
    /// Revision that wrote it.
    pub revision: Revision,
    /// The write.
    pub write: Write,
}

/// What a watch has to tell.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Watched {
    /// Changes after the asked revision, in order; whole transactions. Empty when none came in time.
    Changes(Vec<Change>),
    /// The history back to the asked revision is gone: list again, then watch from there.
    Compacted {
        /// Oldest revision that can still be watched from.
        oldest: Revision,
    },
}

/// Why the store did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The engine failed; for a transaction it is not known whether it was written.
    #[error("the store failed to {action}")]
    Engine {
        /// What it was doing.
        action: &'static str,
        /// What the engine said.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// Another server has the file.
    #[error("{path} is in use by another server")]
    InUse {
        /// The file.
        path: std::path::PathBuf,
    },
    /// The file was written by a newer version of the program.
    #[error("the store has schema version {found}, this program knows versions up to {known}")]
    NewerSchema {
        /// Version found.
        found: u32,
        /// Newest version known.
        known: u32,
    },
    /// The request breaks a limit of the contract.
    #[error("{what} of {value} is over the limit of {limit}")]
    TooLarge {
        /// What is too large.
        what: &'static str,
        /// How large.
        value: usize,
        /// How large it may be.
        limit: usize,
    },
    /// One key is written twice in one transaction.
    #[error("key {key} is written twice in one transaction")]
    WrittenTwice {
        /// Key.
        key: String,
    },
}

/// The engine. Calls block; callers on an async runtime hand them to a blocking thread.
pub trait Store: Send + Sync + fmt::Debug + 'static {
    /// The value of `key`.
    fn get(&self, key: &str) -> Result<Option<Entry>, StoreError>;

    /// All entries whose key starts with `prefix`, sorted by key, and the revision they are consistent with.
    fn list(&self, prefix: &str) -> Result<(Vec<Entry>, Revision), StoreError>;

    /// All or nothing; durable when it returns [`TxnOutcome::Committed`].
    fn txn(&self, txn: &Txn) -> Result<TxnOutcome, StoreError>;

    /// Changes to keys under `prefix` after `after`; waits up to `wait` for the first.
    fn watch(&self, prefix: &str, after: Revision, wait: Duration) -> Result<Watched, StoreError>;

    /// Forgets the history up to and including `upto`; present values stay.
    fn compact(&self, upto: Revision) -> Result<(), StoreError>;

    /// The latest revision.
    fn revision(&self) -> Result<Revision, StoreError>;
}

impl Txn {
    /// Checks the limits that every engine shares.
    pub(super) fn check(&self) -> Result<(), StoreError> {
        let within = |what, value: usize, limit: usize| {
            if value > limit {
                Err(StoreError::TooLarge { what, value, limit })
            } else {
                Ok(())
            }
        };
        within(
            "a transaction",
            self.compares.len() + self.writes.len(),
            MAX_TXN_OPERATIONS,
        )?;
        let mut seen = std::collections::BTreeSet::new();
        for write in &self.writes {
            let key = match write {
                Write::Put { key, value } => {
                    within("a value", value.len(), MAX_VALUE_BYTES)?;
                    key
                }
                Write::Delete { key } => key,
            };
            within("a key", key.len(), MAX_KEY_BYTES)?;
            if !seen.insert(key) {
                return Err(StoreError::WrittenTwice { key: key.clone() });
            }
        }
        Ok(())
    }
}
