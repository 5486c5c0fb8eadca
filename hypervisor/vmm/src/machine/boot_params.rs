//! The Linux/x86 boot parameters ("zero page"), `Documentation/arch/x86/zero-page.rst`.

/// Size of the zero page.
pub(super) const BOOT_PARAMS_BYTES: usize = 4096;

const ACPI_RSDP_ADDR: usize = 0x070;
const E820_ENTRIES: usize = 0x1e8;
const SETUP_HEADER: usize = 0x1f1;
const BOOT_FLAG: usize = 0x1fe;
const HEADER: usize = 0x202;
const VERSION: usize = 0x206;
const TYPE_OF_LOADER: usize = 0x210;
const LOADFLAGS: usize = 0x211;
const RAMDISK_IMAGE: usize = 0x218;
const RAMDISK_SIZE: usize = 0x21c;
const CMD_LINE_PTR: usize = 0x228;
const KERNEL_ALIGNMENT: usize = 0x230;
const CMDLINE_SIZE: usize = 0x238;
const E820_TABLE: usize = 0x2d0;

/// Kind of an address range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub(super) enum RangeKind {
    Ram = 1,
    Reserved = 2,
}

/// What the kernel is told.
#[derive(Clone, Debug)]
pub(super) struct BootParams<'a> {
    /// The kernel file's own setup header, from [`SETUP_HEADER`] on; an ELF has none.
    pub(super) header: Option<&'a [u8]>,
    pub(super) memory_map: &'a [(u64, u64, RangeKind)],
    pub(super) initrd: Option<(u32, u32)>,
    pub(super) cmdline: u32,
    pub(super) cmdline_bytes: u32,
    pub(super) rsdp: u64,
}

impl BootParams<'_> {
    /// The page as the kernel reads it.
    pub(super) fn encode(&self) -> [u8; BOOT_PARAMS_BYTES] {
        let mut page = [0; BOOT_PARAMS_BYTES];
        let mut put =
            |offset: usize, bytes: &[u8]| page[offset..offset + bytes.len()].copy_from_slice(bytes);
        put(ACPI_RSDP_ADDR, &self.rsdp.to_le_bytes());
        put(BOOT_FLAG, &0xaa55u16.to_le_bytes());
        match self.header {
            Some(header) => put(SETUP_HEADER, header),
            None => {
                put(HEADER, b"HdrS");
                put(VERSION, &0x020fu16.to_le_bytes());
                put(LOADFLAGS, &[1]);
                put(KERNEL_ALIGNMENT, &0x0100_0000u32.to_le_bytes());
                put(CMDLINE_SIZE, &self.cmdline_bytes.to_le_bytes());
            }
        }
        put(TYPE_OF_LOADER, &[0xff]);
        put(CMD_LINE_PTR, &self.cmdline.to_le_bytes());
        if let Some((address, bytes)) = self.initrd {
            put(RAMDISK_IMAGE, &address.to_le_bytes());
            put(RAMDISK_SIZE, &bytes.to_le_bytes());
        }
        assert!(
            self.memory_map.len() <= 128,
            "the table has room for 128 ranges"
        );
        put(E820_ENTRIES, &[self.memory_map.len() as u8]);
        for (number, (start, bytes, kind)) in self.memory_map.iter().enumerate() {
            let entry = E820_TABLE + number * 20;
            put(entry, &start.to_le_bytes());
            put(entry + 8, &bytes.to_le_bytes());
            put(entry + 16, &(*kind as u32).to_le_bytes());
        }
        page
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernel_finds_its_memory_map_and_command_line() {
        let page = BootParams {
            header: None,
            memory_map: &[
                (0, 0x9_fc00, RangeKind::Ram),
                (0x10_0000, 0x3f0_0000, RangeKind::Ram),
            ],
            initrd: Some((0x300_0000, 77)),
            cmdline: 0x2_0000,
            cmdline_bytes: 9,
            rsdp: 0xe_0000,
        }
        .encode();
        assert_eq!(page[E820_ENTRIES], 2);
        assert_eq!(
            page[E820_TABLE + 20..E820_TABLE + 28],
            0x10_0000u64.to_le_bytes()
        );
        assert_eq!(page[RAMDISK_SIZE..RAMDISK_SIZE + 4], 77u32.to_le_bytes());
        assert_eq!(&page[HEADER..HEADER + 4], b"HdrS");
    }
}
