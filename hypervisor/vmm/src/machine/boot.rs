//! Putting a kernel into guest memory and the first vCPU at its entry: straight into 64-bit mode, as the Linux
//! 64-bit boot protocol wants it (`Documentation/arch/x86/boot.rst`).

use super::boot_params::{BootParams, RangeKind};
use super::{MachineError, acpi};
use crate::kvm::{KvmError, VcpuFd};
use crate::memory::GuestRam;
use godwit_wire::machine::{Boot, MachineSpec};
use kvm_bindings::{kvm_regs, kvm_segment};
use linux_loader::loader::{Elf, KernelLoader};
use std::fs::File;
use std::io::{Cursor, Read};
use std::path::Path;
use vm_memory::GuestAddress;

// Low memory, all of it below the 640 KiB that the memory map gives out.
const GDT: u64 = 0x500;
const BOOT_PARAMS: u64 = 0x7000;
const PAGE_TABLES: u64 = 0x9000;
const CMDLINE: u64 = 0x2_0000;
const LOW_RAM_END: u64 = 0x9_fc00;
/// ACPI tables: in the BIOS area, where also guests that search for the RSDP find it.
const ACPI_TABLES: u64 = 0xe_0000;
const HIGH_RAM: u64 = 0x10_0000;
/// Identity-mapped for the kernel's first steps: 4 GiB in 2 MiB pages.
const IDENTITY_GIB: u64 = 4;

/// The pilot's timer tick: short enough to measure blackouts of a few milliseconds, long enough to leave an idle
/// guest idle where every guest kernel instruction is emulated.
const PILOT_TICK_US: u32 = 5_000;

const CODE_SELECTOR: u16 = 0x10;
const DATA_SELECTOR: u16 = 0x18;

/// Where the first vCPU begins.
#[derive(Clone, Copy, Debug)]
pub(super) struct Entry {
    rip: u64,
}

/// Loads everything `spec` boots into `ram`. `builtin` is the pilot's ELF image.
pub(super) fn load(
    spec: &MachineSpec,
    builtin: &'static [u8],
    ram: &GuestRam,
) -> Result<Entry, MachineError> {
    let (loaded, initrd, cmdline) = match &spec.boot {
        Boot::Pilot => {
            let loaded = load_elf("boot", &mut Cursor::new(builtin), ram)?;
            (
                loaded,
                None,
                format!("vcpus={} tick_us={PILOT_TICK_US}", spec.vcpus),
            )
        }
        Boot::Linux {
            kernel,
            initrd,
            cmdline,
        } => {
            let loaded = load_elf("boot.kernel", &mut open("boot.kernel", kernel)?, ram)?;
            let initrd = initrd
                .as_deref()
                .map(|path| load_initrd(path, loaded.end, ram))
                .transpose()?;
            (loaded, initrd, cmdline.clone())
        }
    };
    ram.write(CMDLINE, cmdline.as_bytes())?;
    ram.write(CMDLINE + cmdline.len() as u64, &[0])?;
    ram.write(ACPI_TABLES, &acpi::tables(spec.vcpus, ACPI_TABLES))?;
    ram.write(LOW_RAM_END, &mp_floating_pointer())?;
    let boot_params = BootParams {
        memory_map: &memory_map(ram),
        initrd,
        cmdline: CMDLINE as u32,
        cmdline_bytes: cmdline.len() as u32,
        rsdp: ACPI_TABLES,
    };
    ram.write(BOOT_PARAMS, &boot_params.encode())?;
    write_page_tables(ram)?;
    ram.write(GDT, &gdt())?;
    Ok(Entry { rip: loaded.entry })
}

struct Loaded {
    entry: u64,
    end: u64,
}

fn open(field: &'static str, path: &Path) -> Result<File, MachineError> {
    File::open(path).map_err(|source| MachineError::File {
        field,
        path: path.to_owned(),
        source,
    })
}

