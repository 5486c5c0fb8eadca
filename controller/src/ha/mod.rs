//! Failover: who is silent, since when, and what may be done about it. Everything here is pure.

pub mod detector;

pub mod orders;
