//! Tests across processes, one program so that it is linked once.
//!
//! Those below `vmm` run two guests at a time at most, those below `cluster` and `browser` have the machine to
//! themselves: see `.config/nextest.toml`.

mod browser;
mod cluster;
mod vmm;
