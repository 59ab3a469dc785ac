//! System calls of x86-64 without a C library (`syscall(2)`).

use core::arch::asm;

/// The errno of a call that failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Errno(pub u32);

/// Numbers of system calls (`arch/x86/entry/syscalls/syscall_64.tbl`).
pub mod number {
    #![allow(missing_docs, reason = "the names are those of the calls")]
    pub const READ: usize = 0;
    pub const WRITE: usize = 1;
    pub const CLOSE: usize = 3;
    pub const MMAP: usize = 9;
    pub const MUNMAP: usize = 11;
    pub const RT_SIGACTION: usize = 13;
    pub const RT_SIGPROCMASK: usize = 14;
    pub const SETSID: usize = 112;
    pub const SETGROUPS: usize = 116;
    pub const CAPGET: usize = 125;
    pub const CAPSET: usize = 126;
    pub const SIGALTSTACK: usize = 131;
    pub const PERSONALITY: usize = 135;
    pub const PRCTL: usize = 157;
    pub const SETRLIMIT: usize = 160;
    pub const EXIT_GROUP: usize = 231;
    pub const SECCOMP: usize = 317;
    pub const CLOSE_RANGE: usize = 436;
    pub const LANDLOCK_CREATE_RULESET: usize = 444;
    pub const LANDLOCK_RESTRICT_SELF: usize = 446;
}

/// A system call.
///
/// # Errors
/// Its errno.
///
/// # Safety
/// What the call does with these arguments does no harm to this program.
pub unsafe fn call(number: usize, arguments: [usize; 6]) -> Result<usize, Errno> {
    const LAST_ERRNO: usize = 4095;
    let [a, b, c, d, e, f] = arguments;
    let result: usize;
    // SAFETY: what the call does is the caller's promise; the kernel changes `rcx` and `r11` besides. Memory counts as changed.
    unsafe {
        asm!("syscall", inlateout("rax") number => result, in("rdi") a, in("rsi") b, in("rdx") c, in("r10") d,
            in("r8") e, in("r9") f, lateout("rcx") _, lateout("r11") _, options(nostack));
    }
    match u32::try_from(result.wrapping_neg()) {
        Ok(errno) if errno != 0 && errno as usize <= LAST_ERRNO => Err(Errno(errno)),
        _ => Ok(result),
    }
}

/// The same with fewer arguments; the others are 0.
///
/// # Errors
/// As [`call`].
///
/// # Safety
/// As [`call`].
pub unsafe fn call3(number: usize, a: usize, b: usize, c: usize) -> Result<usize, Errno> {
    // SAFETY: the caller's promise.
    unsafe { call(number, [a, b, c, 0, 0, 0]) }
}

/// End this process.
pub fn exit(status: usize) -> ! {
    loop {
        // SAFETY: it does not return.
        let _ = unsafe { call3(number::EXIT_GROUP, status, 0, 0) };
    }
}
