//! Confinement: what a confined process cannot do, and that a plugin which an image has taken over cannot either.
//!
//! A process cannot be freed again, so that each attempt is made in one of its own: this test program again, with an
//! order in the environment, or `instar` with a plugin that does what its images say.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use instar::confine::{Confinement, Reach, Work};
use instar::plugins::FileImage;
use instar::sandbox::{Sandbox, SandboxChoice};
use instar_test_lab::lab::Lab;
use instar_test_lab::sandbox;
use instar_test_lab::{built, PluginDir};
use seccompiler::{BpfProgram, SeccompAction, SeccompFilter, TargetArch};
use std::ffi::CString;
use std::fs::{self, File, OpenOptions};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::{Command, Output};
use std::ptr::{null, null_mut};

/// The order for the child, and the directory that it may reach.
const ORDER: &str = "INSTAR_TEST_ORDER";
const DIRECTORY: &str = "INSTAR_TEST_DIRECTORY";
/// A status that no errno has: the attempt succeeded.
const DONE: i32 = 200;

/// How an attempt ended.
#[derive(Clone, Debug, PartialEq, Eq)]
enum End {
    Done,
    Errno(i32),
    Killed(i32),
    /// Stopped at this system call, by its name in the one line on standard error.
    Stopped(String),
}

/// Stopped at this call and at no other.
fn stopped(call: &str) -> End {
    End::Stopped(call.to_owned())
}

/// The call that the line about one that is not allowed names.
fn named_call(stderr: &str) -> Option<&str> {
    let (_, rest) = stderr.split_once("made the system call ")?;
    rest.split_once(" (number ").map(|(call, _)| call)
}

/// Make an attempt in a confined process of its own.
fn attempt(order: &str, directory: &Path) -> End {
    let mut child = Command::new(std::env::current_exe().unwrap());
    child.args(["--exact", "child", "--ignored", "--nocapture", "--test-threads=1"]);
    child.env(ORDER, order).env(DIRECTORY, directory).env("RUST_BACKTRACE", "1");
    let output = child.output().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    match (output.status.code(), output.status.signal()) {
        (Some(DONE), _) => End::Done,
        (Some(1), _) if named_call(&stderr).is_some() => stopped(named_call(&stderr).unwrap()),
        (Some(errno), _) => End::Errno(errno),
        (None, signal) => End::Killed(signal.unwrap()),
    }
}

/// Whether this kernel has both: where it does not, there is nothing to test.
fn supported() -> bool {
    let dir = tempfile::tempdir().unwrap();
    let supported = attempt("supported", dir.path()) == End::Done;
    if !supported {
        eprintln!("not tested: this kernel lacks Landlock or seccomp");
    }
    supported
}

/// What the test program does when it is a child: `STEP DEED`.
#[test]
#[ignore = "for the other tests"]
fn child() {
    let Ok(order) = std::env::var(ORDER) else { return };
    let directory = std::path::PathBuf::from(std::env::var_os(DIRECTORY).unwrap());
    let image = directory.join("image");
    // SAFETY: it has no arguments. Later it would be a call that is not allowed, and the test would be of that one.
    let parent = i64::from(unsafe { libc::getppid() });
    if order != "supported" {
        fs::write(&image, [7; 8192]).unwrap();
    }
    let reachable = File::open(&directory).unwrap();
    // As the program does it: a backtrace would open files.
    instar_cli::say_panics();
    let sandbox = sandbox().acquire(0).unwrap();
    let needs = sandbox.needs();
    let confinement = Confinement::begin(Reach::default().add(&reachable, true), Work::OpenToCommit, &needs);
    if order == "supported" {
        end(if confinement.to_string().contains("not in force") { 1 } else { 0 });
    }
    let (step, deed) = order.split_once(' ').unwrap();
    let file = OpenOptions::new().read(true).write(true).open(&image).unwrap();
    if step == "sealed" {
        let _ = confinement.forbid_opening(Reach::default(), Work::Commit, &needs);
    }
    end(act(deed, &directory, &file, parent));
}

