//! Register accesses of the virtio-pci transport, in any order, and restoring what any sender may send.

use crate::hostile::MEMORY_BYTES;
use crate::input::Input;
use godwit_devices::console::VirtioConsole;
use godwit_devices::memory::GuestMemory;
use godwit_devices::pci::{
    BAR_BYTES, InterruptLine, MsiMessage, PciBus, Platform, SavedFunction, VirtioPci,
};
use std::io;
use std::sync::{Arc, Mutex};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::EventFd;

const SLOT: u8 = 3;
/// Its configuration space.
const ECAM: u64 = (SLOT as u64) << 15;
const WINDOW: u32 = 0xc000_0000;
const MAX_ACCESSES: usize = 256;
const WIDTHS: [usize; 4] = [1, 2, 4, 8];

/// Checks what the hypervisor is asked for: no doorbell is placed twice, and none removed that is not there.
#[derive(Debug, Default)]
struct Doorbells(Mutex<Vec<u64>>);

#[derive(Debug)]
struct Line;

impl InterruptLine for Line {
    fn route(&self, _: MsiMessage) -> io::Result<()> {
        Ok(())
    }

    fn signal(&self) {}
}

impl Platform for Doorbells {
    fn interrupt_line(&self) -> io::Result<Box<dyn InterruptLine>> {
        Ok(Box::new(Line))
    }

    fn place_doorbell(&self, _: &EventFd, address: u64) -> io::Result<()> {
        let mut placed = self.0.lock().expect("nothing panics with it");
        assert!(!placed.contains(&address), "{address:#x} is placed twice");
        placed.push(address);
        Ok(())
    }

    fn remove_doorbell(&self, _: &EventFd, address: u64) -> io::Result<()> {
        let mut placed = self.0.lock().expect("nothing panics with it");
        let before = placed.len();
        placed.retain(|known| *known != address);
        assert_eq!(placed.len() + 1, before, "{address:#x} was not placed");
        Ok(())
    }
}

fn function(memory: &GuestMemory, bar: u32) -> VirtioPci {
    let (console, input) = VirtioConsole::new(Box::new(io::sink()));
    input.send(b"something to read").expect("it is empty");
    VirtioPci::new(
        SLOT,
        bar,
        Box::new(console),
        memory.clone(),
        Arc::new(Doorbells::default()),
        Arc::new(|_| {}),
    )
}

/// Accesses through the bus, as a guest makes them; then the machine is saved and its twin restored.
pub fn run(data: &[u8]) {
    let mut input = Input::new(data);
    let memory = GuestMemory::from_ranges(&[(GuestAddress(0), MEMORY_BYTES as usize)])
        .expect("the host has 1 MiB");
    let mut bus = PciBus::new(WINDOW);
    let bar = bus.bar_of(SLOT);
    let mut first = function(&memory, bar);
    if input.u8() & 1 == 1 {
        let length = usize::from(input.u16()) % 2048;
        if let Ok(saved) = ciborium::from_reader::<SavedFunction, _>(input.bytes(length)) {
            let _ = first.restore(saved);
        }
    }
    bus.insert(first);
    // The first thing every driver does; without it there is no memory to access. The input may undo it.
    bus.write_config(ECAM + 4, &6u16.to_le_bytes());
    for _ in 0..MAX_ACCESSES {
        if input.is_empty() {
            break;
        }
        access(&bus, bar, &memory, &mut input);
    }
    for mut function in bus.functions() {
        function.pause().expect("the device's thread lives");
        let saved = function.save().expect("a paused function can be saved");
        let mut twin = self::function(&memory, bar);
        twin.restore(saved)
            .expect("what a function saved, its twin restores");
        twin.resume().expect("the device's thread lives");
    }
}

fn access(bus: &PciBus, bar: u32, memory: &GuestMemory, input: &mut Input<'_>) {
    let action = input.u8();
    let width = WIDTHS[usize::from(action >> 3 & 3)];
    let ecam = ECAM + u64::from(input.u8());
    // Registers are at the beginning of each 4 KiB part.
    let part = u64::from(action >> 5) * 0x1000 % u64::from(BAR_BYTES);
    let register = u64::from(bar) + part + ecam % 0x40;
    let mut value = [0; 8];
    match action & 7 {
        0 => bus.read_config(ecam, &mut value[..width]),
        1 => bus.write_config(ecam, &input.array::<8>()[..width]),
        2 => bus.read(register, &mut value[..width]),
        3 | 4 => bus.write(register, &input.array::<8>()[..width]),
        5 => bus.write(u64::from(bar) + 0x14, &[input.u8()]),
        6 => {
            let at = GuestAddress(u64::from(input.u16()));
            let _ = memory.write_slice(&input.array::<16>(), at);
        }
        _ => {
            let far = u64::from(bar) + u64::from(input.u32() % (2 * BAR_BYTES));
            bus.write(far, &input.array::<8>()[..width]);
            bus.read(far, &mut value[..width]);
        }
    }
}
