//! The memory routines that compiled code expects from a C library.
//!
//! Written in assembler throughout, so that the compiler cannot turn a loop in `memcpy` into a call of `memcpy`.
//! Up to 128 bytes everything is loaded before anything is stored, in overlapping pieces; beyond, `rep movsb` and
//! `rep stosb` do it, which every processor with KVM runs at full memory speed.
//!
//! Without the feature `guest` these are ordinary functions, tested on the host.

use core::arch::naked_asm;

/// Copy `length` bytes from `source` to `target`, which do not overlap. Returns `target`.
///
/// # Safety
/// As for C's `memcpy`.
#[cfg_attr(all(feature = "guest", not(test)), no_mangle)]
#[unsafe(naked)]
pub unsafe extern "C" fn memcpy(target: *mut u8, source: *const u8, length: usize) -> *mut u8 {
    naked_asm!(
        "mov rax, rdi",
        "cmp rdx, 16",
        "jb 4f",
        "cmp rdx, 32",
        "ja 2f",
        "movups xmm0, [rsi]",
        "movups xmm1, [rsi + rdx - 16]",
        "movups [rdi], xmm0",
        "movups [rdi + rdx - 16], xmm1",
        "ret",
        "2:",
        "cmp rdx, 128",
        "ja 9f",
        "movups xmm0, [rsi]",
        "movups xmm1, [rsi + 16]",
        "movups xmm2, [rsi + rdx - 32]",
        "movups xmm3, [rsi + rdx - 16]",
        "cmp rdx, 64",
        "jbe 3f",
        "movups xmm4, [rsi + 32]",
        "movups xmm5, [rsi + 48]",
        "movups xmm6, [rsi + rdx - 64]",
        "movups xmm7, [rsi + rdx - 48]",
        "movups [rdi + 32], xmm4",
        "movups [rdi + 48], xmm5",
        "movups [rdi + rdx - 64], xmm6",
        "movups [rdi + rdx - 48], xmm7",
        "3:",
        "movups [rdi], xmm0",
        "movups [rdi + 16], xmm1",
        "movups [rdi + rdx - 32], xmm2",
        "movups [rdi + rdx - 16], xmm3",
        "ret",
        "4:",
        "cmp rdx, 8",
        "jb 5f",
        "mov rcx, [rsi]",
        "mov r8, [rsi + rdx - 8]",
        "mov [rdi], rcx",
        "mov [rdi + rdx - 8], r8",
        "ret",
        "5:",
        "cmp rdx, 4",
        "jb 6f",
        "mov ecx, [rsi]",
        "mov r8d, [rsi + rdx - 4]",
        "mov [rdi], ecx",
        "mov [rdi + rdx - 4], r8d",
        "ret",
        // 1 to 3 bytes: the first, the middle and the last.
        "6:",
        "test rdx, rdx",
        "je 7f",
        "mov r10, rdx",
        "shr r10, 1",
        "movzx ecx, byte ptr [rsi]",
        "movzx r8d, byte ptr [rsi + r10]",
        "movzx r9d, byte ptr [rsi + rdx - 1]",
        "mov [rdi], cl",
        "mov [rdi + r10], r8b",
        "mov [rdi + rdx - 1], r9b",
        "7:",
        "ret",
        "9:",
        "mov rcx, rdx",
        "rep movsb",
        "ret",
    )
}

/// Copy `length` bytes from `source` to `target`, which may overlap. Returns `target`.
///
/// # Safety
/// As for C's `memmove`.
#[cfg_attr(all(feature = "guest", not(test)), no_mangle)]
#[unsafe(naked)]
pub unsafe extern "C" fn memmove(target: *mut u8, source: *const u8, length: usize) -> *mut u8 {
    naked_asm!(
        "mov rax, rdi",
        "cmp rdx, 128",
        "jbe 3f",
        // Forwards is right unless the target begins inside the source.
        "mov rcx, rdi",
        "sub rcx, rsi",
        "cmp rcx, rdx",
        "jae 3f",
        "2:",
        "movups xmm0, [rsi + rdx - 16]",
        "movups xmm1, [rsi + rdx - 32]",
        "movups [rdi + rdx - 16], xmm0",
        "movups [rdi + rdx - 32], xmm1",
        "sub rdx, 32",
        "cmp rdx, 128",
        "ja 2b",
        "3:",
        "jmp {memcpy}",
        memcpy = sym memcpy,
    )
}

/// Fill `length` bytes at `target` with `value`. Returns `target`.
///
/// # Safety
/// As for C's `memset`.
#[cfg_attr(all(feature = "guest", not(test)), no_mangle)]
#[unsafe(naked)]
pub unsafe extern "C" fn memset(target: *mut u8, value: i32, length: usize) -> *mut u8 {
    naked_asm!(
        "movzx eax, sil",
        "cmp rdx, 128",
        "ja 5f",
        "mov rcx, 0x0101010101010101",
        "imul rcx, rax",
        "mov rax, rdi",
        "cmp rdx, 8",
        "jb 3f",
        // 8 to 128 bytes: eight at a time, the last eight overlapping.
        "lea r8, [rdi + rdx - 8]",
        "2:",
        "mov [rdi], rcx",
        "add rdi, 8",
        "cmp rdi, r8",
        "jb 2b",
        "mov [r8], rcx",
        "ret",
        "3:",
        "test rdx, rdx",
        "je 4f",
        "mov [rdi], cl",
        "inc rdi",
        "dec rdx",
        "jmp 3b",
        "4:",
        "ret",
        "5:",
        "mov r8, rdi",
        "mov rcx, rdx",
        "rep stosb",
        "mov rax, r8",
        "ret",
    )
}

/// Compare `length` bytes. Negative, zero or positive as in C.
///
/// # Safety
/// As for C's `memcmp`.
#[cfg_attr(all(feature = "guest", not(test)), no_mangle)]
#[unsafe(naked)]
pub unsafe extern "C" fn memcmp(left: *const u8, right: *const u8, length: usize) -> i32 {
    naked_asm!(
        "xor ecx, ecx",
        "2:",
        "lea r8, [rcx + 8]",
        "cmp r8, rdx",
        "ja 4f",
        "mov rax, [rdi + rcx]",
        "mov r9, [rsi + rcx]",
        "cmp rax, r9",
        "jne 3f",
        "mov rcx, r8",
        "jmp 2b",
        // The first different byte decides: compare as big-endian numbers.
        "3:",
        "bswap rax",
        "bswap r9",
        "cmp rax, r9",
        "sbb eax, eax",
        "or eax, 1",
        "ret",
        "4:",
        "cmp rcx, rdx",
        "je 5f",
        "movzx eax, byte ptr [rdi + rcx]",
        "movzx r9d, byte ptr [rsi + rcx]",
        "inc rcx",
        "sub eax, r9d",
        "je 4b",
        "ret",
        "5:",
        "xor eax, eax",
        "ret",
    )
}

/// Compare `length` bytes: zero if they are equal.
///
/// # Safety
/// As for `bcmp`.
#[cfg_attr(all(feature = "guest", not(test)), no_mangle)]
#[unsafe(naked)]
pub unsafe extern "C" fn bcmp(left: *const u8, right: *const u8, length: usize) -> i32 {
    naked_asm!("jmp {memcmp}", memcmp = sym memcmp)
}
