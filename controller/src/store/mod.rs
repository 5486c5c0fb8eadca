//! Where the controller's records live: a small key-value store with revisions and transactions.
//!
//! One contract ([`Store`]), tested by one suite whatever the engine ([`suite`]); engines are SQLite for one
//! server and memory for simulations. An engine shared by several servers fits behind the same contract.

mod contract;

mod history;

pub mod memory;

pub mod sqlite;

#[cfg(test)]
mod suite;

pub use contract::{
    Change, Compare, Entry, MAX_KEY_BYTES, MAX_TXN_OPERATIONS, MAX_VALUE_BYTES, Revision, Store,
    StoreError, Txn, TxnOutcome, Watched, Write,
};
