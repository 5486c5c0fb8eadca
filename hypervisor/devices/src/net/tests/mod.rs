//! Cards on real taps, and drivers of every kind.

mod frames;
mod hostile;
mod moving;
mod support;
