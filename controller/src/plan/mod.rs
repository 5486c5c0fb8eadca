//! What should be done, as pure functions of a picture of the pool: no clock, no network, no randomness, and the
//! same answer for the same picture.

pub mod along;

pub mod picture;

pub mod placement;

pub mod estimate;

pub mod dirtying;

pub mod forecast;

pub mod traffic;

pub mod fairness;

pub mod admission;

pub mod contract;

pub mod maintenance;

pub mod restore;

pub mod reconcile;
