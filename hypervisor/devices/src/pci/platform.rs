//! What the bus needs of the hypervisor below it.

use super::config::CONFIG_BYTES;
use std::fmt::Debug;
use std::io;
use vmm_sys_util::eventfd::EventFd;

/// A message-signalled interrupt, as a driver writes it into an MSI-X table entry.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MsiMessage {
    /// Where it is written: a LAPIC.
    pub address: u64,
    /// What is written: vector and delivery mode.
    pub data: u32,
}

/// One interrupt of the machine; given back when dropped.
pub trait InterruptLine: Send + Sync + Debug {
    /// From now on [`Self::signal`] delivers `message`.
    fn route(&self, message: MsiMessage) -> io::Result<()>;

    /// Delivers the message that was routed last. Must not block.
    fn signal(&self);
}

/// The hypervisor.
pub trait Platform: Send + Sync + Debug {
    /// An interrupt that is not routed yet.
    fn interrupt_line(&self) -> io::Result<Box<dyn InterruptLine>>;

    /// From now on a write to `address`, of whatever width, signals `doorbell` and nothing else.
    fn place_doorbell(&self, doorbell: &EventFd, address: u64) -> io::Result<()>;

    /// Takes back what [`Self::place_doorbell`] did.
    fn remove_doorbell(&self, doorbell: &EventFd, address: u64) -> io::Result<()>;
}

/// Copies of configuration space that guests read without leaving for the hypervisor.
pub trait ConfigMirror: Send + Sync + Debug {
    /// From now on guests read `registers` of the function in `slot` there, and zeros behind them.
    fn show(&self, slot: u8, registers: &[u8; CONFIG_BYTES]);

    /// From now on the bus is asked for all of that function, whatever is shown later.
    fn withdraw(&self, slot: u8);
}
