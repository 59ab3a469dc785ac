//! The process that the guest runs in, as its host sees it.

use super::memory_files::{above_the_first, guest, program};
use super::spawn::spawn;
use super::unusable;
use crate::sandbox::error::SandboxError;
use crate::sandbox::memory::GuestRam;
use instar_guest_abi::MAX_WORKERS;
use instar_guest_starter::{Ring, ANSWER_SIZE, DOORBELL, MEMORY, RING_SIZE, TEXT};
use rustix::io::Errno;
use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::ptr::null_mut;
use std::time::{Duration, Instant};

/// How long the host waits for a ring before it looks whether the guest is to be ended.
pub const TICK: Duration = Duration::from_millis(100);
/// For how many ticks a process that was killed is waited for.
const ENDING_TICKS: u32 = 10;
/// How long the process may stand still because somebody stopped it: a stop of both is followed by a continuation of both.
const STOPPED_MAX: Duration = Duration::from_secs(1);

/// A process that waits to become a guest, or is one.
pub struct Child {
    /// Its number: it is ours to wait for, so no other process gets that number.
    pub(super) process: libc::pid_t,
    /// Whether it is still to be waited for.
    running: bool,
    /// Our end of the doorbell.
    pub(super) bell: OwnedFd,
    /// Its clock of processor time.
    clock: libc::clockid_t,
    stopped: Option<Instant>,
}

/// A guest that waits for its program: a process for each of its processors, and the memory that they share.
pub struct Guests {
    /// The main processor.
    pub(super) child: Child,
    /// The others.
    pub(super) workers: Vec<Child>,
    /// What will be the guest's memory, and its text.
    pub(super) memory: File,
    pub(super) text: File,
    /// The memory, mapped.
    pub(super) ram: GuestRam,
    pub(super) time_create: Duration,
}

impl Guests {
    /// Start them, with this number of workers, as far as the system lets them be started.
    ///
    /// # Errors
    /// [`SandboxError::ProcessUnusable`].
    pub fn start(starter: &[u8], workers: usize) -> Result<Self, SandboxError> {
        let started = Instant::now();
        let (memory, text) = (guest(c"instar-guest-memory")?, guest(c"instar-guest-text")?);
        let program = program(c"instar-guest", starter)?;
        let file = memory.try_clone().and_then(GuestRam::of_file);
        let ram = file.map_err(|error| unusable("mapping the guest's memory", error.raw_os_error().unwrap_or(0)))?;
        let child = Child::start(&program, &memory, &text)?;
        let another = || Child::start(&program, &memory, &text).ok();
        let workers = (0..workers.min(MAX_WORKERS)).map_while(|_| another()).collect();
        Ok(Self { child, workers, memory, text, ram, time_create: started.elapsed() })
    }
}

impl Child {
    /// Start it, with this memory and text.
    fn start(program: &File, memory: &File, text: &File) -> Result<Self, SandboxError> {
        let failed = |what: &'static str| move |error: Errno| unusable(what, error.raw_os_error());
        let (bell, theirs) = doorbell().map_err(failed("socketpair"))?;
        let handed = [(memory.as_fd(), MEMORY), (theirs.as_fd(), DOORBELL), (text.as_fd(), TEXT)];
        let process = spawn(program, c"instar-guest", &handed).map_err(failed("starting a process"))?;
        let mut clock = 0;
        // SAFETY: the clock is writable.
        let no_clock = unsafe { libc::clock_getcpuclockid(process, &raw mut clock) };
        let child = Self { process, running: true, bell, clock, stopped: None };
        if no_clock == 0 {
            Ok(child)
        } else {
            Err(unusable("clock_getcpuclockid", no_clock))
        }
    }

    /// The ring that has come already, if one has.
    ///
    /// # Errors
    /// As [`wait`](Self::wait).
    pub fn poll(&mut self) -> Result<Option<Ring>, SandboxError> {
        self.take(libc::MSG_DONTWAIT)
    }

