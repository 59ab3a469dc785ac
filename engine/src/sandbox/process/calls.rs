//! The system calls of a process whose guest is another process, besides those of its work.

use super::child::Child;
use crate::confine::Allowed::{Always, First, FirstAndOneOf};
use crate::confine::Call;
use std::os::fd::{AsRawFd, RawFd};

/// Answering the doorbell, filling and sealing the guest's text, ending the guest's process, or asking it where it is, and staying
/// on one processor with it.
pub fn calls(child: &Child) -> Vec<Call> {
    const SIGNALS: &[u32] = &[libc::SIGKILL.cast_unsigned(), libc::SIGXCPU.cast_unsigned()];
    const SEAL: &[u32] = &[libc::F_ADD_SEALS.cast_unsigned()];
    let number = RawFd::cast_unsigned;
    let (bell, memory) = (number(child.bell.as_raw_fd()), number(child.memory.as_raw_fd()));
    let text = number(child.text.as_raw_fd());
    let process = child.process.cast_unsigned();
    vec![
        (libc::SYS_read, First(bell)),
        (libc::SYS_sendto, First(bell)),
        (libc::SYS_pwrite64, First(memory)),
        (libc::SYS_pwrite64, First(text)),
        (libc::SYS_fcntl, FirstAndOneOf(text, 1, SEAL)),
        (libc::SYS_kill, FirstAndOneOf(process, 1, SIGNALS)),
        (libc::SYS_wait4, First(process)),
        // Where there is no vDSO.
        (libc::SYS_getcpu, Always),
        (libc::SYS_sched_getaffinity, First(0)),
        (libc::SYS_sched_setaffinity, First(0)),
        (libc::SYS_sched_setaffinity, First(process)),
    ]
}
