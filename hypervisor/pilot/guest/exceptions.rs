//! The interrupt table: every exception is reported and ends the guest; device
//! interrupts and the spurious vector return.

use core::arch::{asm, global_asm};
use core::cell::UnsafeCell;

use crate::console;
use crate::cpu;
use crate::descriptors::{CODE_SELECTOR, INTERRUPT_STACK_INDEX};
use crate::pure::text::Text;
use crate::serial;
use crate::tick;

pub const TICK_VECTOR: u8 = 0x40;
pub const SERIAL_VECTOR: u8 = 0x41;
pub const SPURIOUS_VECTOR: u8 = 0xff;
const EXCEPTIONS: usize = 32;
const STUB_BYTES: usize = 16;

#[repr(C, align(16))]
struct Table(UnsafeCell<[[u64; 2]; 256]>);

// SAFETY: written by the boot vCPU before any other is started, read-only afterwards.
unsafe impl Sync for Table {}

static TABLE: Table = Table(UnsafeCell::new([[0; 2]; 256]));

#[repr(C, packed)]
struct Pointer {
    limit: u16,
    base: u64,
}

unsafe extern "C" {
    static exception_stubs: u8;
    static tick_stub: u8;
    static serial_stub: u8;
    static spurious_stub: u8;
}

/// Fills the table and loads it on the boot vCPU.
pub fn init() {
    let stubs = (&raw const exception_stubs).addr() as u64;
    for vector in 0..EXCEPTIONS {
        set_gate(vector, stubs + (vector * STUB_BYTES) as u64);
    }
    set_gate(TICK_VECTOR.into(), (&raw const tick_stub).addr() as u64);
    set_gate(SERIAL_VECTOR.into(), (&raw const serial_stub).addr() as u64);
    set_gate(
        SPURIOUS_VECTOR.into(),
        (&raw const spurious_stub).addr() as u64,
    );
    load();
}

/// Loads the table on the calling vCPU.
pub fn load() {
    let pointer = Pointer {
        limit: (size_of::<Table>() - 1) as u16,
        base: TABLE.0.get().addr() as u64,
    };
    // SAFETY: the table lives for ever and its gates lead to the stubs below.
    unsafe { asm!("lidt [{}]", in(reg) &raw const pointer, options(nostack, readonly)) };
}

fn set_gate(vector: usize, handler: u64) {
    const KERNEL_INTERRUPT_GATE: u64 = 0x8e;
    let low = (handler & 0xffff)
        | u64::from(CODE_SELECTOR) << 16
        | u64::from(INTERRUPT_STACK_INDEX) << 32
        | KERNEL_INTERRUPT_GATE << 40
        | (handler >> 16 & 0xffff) << 48;
    // SAFETY: only the boot vCPU calls this, before any other is started.
    unsafe { (*TABLE.0.get())[vector] = [low, handler >> 32] };
}

#[repr(C)]
struct Frame {
    vector: u64,
    error_code: u64,
    rip: u64,
    cs: u64,
    flags: u64,
    rsp: u64,
    ss: u64,
}

extern "C" fn exception(frame: &Frame) -> ! {
    let mut line = Text::new();
    line.push("\npilot: exception")
        .push_pair("vector", frame.vector);
    line.push_key("rip").push_hex(frame.rip);
    line.push_key("error_code").push_hex(frame.error_code);
    line.push_key("cr2").push_hex(cpu::read_cr2());
    line.push_key("rsp").push_hex(frame.rsp);
    line.push_key("cs").push_hex(frame.cs);
    line.push_key("ss").push_hex(frame.ss);
    line.push_key("flags").push_hex(frame.flags);
    console::print_line(&line);
    crate::power::stop_all()
}

global_asm!(
    r#"
    .section .text.stubs, "ax"
    .code64
    .global exception_stubs
    .global tick_stub
    .global serial_stub
    .global spurious_stub
    .balign 16
exception_stubs:
    .set vector, 0
    .rept 32
    .balign 16
    # Vectors 8, 10-14, 17, 21, 29 and 30 come with an error code.
    .if (0x60227d00 >> vector) & 1
    .else
    push 0
    .endif
    push vector
    jmp exception_common
    .set vector, vector + 1
    .endr

    .balign 16
exception_common:
    cmp qword ptr [rsp + 16], offset user_work_done
    je leave_user_mode
    cld
    mov rdi, rsp
    and rsp, -16
    call {exception}
    ud2

    .macro interrupt_stub handler
    push rax
    push rcx
    push rdx
    push rsi
    push rdi
    push r8
    push r9
    push r10
    push r11
    cld
    call \handler
    pop r11
    pop r10
    pop r9
    pop r8
    pop rdi
    pop rsi
    pop rdx
    pop rcx
    pop rax
    iretq
    .endm

    .balign 16
tick_stub:
    interrupt_stub {tick}

    .balign 16
serial_stub:
    interrupt_stub {serial}

spurious_stub:
    iretq
    "#,
    exception = sym exception,
    tick = sym tick::handle,
    serial = sym serial::handle,
);
