//! A program that is stopped before and after each of its system calls (ptrace(2)), on x86-64.

use std::collections::BTreeMap;
use std::ffi::CString;
use std::fs::File;
use std::io::{self, Error};
use std::os::unix::fs::FileExt;
use std::ptr::null_mut;

/// A system call that the program is about to make.
pub struct Call(libc::user_regs_struct);

impl Call {
    /// Its number.
    pub fn number(&self) -> i64 {
        self.0.orig_rax.cast_signed()
    }

    /// Argument 0 to 5.
    pub fn argument(&self, index: usize) -> u64 {
        let r = &self.0;
        [r.rdi, r.rsi, r.rdx, r.r10, r.r8, r.r9][index]
    }

    /// Change an argument.
    pub fn set_argument(&mut self, index: usize, value: u64) {
        let r = &mut self.0;
        *[&mut r.rdi, &mut r.rsi, &mut r.rdx, &mut r.r10, &mut r.r8, &mut r.r9][index] = value;
    }
}

/// A thread of the program, between two stops.
#[derive(Clone, Copy, Default)]
struct Thread {
    /// It is in a call, or before one.
    in_call: bool,
    /// With which errno the call that it is in fails.
    fails: Option<i32>,
}

/// The traced program with all of its threads; it starts no other program.
pub struct Tracee {
    /// The first thread, which stands for the program.
    pid: libc::pid_t,
    /// The one that is stopped before a call.
    current: libc::pid_t,
    threads: BTreeMap<libc::pid_t, Thread>,
    status: Option<u8>,
}

fn check(result: libc::c_long) -> io::Result<()> {
    if result < 0 {
        return Err(Error::last_os_error());
    }
    Ok(())
}

impl Tracee {
    /// Start a program, stopped before its first instruction.
    pub fn start(program: &str, arguments: &[String]) -> io::Result<Self> {
        let all: Result<Vec<CString>, _> =
            std::iter::once(program).chain(arguments.iter().map(String::as_str)).map(CString::new).collect();
        let all = all?;
        let mut pointers: Vec<*const libc::c_char> = all.iter().map(|text| text.as_ptr()).collect();
        pointers.push(std::ptr::null());
        // SAFETY: this process has one thread; between fork and exec the child makes system calls only, on memory that
        // was prepared before.
        let pid = unsafe {
            let pid = libc::fork();
            if pid == 0 {
                libc::ptrace(libc::PTRACE_TRACEME, 0, null_mut::<libc::c_void>(), null_mut::<libc::c_void>());
                libc::execv(pointers[0], pointers.as_ptr());
                libc::_exit(126);
            }
            pid
        };
        check(pid.into())?;
        let threads = BTreeMap::from([(pid, Thread::default())]);
        let tracee = Self { pid, current: pid, threads, status: None };
        let mut status = 0;
        // SAFETY: `status` is writable.
        check(unsafe { libc::waitpid(pid, &raw mut status, 0) }.into())?;
        let options = libc::PTRACE_O_TRACESYSGOOD | libc::PTRACE_O_EXITKILL | libc::PTRACE_O_TRACECLONE;
        // SAFETY: the child is stopped; the request takes its options as data.
        check(unsafe { libc::ptrace(libc::PTRACE_SETOPTIONS, pid, null_mut::<libc::c_void>(), options) })?;
        tracee.resume(pid, 0)?;
        Ok(tracee)
    }

    /// Let a stopped thread run to its next stop at a system call.
    fn resume(&self, thread: libc::pid_t, signal: i32) -> io::Result<()> {
        // SAFETY: the thread is stopped; the request takes a signal as data.
        let result = unsafe { libc::ptrace(libc::PTRACE_SYSCALL, thread, null_mut::<libc::c_void>(), signal) };
        match check(result) {
            // Another thread ended the program meanwhile.
            Err(error) if error.raw_os_error() == Some(libc::ESRCH) => Ok(()),
            other => other,
        }
    }

