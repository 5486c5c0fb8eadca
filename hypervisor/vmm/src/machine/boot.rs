//! Putting a kernel into guest memory and the first vCPU at its entry.
//!
//! A Linux kernel with a PVH note is entered through it; any other one straight in 64-bit mode, as the Linux 64-bit
//! boot protocol wants it (`Documentation/arch/x86/boot.rst`).

mod entry;
mod kernel;
mod pvh;

use super::boot_params::{BootParams, RangeKind};
use super::layout::{ECAM_BYTES, ECAM_START};
use super::{MachineError, acpi};
use crate::devices::{KEYBOARD_COMMAND_PORT, KEYBOARD_RESET};
use crate::memory::GuestRam;
use entry::Entry;
use godwit_wire::machine::{Boot, MachineSpec, MachineType};
use kernel::{Kernel, Placed, Protocol};
use pvh::StartInfo;
use rustix::fs::{Mode, OFlags};
use std::fs::File;
use std::io::{self, Cursor};
use std::path::Path;

// Low memory, all of it below the 640 KiB that the memory map gives out.
const GDT: u64 = 0x500;
/// Zero page, or PVH start info.
const BOOT_PARAMS: u64 = 0x7000;
const PAGE_TABLES: u64 = 0x9000;
const CMDLINE: u64 = 0x2_0000;
const LOW_RAM_END: u64 = 0x9_fc00;
/// ACPI tables: in the BIOS area, where also guests that search for the RSDP find it.
const ACPI_TABLES: u64 = 0xe_0000;
/// Where a PC's firmware begins in real mode, at f000:fff0.
const FIRMWARE_ENTRY: u64 = 0xf_fff0;
const HIGH_RAM: u64 = 0x10_0000;

/// The pilot's timer tick: short enough to measure blackouts of a few milliseconds, long enough to leave an idle
/// guest idle where every guest kernel instruction is emulated.
const PILOT_TICK_US: u32 = 5_000;

/// All the firmware there is, 16-bit code: whoever jumps to it wants the machine to restart.
///
/// A Linux kernel with EFI support restarts hardware-reduced ACPI platforms through EFI alone, and where there is none
/// it jumps to the firmware's entry as its last resort (`native_machine_emergency_restart`); it never tries the
/// FADT's reset register.
const RESTART: [u8; 7] = [
    0xb0, // mov al, KEYBOARD_RESET
    KEYBOARD_RESET,
    0xe6, // out KEYBOARD_COMMAND_PORT, al
    KEYBOARD_COMMAND_PORT as u8,
    0xf4, // hlt
    0xeb, // jmp to the hlt
    0xfd,
];

const INITRD: &str = "boot.initrd";

/// Refuses what could not be booted, before anything is built: also for machines that arrive from elsewhere, which
/// boot when the guest restarts.
pub(super) fn check(spec: &MachineSpec) -> Result<(), MachineError> {
    let Boot::Linux {
        kernel,
        initrd,
        cmdline,
    } = &spec.boot
    else {
        return Ok(());
    };
    let low_ram_end = spec.memory_mib.bytes().0.min(super::layout::LOW_RAM_END);
    Kernel::open(kernel)?.check(low_ram_end, cmdline.len())?;
    if let Some(initrd) = initrd {
        open_file(INITRD, initrd)?;
    }
    Ok(())
}

/// Loads everything `spec` boots into `ram`. `builtin` is the pilot's ELF image.
pub(super) fn load(
    spec: &MachineSpec,
    builtin: &'static [u8],
    ram: &GuestRam,
) -> Result<Entry, MachineError> {
    let (placed, initrd, cmdline) = match &spec.boot {
        Boot::Pilot => {
            let placed = kernel::place_elf(&mut Cursor::new(builtin), ram)?;
            let cmdline = format!("vcpus={} tick_us={PILOT_TICK_US}", spec.vcpus);
            (placed, None, cmdline)
        }
        Boot::Linux {
            kernel,
            initrd,
            cmdline,
        } => {
            let kernel = Kernel::open(kernel)?;
            kernel.check(ram.segments()[0].bytes, cmdline.len())?;
            let placed = kernel.place(ram)?;
            let initrd = initrd
                .as_deref()
                .map(|path| load_initrd(path, &placed, ram))
                .transpose()?;
            (placed, initrd, cmdline.clone())
        }
    };
    ram.write(CMDLINE, cmdline.as_bytes())?;
    ram.write(CMDLINE + cmdline.len() as u64, &[0])?;
    let tables = acpi::tables(spec.machine_type, spec.vcpus, ACPI_TABLES);
    ram.write(ACPI_TABLES, &tables)?;
    ram.write(LOW_RAM_END, &mp_floating_pointer())?;
    ram.write(FIRMWARE_ENTRY, &RESTART)?;
    let memory_map = memory_map(spec.machine_type, ram);
    match placed.entry {
        Protocol::Linux64(_) => {
            let boot_params = BootParams {
                header: placed.header.as_ref().map(|header| header.raw.as_slice()),
                memory_map: &memory_map,
                initrd,
                cmdline: CMDLINE as u32,
                cmdline_bytes: cmdline.len() as u32,
                rsdp: ACPI_TABLES,
            };
            ram.write(BOOT_PARAMS, &boot_params.encode())?;
        }
        Protocol::Pvh(_) => StartInfo {
            memory_map: &memory_map,
            initrd,
            cmdline: CMDLINE,
            rsdp: ACPI_TABLES,
        }
        .write(ram, BOOT_PARAMS)?,
    }
    entry::prepare(ram, placed.entry)?;
    Ok(Entry(placed.entry))
}