/// Without what the harness does at the end.
fn end(errno: i32) -> ! {
    // SAFETY: it ends the process.
    unsafe { libc::_exit(if errno == 0 { DONE } else { errno }) }
}

fn text(path: impl AsRef<Path>) -> CString {
    CString::new(path.as_ref().to_str().unwrap()).unwrap()
}

/// A system call with one or no pointer in its arguments; its errno.
fn call(number: libc::c_long, arguments: [i64; 6]) -> i32 {
    let [a, b, c, d, e, f] = arguments;
    // SAFETY: the callers pass pointers that are valid for the call, or calls that fail.
    let result = unsafe { libc::syscall(number, a, b, c, d, e, f) };
    if result < 0 {
        std::io::Error::last_os_error().raw_os_error().unwrap()
    } else {
        0
    }
}

fn pointer(text: &CString) -> i64 {
    text.as_ptr() as i64
}

fn errno<T>(result: std::io::Result<T>) -> i32 {
    result.map_or_else(|error| error.raw_os_error().unwrap(), |_| 0)
}

/// Do what the order says; errno, or 0.
fn act(deed: &str, directory: &Path, file: &File, parent: i64) -> i32 {
    let inside = text(directory.join("image"));
    let fresh = text(directory.join("fresh"));
    let outside = text("/etc/passwd");
    let open = |path: &CString, flags: i32| {
        call(libc::SYS_openat, [libc::AT_FDCWD.into(), pointer(path), flags.into(), 0o600, 0, 0])
    };
    let map = |protection: i32| {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        call(libc::SYS_mmap, [0, 4096, protection.into(), flags.into(), -1, 0])
    };
    let standard_error = i64::from(libc::STDERR_FILENO);
    let mut byte = [0u8; 1];
    let scratch = byte.as_mut_ptr() as i64;
    match deed {
        "open inside" => open(&inside, libc::O_RDWR),
        "open outside" => open(&outside, libc::O_RDONLY),
        "create" => open(&fresh, libc::O_RDWR | libc::O_CREAT),
        "list" => open(&text(directory), libc::O_RDONLY | libc::O_DIRECTORY),
        "old open" => call(libc::SYS_open, [pointer(&outside), 0, 0, 0, 0, 0]),
        "unlink" => call(libc::SYS_unlink, [pointer(&inside), 0, 0, 0, 0, 0]),
        "rename" => call(libc::SYS_rename, [pointer(&inside), pointer(&fresh), 0, 0, 0, 0]),
        "mkdir" => call(libc::SYS_mkdir, [pointer(&fresh), 0o700, 0, 0, 0, 0]),
        "exec" => {
            let program = text("/bin/true");
            let arguments = [program.as_ptr(), null()];
            call(libc::SYS_execve, [pointer(&program), arguments.as_ptr() as i64, 0, 0, 0, 0])
        }
        "fork" => call(libc::SYS_fork, [0; 6]),
        "thread" => call(libc::SYS_clone3, [0; 6]),
        "socket" => call(libc::SYS_socket, [libc::AF_INET.into(), libc::SOCK_STREAM.into(), 0, 0, 0, 0]),
        "unix socket" => call(libc::SYS_socket, [libc::AF_UNIX.into(), libc::SOCK_STREAM.into(), 0, 0, 0, 0]),
        "connect" => errno(std::net::TcpStream::connect("127.0.0.1:9")),
        "ptrace" => call(libc::SYS_ptrace, [0; 6]),
        "io_uring" => call(libc::SYS_io_uring_setup, [1, 0, 0, 0, 0, 0]),
        "kill parent" => call(libc::SYS_kill, [parent, 0, 0, 0, 0, 0]),
        "signal parent" => call(libc::SYS_tgkill, [parent, parent, 0, 0, 0, 0]),
        "replace the handler" => call(libc::SYS_rt_sigaction, [libc::SIGSYS.into(), 0, 0, 8, 0, 0]),
        "block the signal" => {
            let (all, mut old, mut now) = (u64::MAX, u64::MAX, 0u64);
            let mask = |how: i32, new: *const u64, old: *mut u64| {
                call(libc::SYS_rt_sigprocmask, [how.into(), new as i64, old as i64, 8, 0, 0])
            };
            assert_eq!(mask(libc::SIG_BLOCK, &raw const all, &raw mut old), 0);
            assert_eq!(mask(libc::SIG_SETMASK, null(), &raw mut now), 0);
            // All but this one; two cannot be blocked at all.
            assert_eq!(old, 0);
            assert_eq!(!now, [libc::SIGSYS, libc::SIGKILL, libc::SIGSTOP].iter().map(|s| 1u64 << (s - 1)).sum::<u64>());
            call(libc::SYS_fork, [0; 6])
        }
        "read from standard output" => call(libc::SYS_pread64, [1, scratch, 1, 0, 0, 0]),
        "write into standard output" => call(libc::SYS_pwrite64, [1, scratch, 1, 0, 0, 0]),
        "cut standard output" => call(libc::SYS_ftruncate, [1, 0, 0, 0, 0, 0]),
        "copy from standard output" => call(libc::SYS_copy_file_range, [1, 0, file.as_raw_fd().into(), 0, 1, 0]),
        "copy to standard output" => call(libc::SYS_copy_file_range, [file.as_raw_fd().into(), 0, 1, 0, 1, 0]),
        "map standard output" => call(libc::SYS_mmap, [0, 4096, libc::PROT_READ.into(), libc::MAP_SHARED.into(), 1, 0]),
        "type into the terminal" => {
            #[allow(clippy::cast_possible_wrap)]
            let request = libc::TIOCSTI as i64;
            call(libc::SYS_ioctl, [standard_error, request, 0, 0, 0, 0])
        }
        "a request of KVM that is not used" => {
            // KVM_CREATE_IRQCHIP
            call(libc::SYS_ioctl, [file.as_raw_fd().into(), 0xae60, 0, 0, 0, 0])
        }
        "ask the terminal" => {
            // SAFETY: it only looks at the descriptor.
            unsafe { libc::isatty(libc::STDERR_FILENO) };
            0
        }
        "executable memory" => map(libc::PROT_READ | libc::PROT_EXEC),
        "make memory executable" => {
            // SAFETY: a page of its own is mapped and is not used.
            let page = unsafe {
                let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
                libc::mmap(null_mut(), 4096, libc::PROT_READ, flags, -1, 0)
            };
            call(libc::SYS_mprotect, [page as i64, 4096, i64::from(libc::PROT_READ | libc::PROT_EXEC), 0, 0, 0])
        }
        "memory" => {
            let many: Vec<Vec<u8>> = (0..200).map(|i| vec![1; 1 << (i % 21)]).collect();
            map(libc::PROT_READ | libc::PROT_WRITE) + i32::from(many.iter().any(|v| v[0] != 1))
        }
        "write to a descriptor" => call(libc::SYS_write, [file.as_raw_fd().into(), pointer(&inside), 1, 0, 0, 0]),
        "work" => {
            let mut bytes = [0; 4096];
            let work = file.read_exact_at(&mut bytes, 4096).and_then(|()| file.write_all_at(&bytes, 10_000));
            errno(work.and_then(|()| file.set_len(20_000)).and_then(|()| file.sync_data()))
        }
        "sleep" => {
            std::thread::sleep(std::time::Duration::from_millis(20));
            0
        }
        "interrupt" => {
            // SAFETY: the handler of the C library for nothing; the signal goes to this thread.
            unsafe {
                libc::signal(libc::SIGUSR1, ignore as extern "C" fn(libc::c_int) as usize);
                libc::raise(libc::SIGUSR1);
            }
            0
        }
        "panic" => i32::from(std::panic::catch_unwind(|| panic!("with RUST_BACKTRACE")).is_ok()),
        "abort" => std::process::abort(),
        _ => panic!("{deed}"),
    }
}