    /// Wait for a ring, for a tick at most; `None` if there is none.
    ///
    /// # Errors
    /// The process is gone, or what it rang is no ring.
    pub fn wait(&mut self) -> Result<Option<Ring>, SandboxError> {
        self.take(0)
    }

    fn take(&mut self, flags: libc::c_int) -> Result<Option<Ring>, SandboxError> {
        let mut bytes = [0; RING_SIZE];
        let mut received = self.receive(&mut bytes, flags);
        if received == Err(Errno::CONNRESET) {
            // It left an answer behind that it had not read (`unix_release_sock`, `net/unix/af_unix.c`). The kernel tells that
            // once, and before what was rung last, such as the report of a fault that came while it was served.
            received = self.receive(&mut bytes, flags);
        }
        match received {
            Ok(0) | Err(Errno::CONNRESET) => Err(self.end()),
            Ok(RING_SIZE) => {
                self.stopped = None;
                Ok(Some(Ring::from_bytes(bytes)))
            }
            Ok(length) => Err(SandboxError::protocol(format!("a ring of {length} bytes"))),
            Err(Errno::AGAIN | Errno::INTR) => Ok(None),
            Err(error) => Err(unusable("reading the doorbell", error.raw_os_error())),
        }
    }

    fn receive(&self, bytes: &mut [u8; RING_SIZE], flags: libc::c_int) -> Result<usize, Errno> {
        // SAFETY: the buffer is valid for the call.
        let received = unsafe { libc::recv(self.bell.as_raw_fd(), bytes.as_mut_ptr().cast(), RING_SIZE, flags) };
        usize::try_from(received).map_err(|_| last_errno())
    }

    /// Let it go on after a ring: the starter as the processor with this number.
    ///
    /// # Errors
    /// It takes no answers. Whether it is gone, and why, the next wait says: its last words may not have been read yet.
    pub fn answer(&mut self, answer: u8) -> Result<(), SandboxError> {
        loop {
            let answer = [answer; ANSWER_SIZE];
            // SAFETY: the buffer is valid for the call. A `write` would raise a signal where the other end is gone.
            let sent =
                unsafe { libc::send(self.bell.as_raw_fd(), answer.as_ptr().cast(), ANSWER_SIZE, libc::MSG_NOSIGNAL) };
            if sent >= 0 {
                return Ok(());
            }
            match last_errno() {
                Errno::INTR => {}
                Errno::AGAIN => return Err(SandboxError::protocol("the guest rings, and takes no answers")),
                Errno::PIPE | Errno::CONNRESET => return Ok(()),
                error => return Err(unusable("answering the doorbell", error.raw_os_error())),
            }
        }
    }

    /// Its processor time, as far as it is known.
    pub fn used(&self) -> Option<Duration> {
        let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
        // SAFETY: the time is writable.
        if unsafe { libc::clock_gettime(self.clock, &raw mut time) } != 0 {
            return None;
        }
        Some(Duration::new(u64::try_from(time.tv_sec).ok()?, u32::try_from(time.tv_nsec).ok()?))
    }

    /// Whether it stands still because somebody stopped it, for longer than a moment.
    pub fn is_stopped(&mut self) -> bool {
        let mut status = 0;
        // SAFETY: the status is writable.
        let changed =
            unsafe { libc::waitpid(self.process, &raw mut status, libc::WNOHANG | libc::WUNTRACED | libc::WCONTINUED) };
        if changed == self.process {
            if libc::WIFSTOPPED(status) {
                self.stopped = Some(Instant::now());
            } else if libc::WIFCONTINUED(status) {
                self.stopped = None;
            } else {
                // It has ended meanwhile: the doorbell says so as well.
                self.running = false;
            }
        }
        self.stopped.is_some_and(|since| since.elapsed() > STOPPED_MAX)
    }

    /// Ask it where it is: it rings on the fault port, and ends.
    pub fn ask_for_position(&self) {
        if self.running {
            // SAFETY: it sends a signal to our own process.
            unsafe { libc::kill(self.process, libc::SIGXCPU) };
        }
    }