fn load_elf<F>(field: &'static str, image: &mut F, ram: &GuestRam) -> Result<Loaded, MachineError>
where
    F: Read + std::io::Seek + vm_memory::ReadVolatile,
{
    let loaded =
        Elf::load(ram.map(), None, image, Some(GuestAddress(HIGH_RAM))).map_err(|error| {
            MachineError::NotAKernel {
                field,
                reason: error.to_string(),
            }
        })?;
    Ok(Loaded {
        entry: loaded.kernel_load.0,
        end: loaded.kernel_end,
    })
}

/// Puts the initrd as high as the kernel can reach it: below 4 GiB and within the first segment.
fn load_initrd(path: &Path, kernel_end: u64, ram: &GuestRam) -> Result<(u32, u32), MachineError> {
    const FIELD: &str = "boot.initrd";
    let file_error = |source| MachineError::File {
        field: FIELD,
        path: path.to_owned(),
        source,
    };
    let mut file = open(FIELD, path)?;
    let bytes = file.metadata().map_err(file_error)?.len();
    let top = ram.segments()[0].bytes;
    let address = top.checked_sub(bytes).map_or(0, |address| address & !0xfff);
    if address < kernel_end.max(HIGH_RAM) || bytes > u64::from(u32::MAX) {
        return Err(MachineError::NoRoom {
            initrd_bytes: bytes,
        });
    }
    if bytes > 0 {
        use vm_memory::ReadVolatile;
        let mut room = ram.slice(address, bytes)?;
        file.read_exact_volatile(&mut room)
            .map_err(|error| file_error(std::io::Error::other(error)))?;
    }
    Ok((address as u32, bytes as u32))
}

fn memory_map(ram: &GuestRam) -> Vec<(u64, u64, RangeKind)> {
    let mut map = vec![
        (0, LOW_RAM_END, RangeKind::Ram),
        (LOW_RAM_END, HIGH_RAM - LOW_RAM_END, RangeKind::Reserved),
    ];
    for segment in ram.segments() {
        let start = segment.start.max(HIGH_RAM);
        map.push((start, segment.start + segment.bytes - start, RangeKind::Ram));
    }
    map
}

/// An MP floating pointer structure without a table (MultiProcessor Specification 1.4, section 4.1). CPUs are
/// described by ACPI; this only ends Linux's search, which otherwise reads through the whole BIOS area.
fn mp_floating_pointer() -> [u8; 16] {
    let mut pointer = [0u8; 16];
    pointer[..4].copy_from_slice(b"_MP_");
    pointer[8] = 1; // length in units of 16 bytes
    pointer[9] = 4; // specification 1.4
    let sum = pointer
        .iter()
        .fold(0, |sum: u8, byte| sum.wrapping_add(*byte));
    pointer[10] = 0u8.wrapping_sub(sum);
    pointer
}

/// PML4 → PDPT → four page directories of 2 MiB pages, identity-mapped.
fn write_page_tables(ram: &GuestRam) -> Result<(), MachineError> {
    const PRESENT_WRITABLE: u64 = 0b11;
    const LARGE: u64 = 1 << 7;
    let (pdpt, directories) = (PAGE_TABLES + 0x1000, PAGE_TABLES + 0x2000);
    ram.write(PAGE_TABLES, &(pdpt | PRESENT_WRITABLE).to_le_bytes())?;
    for gib in 0..IDENTITY_GIB {
        let directory = directories + gib * 0x1000;
        ram.write(
            pdpt + gib * 8,
            &(directory | PRESENT_WRITABLE).to_le_bytes(),
        )?;
        let entries: Vec<u8> = (0..512u64)
            .flat_map(|entry| {
                (((gib << 30) + (entry << 21)) | PRESENT_WRITABLE | LARGE).to_le_bytes()
            })
            .collect();
        ram.write(directory, &entries)?;
    }
    Ok(())
}

/// Null, unused, 64-bit code, data: the selectors the boot protocol names (0x10 and 0x18).
fn gdt() -> Vec<u8> {
    [0u64, 0, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff]
        .iter()
        .flat_map(|entry| entry.to_le_bytes())
        .collect()
}

fn segment(selector: u16, kind: u8, long: u8) -> kvm_segment {
    kvm_segment {
        base: 0,
        limit: 0xffff_ffff,
        selector,
        type_: kind,
        present: 1,
        dpl: 0,
        db: 1 - long,
        s: 1,
        l: long,
        g: 1,
        ..Default::default()
    }
}

impl Entry {
    /// Puts the boot vCPU at the kernel's entry.
    pub(super) fn enter(self, vcpu: &VcpuFd) -> Result<(), KvmError> {
        let mut sregs = vcpu
            .get_sregs()
            .map_err(KvmError::during("KVM_GET_SREGS"))?;
        sregs.cs = segment(CODE_SELECTOR, 0xb, 1);
        let data = segment(DATA_SELECTOR, 0x3, 0);
        (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
        sregs.gdt.base = GDT;
        sregs.gdt.limit = 4 * 8 - 1;
        sregs.idt.limit = 0;
        sregs.cr3 = PAGE_TABLES;
        sregs.cr4 = 1 << 5; // PAE
        sregs.cr0 = 1 | 1 << 4 | 1 << 5 | 1 << 31; // PE, ET, NE, PG
        sregs.efer = 1 << 8 | 1 << 10; // LME, LMA
        vcpu.set_sregs(&sregs)
            .map_err(KvmError::during("KVM_SET_SREGS"))?;
        let regs = kvm_regs {
            rip: self.rip,
            rsi: BOOT_PARAMS,
            rsp: BOOT_PARAMS,
            rflags: 2,
            ..Default::default()
        };
        vcpu.set_regs(&regs)
            .map_err(KvmError::during("KVM_SET_REGS"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mp_floating_pointer_has_a_valid_checksum() {
        let sum = mp_floating_pointer()
            .iter()
            .fold(0u8, |sum, byte| sum.wrapping_add(*byte));
        assert_eq!(sum, 0);
    }
}