    /// Wait for whatever comes next of any thread: which one, and its status. `None` once the program has ended.
    fn wait(&mut self) -> io::Result<Option<(libc::pid_t, i32)>> {
        let mut status = 0;
        // SAFETY: `status` is writable.
        let thread = unsafe { libc::waitpid(-1, &raw mut status, libc::__WALL) };
        check(thread.into())?;
        if libc::WIFSTOPPED(status) {
            return Ok(Some((thread, status)));
        }
        self.threads.remove(&thread);
        if thread != self.pid {
            return self.wait();
        }
        // The first thread is reported when all others have ended.
        let code = if libc::WIFEXITED(status) { libc::WEXITSTATUS(status) } else { 128 + libc::WTERMSIG(status) };
        self.status = Some(u8::try_from(code).unwrap_or(255));
        Ok(None)
    }

    fn registers(&self) -> io::Result<Call> {
        // SAFETY: all bits zero are registers.
        let mut call = Call(unsafe { std::mem::zeroed() });
        // SAFETY: the child is stopped; the registers are writable.
        check(unsafe {
            libc::ptrace(libc::PTRACE_GETREGS, self.current, null_mut::<libc::c_void>(), &raw mut call.0)
        })?;
        Ok(call)
    }

    /// Make the program's registers those of `call`.
    pub fn set(&self, call: &Call) -> io::Result<()> {
        // SAFETY: the child is stopped; the registers are readable.
        check(unsafe {
            libc::ptrace(libc::PTRACE_SETREGS, self.current, null_mut::<libc::c_void>(), &raw const call.0)
        })
    }

    /// The next system call of any thread, before it is made; `None` if the program ended.
    pub fn next_call(&mut self) -> io::Result<Option<Call>> {
        while self.status.is_none() {
            let Some((thread, status)) = self.wait()? else { break };
            let (signal, event) = (libc::WSTOPSIG(status), status >> 16);
            let known = self.threads.contains_key(&thread);
            let state = self.threads.entry(thread).or_default();
            if signal != libc::SIGTRAP | 0x80 {
                // A new thread begins with a stop, and its parent is told of it; other signals are passed on.
                let quiet = event != 0 || signal == libc::SIGTRAP || (signal == libc::SIGSTOP && !known);
                self.resume(thread, if quiet { 0 } else { signal })?;
                continue;
            }
            self.current = thread;
            state.in_call = !state.in_call;
            if state.in_call {
                return self.registers().map(Some);
            }
            if let Some(errno) = state.fails.take() {
                let mut call = self.registers()?;
                call.0.rax = i64::from(-errno).cast_unsigned();
                self.set(&call)?;
            }
            self.resume(thread, 0)?;
        }
        Ok(None)
    }

    /// Have the call made, or let it fail with an errno instead.
    pub fn go_on(&mut self, errno: Option<i32>) -> io::Result<()> {
        if let Some(state) = self.threads.get_mut(&self.current).filter(|_| errno.is_some()) {
            state.fails = errno;
            let mut call = self.registers()?;
            call.0.orig_rax = libc::SYS_getpid.cast_unsigned();
            self.set(&call)?;
        }
        self.resume(self.current, 0)
    }

    /// End it now.
    pub fn kill(&mut self) -> io::Result<()> {
        // SAFETY: the child has not been waited for to its end, so the number is its own.
        check(unsafe { libc::kill(self.pid, libc::SIGKILL) }.into())?;
        while self.wait()?.is_some() {}
        Ok(())
    }

    /// The exit status, as a shell has it.
    pub fn status(&self) -> u8 {
        self.status.unwrap_or(255)
    }

    /// The path of an open descriptor.
    pub fn path_of(&self, descriptor: u64) -> Option<String> {
        let link = std::fs::read_link(format!("/proc/{}/fd/{descriptor}", self.pid)).ok()?;
        link.to_str().map(str::to_owned)
    }

    /// The text at an address of the program.
    pub fn text(&self, address: u64) -> Option<String> {
        let mut bytes = vec![0; 4096];
        let read = File::open(format!("/proc/{}/mem", self.pid)).ok()?.read_at(&mut bytes, address).ok()?;
        let text = bytes.get(..read)?.split(|&byte| byte == 0).next()?;
        String::from_utf8(text.to_vec()).ok()
    }
}
