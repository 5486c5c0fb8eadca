//! The first vCPU at the kernel's first instruction.

use super::kernel::Protocol;
use super::{BOOT_PARAMS, GDT, PAGE_TABLES};
use crate::kvm::{KvmError, VcpuFd};
use crate::machine::MachineError;
use crate::memory::GuestRam;
use kvm_bindings::{kvm_regs, kvm_segment, kvm_sregs};

/// Identity-mapped for a 64-bit kernel's first steps: 4 GiB in 2 MiB pages.
const IDENTITY_GIB: u64 = 4;

// The selectors that the Linux boot protocol names.
const CODE_SELECTOR: u16 = 0x10;
const DATA_SELECTOR: u16 = 0x18;
const TASK_SELECTOR: u16 = 0x20;

const CODE_SEGMENT: u8 = 0xb;
const DATA_SEGMENT: u8 = 0x3;
/// A task-state segment in use, which entering a guest wants in protected mode.
const BUSY_TASK: u8 = 0xb;

const CR0_PROTECTED: u64 = 1;
const CR0_EXTENSION_TYPE: u64 = 1 << 4;
const CR0_NUMERIC_ERROR: u64 = 1 << 5;
const CR0_PAGING: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LONG_MODE: u64 = 1 << 8 | 1 << 10;

/// Where the first vCPU begins.
#[derive(Clone, Copy, Debug)]
pub(in crate::machine) struct Entry(pub(super) Protocol);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Width {
    Bits32,
    Bits64,
}

impl Entry {
    /// Puts the boot vCPU at the kernel's entry.
    pub(in crate::machine) fn enter(self, vcpu: &VcpuFd) -> Result<(), KvmError> {
        let mut sregs = vcpu
            .get_sregs()
            .map_err(KvmError::during("KVM_GET_SREGS"))?;
        let regs = match self.0 {
            Protocol::Linux64(rip) => {
                enter_long_mode(&mut sregs);
                kvm_regs {
                    rip,
                    rsi: BOOT_PARAMS,
                    rsp: BOOT_PARAMS,
                    rflags: 2,
                    ..Default::default()
                }
            }
            Protocol::Pvh(rip) => {
                enter_protected_mode(&mut sregs);
                kvm_regs {
                    rip,
                    rbx: BOOT_PARAMS,
                    rflags: 2,
                    ..Default::default()
                }
            }
        };
        vcpu.set_sregs(&sregs)
            .map_err(KvmError::during("KVM_SET_SREGS"))?;
        vcpu.set_regs(&regs)
            .map_err(KvmError::during("KVM_SET_REGS"))
    }
}

fn enter_long_mode(sregs: &mut kvm_sregs) {
    set_segments(sregs, Width::Bits64);
    sregs.cr3 = PAGE_TABLES;
    sregs.cr4 = CR4_PAE;
    sregs.cr0 = CR0_PROTECTED | CR0_EXTENSION_TYPE | CR0_NUMERIC_ERROR | CR0_PAGING;
    sregs.efer = EFER_LONG_MODE;
}

fn enter_protected_mode(sregs: &mut kvm_sregs) {
    set_segments(sregs, Width::Bits32);
    sregs.cr4 = 0;
    sregs.cr0 = CR0_PROTECTED | CR0_EXTENSION_TYPE;
    sregs.efer = 0;
}

fn set_segments(sregs: &mut kvm_sregs, width: Width) {
    sregs.cs = segment(CODE_SELECTOR, CODE_SEGMENT, width);
    let data = segment(DATA_SELECTOR, DATA_SEGMENT, Width::Bits32);
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    sregs.tr = kvm_segment {
        limit: 0x67,
        s: 0,
        g: 0,
        db: 0,
        ..segment(TASK_SELECTOR, BUSY_TASK, Width::Bits32)
    };
    sregs.gdt.base = GDT;
    sregs.gdt.limit = (gdt_entries(width).len() * 8 - 1) as u16;
    sregs.idt.limit = 0;
}

fn segment(selector: u16, kind: u8, width: Width) -> kvm_segment {
    kvm_segment {
        base: 0,
        limit: 0xffff_ffff,
        selector,
        type_: kind,
        present: 1,
        dpl: 0,
        db: u8::from(width == Width::Bits32),
        s: 1,
        l: u8::from(width == Width::Bits64),
        g: 1,
        ..Default::default()
    }
}

/// Null, unused, code, data, task state.
const fn gdt_entries(width: Width) -> [u64; 5] {
    let code = match width {
        Width::Bits32 => 0x00cf_9b00_0000_ffff,
        Width::Bits64 => 0x00af_9b00_0000_ffff,
    };
    [0, 0, code, 0x00cf_9300_0000_ffff, 0x0000_8b00_0000_0067]
}

/// Writes what the vCPU needs in memory to begin: descriptors and, for 64-bit mode, page tables.
pub(super) fn prepare(ram: &GuestRam, protocol: Protocol) -> Result<(), MachineError> {
    let width = match protocol {
        Protocol::Linux64(_) => {
            write_page_tables(ram)?;
            Width::Bits64
        }
        Protocol::Pvh(_) => Width::Bits32,
    };
    let gdt: Vec<u8> = gdt_entries(width)
        .iter()
        .flat_map(|entry| entry.to_le_bytes())
        .collect();
    Ok(ram.write(GDT, &gdt)?)
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