extern "C" fn ignore(_: libc::c_int) {}

#[test]
fn while_images_are_opened() {
    if !supported() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let denied = || End::Errno(libc::EACCES);
    for (deed, expected) in [
        ("open inside", End::Done),
        ("open outside", denied()),
        ("old open", denied()),
        ("create", denied()),
        ("list", denied()),
        ("unlink", stopped("unlink")),
        ("rename", stopped("rename")),
        ("mkdir", stopped("mkdir")),
        ("exec", stopped("execve")),
        ("fork", stopped("fork")),
        ("thread", stopped("clone3")),
        ("socket", stopped("socket")),
        ("unix socket", stopped("socket")),
        ("connect", stopped("socket")),
        ("ptrace", stopped("ptrace")),
        ("io_uring", stopped("io_uring_setup")),
        ("kill parent", stopped("kill")),
        ("signal parent", stopped("tgkill")),
        ("executable memory", stopped("mmap")),
        ("make memory executable", stopped("mprotect")),
        ("read from standard output", stopped("pread64")),
        ("map standard output", stopped("mmap")),
        ("replace the handler", stopped("rt_sigaction")),
        ("block the signal", stopped("fork")),
        ("write into standard output", stopped("pwrite64")),
        ("memory", End::Done),
        ("work", End::Done),
        ("panic", End::Done),
        ("abort", End::Killed(libc::SIGABRT)),
    ] {
        assert_eq!(attempt(&format!("opening {deed}"), dir.path()), expected, "{deed}");
    }
    assert!(!dir.path().join("fresh").exists());
}

