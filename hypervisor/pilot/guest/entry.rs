//! The three ways into the image: 64-bit Linux boot, PVH, and start-up of the other vCPUs.
//!
//! All three end with the image's own descriptor table, page tables and a stack.

use core::arch::global_asm;

use crate::descriptors::{CODE_SELECTOR, CODE32_SELECTOR, DATA_SELECTOR};
use crate::pure::constants::BANNER_PREFIX;
use crate::vcpu::STACK_BYTES;

pub const PROTOCOL_PVH: u64 = 1;

/// PG, WP, NE, ET, MP, PE: paging on, caches on, vector instructions allowed.
const CR0: u32 = 0x8001_0033;
/// PAE, OSFXSR, OSXMMEXCPT: precompiled `core` code may move data through SSE registers.
const CR4: u32 = 0x620;
const EFER_MSR: u32 = 0xc000_0080;
const EFER_LONG_MODE_ENABLE: u32 = 0x100;
const XEN_ELFNOTE_PHYS32_ENTRY: u32 = 18;

unsafe extern "C" {
    static other_vcpu_start: u8;
    static other_vcpu_end: u8;
}

/// The real-mode code that a started vCPU runs first, to be copied below 1 MiB.
pub fn other_vcpu_code() -> &'static [u8] {
    let (start, end) = (&raw const other_vcpu_start, &raw const other_vcpu_end);
    // SAFETY: both symbols delimit one run of bytes in the image's read-only text, see below.
    unsafe { core::slice::from_raw_parts(start, end.offset_from_unsigned(start)) }
}

global_asm!(
    r#"
    .section .note.pvh, "a", @note
    .balign 4
    .long 4, 4, {phys32_entry}
    .asciz "Xen"
    .long pvh_entry

    .section .text.boot, "ax"

    # 64-bit entry, rsi = boot_params. Nothing is assumed of the stack or the descriptor tables.
    .code64
    .global pilot_entry
pilot_entry:
    cli
    cld
    mov edx, {serial_data}
    mov al, {first_byte}
    out dx, al
    mov rbx, rsi
    xor ebp, ebp
    mov eax, offset boot_pml4
    mov cr3, rax
    mov eax, {cr4}
    mov cr4, rax
    mov eax, {cr0}
    mov cr0, rax
    lgdt [gdt_pointer]
    mov esp, offset boot_stack_top
    push {code}
    mov eax, offset boot_vcpu_64
    push rax
    retfq

    # PVH entry, 32-bit protected mode, ebx = hvm_start_info.
    .code32
pvh_entry:
    cli
    cld
    mov edx, {serial_data}
    mov al, {first_byte}
    out dx, al
    mov ebp, {protocol_pvh}
    lgdt [gdt_pointer]
    mov edi, offset boot_vcpu_64
    jmp enter_long_mode

    # Turns paging and long mode on and continues at edi. Keeps ebx and ebp.
enter_long_mode:
    mov eax, {cr4}
    mov cr4, eax
    mov eax, offset boot_pml4
    mov cr3, eax
    mov ecx, {efer}
    mov eax, {long_mode_enable}
    xor edx, edx
    wrmsr
    mov eax, {cr0}
    mov cr0, eax
    .byte 0xea                      # far jump to 64-bit code
    .long in_long_mode
    .word {code}
    .code64
in_long_mode:
    mov edi, edi
    jmp rdi

boot_vcpu_64:
    mov eax, {data}
    mov ds, eax
    mov es, eax
    mov ss, eax
    xor eax, eax
    mov fs, eax
    mov gs, eax
    mov esp, offset boot_stack_top
    mov edi, offset __bss_start
    mov ecx, offset __bss_end
    sub ecx, edi
    shr ecx, 3
    rep stosq
    mov rdi, rbx
    mov esi, ebp
    call {boot_main}
    ud2

    # Real mode: cs is the page this was copied to, ip is 0.
    .code16
    .global other_vcpu_start
    .global other_vcpu_end
other_vcpu_start:
    cli
    cld
    mov ax, cs
    mov ds, ax
    .byte 0x66, 0x0f, 0x01, 0x16    # lgdt with a 32-bit base
    .word other_vcpu_gdt_pointer - other_vcpu_start
    mov eax, cr0
    or al, 1
    mov cr0, eax
    .byte 0x66, 0xea                # far jump to 32-bit code in the image
    .long other_vcpu_32
    .word {code32}
    .balign 4
other_vcpu_gdt_pointer:
    .word 8 * 5 - 1
    .long boot_gdt
other_vcpu_end:

    .code32
other_vcpu_32:
    mov eax, {data}
    mov ds, eax
    mov es, eax
    mov ss, eax
    lgdt [gdt_pointer]
    mov edi, offset other_vcpu_64
    jmp enter_long_mode

    .code64
other_vcpu_64:
    xor eax, eax
    mov fs, eax
    mov gs, eax
    mov edi, dword ptr [{starting_vcpu}]
    mov esi, edi
    inc esi
    imul esi, esi, {stack_bytes}
    mov esp, offset {stacks}
    add rsp, rsi
    call {other_main}
    ud2

    .section .data.boot_tables, "aw"
    # The first 4 GiB, mapped to themselves in 2 MiB pages.
    .balign 4096
    .global boot_pml4
    .global boot_pdpt
boot_pml4:
    .quad boot_pdpt + 0x7
    .fill 511, 8, 0
boot_pdpt:
    .quad boot_pd + 0x0007
    .quad boot_pd + 0x1007
    .quad boot_pd + 0x2007
    .quad boot_pd + 0x3007
    .fill 508, 8, 0
boot_pd:
    .set address, 0
    # Memory is open to user mode. Device memory, the last GiB, is not, and not cached.
    .rept 1536
    .quad address + 0x87
    .set address, address + 0x200000
    .endr
    .rept 512
    .quad address + 0x9b
    .set address, address + 0x200000
    .endr
    "#,
    phys32_entry = const XEN_ELFNOTE_PHYS32_ENTRY,
    serial_data = const crate::serial::DATA_PORT,
    first_byte = const BANNER_PREFIX.as_bytes()[0],
    protocol_pvh = const PROTOCOL_PVH,
    cr0 = const CR0,
    cr4 = const CR4,
    efer = const EFER_MSR,
    long_mode_enable = const EFER_LONG_MODE_ENABLE,
    code = const CODE_SELECTOR,
    code32 = const CODE32_SELECTOR,
    data = const DATA_SELECTOR,
    boot_main = sym crate::pilot_main,
    other_main = sym crate::smp::other_vcpu_main,
    starting_vcpu = sym crate::smp::STARTING_VCPU,
    stacks = sym crate::vcpu::STACKS,
    stack_bytes = const STACK_BYTES,
);

global_asm!(
    ".set boot_stack_top, {stacks} + {stack_bytes}",
    stacks = sym crate::vcpu::STACKS,
    stack_bytes = const STACK_BYTES,
);
