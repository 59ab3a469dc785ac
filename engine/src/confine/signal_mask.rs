//! A confined process cannot block `SIGSYS`, so that [what it must not call](super::trap) is always named.
//!
//! The C library blocks all signals while it starts a thread or a process, and the kernel silently kills a process that a
//! filter stops while it blocks `SIGSYS`. A filter cannot read a mask in memory, so it stops every `rt_sigprocmask` that adds
//! signals to the mask, and the handler adds all of them except this one. A call that sets the whole mask passes: a thread that
//! was started before the filter gets its mask that way.

/// Bit of `SIGSYS` in the kernel's mask of signals.
const NAMED: u64 = 1 << (libc::SIGSYS - 1);
/// Bytes of that mask.
const MASK_BYTES: i64 = 8;

/// Do the `rt_sigprocmask` with `SIG_BLOCK` that a filter stopped. `context` has its arguments in its registers, and the mask
/// that takes effect when the handler returns.
///
/// # Safety
/// `context` is the third argument of a signal handler. The pointers in its registers are those of the call that was
/// stopped: where they are bad, this faults, where the kernel would have said so.
pub(super) unsafe fn change(context: *mut libc::ucontext_t) {
    // SAFETY: the kernel passes a valid context. Its mask has 8 bytes, where that of the C library has room for more.
    let (registers, mask) = unsafe {
        let registers = &mut (*context).uc_mcontext.gregs;
        (registers, &mut *(&raw mut (*context).uc_sigmask).cast::<u64>())
    };
    let at = |index: libc::c_int| usize::try_from(index).unwrap_or_default();
    let wanted = registers[at(libc::REG_RSI)] as *const u64;
    let old = registers[at(libc::REG_RDX)] as *mut u64;
    let size = registers[at(libc::REG_R10)];
    registers[at(libc::REG_RAX)] = if size == MASK_BYTES {
        let before = *mask;
        if !wanted.is_null() {
            // SAFETY: see above.
            *mask = before | (unsafe { wanted.read_unaligned() } & !NAMED);
        }
        if !old.is_null() {
            // SAFETY: see above.
            unsafe { old.write_unaligned(before) };
        }
        0
    } else {
        i64::from(-libc::EINVAL)
    };
}
