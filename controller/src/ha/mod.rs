//! Failover: who is silent, since when, and what may be done about it. Only the debts are remembered.

pub(crate) mod debts;

pub mod detector;

pub mod orders;