#[test]
fn once_the_chain_is_open() {
    if !supported() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    for (deed, expected) in [
        ("open inside", stopped("openat")),
        ("open outside", stopped("openat")),
        ("old open", stopped("open")),
        ("create", stopped("openat")),
        ("unlink", stopped("unlink")),
        ("rename", stopped("rename")),
        ("exec", stopped("execve")),
        ("fork", stopped("fork")),
        ("thread", stopped("clone3")),
        ("socket", stopped("socket")),
        ("unix socket", stopped("socket")),
        ("connect", stopped("socket")),
        ("kill parent", stopped("kill")),
        ("signal parent", stopped("tgkill")),
        ("type into the terminal", stopped("ioctl")),
        ("a request of KVM that is not used", stopped("ioctl")),
        ("executable memory", stopped("mmap")),
        ("make memory executable", stopped("mprotect")),
        ("write to a descriptor", stopped("write")),
        ("read from standard output", stopped("pread64")),
        ("map standard output", stopped("mmap")),
        ("replace the handler", stopped("rt_sigaction")),
        ("block the signal", stopped("fork")),
        ("write into standard output", stopped("pwrite64")),
        ("cut standard output", stopped("ftruncate")),
        ("copy from standard output", stopped("copy_file_range")),
        ("copy to standard output", stopped("copy_file_range")),
        ("ask the terminal", End::Done),
        ("memory", End::Done),
        ("work", End::Done),
        ("sleep", End::Done),
        ("interrupt", End::Done),
        ("panic", End::Done),
        ("abort", End::Killed(libc::SIGABRT)),
    ] {
        assert_eq!(attempt(&format!("sealed {deed}"), dir.path()), expected, "{deed}");
    }
    assert!(!dir.path().join("fresh").exists());
}

/// A directory of images for the hostile plugin, and another one that is none of its business.
struct Target {
    lab: Lab,
    outside: tempfile::TempDir,
    plugins: PluginDir,
}