    /// Whether a process that was killed ends, which the doorbell says. One that is frozen does not.
    fn ends(&self) -> bool {
        let (mut bytes, mut ticks) = ([0; RING_SIZE], 0);
        while ticks < ENDING_TICKS {
            match rustix::io::read(&self.bell, &mut bytes) {
                Ok(0) | Err(Errno::CONNRESET) => return true,
                // What it rang before.
                Ok(_) | Err(Errno::INTR) => {}
                Err(_) => ticks += 1,
            }
        }
        false
    }

    /// It does not ring any more: why it is gone.
    fn end(&mut self) -> SandboxError {
        let mut status = 0;
        // SAFETY: the status is writable.
        let known = self.running && unsafe { libc::waitpid(self.process, &raw mut status, 0) } == self.process;
        self.running = false;
        if !known {
            return SandboxError::ProcessLost("has ended".to_owned());
        }
        if libc::WIFSIGNALED(status) {
            let signal = libc::WTERMSIG(status);
            return match fault_name(signal) {
                Some(name) => SandboxError::protocol(format!("its process ended by {name} (signal {signal})")),
                None => SandboxError::ProcessLost(format!("was ended from outside (signal {signal}){}", why(signal))),
            };
        }
        SandboxError::protocol(format!("its process ended with status {}", libc::WEXITSTATUS(status)))
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        // SAFETY: our own process. Where this process ignores its children, nobody has to wait for them, and one that is gone
        // may have lost its number to another one: it is not there to wait for. One that may not be killed, by a container's list
        // of system calls, waits for an answer, and ends when the doorbell is closed.
        unsafe {
            if self.running
                && libc::waitpid(self.process, null_mut(), libc::WNOHANG) == 0
                && libc::kill(self.process, libc::SIGKILL) == 0
                && self.ends()
            {
                libc::waitpid(self.process, null_mut(), 0);
            }
        }
    }
}

/// The signals that a guest can raise itself.
const fn fault_name(signal: i32) -> Option<&'static str> {
    Some(match signal {
        libc::SIGILL => "an invalid instruction",
        libc::SIGTRAP => "a trap",
        libc::SIGBUS => "a bus error",
        libc::SIGFPE => "an arithmetic error",
        libc::SIGSEGV => "a memory fault",
        libc::SIGSYS => "a system call",
        _ => return None,
    })
}

/// Who may have sent it.
const fn why(signal: i32) -> &'static str {
    if signal == libc::SIGKILL {
        ", by another program, or by the kernel for lack of memory"
    } else {
        ""
    }
}

fn last_errno() -> Errno {
    Errno::from_raw_os_error(std::io::Error::last_os_error().raw_os_error().unwrap_or(libc::EIO))
}

/// The two ends of a doorbell: ours, which waits a tick for a ring, and for an answer to be taken, and the guest's.
fn doorbell() -> Result<(OwnedFd, OwnedFd), Errno> {
    let mut ends = [0; 2];
    // SAFETY: there is room for two descriptors, which nobody else owns.
    let (ours, theirs) = unsafe {
        if libc::socketpair(libc::AF_UNIX, libc::SOCK_SEQPACKET | libc::SOCK_CLOEXEC, 0, ends.as_mut_ptr()) != 0 {
            return Err(last_errno());
        }
        (OwnedFd::from_raw_fd(ends[0]), OwnedFd::from_raw_fd(ends[1]))
    };
    let tick = libc::timeval { tv_sec: 0, tv_usec: libc::suseconds_t::from(TICK.subsec_micros()) };
    for option in [libc::SO_RCVTIMEO, libc::SO_SNDTIMEO] {
        #[allow(clippy::cast_possible_truncation, reason = "16 bytes")]
        let size = size_of::<libc::timeval>() as libc::socklen_t;
        // SAFETY: the value is valid for the call.
        let set =
            unsafe { libc::setsockopt(ours.as_raw_fd(), libc::SOL_SOCKET, option, (&raw const tick).cast(), size) };
        if set != 0 {
            return Err(last_errno());
        }
    }
    Ok((ours, above_the_first(theirs)?))
}
