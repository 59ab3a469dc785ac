//! The system calls that each kind of work needs, and with which arguments.
//!
//! Found by tracing the test suite, completed by what the C library, the allocator and the runtime of Rust may take
//! instead on another machine (a clock without vDSO, a panic, an abort). Nothing here opens a socket, starts a process
//! or makes memory executable.

use std::collections::BTreeMap;
use std::os::fd::RawFd;

/// When a system call is allowed. Arguments count from 0, and are compared as 32 bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Allowed {
    /// Whatever its arguments.
    Always,
    /// When this argument has one of these values.
    OneOf(u8, &'static [u32]),
    /// When this argument has another value.
    Except(u8, u32),
    /// When this argument has none of these bits.
    Without(u8, u32),
    /// When the first argument has this value.
    First(u32),
    /// When the first argument has this value, and this other one has one of these.
    FirstAndOneOf(u32, u8, &'static [u32]),
    /// When this argument is the number of this process.
    OwnProcess(u8),
    /// When each of these arguments is a descriptor other than the standard ones, which are the caller's.
    Files(&'static [u8]),
    /// When the first argument is such a descriptor, and this one has one of these values.
    FileOneOf(u8, &'static [u32]),
    /// For the arguments of `mmap`: memory that is not executable and belongs to no standard descriptor.
    Mapping,
}

use Allowed::{Always, Except, FileOneOf, Files, First, FirstAndOneOf, Mapping, OneOf, OwnProcess, Without};

/// When the first argument is a descriptor other than the standard ones.
const FILE: Allowed = Files(&[0]);

/// A system call and when it is allowed.
pub type Call = (i64, Allowed);

/// What the process is going to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Work {
    /// Look at images that are open.
    Look,
    /// The same in a thread other than the first.
    LookInThread,
    /// Open images and look at them.
    OpenAndLook,
    /// Open images, look at them, and then go on with [`Work::Commit`].
    OpenToCommit,
    /// Commit images that are open.
    Commit,
    /// Open images, look at them, clone the target, and then go on with [`Work::CommitAtomically`].
    OpenToCommitAtomically,
    /// Commit images that are open, and give the target, or what undoes its change, a name, or take that away.
    CommitAtomically,
    /// Open images, look at them, and then go on with [`Work::Adopt`].
    OpenToAdopt,
    /// Write into an image that is open, and give it the place of another.
    Adopt,
    /// Open images, look at them, and then go on with [`Work::Read`].
    OpenToRead,
    /// Let the sandbox read images that are open.
    Read,
    /// Open images, look at them, and then go on with [`Work::Convert`].
    OpenToConvert,
    /// Fill an image that is open, and has no name yet, and give it one.
    Convert,
    /// Give an image that is open back what its undo log says, and remove that.
    Recover,
}

impl Work {
    /// All of them.
    pub const ALL: [Self; 14] = [
        Self::Look,
        Self::LookInThread,
        Self::OpenAndLook,
        Self::OpenToCommit,
        Self::Commit,
        Self::OpenToCommitAtomically,
        Self::CommitAtomically,
        Self::Recover,
        Self::OpenToAdopt,
        Self::Adopt,
        Self::OpenToRead,
        Self::Read,
        Self::OpenToConvert,
        Self::Convert,
    ];

    /// The system calls that it needs, besides those of the sandbox.
    #[must_use]
    pub fn calls(self) -> BTreeMap<i64, Vec<Allowed>> {
        self.calls_and(&[])
    }

    /// Whether it looks for images in directories.
    #[must_use]
    pub fn lists_directories(self) -> bool {
        !matches!(
            self,
            Self::Look
                | Self::LookInThread
                | Self::Commit
                | Self::CommitAtomically
                | Self::Adopt
                | Self::Read
                | Self::Convert
                | Self::Recover
        )
    }

    /// The same, and these.
    pub(super) fn calls_and(self, others: &[Call]) -> BTreeMap<i64, Vec<Allowed>> {
        let tables: &[&[Call]] = match self {
            Self::Look => &[LOOK],
            Self::LookInThread => &[LOOK, THREAD],
            Self::OpenAndLook => &[LOOK, OPEN, LIST],
            // A filter can only be made stricter: what comes later is allowed before.
            Self::OpenToCommit => &[LOOK, OPEN, LIST, CONFINE, CHANGE],
            Self::Commit => &[LOOK, CHANGE],
            Self::OpenToCommitAtomically => &[LOOK, OPEN, LIST, CONFINE, CONFINE_BUT, CHANGE, NAME, CLONE, LIKENESS],
            Self::CommitAtomically => &[LOOK, CHANGE, NAME, MARK],
            Self::Recover => &[LOOK, CHANGE, NAME],
            Self::OpenToAdopt => &[LOOK, OPEN, LIST, CONFINE, CONFINE_BUT, CHANGE, NAME, LIKENESS],
            Self::Adopt => &[LOOK, CHANGE, NAME, LIKENESS],
            Self::OpenToRead => &[LOOK, OPEN, LIST, CONFINE],
            Self::Read => &[LOOK],
            Self::OpenToConvert => &[LOOK, OPEN, LIST, CONFINE, CONFINE_BUT, CHANGE, NAME],
            Self::Convert => &[LOOK, CHANGE, NAME],
        };
        let mut calls: BTreeMap<i64, Vec<Allowed>> = BTreeMap::new();
        for (call, allowed) in tables.iter().copied().flatten().chain(others) {
            let known = calls.entry(*call).or_default();
            // For a filter, no rules is "always": beside others, it would not be seen.
            if *allowed == Always {
                *known = vec![Always];
            } else if !known.contains(&Always) && !known.contains(allowed) {
                known.push(*allowed);
            }
        }
        calls
    }
}

/// Bits without sign, as the tables have them.
const fn bits(value: i32) -> u32 {
    value.cast_unsigned()
}

/// Reading what is open, printing, and what every program does: memory, time, signals, the end.
const LOOK: &[Call] = &[
    // Files
    (libc::SYS_pread64, FILE),
    (libc::SYS_preadv, FILE),
    (libc::SYS_lseek, FILE),
    (libc::SYS_fstat, Always),
    (libc::SYS_newfstatat, Always),
    (libc::SYS_statx, Always),
    // How much space there is, and whether a link is one of procfs
    (libc::SYS_fstatfs, Always),
    (libc::SYS_close, Always),
    (libc::SYS_fcntl, OneOf(1, &[bits(libc::F_GETFD), bits(libc::F_GETFL)])),
    // Printing: standard output and standard error
    (libc::SYS_write, OneOf(0, &[1, 2])),
    (libc::SYS_writev, OneOf(0, &[1, 2])),
    (libc::SYS_ioctl, OneOf(1, TERMINAL)),
    // Memory
    (libc::SYS_brk, Always),
    (libc::SYS_mmap, Mapping),
    (libc::SYS_mprotect, Without(2, bits(libc::PROT_EXEC))),
    (libc::SYS_mremap, Always),
    (libc::SYS_munmap, Always),
    (libc::SYS_madvise, Always),
    (libc::SYS_getrandom, Always),
    // Time
    (libc::SYS_clock_gettime, Always),
    (libc::SYS_clock_getres, Always),
    (libc::SYS_gettimeofday, Always),
    // Locks of the runtime
    (libc::SYS_futex, Always),
    (libc::SYS_sched_yield, Always),
    // Signals; an abort sends one. Nobody replaces the handler that reports a call that is not in the list
    (libc::SYS_rt_sigaction, Except(0, bits(libc::SIGSYS))),
    // To block signals is the handler's, which does so for all but its own
    (libc::SYS_rt_sigprocmask, OneOf(0, &[bits(libc::SIG_UNBLOCK), bits(libc::SIG_SETMASK)])),
    (libc::SYS_rt_sigreturn, Always),
    (libc::SYS_restart_syscall, Always),
    (libc::SYS_sigaltstack, Always),
    (libc::SYS_getpid, Always),
    (libc::SYS_geteuid, Always),
    (libc::SYS_gettid, Always),
    (libc::SYS_tgkill, OwnProcess(0)),
    // The end
    (libc::SYS_exit, Always),
    (libc::SYS_exit_group, Always),
];

/// What the C library does for threads: at their end, and for the memory of a second one.
const THREAD: &[Call] =
    &[(libc::SYS_rseq, Always), (libc::SYS_set_robust_list, Always), (libc::SYS_sched_getaffinity, Always)];

/// Opening images and locking them; Landlock decides which.
const OPEN: &[Call] = &[
    (libc::SYS_open, Always),
    (libc::SYS_openat, Always),
    (libc::SYS_readlinkat, Always),
    (libc::SYS_getcwd, Always),
    // Whether a file could be written to, by the version of the kernel
    (libc::SYS_faccessat, Always),
    (libc::SYS_faccessat2, Always),
    (libc::SYS_stat, Always),
    (libc::SYS_lstat, Always),
    (libc::SYS_getuid, Always),
    (libc::SYS_getgid, Always),
    (libc::SYS_getegid, Always),
    (libc::SYS_fcntl, FileOneOf(1, &[bits(libc::F_OFD_SETLK), bits(libc::F_OFD_GETLK)])),
    // Whether what is to be written to is read-only, and what a loop device stands on
    (libc::SYS_ioctl, FileOneOf(1, &[BLKROGET, LOOP_GET_STATUS64])),
    (libc::SYS_fstatfs, Always),
    // Waiting for a lock
    (libc::SYS_nanosleep, Always),
    (libc::SYS_clock_nanosleep, Always),
];

/// Listing directories; Landlock decides which.
const LIST: &[Call] = &[(libc::SYS_getdents64, FILE)];

/// `_IO(0x12, 94)` of `linux/fs.h`: whether a block device is read-only.
pub const BLKROGET: u32 = 0x125e;
/// A request of `linux/loop.h`: what a loop device stands on.
pub const LOOP_GET_STATUS64: u32 = 0x4c05;

/// Confining the process further.
const CONFINE: &[Call] = &[
    (libc::SYS_prctl, OneOf(0, &[bits(libc::PR_SET_NO_NEW_PRIVS)])),
    (libc::SYS_seccomp, OneOf(0, &[libc::SECCOMP_SET_MODE_FILTER])),
    (libc::SYS_landlock_create_ruleset, Always),
    (libc::SYS_landlock_restrict_self, Always),
];

/// Confining it further, but for a directory.
const CONFINE_BUT: &[Call] = &[(libc::SYS_landlock_add_rule, Always)];

/// Changing what is open.
const CHANGE: &[Call] = &[
    (libc::SYS_pwrite64, FILE),
    (libc::SYS_pwritev, FILE),
    (libc::SYS_copy_file_range, Files(&[0, 2])),
    (libc::SYS_fallocate, FILE),
    (libc::SYS_ftruncate, FILE),
    (libc::SYS_fdatasync, FILE),
    // Sharing extents
    (libc::SYS_ioctl, FileOneOf(1, &[request(libc::FICLONERANGE)])),
    // What is read back is read from the disk
    (libc::SYS_fadvise64, FILE),
    // To begin writing, without waiting
    (libc::SYS_sync_file_range, FILE),
    // Direct I/O is switched on and off on the descriptor.
    (libc::SYS_fcntl, FileOneOf(1, &[bits(libc::F_SETFL)])),
    // How much space there is
    (libc::SYS_fstatfs, Always),
    // The pauses of a rate limit
    (libc::SYS_nanosleep, Always),
    (libc::SYS_clock_nanosleep, Always),
];

/// Giving a file that is complete its name, durably; Landlock decides in which directory.
const NAME: &[Call] = &[
    (libc::SYS_linkat, Always),
    (libc::SYS_renameat, Always),
    (libc::SYS_renameat2, Always),
    (libc::SYS_unlinkat, Always),
    (libc::SYS_fsync, FILE),
];

/// Removing the names of files from the directory behind this descriptor, durably; Landlock says that it is this one, and those
/// beneath it.
pub(crate) fn removing_in(directory: RawFd) -> Vec<Call> {
    vec![
        (libc::SYS_unlinkat, FirstAndOneOf(bits(directory), 2, &[0])),
        (libc::SYS_fsync, First(bits(directory))),
        // Confining it further, but for the directory
        (libc::SYS_landlock_add_rule, Always),
    ]
}

/// Making a clone of a file.
const CLONE: &[Call] = &[
    (libc::SYS_ioctl, FileOneOf(1, &[request(libc::FICLONE)])),
    // It is held for the image, and for its name.
    (libc::SYS_fcntl, FileOneOf(1, &[bits(libc::F_DUPFD_CLOEXEC)])),
];

/// Giving a file owner, mode and extended attributes of the one whose place it takes.
const LIKENESS: &[Call] = &[
    (libc::SYS_fchown, FILE),
    (libc::SYS_fchmod, FILE),
    (libc::SYS_flistxattr, FILE),
    (libc::SYS_fgetxattr, FILE),
    (libc::SYS_fsetxattr, FILE),
    (libc::SYS_fremovexattr, FILE),
];

/// Having an old target say what has taken its place.
const MARK: &[Call] = &[(libc::SYS_fgetxattr, FILE), (libc::SYS_fsetxattr, FILE), (libc::SYS_fremovexattr, FILE)];

/// Printing on a descriptor that the caller hands over for it, and waiting for its reader.
pub(crate) fn printing_on(descriptor: RawFd) -> Vec<Call> {
    vec![(libc::SYS_write, First(bits(descriptor))), (libc::SYS_poll, Always)]
}

/// Asking whether a descriptor is a terminal, and how wide it is: what takes input, `TIOCSTI` above all, is not there.
const TERMINAL: &[u32] = &[request(libc::TCGETS), request(libc::TCGETS2), request(libc::TIOCGWINSZ)];

const fn request(number: libc::Ioctl) -> u32 {
    #[allow(clippy::cast_possible_truncation, reason = "an unsigned int in the kernel")]
    let number = number as u32;
    number
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_call_that_is_always_allowed_stays_so() {
        let calls = Work::CommitAtomically.calls_and(&removing_in(7));
        assert_eq!(calls.get(&libc::SYS_unlinkat), Work::CommitAtomically.calls().get(&libc::SYS_unlinkat));
        let calls = Work::Commit.calls_and(&[(libc::SYS_unlinkat, First(7)), (libc::SYS_unlinkat, Always)]);
        assert_eq!(calls.get(&libc::SYS_unlinkat), Some(&vec![Always]));
    }

    #[test]
    fn numbers_are_those_of_the_kernel() {
        assert_eq!(TERMINAL[0], 0x5401);
    }

    #[test]
    fn nothing_leads_out() {
        let never = [
            libc::SYS_creat,
            libc::SYS_execve,
            libc::SYS_execveat,
            libc::SYS_fork,
            libc::SYS_vfork,
            libc::SYS_clone,
            libc::SYS_clone3,
            libc::SYS_socket,
            libc::SYS_connect,
            libc::SYS_ptrace,
            libc::SYS_process_vm_writev,
            libc::SYS_kill,
            libc::SYS_io_uring_setup,
            libc::SYS_bpf,
            libc::SYS_unlink,
            libc::SYS_rename,
            libc::SYS_mkdirat,
            libc::SYS_symlinkat,
            libc::SYS_memfd_create,
            libc::SYS_dup2,
            libc::SYS_openat2,
        ];
        for work in Work::ALL {
            let calls = work.calls();
            for call in never {
                assert!(!calls.contains_key(&call), "{work:?} {call}");
            }
            let names = matches!(
                work,
                Work::OpenToConvert
                    | Work::Convert
                    | Work::OpenToCommitAtomically
                    | Work::CommitAtomically
                    | Work::OpenToAdopt
                    | Work::Adopt
                    | Work::Recover
            );
            for call in [libc::SYS_linkat, libc::SYS_renameat, libc::SYS_renameat2, libc::SYS_unlinkat] {
                assert_eq!(calls.contains_key(&call), names, "{work:?} {call}");
            }
            let opens = matches!(
                work,
                Work::OpenAndLook
                    | Work::OpenToCommit
                    | Work::OpenToCommitAtomically
                    | Work::OpenToAdopt
                    | Work::OpenToRead
                    | Work::OpenToConvert
            );
            for call in [libc::SYS_open, libc::SYS_openat] {
                assert_eq!(calls.contains_key(&call), opens, "{work:?} {call}");
            }
            assert_eq!(calls.contains_key(&libc::SYS_getdents64), work.lists_directories(), "{work:?}");
            // No rules is "always" for a filter: the two cannot be mixed.
            for (call, allowed) in &calls {
                assert!(allowed.len() == 1 || !allowed.contains(&Always), "{work:?} {call}");
            }
        }
    }

    #[test]
    fn what_comes_later_is_allowed_before() {
        let both = [
            (Work::OpenToCommit, Work::Commit),
            (Work::OpenToCommitAtomically, Work::CommitAtomically),
            (Work::OpenToAdopt, Work::Adopt),
            (Work::OpenToRead, Work::Read),
            (Work::OpenToConvert, Work::Convert),
        ];
        for (before, after) in both {
            let before = before.calls();
            for (call, allowed) in after.calls() {
                let known = before.get(&call).is_some_and(|known| allowed.iter().all(|one| known.contains(one)));
                assert!(known, "{after:?} {call}");
            }
        }
    }
}
