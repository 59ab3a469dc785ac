//! The guest's end of the doorbell.

use crate::{Ring, ANSWER_SIZE, DOORBELL, RING_SIZE, SYS_READ, SYS_WRITE};
use core::arch::asm;

/// Ring.
///
/// # Safety
/// In the guest's process. The host may change the guest's memory until it answers.
#[must_use]
pub unsafe fn ring(ring: Ring) -> bool {
    // SAFETY: the buffer is valid for the call.
    unsafe { call(SYS_WRITE, (&raw const ring) as usize, RING_SIZE) == RING_SIZE }
}

/// Wait for the answer.
///
/// # Safety
/// As [`ring`].
#[must_use]
pub unsafe fn wait() -> bool {
    let mut answer = [0_u8; ANSWER_SIZE];
    // SAFETY: the buffer is valid for the call.
    unsafe { call(SYS_READ, answer.as_mut_ptr() as usize, ANSWER_SIZE) == ANSWER_SIZE }
}

/// `read` or `write` of this buffer on the doorbell (syscall(2), x86-64): how many bytes, or a large number.
///
/// # Safety
/// The buffer is `length` bytes long, and may be written if the call is a `read`.
unsafe fn call(number: usize, buffer: usize, length: usize) -> usize {
    let result;
    // SAFETY: the kernel changes the buffer, `rcx` and `r11`; that the host may change memory meanwhile is what a clobber of all
    // memory says.
    unsafe {
        asm!("syscall", inlateout("rax") number => result, in("rdi") DOORBELL as usize, in("rsi") buffer,
            in("rdx") length, lateout("rcx") _, lateout("r11") _, options(nostack));
    }
    result
}
