//! `memcpy` and its relatives, which compiled code calls by name.
//!
//! String instructions keep them at a handful of instructions, whatever the length.

use core::arch::asm;

/// # Safety
/// As for C's `memcpy`.
#[unsafe(no_mangle)]
unsafe extern "C" fn memcpy(to: *mut u8, from: *const u8, bytes: usize) -> *mut u8 {
    // SAFETY: the caller vouches for both ranges; the direction flag is clear in compiled code.
    unsafe {
        asm!(
            "rep movsb",
            inout("rdi") to => _, inout("rsi") from => _, inout("rcx") bytes => _,
            options(nostack, preserves_flags)
        );
    }
    to
}

/// # Safety
/// As for C's `memmove`.
#[unsafe(no_mangle)]
unsafe extern "C" fn memmove(to: *mut u8, from: *const u8, bytes: usize) -> *mut u8 {
    if to.addr().wrapping_sub(from.addr()) >= bytes {
        // SAFETY: copying upwards never reads a byte it has overwritten, since `to` is not inside
        // the source range.
        return unsafe { memcpy(to, from, bytes) };
    }
    // SAFETY: as above, downwards from the last byte; `bytes` is not zero here, and the direction
    // flag is clear again afterwards.
    unsafe {
        asm!(
            "std", "rep movsb", "cld",
            inout("rdi") to.add(bytes - 1) => _, inout("rsi") from.add(bytes - 1) => _,
            inout("rcx") bytes => _,
            options(nostack)
        );
    }
    to
}

/// # Safety
/// As for C's `memset`.
#[unsafe(no_mangle)]
unsafe extern "C" fn memset(to: *mut u8, value: i32, bytes: usize) -> *mut u8 {
    // SAFETY: the caller vouches for the range; the direction flag is clear in compiled code.
    unsafe {
        asm!(
            "rep stosb",
            inout("rdi") to => _, in("al") value as u8, inout("rcx") bytes => _,
            options(nostack, preserves_flags)
        );
    }
    to
}

/// # Safety
/// As for C's `memcmp`.
#[unsafe(no_mangle)]
unsafe extern "C" fn memcmp(left: *const u8, right: *const u8, bytes: usize) -> i32 {
    let order: i32;
    // SAFETY: the caller vouches for both ranges. Comparing a register with itself first makes
    // an empty comparison equal, because the string instruction then leaves the flags alone.
    unsafe {
        asm!(
            "xor eax, eax",
            "repe cmpsb",
            "seta al",
            "setb dl",
            "movzx edx, dl",
            "sub eax, edx",
            inout("rsi") left => _, inout("rdi") right => _, inout("rcx") bytes => _,
            out("eax") order, out("edx") _,
            options(nostack, readonly)
        );
    }
    order
}

/// # Safety
/// As for `memcmp`.
#[unsafe(no_mangle)]
unsafe extern "C" fn bcmp(left: *const u8, right: *const u8, bytes: usize) -> i32 {
    // SAFETY: the caller gives `memcmp`'s promise.
    unsafe { memcmp(left, right, bytes) }
}

/// Precompiled `core` refers to it; nothing unwinds in a guest built to abort.
#[unsafe(no_mangle)]
extern "C" fn rust_eh_personality() {}
