//! The guest's end of the doorbell: the starter's until it jumps, then the guest's.

use crate::calls::{call3, number};
use crate::{Ring, ANSWER_SIZE, DOORBELL, RING_SIZE};

#[allow(clippy::cast_sign_loss, reason = "a descriptor")]
const BELL: usize = DOORBELL as usize;

/// Ring.
///
/// # Safety
/// In the guest's process. The host may change the guest's memory until it answers.
#[must_use]
pub unsafe fn ring(ring: Ring) -> bool {
    // SAFETY: the buffer is valid for the call.
    unsafe { call3(number::WRITE, BELL, (&raw const ring) as usize, RING_SIZE) == Ok(RING_SIZE) }
}

/// Wait for the answer; `None` if there is no host any more.
///
/// # Safety
/// As [`ring`].
#[must_use]
pub unsafe fn answer() -> Option<u8> {
    let mut answer = [0_u8; ANSWER_SIZE];
    // SAFETY: the buffer is valid for the call.
    let read = unsafe { call3(number::READ, BELL, answer.as_mut_ptr() as usize, ANSWER_SIZE) };
    (read == Ok(ANSWER_SIZE)).then_some(answer[0])
}

/// Wait for the answer, whatever it is.
///
/// # Safety
/// As [`ring`].
#[must_use]
pub unsafe fn wait() -> bool {
    // SAFETY: the caller's promise.
    unsafe { answer().is_some() }
}
