//! The system calls of a process whose guest is another process, besides those of its work.

use super::child::Guests;
use crate::confine::Allowed::{Always, First, FirstAndOneOf};
use crate::confine::Call;
use std::os::fd::{AsRawFd, RawFd};

/// Answering the doorbells, filling and sealing the guest's text, ending the guest's processes, or asking them where they are, and
/// staying on one processor with the main one.
pub fn calls(guests: &Guests) -> Vec<Call> {
    const SIGNALS: &[u32] = &[libc::SIGKILL.cast_unsigned(), libc::SIGXCPU.cast_unsigned()];
    const SEAL: &[u32] = &[libc::F_ADD_SEALS.cast_unsigned()];
    let number = RawFd::cast_unsigned;
    let (memory, text) = (number(guests.memory.as_raw_fd()), number(guests.text.as_raw_fd()));
    let mut calls = vec![
        (libc::SYS_pwrite64, First(memory)),
        (libc::SYS_pwrite64, First(text)),
        (libc::SYS_fcntl, FirstAndOneOf(text, 1, SEAL)),
        // Where there is no vDSO.
        (libc::SYS_getcpu, Always),
        (libc::SYS_sched_getaffinity, First(0)),
        (libc::SYS_sched_setaffinity, First(0)),
        (libc::SYS_sched_setaffinity, First(guests.child.process.cast_unsigned())),
    ];
    for child in std::iter::once(&guests.child).chain(&guests.workers) {
        let (bell, process) = (number(child.bell.as_raw_fd()), child.process.cast_unsigned());
        calls.extend([
            (libc::SYS_read, First(bell)),
            (libc::SYS_recvfrom, First(bell)),
            (libc::SYS_sendto, First(bell)),
            (libc::SYS_kill, FirstAndOneOf(process, 1, SIGNALS)),
            (libc::SYS_wait4, First(process)),
        ]);
    }
    calls
}
