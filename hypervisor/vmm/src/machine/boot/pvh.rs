//! What a kernel entered through its PVH note is told (Xen's `public/arch-x86/hvm/start_info.h`).

use super::super::boot_params::RangeKind;
use crate::machine::MachineError;
use crate::memory::GuestRam;

const MAGIC: u32 = 0x336e_c578;
const VERSION: u32 = 1;
/// Behind the start info itself, which has 56 bytes; 24 bytes for each range.
const MEMORY_MAP_OFFSET: u64 = 0x100;
/// Behind the memory map; one entry of 32 bytes.
const MODULES_OFFSET: u64 = 0x800;
const MEMORY_MAP_ENTRY_BYTES: u64 = 24;

/// Everything the kernel is told.
#[derive(Clone, Copy, Debug)]
pub(super) struct StartInfo<'a> {
    pub(super) memory_map: &'a [(u64, u64, RangeKind)],
    pub(super) initrd: Option<(u32, u32)>,
    pub(super) cmdline: u64,
    pub(super) rsdp: u64,
}

impl StartInfo<'_> {
    /// Writes it to `address` in guest memory; it takes up to 4 KiB.
    pub(super) fn write(&self, ram: &GuestRam, address: u64) -> Result<(), MachineError> {
        assert!(
            self.memory_map.len() as u64 * MEMORY_MAP_ENTRY_BYTES
                <= MODULES_OFFSET - MEMORY_MAP_OFFSET,
            "the memory map has room before the modules"
        );
        let (memory_map, modules) = (address + MEMORY_MAP_OFFSET, address + MODULES_OFFSET);
        let mut info = Vec::new();
        for word in [MAGIC, VERSION, 0, u32::from(self.initrd.is_some())] {
            info.extend_from_slice(&word.to_le_bytes());
        }
        for pointer in [modules, self.cmdline, self.rsdp, memory_map] {
            info.extend_from_slice(&pointer.to_le_bytes());
        }
        for word in [self.memory_map.len() as u32, 0] {
            info.extend_from_slice(&word.to_le_bytes());
        }
        ram.write(address, &info)?;
        let mut entries = Vec::new();
        for (start, bytes, kind) in self.memory_map {
            entries.extend_from_slice(&start.to_le_bytes());
            entries.extend_from_slice(&bytes.to_le_bytes());
            entries.extend_from_slice(&(*kind as u64).to_le_bytes());
        }
        ram.write(memory_map, &entries)?;
        if let Some((start, bytes)) = self.initrd {
            let module: Vec<u8> = [u64::from(start), u64::from(bytes), 0, 0]
                .iter()
                .flat_map(|word| word.to_le_bytes())
                .collect();
            ram.write(modules, &module)?;
        }
        Ok(())
    }
}
