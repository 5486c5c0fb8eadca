//! Mapping RAM above the 4 GiB that the image's own page tables cover.

use core::cell::UnsafeCell;
use core::ptr;

use crate::pure::constants::PAGE_BYTES;
use crate::pure::memory_map::MemoryMap;

const GIB: u64 = 1 << 30;
const MAPPED_AT_BOOT_GIB: u64 = 4;
/// What one top-level entry reaches.
const MAPPABLE_GIB: u64 = 512;
const ENTRIES: u64 = 512;

const PRESENT_WRITABLE_USER: u64 = 0x7;
const LARGE_PAGE: u64 = 0x80;
const LARGE_PAGE_BYTES: u64 = 2 << 20;

#[repr(C, align(4096))]
struct Table(UnsafeCell<[u64; ENTRIES as usize]>);

// SAFETY: written by the boot vCPU before others start; afterwards only processors read it.
unsafe impl Sync for Table {}

unsafe extern "C" {
    static boot_pdpt: Table;
}

/// Maps all of `usable` to itself and returns the address up to which memory is mapped. The
/// tables for what lies above 4 GiB are taken from `usable`.
pub fn map(usable: &mut MemoryMap) -> u64 {
    let end_gib = usable.end().div_ceil(GIB).min(MAPPABLE_GIB);
    for gib in MAPPED_AT_BOOT_GIB..end_gib {
        let below = gib * GIB;
        let Some(table) = usable
            .take(PAGE_BYTES)
            .filter(|table| table + PAGE_BYTES <= below)
        else {
            return below;
        };
        let entries: *mut u64 = ptr::with_exposed_provenance_mut(table as usize);
        for entry in 0..ENTRIES {
            let address = gib * GIB + entry * LARGE_PAGE_BYTES;
            // SAFETY: the table's page is mapped RAM that was just set aside for it.
            unsafe {
                entries
                    .add(entry as usize)
                    .write(address | LARGE_PAGE | PRESENT_WRITABLE_USER);
            }
        }
        // SAFETY: the entry was not present before, so no processor has cached it.
        unsafe { (*boot_pdpt.0.get())[gib as usize] = table | PRESENT_WRITABLE_USER };
    }
    end_gib.max(MAPPED_AT_BOOT_GIB) * GIB
}
