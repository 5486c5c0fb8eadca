//! Bus 0: a host bridge and up to 31 virtio functions, reached through ECAM (PCI Express base specification, 7.2.2)
//! and through their memory.

use super::config::{ConfigSpace, Identity};
use super::platform::ConfigMirror;
use super::virtio::{BAR_BYTES, VirtioPci};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

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
    mirror: OnceLock<Box<dyn ConfigMirror>>,
}

impl PciBus {
    /// A bus with nothing but its host bridge, whose functions' memory begins at `window`.
    pub fn new(window: u32) -> Self {
        assert!(window.is_multiple_of(BAR_BYTES), "BARs are aligned");
        Self {
            bridge: Mutex::new(ConfigSpace::new(HOST_BRIDGE)),
            functions: [const { None }; SLOTS],
            window: window.into(),
            mirror: OnceLock::new(),
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

    /// Shows configuration space in `mirror` as well, from now on. Guests read it far more often than they write it.
    /// Only the first mirror counts, and only what is restored before it is there is seen in it.
    pub fn mirror_to(&self, mirror: Box<dyn ConfigMirror>) {
        if self.mirror.set(mirror).is_err() {
            return;
        }
        if let Some(mirror) = self.mirror.get() {
            mirror.show(0, lock(&self.bridge).bytes());
        }
        self.functions()
            .for_each(|function| self.show_one(&function));
    }

    fn show_one(&self, function: &VirtioPci) {
        match (self.mirror.get(), function.plain_config()) {
            (None, _) => {}
            (Some(mirror), Some(registers)) => mirror.show(function.slot(), registers),
            (Some(mirror), None) => mirror.withdraw(function.slot()),
        }
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
            Some(Target { slot: 0, register }) => {
                let mut bridge = lock(&self.bridge);
                bridge.write(register.into(), data);
                if let Some(mirror) = self.mirror.get() {
                    mirror.show(0, bridge.bytes());
                }
            }
            Some(Target { slot, register }) => {
                if let Some(function) = &self.functions[slot] {
                    let mut function = lock(function);
                    function.write_config(register, data);
                    // Under its lock, so that the latest write is what stays to be seen.
                    self.show_one(&function);
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pci::config::CONFIG_BYTES;
    use crate::pci::virtio::tests::{SLOT, function};
    use proptest::prelude::*;
    use std::collections::BTreeMap;
    use std::sync::Arc;

    /// What a guest would see of each function, until it is withdrawn.
    #[derive(Clone, Debug, Default)]
    struct Seen(Arc<Mutex<BTreeMap<u8, Option<[u8; CONFIG_BYTES]>>>>);

    impl ConfigMirror for Seen {
        fn show(&self, slot: u8, registers: &[u8; CONFIG_BYTES]) {
            let mut seen = lock(&self.0);
            if let Some(page) = seen.entry(slot).or_insert(Some([0; CONFIG_BYTES])) {
                *page = *registers;
            }
        }

        fn withdraw(&self, slot: u8) {
            lock(&self.0).insert(slot, None);
        }
    }

    fn bus() -> (PciBus, Seen) {
        let mut bus = PciBus::new(0xc000_0000);
        bus.insert(function());
        let seen = Seen::default();
        bus.mirror_to(Box::new(seen.clone()));
        (bus, seen)
    }

    fn config(bus: &PciBus, slot: u8) -> [u8; CONFIG_BYTES] {
        let mut registers = [0; CONFIG_BYTES];
        bus.read_config(u64::from(slot) * 8 * FUNCTION_BYTES, &mut registers);
        registers
    }

    proptest! {
        #[test]
        fn what_is_shown_is_what_a_read_would_give(
            writes in prop::collection::vec((prop::sample::select(vec![0, SLOT, 9]), 0u64..256, any::<u32>()), 0..40)
        ) {
            let (bus, seen) = bus();
            for (slot, register, value) in writes {
                let at = u64::from(slot) * 8 * FUNCTION_BYTES + register;
                bus.write_config(at, &value.to_le_bytes());
                let shown: Vec<_> = lock(&seen.0).clone().into_iter().collect();
                prop_assert!(shown.iter().map(|(slot, _)| *slot).eq([0, SLOT]));
                for (slot, page) in shown {
                    if let Some(page) = page {
                        prop_assert_eq!(page, config(&bus, slot));
                    }
                }
            }
        }
    }

    #[test]
    fn a_function_whose_registers_reach_its_memory_is_not_shown_any_more() {
        let (bus, seen) = bus();
        let registers = config(&bus, SLOT);
        let mut at = usize::from(registers[0x34]);
        // The access capability is of the vendor's kind 5.
        while (registers[at], registers[at + 3]) != (9, 5) {
            at = usize::from(registers[at + 1]);
        }
        let start = u64::from(SLOT) * 8 * FUNCTION_BYTES;
        bus.write_config(start + at as u64 + 12, &4u32.to_le_bytes());
        assert_eq!(lock(&seen.0)[&SLOT], None);
        assert!(lock(&seen.0)[&0].is_some());
    }
}
