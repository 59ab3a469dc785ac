//! The last message of a process that makes a system call which its filter does not allow.
//!
//! The kernel raises `SIGSYS` instead of doing the call. The handler names the call, and the plugin that made it if one
//! is being called, in one line on standard error, and ends the process with status 1. The filter lets nobody replace
//! the handler or block the signal.

use super::call_names::call_name;
use super::signal_mask;
use instar_guest_abi::ErrorCode;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::sync::Once;

/// `si_code` of a signal that a seccomp filter raised (`SYS_SECCOMP` of `asm-generic/siginfo.h`).
const BY_FILTER: libc::c_int = 1;
/// Longest name of a plugin, in bytes.
const MAX_NAME: usize = 32;

/// Name of the plugin that is being called, up to the first zero byte.
static PLUGIN: [AtomicU8; MAX_NAME] = [const { AtomicU8::new(0) }; MAX_NAME];
/// Errors are JSON objects.
static AS_JSON: AtomicBool = AtomicBool::new(false);

/// Report as a JSON object on standard error from now on.
pub fn report_as_json() {
    AS_JSON.store(true, Ordering::Relaxed);
}

/// A guard that marks a call into a plugin for its lifetime.
#[derive(Debug)]
#[must_use]
pub struct Calling(());

impl Calling {
    /// Mark the plugin with this name as called.
    pub fn plugin(name: &str) -> Self {
        name_plugin(name.as_bytes());
        Self(())
    }
}

impl Drop for Calling {
    fn drop(&mut self) {
        name_plugin(&[]);
    }
}

fn name_plugin(name: &[u8]) {
    for (index, byte) in PLUGIN.iter().enumerate() {
        byte.store(name.get(index).copied().unwrap_or(0), Ordering::Relaxed);
    }
}

/// What the kernel says of a call that a filter stopped: the head of `siginfo_t`, and its variant `_sigsys`.
#[repr(C)]
struct Stopped {
    signal: libc::c_int,
    errno: libc::c_int,
    code: libc::c_int,
    padding: libc::c_int,
    address: *const libc::c_void,
    call: libc::c_int,
    architecture: libc::c_uint,
}

/// Install the handler, once in the life of a process: a filter does not allow it later. The calling thread takes the signal,
/// even if the parent process blocked it.
pub(super) fn install() {
    static ONCE: Once = Once::new();
    // SAFETY: all-zero is a valid value of the C structure, which lives as long as the calls.
    unsafe {
        let mut signal: libc::sigset_t = std::mem::zeroed();
        libc::sigaddset(&raw mut signal, libc::SIGSYS);
        libc::pthread_sigmask(libc::SIG_UNBLOCK, &raw const signal, std::ptr::null_mut());
    }
    ONCE.call_once(|| {
        // SAFETY: `action` is a valid sigaction; the handler does only what a signal handler may.
        unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction =
                report as extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void) as usize;
            // The signal is blocked in the handler: a call there that is not allowed is the end.
            action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
            libc::sigemptyset(&raw mut action.sa_mask);
            libc::sigaction(libc::SIGSYS, &raw const action, std::ptr::null_mut());
        }
    });
}

extern "C" fn report(_: libc::c_int, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: the kernel passes a `siginfo_t` to a handler that was installed with `SA_SIGINFO`. It is longer than `Stopped`.
    let stopped = unsafe { &*info.cast::<Stopped>() };
    if stopped.code != BY_FILTER {
        // Somebody sent it: it is the end, as without a handler.
        // SAFETY: it sends a signal to this thread.
        unsafe { libc::raise(libc::SIGKILL) };
        return;
    }
    if i64::from(stopped.call) == libc::SYS_rt_sigprocmask {
        // SAFETY: the context is that of this handler, and of this call.
        return unsafe { signal_mask::change(context.cast()) };
    }
    let line = line(stopped.call.into());
    // SAFETY: the line is valid for the call; both calls may be made in a signal handler.
    unsafe {
        libc::write(libc::STDERR_FILENO, line.bytes.as_ptr().cast(), line.length);
        libc::_exit(1);
    }
}

/// Report that memory is exhausted, and end the process with status 1. The runtime's own handler would need more memory, and
/// files.
pub fn end_without_memory(bytes: usize) -> ! {
    let line = line_without_memory(bytes);
    // SAFETY: the line is valid for the call.
    unsafe {
        libc::write(libc::STDERR_FILENO, line.bytes.as_ptr().cast(), line.length);
        libc::_exit(1)
    }
}

