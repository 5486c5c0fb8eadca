//! Bus 0: a host bridge and up to 31 virtio functions, reached through ECAM (PCI Express base specification, 7.2.2)
//! and through their memory.

use super::config::{ConfigSpace, Identity};
use super::virtio::{BAR_BYTES, VirtioPci};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Devices of a bus; each has one function here.
pub const SLOTS: usize = 32;
/// Configuration space of one function in ECAM.
const FUNCTION_BYTES: u64 = 4096;

/// Red Hat's generic PCI Express host bridge: it has no registers of its own.
const HOST_BRIDGE: Identity = Identity {
    vendor: 0x1b36,
    device: 0x0008,
    class: 0x06_0000,
    revision: 0,
    subsystem: 0x1100,
};

/// The bus of one machine. vCPUs reach it at the same time; each function has a lock of its own.
#[derive(Debug)]
pub struct PciBus {
    bridge: Mutex<ConfigSpace>,
    functions: [Option<Mutex<VirtioPci>>; SLOTS],
    /// Where functions' memory begins; slot N's is N BARs behind it until the guest moves it.
    window: u64,
}

impl PciBus {
    /// A bus with nothing but its host bridge, whose functions' memory begins at `window`.
    pub fn new(window: u32) -> Self {
        assert!(window.is_multiple_of(BAR_BYTES), "BARs are aligned");
        Self {
            bridge: Mutex::new(ConfigSpace::new(HOST_BRIDGE)),
            functions: [const { None }; SLOTS],
            window: window.into(),
        }
    }

    /// Where the memory of the function in `slot` is to begin.
    pub const fn bar_of(&self, slot: u8) -> u32 {
        self.window as u32 + slot as u32 * BAR_BYTES
    }

    /// Puts a function into its slot.
    pub fn insert(&mut self, function: VirtioPci) {
        let slot = usize::from(function.slot());
        assert!(
            slot > 0 && self.functions[slot].is_none(),
            "slot {slot} is taken"
        );
        self.functions[slot] = Some(Mutex::new(function));
    }

    /// All functions, in order.
    pub fn functions(&self) -> impl Iterator<Item = MutexGuard<'_, VirtioPci>> {
        self.functions.iter().flatten().map(lock)
    }

    /// The guest reads configuration space at `offset` of ECAM. Where there is no function it reads all ones.
    pub fn read_config(&self, offset: u64, data: &mut [u8]) {
        match Target::of(offset) {
            Some(Target { slot: 0, register }) => lock(&self.bridge).read(register.into(), data),
            Some(Target { slot, register }) => match &self.functions[slot] {
                Some(function) => lock(function).read_config(register, data),
                None => data.fill(0xff),
            },
            None => data.fill(0xff),
        }
    }

    /// The guest writes configuration space at `offset` of ECAM.
    pub fn write_config(&self, offset: u64, data: &[u8]) {
        match Target::of(offset) {
            Some(Target { slot: 0, register }) => lock(&self.bridge).write(register.into(), data),
            Some(Target { slot, register }) => {
                if let Some(function) = &self.functions[slot] {
                    lock(function).write_config(register, data);
                }
            }
            None => {}
        }
    }

    /// The guest reads memory that no RAM is at.
    pub fn read(&self, address: u64, data: &mut [u8]) {
        data.fill(0xff);
        self.at(address, |function, offset| function.read_bar(offset, data));
    }

    /// The guest writes memory that no RAM is at.
    pub fn write(&self, address: u64, data: &[u8]) {
        self.at(address, |function, offset| function.write_bar(offset, data));
    }

    fn at(&self, address: u64, mut access: impl FnMut(&mut VirtioPci, u32)) {
        // Nearly always it is where it was put; else every function is asked.
        let likely = address
            .checked_sub(self.window)
            .map(|offset| (offset / u64::from(BAR_BYTES)) as usize)
            .filter(|slot| *slot < SLOTS);
        let first = likely.and_then(|slot| self.functions[slot].as_ref());
        for function in first.into_iter().chain(self.functions.iter().flatten()) {
            let mut function = lock(function);
            if let Some(window) = function.window()
                && window.contains(&address)
            {
                access(&mut function, (address - window.start) as u32);
                return;
            }
        }
    }
}

struct Target {
    slot: usize,
    register: u16,
}

impl Target {
    /// Function 0 of a device of bus 0; others do not exist.
    fn of(offset: u64) -> Option<Self> {
        let (function, register) = (offset / FUNCTION_BYTES, offset % FUNCTION_BYTES);
        let slot = (function / 8) as usize;
        (function.is_multiple_of(8) && slot < SLOTS).then_some(Self {
            slot,
            register: register as u16,
        })
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
