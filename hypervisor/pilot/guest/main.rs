//! The pilot: a small guest that says what it noticed while it was being moved.
//!
//! It counts timer ticks on every vCPU and measures the gaps between them, fills and keeps
//! rewriting memory whose contents it can prove, and answers a line shell on the serial port.

#![no_std]
#![no_main]
#![deny(unsafe_op_in_unsafe_fn)]

mod apic;
mod boot_info;
mod clock;
mod console;
mod cpu;
mod descriptors;
mod dirtier;
mod entry;
mod exceptions;
mod ioapic;
mod memory;
mod paging;
mod panic;
mod port;
mod power;
mod pure;
mod serial;
mod shell;
mod smp;
mod string;
mod tick;
mod user_mode;
mod vcpu;

use boot_info::{BootInfo, Protocol};
use pure::boot_arguments;
use pure::text::Text;

/// The first Rust code, on the boot vCPU, with the image's own tables and a cleared `.bss`.
extern "C" fn pilot_main(info_address: u64, protocol: u64) -> ! {
    let protocol = match protocol {
        entry::PROTOCOL_PVH => Protocol::Pvh,
        _ => Protocol::Linux,
    };
    serial::init();
    exceptions::init();
    let boot = BootInfo::read(protocol, info_address);
    let asked = boot_arguments::vcpus(boot.command_line());

    let memory = memory::init(&boot.ram);
    let boot_vcpu = vcpu::init_this(smp::BOOT_VCPU);
    clock::init();
    apic::init();
    tick::set_period_us(boot_arguments::tick_us(boot.command_line()));
    apic::calibrate_timer();
    serial::enable_interrupt();
    tick::start(boot_vcpu);
    let vcpus = smp::start_others(&boot.ram, asked);
    print_banner(vcpus, boot.ram.total_bytes());
    shell::run(memory, vcpus)
}

/// Completes the banner line, whose first byte the entry code has already sent.
fn print_banner(vcpus: usize, ram_bytes: u64) {
    let mut line = Text::new();
    line.push(&pure::constants::BANNER_PREFIX[1..])
        .push(env!("CARGO_PKG_VERSION"));
    line.push_pair("vcpus", vcpus as u64);
    line.push_pair("memory_mib", ram_bytes.div_ceil(1 << 20));
    console::print_line(&line);
}