fn line_without_memory(bytes: usize) -> Line {
    let as_json = AS_JSON.load(Ordering::Relaxed);
    let code = ErrorCode::ScratchTooSmall;
    let mut line = Line { bytes: [0; 512], length: 0 };
    line.begin(as_json, code);
    line.push(b"out of memory: ");
    line.push_number(bytes as u64);
    line.push(b" bytes are not there; raise the limits of this process (see `ulimit -a`), or free memory");
    if as_json {
        line.push(b"\"}}\n");
    } else {
        line.push(b" (");
        line.push(code.name().as_bytes());
        line.push(b")\n");
    }
    line
}

/// The line about the call with this number.
fn line(number: i64) -> Line {
    let mut name = [0; MAX_NAME];
    for (to, from) in name.iter_mut().zip(&PLUGIN) {
        *to = from.load(Ordering::Relaxed);
    }
    let length = name.iter().position(|&byte| byte == 0).unwrap_or(MAX_NAME);
    let plugin = &name[..length];
    let (as_json, code) = (
        AS_JSON.load(Ordering::Relaxed),
        if plugin.is_empty() { ErrorCode::InternalOverflow } else { ErrorCode::PluginUnavailable },
    );
    let mut line = Line { bytes: [0; 512], length: 0 };
    line.begin(as_json, code);
    if !plugin.is_empty() {
        line.push(b"the ");
        line.push(plugin);
        line.push(b" plugin is faulty: it ");
    }
    line.push(b"made the system call ");
    line.push(call_name(number).unwrap_or("without a name").as_bytes());
    line.push(b" (number ");
    line.push_number(number.unsigned_abs());
    line.push(b"), which is not allowed once images are looked at");
    line.push(if plugin.is_empty() { b"; please report this" } else { b": report this to the plugin's author" });
    line.push(if as_json { b"\"}}\n" } else { b"\n" });
    line
}

/// A line that is put together without allocating.
struct Line {
    bytes: [u8; 512],
    length: usize,
}

impl Line {
    /// What comes before the message.
    fn begin(&mut self, as_json: bool, code: ErrorCode) {
        if as_json {
            self.push(b"{\"error\": {\"code\": ");
            self.push_number(code.number().into());
            self.push(b", \"name\": \"");
            self.push(code.name().as_bytes());
            self.push(b"\", \"message\": \"");
        } else {
            self.push(b"instar: ");
        }
    }

    fn push(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            if let Some(place) = self.bytes.get_mut(self.length) {
                *place = byte;
                self.length += 1;
            }
        }
    }

    fn push_number(&mut self, number: u64) {
        let mut unit = 1;
        while number / unit >= 10 {
            unit *= 10;
        }
        while unit > 0 {
            self.push(&[b'0' + u8::try_from(number / unit % 10).unwrap_or(0)]);
            unit /= 10;
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn text(number: i64) -> String {
        let line = line(number);
        String::from_utf8(line.bytes[..line.length].to_vec()).unwrap()
    }

    #[test]
    fn the_line_names_the_call_and_the_plugin() {
        let own = text(libc::SYS_clone3);
        assert!(own.starts_with("instar: made the system call clone3 (number 435), which is not allowed"), "{own}");
        assert!(own.ends_with("please report this\n"), "{own}");
        {
            let _calling = Calling::plugin("qed");
            let its = text(100_000);
            assert!(its.contains("the qed plugin is faulty: it made the system call without a name (number 100000)"));
            AS_JSON.store(true, Ordering::Relaxed);
            let json: serde_json::Value = serde_json::from_str(&text(0)).unwrap();
            AS_JSON.store(false, Ordering::Relaxed);
            assert_eq!(json["error"]["name"], "ERROR_PLUGIN_UNAVAILABLE");
            assert!(json["error"]["message"].as_str().unwrap().contains("read (number 0)"));
            let without = line_without_memory(7);
            AS_JSON.store(true, Ordering::Relaxed);
            let as_json = line_without_memory(7);
            AS_JSON.store(false, Ordering::Relaxed);
            let said = |line: &Line| String::from_utf8(line.bytes[..line.length].to_vec()).unwrap();
            assert!(said(&without).starts_with("instar: out of memory: 7 bytes"), "{}", said(&without));
            let json: serde_json::Value = serde_json::from_str(&said(&as_json)).unwrap();
            assert_eq!(json["error"]["name"], "ERROR_SCRATCH_TOO_SMALL");
            let longest = Calling::plugin(&"x".repeat(MAX_NAME));
            assert!(text(435).ends_with("author\n"), "the longest name fits");
            drop(longest);
        }
        assert_eq!(text(libc::SYS_clone3), own, "the call is over");
    }
}
