//! Starts a program with given descriptors and nothing else of this process.

use rustix::io::Errno;
use std::ffi::{c_int, c_void, CStr};
use std::fs::File;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr::{null, null_mut};

/// Bytes of the stack that the new process has until it is another program.
const STACK_SIZE: usize = 64 << 10;

/// What the new process is told, in memory that both have until then.
struct Order<'a> {
    program: c_int,
    /// The descriptors, and which number each gets.
    handed: &'a [(c_int, c_int)],
    arguments: [*const libc::c_char; 2],
    environment: [*const libc::c_char; 1],
    /// The errno, where it does not become another program.
    errno: c_int,
}

/// Start `program` with these descriptors, which get these numbers, one argument and no environment. None of them may have a
/// number that another one gets. Returns the number of the process, which is the caller's to wait for.
///
/// # Errors
/// No process can be started, or the program cannot be executed.
pub fn spawn(program: &File, argument: &CStr, handed: &[(BorrowedFd<'_>, c_int)]) -> Result<libc::pid_t, Errno> {
    let handed: Vec<(c_int, c_int)> = handed.iter().map(|(from, to)| (from.as_raw_fd(), *to)).collect();
    let mut order = Order {
        program: program.as_raw_fd(),
        handed: &handed,
        arguments: [argument.as_ptr(), null()],
        environment: [null()],
        errno: 0,
    };
    let mut stack = vec![MaybeUninit::<u128>::uninit(); STACK_SIZE / size_of::<u128>()];
    // SAFETY: the new process runs `become_program` on a stack of its own and in this memory, while this thread waits for it to
    // become another program or to end (`CLONE_VFORK`): what it is told lives that long. It gets a copy of the descriptors. No
    // handler of this process runs there, because all signals are blocked.
    let process = unsafe {
        let mut all: libc::sigset_t = std::mem::zeroed();
        let mut before: libc::sigset_t = std::mem::zeroed();
        libc::sigfillset(&raw mut all);
        libc::pthread_sigmask(libc::SIG_SETMASK, &raw const all, &raw mut before);
        let top = stack.as_mut_ptr().add(stack.len()).cast::<c_void>();
        let flags = libc::CLONE_VM | libc::CLONE_VFORK | libc::SIGCHLD;
        let process = libc::clone(become_program, top, flags, (&raw mut order).cast());
        let error = std::io::Error::last_os_error();
        libc::pthread_sigmask(libc::SIG_SETMASK, &raw const before, null_mut());
        if process < 0 {
            return Err(Errno::from_raw_os_error(error.raw_os_error().unwrap_or(libc::EAGAIN)));
        }
        process
    };
    // Written by the new process while this thread was in `clone`.
    // SAFETY: it is a valid number.
    let errno = unsafe { (&raw const order.errno).read_volatile() };
    if errno != 0 {
        // SAFETY: it has no pointers.
        unsafe { libc::waitpid(process, null_mut(), 0) };
        return Err(Errno::from_raw_os_error(errno));
    }
    Ok(process)
}

/// In the new process: only system calls.
extern "C" fn become_program(order: *mut c_void) -> c_int {
    // SAFETY: `spawn` passes its own, and waits.
    let order = unsafe { &mut *order.cast::<Order<'_>>() };
    for (from, to) in order.handed {
        // SAFETY: it has no pointers. The new descriptor survives the start of a program.
        if unsafe { libc::dup2(*from, *to) } < 0 {
            order.errno = errno();
            return 1;
        }
    }
    let (arguments, environment) = (order.arguments.as_ptr(), order.environment.as_ptr());
    // SAFETY: the strings and arrays are valid and end as they should.
    unsafe {
        libc::syscall(libc::SYS_execveat, order.program, c"".as_ptr(), arguments, environment, libc::AT_EMPTY_PATH);
    }
    order.errno = errno();
    1
}

fn errno() -> c_int {
    // SAFETY: the thread's own.
    unsafe { *libc::__errno_location() }
}