impl Target {
    fn new() -> Self {
        let (lab, outside, plugins) = (Lab::new(), tempfile::tempdir().unwrap(), PluginDir::new());
        plugins.copy("hostile", &built("instar_test_plugin_hostile"));
        plugins.copy("qcow2", &instar_test_lab::qcow2_library());
        lab.create("base", None, 1 << 20);
        fs::write(lab.path("precious"), "precious").unwrap();
        fs::write(outside.path().join("precious"), "precious").unwrap();
        Self { lab, outside, plugins }
    }

    /// Let `instar` look at an image that gives this order; nothing may come of it.
    fn run(&self, command: &[&str], when: &str, deed: &str, path: &Path) -> Output {
        let image = self.lab.path("image");
        fs::write(&image, format!("HOSTILE {when} {deed} {}\n", path.display())).unwrap();
        let before = self.lab.files();
        let (name, options) = command.split_first().unwrap();
        let mut instar = instar_test_lab::instar(name);
        instar.args(options).arg("--plugin-dir").arg(self.plugins.path()).arg(&image);
        let output = instar.output().unwrap();
        assert!(self.lab.files() == before, "{command:?} {when} {deed}: files were changed");
        let outside: Vec<_> = fs::read_dir(self.outside.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
        assert_eq!(outside, ["precious"], "{command:?} {when} {deed}");
        assert_eq!(fs::read(self.outside.path().join("precious")).unwrap(), b"precious");
        output
    }

    /// The plugin was told by the kernel that it may not, and the program goes on to say so.
    fn denied(&self, command: &[&str], when: &str, deed: &str, path: &Path) {
        let output = self.run(command, when, deed, path);
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{command:?} {when} {deed}: {stderr}");
        assert!(stderr.contains(&format!("{deed} failed: Permission denied")), "{command:?} {when} {deed}: {stderr}");
    }

    /// The process ended at the attempt, at the system call that this deed needs, and said so in one line.
    fn stopped(&self, command: &[&str], when: &str, deed: &str, path: &Path) {
        let output = self.run(command, when, deed, path);
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{command:?} {when} {deed}: {stderr}");
        let call = match deed {
            "read" | "write" | "append" => "openat",
            "remove" => "unlink",
            "exec" => "execve",
            "spawn" => "clone3",
            "thread" => "clone3",
            "tcp" | "udp" => "socket",
            deed => deed,
        };
        let line = format!("instar: the hostile plugin is faulty: it made the system call {call} (number ");
        assert!(stderr.starts_with(&line) && stderr.lines().count() == 1, "{command:?} {when} {deed}: {stderr}");
    }
}

#[test]
fn a_hostile_plugin_is_stopped() {
    if !supported() {
        return;
    }
    let target = Target::new();
    let (passwd, precious) = (Path::new("/etc/passwd"), target.outside.path().join("precious"));
    let (beside, fresh) = (target.lab.path("precious"), target.lab.path("fresh"));
    let elsewhere = target.outside.path().join("fresh");
    for when in ["probe", "facts"] {
        for (deed, path) in [
            ("read", passwd),
            ("read", &precious),
            ("append", &precious),
            ("write", &elsewhere),
            ("write", &fresh),
            ("list", target.outside.path()),
        ] {
            target.denied(&["commit"], when, deed, path);
        }
        // The backing may be any file of the overlay's directory, and so may the other files of an image.
        for command in [&["commit"][..], &["commit", "-b", "base"]] {
            let output = target.run(command, when, "append", &beside);
            assert!(String::from_utf8_lossy(&output.stderr).contains("append succeeded"), "{output:?}");
            for deed in ["read", "append"] {
                target.denied(command, when, deed, &precious);
            }
        }
        for deed in ["remove", "rename"] {
            target.stopped(&["commit"], when, deed, &beside);
        }
        for deed in ["exec", "spawn", "thread", "tcp", "udp"] {
            target.stopped(&["commit"], when, deed, &elsewhere);
            target.stopped(&["info"], when, deed, &elsewhere);
        }
        // Of `info`, the image is all that is open, and nothing else will be.
        for deed in ["read", "write", "append"] {
            target.stopped(&["info"], when, deed, &precious);
        }
    }
    for deed in ["read", "write", "append", "exec", "spawn", "tcp", "remove"] {
        target.stopped(&["commit"], "verdict", deed, &precious);
    }
}

/// What the caller has open is no business of a process that an image has taken over.
#[test]
fn descriptors_of_the_caller_are_closed() {
    let target = Target::new();
    let (image, secret) = (target.lab.path("image"), target.outside.path().join("precious"));
    let look = |number: i32, image_name: &Path, without: &[i64]| {
        fs::write(&image, format!("HOSTILE probe descriptor {number}\n")).unwrap();
        let file = File::open(&secret).unwrap();
        let inherited = file.as_raw_fd();
        let rules = without.iter().map(|&call| (call, Vec::new())).collect();
        let missing = SeccompAction::Errno(libc::ENOSYS.cast_unsigned());
        let filter = SeccompFilter::new(rules, SeccompAction::Allow, missing, TargetArch::x86_64).unwrap();
        let program: BpfProgram = filter.try_into().unwrap();
        let mut instar = instar_test_lab::instar("info");
        instar.arg("--plugin-dir").arg(target.plugins.path()).arg(image_name);
        // SAFETY: system calls only, on what was made before.
        unsafe {
            instar.pre_exec(move || {
                for to in [77, 1234] {
                    if libc::dup2(inherited, to) < 0 {
                        return Err(std::io::Error::last_os_error());
                    }
                }
                seccompiler::apply_filter(&program).map_err(std::io::Error::other)
            });
        }
        let output = instar.stdin(File::open(&secret).unwrap()).output().unwrap();
        String::from_utf8_lossy(&output.stderr).into_owned()
    };
    for without in [&[][..], &[libc::SYS_close_range]] {
        for number in [77, 1234] {
            let said = look(number, &image, without);
            assert!(said.contains("descriptor failed: Bad file descriptor"), "{number} {without:?}: {said}");
        }
    }
    // One that the command line names is handed over, and only that one.
    let named = Path::new("/dev/fd/77");
    fs::write(&secret, "HOSTILE probe descriptor 77\n").unwrap();
    assert!(look(77, named, &[]).contains("descriptor succeeded"));
    fs::write(&secret, "HOSTILE probe descriptor 1234\n").unwrap();
    assert!(look(1234, named, &[]).contains("descriptor failed: Bad file descriptor"));
    if supported() {
        for number in [0, 1, 2] {
            let said = look(number, &image, &[]);
            assert_eq!(named_call(&said), Some("pread64"), "{said}");
        }
    }
}

/// The test above proves nothing if the plugin does not do what it is told where nobody stops it.
#[test]
fn the_hostile_plugin_does_what_it_is_told() {
    let dir = tempfile::tempdir().unwrap();
    let plugins = PluginDir::new();
    plugins.copy("hostile", &built("instar_test_plugin_hostile"));
    let registry = plugins.load();
    let (image, victim) = (dir.path().join("image"), dir.path().join("victim"));
    for when in ["probe", "facts"] {
        for deed in ["write", "read", "append", "udp", "rename"] {
            fs::write(&image, format!("HOSTILE {when} {deed} {}", victim.display())).unwrap();
            let file = FileImage::new(File::open(&image).unwrap()).unwrap();
            let error = registry.identify(&file, Some("hostile")).unwrap_err().to_string();
            assert!(error.contains(&format!("{deed} succeeded")), "{error}");
        }
        assert!(!victim.exists() && dir.path().join("victim.renamed").exists());
    }
}

/// `create` looks at a backing in a thread that can open nothing, and still writes its file.
#[test]
fn creating_over_a_hostile_backing() {
    if !supported() {
        return;
    }
    let target = Target::new();
    let backing = target.lab.path("backing");
    let passwd = "/etc/passwd";
    fs::write(&backing, format!("HOSTILE facts read {passwd}\n")).unwrap();
    let create = |name: &str, backing: &str, format: &str| {
        let mut instar = instar_test_lab::instar("create");
        instar.args(["-f", "qcow2", "-b", backing, "-F", format]);
        instar.arg("--plugin-dir").arg(target.plugins.path()).arg(target.lab.path(name)).output().unwrap()
    };
    let output = create("new", "backing", "hostile");
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    assert_eq!(named_call(&String::from_utf8_lossy(&output.stderr)), Some("openat"), "{output:?}");
    assert!(!target.lab.path("new").exists());
    let output = create("new", "base", "qcow2");
    assert!(output.status.success(), "{output:?}");
    target.lab.qemu_img(&["check", "-q", target.lab.path("new").to_str().unwrap()]);
}

#[test]
fn verbose_says_what_is_in_force() {
    let lab = Lab::pair();
    let outcome = lab.committed(&["-v", "top"], "top", "base");
    let lines: Vec<&str> = outcome.stderr.lines().filter(|line| line.starts_with("instar: confinement")).collect();
    assert_eq!(lines.len(), 2, "{}", outcome.stderr);
    if supported() {
        for line in lines {
            assert!(line.contains("Landlock ABI ") && line.contains("paths"), "{line}");
            assert!(line.contains("seccomp: ") && line.ends_with(" system calls"), "{line}");
        }
    }
    // Also of a commit that is refused later.
    let refused = lab.instar(&["-v", "absent"]);
    assert!(refused.stderr.contains("instar: confinement: "), "{}", refused.stderr);
}

/// What a kernel without these system calls would do: `ENOSYS`. A container may do the same.
fn without(calls: &[i64], lab: &Lab) -> Output {
    let rules = calls.iter().map(|&call| (call, Vec::new())).collect();
    let missing = SeccompAction::Errno(libc::ENOSYS.cast_unsigned());
    let filter = SeccompFilter::new(rules, SeccompAction::Allow, missing, TargetArch::x86_64).unwrap();
    let program: BpfProgram = filter.try_into().unwrap();
    let mut instar = instar_test_lab::instar("commit");
    instar.args(["-v", "--plugin-dir"]).arg(lab.plugins().path());
    let confine = move || seccompiler::apply_filter(&program).map_err(std::io::Error::other);
    // SAFETY: two system calls on memory that was allocated before.
    unsafe { instar.pre_exec(confine) };
    instar.arg(lab.path("top")).output().unwrap()
}

#[test]
fn a_kernel_that_lacks_something_is_no_obstacle() {
    const PATHS: &str = "Landlock is not in force";
    const CALLS: &str = "seccomp is not in force";
    for (calls, missing, there) in [
        (&[libc::SYS_landlock_create_ruleset][..], &[PATHS][..], &[CALLS][..]),
        (&[libc::SYS_seccomp], &[CALLS], &[PATHS]),
        (&[libc::SYS_seccomp, libc::SYS_landlock_create_ruleset], &[PATHS, CALLS], &[]),
    ] {
        let lab = Lab::pair();
        let output = without(calls, &lab);
        let stderr = String::from_utf8_lossy(&output.stderr);
        if sandbox() == SandboxChoice::Process && calls.contains(&libc::SYS_seccomp) {
            // It is all that keeps the guest of such a sandbox in.
            assert_eq!(output.status.code(), Some(1), "{calls:?}: {stderr}");
            assert!(stderr.ends_with("(ERROR_SANDBOX_UNUSABLE)\n"), "{calls:?}: {stderr}");
            continue;
        }
        assert!(output.status.success(), "{calls:?}: {stderr}");
        let lines: Vec<&str> = stderr.lines().filter(|line| line.starts_with("instar: confinement")).collect();
        assert_eq!(lines.len(), 2, "{stderr}");
        for line in lines {
            assert!(missing.iter().all(|part| line.contains(part)), "{line}");
            assert!(!supported() || !there.iter().any(|part| line.contains(part)), "{line}");
        }
    }
}
