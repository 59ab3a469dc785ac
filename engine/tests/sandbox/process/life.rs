//! The process as others can reach it: killed, stopped, traced, and what is left of it.

use super::code::{failure, ring, run, run_with, told, wait};
use super::inside::{self, Telling};
use instar::sandbox::{Process, Sandbox, SandboxError};
use instar_guest_abi::{ErrorCode, PORT_EXIT};
use std::fs::{read_dir, read_to_string};
use std::time::{Duration, Instant};

fn signal(child: i32, signal: i32) {
    // SAFETY: it sends a signal to our own process.
    assert_eq!(unsafe { libc::kill(child, signal) }, 0);
}

/// What becomes of a guest to which this happens while it is served, and how long that takes.
fn struck(strike: impl FnMut(i32)) -> (Result<(), SandboxError>, Duration) {
    let mut strike = strike;
    let mut host = Telling::new(|child| {
        strike(child);
        0
    });
    let started = Instant::now();
    let result = run_with(&[told(), ring(PORT_EXIT.into(), 0)].concat(), &mut host);
    (result.map(drop), started.elapsed())
}

#[test]
fn the_signal_of_a_fault_that_somebody_sent_is_no_fault() {
    for number in [libc::SIGSEGV, libc::SIGBUS, libc::SIGILL, libc::SIGFPE, libc::SIGTRAP, libc::SIGSYS, libc::SIGXCPU]
    {
        let error = struck(|child| signal(child, number)).0.unwrap_err();
        assert_eq!(error.code(), ErrorCode::SandboxLost, "signal {number}: {error}");
    }
}

#[test]
fn its_last_words_are_heard_though_it_left_an_answer_behind() {
    // It stands still until the host has answered, and dies without having read that.
    let error = struck(|child| {
        signal(child, libc::SIGSTOP);
        signal(child, libc::SIGSYS);
        std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(200));
            signal(child, libc::SIGCONT);
        });
    });
    let error = error.0.unwrap_err();
    assert_eq!(error.code(), ErrorCode::SandboxLost, "{error}");
}

#[test]
fn a_process_that_is_killed_is_told_as_lost() {
    let error = struck(|child| signal(child, libc::SIGKILL)).0.unwrap_err();
    assert_eq!(error.code(), ErrorCode::SandboxLost, "{error}");
    let text = "was ended from outside (signal 9), by another program, or by the kernel for lack of memory";
    assert!(error.to_string().contains(text), "{error}");
    // Those that a process can block are blocked.
    for number in
        [libc::SIGTERM, libc::SIGINT, libc::SIGHUP, libc::SIGALRM, libc::SIGUSR1, libc::SIGTSTP, libc::SIGRTMIN()]
    {
        struck(|child| signal(child, number)).0.unwrap();
    }
}

#[test]
fn a_process_that_is_stopped_is_told_as_lost_and_one_that_goes_on_is_not() {
    let (result, took) = struck(|child| signal(child, libc::SIGSTOP));
    let error = result.unwrap_err();
    assert_eq!(error.code(), ErrorCode::SandboxLost, "{error}");
    assert!(error.to_string().contains("was stopped from outside") && took < Duration::from_secs(20), "{error}");
    struck(|child| {
        signal(child, libc::SIGSTOP);
        signal(child, libc::SIGCONT);
    })
    .0
    .unwrap();
}

#[test]
fn a_process_that_is_traced_does_not_hang_its_host() {
    if !inside::can_look() {
        return;
    }
    // Attaching stops it, and the tracer does not let it continue.
    let (result, took) = struck(|child| {
        // SAFETY: it attaches to our own process.
        assert_eq!(unsafe { libc::ptrace(libc::PTRACE_ATTACH, child, 0, 0) }, 0);
    });
    let error = result.unwrap_err();
    assert!([ErrorCode::SandboxLost, ErrorCode::GuestStalled].contains(&error.code()), "{error}");
    assert!(took < Duration::from_secs(30), "{took:?}");
}

#[test]
fn a_question_where_it_is_that_the_host_did_not_ask_is_the_end() {
    // Any process that may send signals may send this one, and so does the kernel at a limit of processor time
    // (`setrlimit(2)`).
    let error = struck(|child| signal(child, libc::SIGXCPU)).0.unwrap_err();
    assert_eq!(error.code(), ErrorCode::SandboxLost, "{error}");
    assert!(error.to_string().contains("was ended by SIGXCPU"), "{error}");
}

/// The numbers of this thread's descriptors.
fn descriptors() -> Vec<String> {
    let entries = read_dir("/proc/thread-self/fd").unwrap();
    let mut names: Vec<_> = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort_unstable();
    names
}

/// Run this in a thread with descriptors of its own, and see that neither descriptors nor processes nor mappings are left.
pub fn leaving_nothing(body: impl FnOnce() + Send) {
    let body = || {
        // SAFETY: this thread gets a copy of the descriptors.
        assert_eq!(unsafe { libc::unshare(libc::CLONE_FILES) }, 0);
        run(&ring(PORT_EXIT.into(), 0)).unwrap();
        let before = descriptors();
        body();
        assert_eq!(descriptors(), before);
        assert_eq!(read_to_string("/proc/thread-self/children").unwrap(), "");
    };
    std::thread::scope(|scope| scope.spawn(body).join()).unwrap();
}

#[test]
fn nothing_is_left_of_a_guest_however_it_ends() {
    leaving_nothing(|| {
        failure(&[0x0f, 0x0b]);
        failure(&wait());
        struck(|child| signal(child, libc::SIGKILL)).0.unwrap_err();
        struck(|child| signal(child, libc::SIGSTOP)).0.unwrap_err();
        // One that never ran.
        drop(Process.acquire(0).unwrap());
    });
}

#[test]
fn a_guest_does_not_survive_its_host() {
    // A second process becomes the host, and is killed with a guest that loops.
    // SAFETY: the new process only makes a guest, without locks of other threads but the allocator's, which the C library resets,
    // and never returns from here.
    let host = unsafe { libc::fork() };
    if host == 0 {
        let _ = run(&[0xeb, 0xfe]);
        // SAFETY: it ends the process.
        unsafe { libc::_exit(0) }
    }
    let children = format!("/proc/{host}/task/{host}/children");
    let started = Instant::now();
    let guest: i32 = loop {
        assert!(started.elapsed() < Duration::from_secs(20));
        match read_to_string(&children).unwrap().split_whitespace().next() {
            Some(guest) => break guest.parse().unwrap(),
            None => std::thread::sleep(Duration::from_millis(1)),
        }
    };
    signal(host, libc::SIGKILL);
    // SAFETY: our own process.
    unsafe { libc::waitpid(host, std::ptr::null_mut(), 0) };
    let started = Instant::now();
    let state = || read_to_string(format!("/proc/{guest}/stat")).ok().filter(|stat| !stat.contains(") Z "));
    while state().is_some() {
        assert!(started.elapsed() < Duration::from_secs(20), "the guest goes on");
        std::thread::sleep(Duration::from_millis(1));
    }
}
