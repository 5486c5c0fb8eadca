//! Segment descriptors and task state: flat segments, and one interrupt stack per vCPU.

use core::arch::asm;
use core::cell::UnsafeCell;

use crate::pure::constants::VCPUS_MAX;
use crate::vcpu::INTERRUPT_STACKS;

pub const CODE_SELECTOR: u16 = 0x08;
pub const DATA_SELECTOR: u16 = 0x10;
pub const CODE32_SELECTOR: u16 = 0x18;
pub const USER_DATA_SELECTOR: u16 = 0x20 | USER_PRIVILEGE;
pub const USER_CODE_SELECTOR: u16 = 0x28 | USER_PRIVILEGE;
const USER_PRIVILEGE: u16 = 3;

/// The interrupt stack table entry all gates use.
pub const INTERRUPT_STACK_INDEX: u8 = 1;

const FIRST_TASK_ENTRY: usize = 6;
const ENTRIES: usize = FIRST_TASK_ENTRY + 2 * VCPUS_MAX;
const TASK_STATE_BYTES: u64 = 104;
const AVAILABLE_TASK_STATE: u64 = 0x89;

#[repr(C, align(16))]
struct Table(UnsafeCell<[u64; ENTRIES]>);

// SAFETY: each vCPU writes only its own two entries, before it loads them.
unsafe impl Sync for Table {}

#[unsafe(no_mangle)]
static boot_gdt: Table = Table(UnsafeCell::new(
    const {
        let mut entries = [0; ENTRIES];
        entries[CODE_SELECTOR as usize / 8] = 0x00af_9b00_0000_ffff;
        entries[DATA_SELECTOR as usize / 8] = 0x00cf_9300_0000_ffff;
        entries[CODE32_SELECTOR as usize / 8] = 0x00cf_9b00_0000_ffff;
        entries[USER_DATA_SELECTOR as usize / 8] = 0x00cf_f300_0000_ffff;
        entries[USER_CODE_SELECTOR as usize / 8] = 0x00af_fb00_0000_ffff;
        entries
    },
));

#[repr(C, packed)]
struct Pointer {
    limit: u16,
    base: &'static Table,
}

#[unsafe(no_mangle)]
static gdt_pointer: Pointer = Pointer {
    limit: (ENTRIES * 8 - 1) as u16,
    base: &boot_gdt,
};

/// The 64-bit task state segment as 32-bit words, since its fields are not aligned.
#[repr(C, align(128))]
struct TaskState(UnsafeCell<[u32; 26]>);

// SAFETY: each vCPU writes only its own, before it loads it.
unsafe impl Sync for TaskState {}

static TASK_STATES: [TaskState; VCPUS_MAX] =
    [const { TaskState(UnsafeCell::new([0; 26])) }; VCPUS_MAX];

/// Gives the vCPU `index`, which must be the calling one, its interrupt stack.
pub fn load_task_state(index: usize) {
    const FIRST_INTERRUPT_STACK_WORD: usize = 9;
    const IO_BITMAP_WORD: usize = 25;
    const NO_IO_BITMAP: u32 = (TASK_STATE_BYTES as u32) << 16;

    let state = TASK_STATES[index].0.get();
    let stack = INTERRUPT_STACKS[index].top();
    let base = state.addr() as u64;
    let entry = FIRST_TASK_ENTRY + 2 * index;
    let low = (TASK_STATE_BYTES - 1)
        | (base & 0xff_ffff) << 16
        | AVAILABLE_TASK_STATE << 40
        | (base >> 24 & 0xff) << 56;
    // SAFETY: this vCPU is the only one to touch its task state and its two table entries, and
    // the selector names exactly those.
    unsafe {
        (*state)[FIRST_INTERRUPT_STACK_WORD] = stack as u32;
        (*state)[FIRST_INTERRUPT_STACK_WORD + 1] = (stack >> 32) as u32;
        (*state)[IO_BITMAP_WORD] = NO_IO_BITMAP;
        let entries = boot_gdt.0.get().cast::<u64>();
        entries.add(entry).write(low);
        entries.add(entry + 1).write(base >> 32);
        asm!("ltr {0:x}", in(reg) (entry * 8) as u16, options(nostack, preserves_flags));
    }
}