/// Opens a file of the boot spec. Whatever else has that name is refused, and never waited for.
fn open_file(field: &'static str, path: &Path) -> Result<File, MachineError> {
    let file_error = |source: io::Error| MachineError::File {
        field,
        path: path.to_owned(),
        source,
    };
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
    let file = File::from(
        rustix::fs::open(path, flags, Mode::empty()).map_err(|error| file_error(error.into()))?,
    );
    let metadata = file.metadata().map_err(file_error)?;
    let found = if metadata.is_dir() {
        "is a directory"
    } else if !metadata.is_file() {
        "is no regular file"
    } else if metadata.len() == 0 {
        "is empty"
    } else {
        return Ok(file);
    };
    Err(MachineError::WrongFile {
        field,
        path: path.to_owned(),
        found,
    })
}

/// Puts the initrd as high as the kernel can reach it: below 4 GiB and within the first segment.
fn load_initrd(path: &Path, kernel: &Placed, ram: &GuestRam) -> Result<(u32, u32), MachineError> {
    let file_error = |source| MachineError::File {
        field: INITRD,
        path: path.to_owned(),
        source,
    };
    let mut file = open_file(INITRD, path)?;
    let bytes = file.metadata().map_err(file_error)?.len();
    let limit = kernel
        .header
        .as_ref()
        .map_or(u64::MAX, |header| header.initrd_addr_max.saturating_add(1));
    let top = ram.segments()[0].bytes.min(limit);
    let address = top.checked_sub(bytes).map_or(0, |address| address & !0xfff);
    if address < kernel.end.max(HIGH_RAM) || bytes > u64::from(u32::MAX) {
        return Err(MachineError::NoRoom {
            initrd_bytes: bytes,
        });
    }
    use vm_memory::ReadVolatile;
    let mut room = ram.slice(address, bytes)?;
    file.read_exact_volatile(&mut room)
        .map_err(|error| file_error(io::Error::other(error)))?;
    Ok((address as u32, bytes as u32))
}

fn memory_map(machine_type: MachineType, ram: &GuestRam) -> Vec<(u64, u64, RangeKind)> {
    let mut map = vec![
        (0, LOW_RAM_END, RangeKind::Ram),
        (LOW_RAM_END, HIGH_RAM - LOW_RAM_END, RangeKind::Reserved),
    ];
    for segment in ram.segments() {
        let start = segment.start.max(HIGH_RAM);
        map.push((start, segment.start + segment.bytes - start, RangeKind::Ram));
    }
    // Linux uses the configuration space from its first look at the bus on only if it is reserved here too.
    if machine_type == MachineType::Godwit2 {
        map.push((ECAM_START, ECAM_BYTES, RangeKind::Reserved));
    }
    map.sort_unstable_by_key(|(start, ..)| *start);
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

#[cfg(test)]
mod tests {
    use super::*;
    use godwit_wire::unit::Mib;
    use std::path::PathBuf;

    #[test]
    fn the_mp_floating_pointer_has_a_valid_checksum() {
        let sum = mp_floating_pointer()
            .iter()
            .fold(0u8, |sum, byte| sum.wrapping_add(*byte));
        assert_eq!(sum, 0);
    }

    #[test]
    fn whatever_is_no_regular_file_is_refused_without_waiting_for_it() {
        let dir = tempfile::tempdir().unwrap();
        let refusal = |path: PathBuf| match open_file("boot.kernel", &path) {
            Err(MachineError::WrongFile { found, .. }) => found,
            other => panic!("{other:?}"),
        };
        assert_eq!(refusal(dir.path().to_owned()), "is a directory");
        let fifo = dir.path().join("fifo");
        rustix::fs::mknodat(
            rustix::fs::CWD,
            &fifo,
            rustix::fs::FileType::Fifo,
            Mode::RUSR,
            0,
        )
        .unwrap();
        assert_eq!(refusal(fifo), "is no regular file");
        let empty = dir.path().join("empty");
        std::fs::write(&empty, []).unwrap();
        assert_eq!(refusal(empty), "is empty");
        assert!(matches!(
            open_file("boot.kernel", &dir.path().join("missing")),
            Err(MachineError::File { .. })
        ));
    }

    #[test]
    fn a_machine_with_pci_keeps_its_configuration_space_out_of_use() {
        let ram = GuestRam::new(Mib(16)).unwrap();
        let reserved = (ECAM_START, ECAM_BYTES, RangeKind::Reserved);
        assert!(memory_map(MachineType::Godwit2, &ram).contains(&reserved));
        assert!(!memory_map(MachineType::Godwit1, &ram).contains(&reserved));
    }
}
