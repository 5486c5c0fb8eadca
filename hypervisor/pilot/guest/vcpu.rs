//! What each vCPU owns: its stacks, its counters, its clock page.

use core::arch::asm;
use core::cell::UnsafeCell;
use core::ptr;
use core::sync::atomic::{AtomicBool, AtomicPtr, AtomicU64, Ordering};

use crate::cpu;
use crate::descriptors;
use crate::pure::constants::VCPUS_MAX;

pub const STACK_BYTES: usize = 16 << 10;
const INTERRUPT_STACK_BYTES: usize = 8 << 10;
const GS_BASE_MSR: u32 = 0xc000_0101;

#[repr(C, align(4096))]
pub struct Stack<const BYTES: usize>(UnsafeCell<[u8; BYTES]>);

// SAFETY: only the vCPU a stack belongs to touches it, and only through its stack pointer.
unsafe impl<const BYTES: usize> Sync for Stack<BYTES> {}

impl<const BYTES: usize> Stack<BYTES> {
    const NEW: Self = Self(UnsafeCell::new([0; BYTES]));

    pub fn top(&self) -> u64 {
        self.0.get().addr() as u64 + BYTES as u64
    }
}

#[unsafe(link_section = ".bss.uninitialized")]
pub static STACKS: [Stack<STACK_BYTES>; VCPUS_MAX] = [Stack::NEW; VCPUS_MAX];

/// Interrupts switch to a stack of their own, because precompiled code may keep data below its
/// stack pointer, where an interrupt on the same stack would overwrite it.
#[unsafe(link_section = ".bss.uninitialized")]
pub static INTERRUPT_STACKS: [Stack<INTERRUPT_STACK_BYTES>; VCPUS_MAX] = [Stack::NEW; VCPUS_MAX];

/// For `user_mode`, which runs one piece of work at a time on a vCPU.
#[unsafe(link_section = ".bss.uninitialized")]
pub static USER_STACKS: [Stack<STACK_BYTES>; VCPUS_MAX] = [Stack::NEW; VCPUS_MAX];

/// Counters of one vCPU. Only its own tick handler advances `ticks`, `last_ns` and `last_tsc`;
/// the rest may be cleared by the shell on another vCPU.
#[repr(C, align(64))]
pub struct Vcpu {
    /// Where this is, for `current`. It must come first.
    address: AtomicPtr<Vcpu>,
    pub ticks: AtomicU64,
    pub last_ns: AtomicU64,
    pub last_tsc: AtomicU64,
    pub blackouts: AtomicU64,
    pub max_blackout_us: AtomicU64,
    pub backwards: AtomicU64,
    pub tsc_backwards: AtomicU64,
    pub online: AtomicBool,
}

static VCPUS: [Vcpu; VCPUS_MAX] = [const { Vcpu::new() }; VCPUS_MAX];

impl Vcpu {
    const fn new() -> Self {
        Self {
            address: AtomicPtr::new(ptr::null_mut()),
            ticks: AtomicU64::new(0),
            last_ns: AtomicU64::new(0),
            last_tsc: AtomicU64::new(0),
            blackouts: AtomicU64::new(0),
            max_blackout_us: AtomicU64::new(0),
            backwards: AtomicU64::new(0),
            tsc_backwards: AtomicU64::new(0),
            online: AtomicBool::new(false),
        }
    }

    pub fn index(&self) -> usize {
        ((self as *const Self).addr() - (&raw const VCPUS).addr()) / size_of::<Self>()
    }
}

/// Loads this vCPU's tables and makes `current` work on it.
pub fn init_this(index: usize) -> &'static Vcpu {
    descriptors::load_task_state(index);
    let this = &VCPUS[index];
    this.address
        .store(ptr::from_ref(this).cast_mut(), Ordering::Relaxed);
    // SAFETY: the GS segment is used for nothing else.
    unsafe { cpu::write_msr(GS_BASE_MSR, (this as *const Vcpu).addr() as u64) };
    this
}

/// The vCPU this code runs on.
pub fn current() -> &'static Vcpu {
    let this: *const Vcpu;
    // SAFETY: the GS segment has started at this vCPU's element of `VCPUS`, whose first field is
    // its own address, since `init_this`, which every vCPU runs before it enables interrupts.
    unsafe {
        asm!("mov {}, gs:[0]", out(reg) this, options(nostack, readonly, preserves_flags));
        &*this
    }
}

/// The first `count` vCPUs.
pub fn all(count: usize) -> &'static [Vcpu] {
    &VCPUS[..count]
}

pub fn get(index: usize) -> &'static Vcpu {
    &VCPUS[index]
}

/// Waits for the next interrupt, or burns the time until then when asked to look busy.
pub fn idle() {
    if SPINNING.load(Ordering::Relaxed) {
        for _ in 0..SPINS_PER_IDLE {
            core::hint::spin_loop();
        }
        return;
    }
    // SAFETY: interrupts are meant to be on here; `hlt` returns with the next tick.
    unsafe { asm!("sti", "hlt", options(nostack)) };
}

pub static SPINNING: AtomicBool = AtomicBool::new(false);
const SPINS_PER_IDLE: u32 = 1_000;
