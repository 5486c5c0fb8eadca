//! What the boot protocol tells: RAM and the command line, copied before their memory is reused.

use core::ptr;

use crate::pure::memory_map::MemoryMap;

const COMMAND_LINE_BYTES_MAX: usize = 512;
const RAM: u32 = 1;

/// Page tables reach this far at boot, so nothing beyond it is read.
const MAPPED_END: u64 = 4 << 30;

#[derive(Clone, Copy)]
pub enum Protocol {
    Linux,
    Pvh,
}

pub struct BootInfo {
    pub ram: MemoryMap,
    command_line: [u8; COMMAND_LINE_BYTES_MAX],
    command_line_len: usize,
}

impl BootInfo {
    pub fn read(protocol: Protocol, address: u64) -> Self {
        let mut info = Self {
            ram: MemoryMap::new(),
            command_line: [0; COMMAND_LINE_BYTES_MAX],
            command_line_len: 0,
        };
        match protocol {
            Protocol::Linux => info.read_linux(address),
            Protocol::Pvh => info.read_pvh(address),
        }
        info
    }

    pub fn command_line(&self) -> &[u8] {
        &self.command_line[..self.command_line_len]
    }

    /// `struct boot_params`, Documentation/arch/x86/zero-page.rst.
    fn read_linux(&mut self, address: u64) {
        const E820_ENTRIES: u64 = 0x1e8;
        const COMMAND_LINE: u64 = 0x228;
        const E820_TABLE: u64 = 0x2d0;
        const E820_ENTRY_BYTES: u64 = 20;

        let entries = u64::from(read::<u8>(address + E820_ENTRIES));
        for entry in 0..entries {
            self.add_entry(address + E820_TABLE + entry * E820_ENTRY_BYTES);
        }
        self.copy_command_line(read::<u32>(address + COMMAND_LINE).into());
    }

    /// `struct hvm_start_info`, version 1 (xen/include/public/arch-x86/hvm/start_info.h).
    fn read_pvh(&mut self, address: u64) {
        const COMMAND_LINE: u64 = 24;
        const MEMORY_MAP: u64 = 40;
        const MEMORY_MAP_ENTRIES: u64 = 48;
        const MEMORY_MAP_ENTRY_BYTES: u64 = 24;
        const MEMORY_MAP_ENTRIES_MAX: u32 = 128;

        let table = read::<u64>(address + MEMORY_MAP);
        let entries = read::<u32>(address + MEMORY_MAP_ENTRIES).min(MEMORY_MAP_ENTRIES_MAX);
        for entry in 0..u64::from(entries) {
            self.add_entry(table + entry * MEMORY_MAP_ENTRY_BYTES);
        }
        self.copy_command_line(read::<u64>(address + COMMAND_LINE));
    }

    /// Both protocols' entries begin alike: address, size, type.
    fn add_entry(&mut self, entry: u64) {
        if read::<u32>(entry + 16) == RAM {
            self.ram.add(read::<u64>(entry), read::<u64>(entry + 8));
        }
    }

    fn copy_command_line(&mut self, address: u64) {
        if address == 0 {
            return;
        }
        for slot in &mut self.command_line {
            let byte = read::<u8>(address + self.command_line_len as u64);
            if byte == 0 {
                return;
            }
            *slot = byte;
            self.command_line_len += 1;
        }
    }
}

/// Reads a number at a physical address; zero outside what is mapped at boot.
fn read<T: Copy + Default>(address: u64) -> T {
    if address.saturating_add(size_of::<T>() as u64) > MAPPED_END {
        return T::default();
    }
    // SAFETY: the address is mapped, and `T` is an integer, for which any bytes are valid. Rust
    // knows of no object there: these structures lie outside the image.
    unsafe { ptr::with_exposed_provenance::<T>(address as usize).read_unaligned() }
}
