//! Starting the other vCPUs, and what they do then.

use core::ptr;
use core::sync::atomic::{AtomicU32, AtomicUsize, Ordering};

use crate::apic;
use crate::clock;
use crate::dirtier::Dirtier;
use crate::entry;
use crate::exceptions;
use crate::memory;
use crate::pure::constants::PAGE_BYTES;
use crate::pure::memory_map::MemoryMap;
use crate::tick;
use crate::vcpu;

pub const BOOT_VCPU: usize = 0;

/// Which vCPU the start-up code brings up now. They are started one at a time.
pub static STARTING_VCPU: AtomicU32 = AtomicU32::new(0);

/// How many vCPUs run; zero until all are started.
static RUNNING: AtomicUsize = AtomicUsize::new(0);

const START_TIMEOUT_NS: u64 = 1_000_000_000;
const START_RETRY_NS: u64 = 10_000_000;

/// Starts vCPUs until `asked` run, and returns how many do.
pub fn start_others(ram: &MemoryMap, asked: usize) -> usize {
    let mut running = 1;
    if let Some(page) = start_page(ram) {
        copy_start_code(page);
        while running < asked && start(running, page) {
            running += 1;
        }
    }
    RUNNING.store(running, Ordering::Release);
    running
}

/// Where every vCPU but the boot vCPU arrives from `entry`.
pub extern "C" fn other_vcpu_main(index: u32) -> ! {
    let index = index as usize;
    exceptions::load();
    let this = vcpu::init_this(index);
    clock::init_this(index);
    apic::init_this();
    tick::start(this);
    this.online.store(true, Ordering::Release);

    while RUNNING.load(Ordering::Acquire) == 0 {
        vcpu::idle();
    }
    if index + 1 != RUNNING.load(Ordering::Relaxed) {
        loop {
            vcpu::idle();
        }
    }
    let mut dirtier = Dirtier::new(memory::get(), index);
    loop {
        if !dirtier.work() {
            vcpu::idle();
        }
    }
}

/// A page of RAM below 1 MiB, where real mode can start.
fn start_page(ram: &MemoryMap) -> Option<u64> {
    const PREFERRED: u64 = 0x8000;
    const LOW_MEMORY_END: u64 = 0x9_f000;
    let mut candidates = (PREFERRED..LOW_MEMORY_END).step_by(PAGE_BYTES as usize);
    candidates.find(|&page| ram.contains(page, page + PAGE_BYTES))
}

fn copy_start_code(page: u64) {
    let code = entry::other_vcpu_code();
    // SAFETY: the page is RAM outside the image, and nothing from the boot protocol is needed
    // any more. The code is shorter than a page.
    unsafe {
        let to = ptr::with_exposed_provenance_mut::<u8>(page as usize);
        ptr::copy_nonoverlapping(code.as_ptr(), to, code.len());
    }
}

fn start(index: usize, page: u64) -> bool {
    STARTING_VCPU.store(index as u32, Ordering::Release);
    apic::send_init(index as u32);
    apic::send_start(index as u32, page);
    // Processors may miss the first start message, and ignore a second one once started.
    if wait_online(index, START_RETRY_NS) {
        return true;
    }
    apic::send_start(index as u32, page);
    wait_online(index, START_TIMEOUT_NS)
}

fn wait_online(index: usize, timeout_ns: u64) -> bool {
    let start_ns = clock::read(BOOT_VCPU).ns;
    while !vcpu::get(index).online.load(Ordering::Acquire) {
        if clock::read(BOOT_VCPU).ns.saturating_sub(start_ns) > timeout_ns {
            return false;
        }
        core::hint::spin_loop();
    }
    true
}
