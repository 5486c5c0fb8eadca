//! Running page work in user mode, like the work of any ordinary guest.
//!
//! Some KVM backends emulate every kernel instruction but run user code natively, where the same
//! loop is hundreds of times as fast. Elsewhere the detour costs a microsecond.

use core::arch::global_asm;
use core::mem::MaybeUninit;

use crate::descriptors::{DATA_SELECTOR, USER_CODE_SELECTOR, USER_DATA_SELECTOR};
use crate::vcpu::{self, USER_STACKS};

/// Runs `work` in user mode on this vCPU. It may compute and use memory, but neither idle nor
/// reach devices; interrupts stay enabled.
pub fn run<Work: FnOnce() -> Done, Done>(work: Work) -> Done {
    let index = vcpu::current().index();
    let mut call = Call {
        work: Some(work),
        done: MaybeUninit::uninit(),
    };
    // SAFETY: `execute` fits the type of `call`, which outlives the call; the user stack is
    // this vCPU's own, and user-mode work does not nest.
    unsafe {
        enter_user_mode(
            execute::<Work, Done>,
            (&raw mut call).cast(),
            USER_STACKS[index].top(),
        );
        call.done.assume_init()
    }
}

struct Call<Work, Done> {
    work: Option<Work>,
    done: MaybeUninit<Done>,
}

/// # Safety
/// `call` must point to a `Call` of these very types.
unsafe extern "C" fn execute<Work: FnOnce() -> Done, Done>(call: *mut u8) {
    // SAFETY: the caller vouches for the pointer, and waits.
    let call = unsafe { &mut *call.cast::<Call<Work, Done>>() };
    if let Some(work) = call.work.take() {
        call.done.write(work());
    }
}

unsafe extern "C" {
    fn enter_user_mode(
        function: unsafe extern "C" fn(*mut u8),
        argument: *mut u8,
        user_stack_top: u64,
    );
}

// The way back is a deliberate invalid instruction, whose exception continues at
// `leave_user_mode`: exceptions are the one way from user to kernel mode that every backend
// delivers faithfully. The kernel's stack pointer waits in a register that called functions
// preserve.
global_asm!(
    r#"
    .section .text.user_mode, "ax"
    .code64
    .global enter_user_mode
    .global user_work_done
    .global leave_user_mode
enter_user_mode:
    push rbx
    push rbp
    push r12
    push r13
    push r14
    push r15
    mov rbx, rsp
    push {user_data}
    push rdx
    push 0x202                      # interrupts enabled
    push {user_code}
    mov eax, offset in_user_mode
    push rax
    mov rax, rdi
    mov rdi, rsi
    iretq

in_user_mode:
    call rax
user_work_done:
    ud2

leave_user_mode:
    mov eax, {data}
    mov ss, eax
    mov rsp, rbx
    pop r15
    pop r14
    pop r13
    pop r12
    pop rbp
    pop rbx
    sti
    ret
    "#,
    data = const DATA_SELECTOR,
    user_data = const USER_DATA_SELECTOR,
    user_code = const USER_CODE_SELECTOR,
);
