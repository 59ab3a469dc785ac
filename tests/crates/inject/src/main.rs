//! `instar-test-inject FAULT NTH CALL FILE… -- PROGRAM ARGUMENT…`: run a program, and do something to the NTH call (from 1 on)
//! of a system call that names one of the files, by descriptor or by name. A directory among the files stands for itself and for
//! whatever is open in it, with a name or without. FAULT is an errno (`EIO`, `ENOSPC`, `EINTR`), with which it fails without being
//! done; `SHORT`, by which it is asked to move half as much; `KILL`, which ends the program before it; `FLIP@OFFSET`, by which
//! all bits of a byte of the second file are changed on its disk before it; `REPLACE`, before which the second file takes the name
//! of the first; `KILL-UNFLUSHED`, as `KILL`, and until then flushes of the second file are skipped and said to be
//! done; `KILL-UNNAMED`, the same of files without a name; or
//! `COUNT`, which does nothing. The exit status is the program's, 137 after `KILL`; the last line on
//! standard error tells what came of it: `inject: COUNT of CALL` for every call that was seen, and whether the fault was
//! injected.
//!
//! It traces, as a debugger does. `strace -e inject=` cannot do this to a confined program: it replaces the call by one that
//! no seccomp filter knows. Here it becomes `getpid`, which all of them know.

mod trace;

use std::collections::BTreeMap;
use std::os::unix::fs::FileExt;
use std::process::ExitCode;
use trace::{Call, Tracee};

/// The calls that are looked at: their number, their name, which of their arguments are descriptors, and which one says how
/// much is to be moved. One with a path has its index in place of a descriptor.
pub struct Known {
    number: i64,
    name: &'static str,
    descriptors: &'static [usize],
    path: Option<usize>,
    length: Option<Length>,
}

/// How a call says how much is to be moved.
#[derive(Clone, Copy)]
pub enum Length {
    /// In bytes, in this argument.
    Bytes(usize),
    /// As the number of buffers, in this argument.
    Buffers(usize),
}

const fn by_descriptor(number: i64, name: &'static str, length: Option<Length>) -> Known {
    Known { number, name, descriptors: &[0], path: None, length }
}

const KNOWN: &[Known] = &[
    Known { number: libc::SYS_openat, name: "openat", descriptors: &[], path: Some(1), length: None },
    Known { number: libc::SYS_open, name: "open", descriptors: &[], path: Some(0), length: None },
    by_descriptor(libc::SYS_pread64, "pread64", Some(Length::Bytes(2))),
    by_descriptor(libc::SYS_preadv, "preadv", Some(Length::Buffers(2))),
    by_descriptor(libc::SYS_pwrite64, "pwrite64", Some(Length::Bytes(2))),
    by_descriptor(libc::SYS_pwritev, "pwritev", Some(Length::Buffers(2))),
    by_descriptor(libc::SYS_lseek, "lseek", None),
    by_descriptor(libc::SYS_fstat, "fstat", None),
    by_descriptor(libc::SYS_fcntl, "fcntl", None),
    by_descriptor(libc::SYS_fallocate, "fallocate", None),
    by_descriptor(libc::SYS_ftruncate, "ftruncate", None),
    by_descriptor(libc::SYS_fdatasync, "fdatasync", None),
    by_descriptor(libc::SYS_fsync, "fsync", None),
    by_descriptor(libc::SYS_fadvise64, "fadvise64", None),
    // Marks of a file
    by_descriptor(libc::SYS_fsetxattr, "fsetxattr", None),
    by_descriptor(libc::SYS_fremovexattr, "fremovexattr", None),
    // Names, by the directory that they are made or removed in
    Known { number: libc::SYS_linkat, name: "linkat", descriptors: &[2], path: None, length: None },
    by_descriptor(libc::SYS_renameat, "renameat", None),
    by_descriptor(libc::SYS_renameat2, "renameat2", None),
    Known { number: libc::SYS_unlinkat, name: "unlinkat", descriptors: &[0], path: Some(1), length: None },
    // Of an image: sharing extents
    by_descriptor(libc::SYS_ioctl, "ioctl", None),
    by_descriptor(libc::SYS_sync_file_range, "sync_file_range", None),
    Known {
        number: libc::SYS_copy_file_range,
        name: "copy_file_range",
        descriptors: &[0, 2],
        path: None,
        length: Some(Length::Bytes(4)),
    },
];

/// What is to be done to a call.
#[derive(Clone, Copy)]
enum Fault {
    Nothing,
    Fail(i32),
    Short,
    Kill,
    KillUnflushed,
    Flip(u64),
    Replace,
    KillUnnamed,
}

fn fault(name: &str) -> Option<Fault> {
    Some(match name {
        "COUNT" => Fault::Nothing,
        "EIO" => Fault::Fail(libc::EIO),
        "ENOSPC" => Fault::Fail(libc::ENOSPC),
        "EINTR" => Fault::Fail(libc::EINTR),
        "SHORT" => Fault::Short,
        "KILL" => Fault::Kill,
        "REPLACE" => Fault::Replace,
        "KILL-UNFLUSHED" => Fault::KillUnflushed,
        "KILL-UNNAMED" => Fault::KillUnnamed,
        _ => Fault::Flip(name.strip_prefix("FLIP@")?.parse().ok()?),
    })
}

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let mut parts = arguments.splitn(2, |argument| argument == "--");
    let (options, program) = (parts.next().unwrap_or_default(), parts.next().unwrap_or_default());
    let [fault_name, nth, name, files @ ..] = options else { return usage() };
    let (Some(fault), Ok(nth), [program, arguments @ ..]) = (fault(fault_name), nth.parse::<u64>(), program) else {
        return usage();
    };
    let files: Vec<String> =
        files.iter().filter_map(|file| Some(std::fs::canonicalize(file).ok()?.to_str()?.to_owned())).collect();
    match run(fault, nth, name, &files, program, arguments) {
        Ok(status) => ExitCode::from(status),
        Err(error) => {
            eprintln!("inject: {error}");
            ExitCode::from(125)
        }
    }
}

fn usage() -> ExitCode {
    eprintln!("usage: instar-test-inject FAULT NTH CALL FILE… -- PROGRAM ARGUMENT…");
    ExitCode::from(125)
}

/// Run the program to its end; its exit status.
fn run(
    fault: Fault,
    nth: u64,
    name: &str,
    files: &[String],
    program: &str,
    arguments: &[String],
) -> std::io::Result<u8> {
    let mut tracee = Tracee::start(program, arguments)?;
    let mut counts: BTreeMap<&str, u64> = BTreeMap::new();
    let mut injected = false;
    let status = loop {
        let Some(mut call) = tracee.next_call()? else { break tracee.status() };
        let known = KNOWN.iter().find(|known| known.number == call.number());
        let Some(known) = known.filter(|known| touches(&tracee, &call, known, files)) else {
            tracee.go_on(None)?;
            continue;
        };
        let count = counts.entry(known.name).or_default();
        *count += 1;
        if known.name != name || *count != nth {
            let flushes = matches!(known.name, "fdatasync" | "fsync");
            let skipped = match fault {
                Fault::KillUnflushed => files.get(1..2).is_some_and(|second| touches(&tracee, &call, known, second)),
                // They have a number in place of a name (`#123`), also once they have got one.
                Fault::KillUnnamed => tracee.path_of(call.argument(0)).is_some_and(|path| path.contains("/#")),
                _ => false,
            } && flushes;
            tracee.go_on(skipped.then_some(0))?;
            continue;
        }
        injected = true;
        match (fault, known.length) {
            (Fault::Nothing, _) => tracee.go_on(None)?,
            (Fault::Flip(offset), _) => {
                flip(files.get(1).map_or("", String::as_str), offset)?;
                tracee.go_on(None)?;
            }
            (Fault::Replace, _) => {
                if let [first, second, ..] = files {
                    std::fs::rename(second, first)?;
                }
                tracee.go_on(None)?;
            }
            (Fault::Fail(errno), _) => tracee.go_on(Some(errno))?,
            (Fault::Kill | Fault::KillUnflushed | Fault::KillUnnamed, _) => {
                tracee.kill()?;
                break 137;
            }
            (Fault::Short, Some(Length::Bytes(argument) | Length::Buffers(argument)))
                if call.argument(argument) > 1 =>
            {
                call.set_argument(argument, call.argument(argument) / 2);
                tracee.set(&call)?;
                tracee.go_on(None)?;
            }
            (Fault::Short, _) => {
                injected = false;
                tracee.go_on(None)?;
            }
        }
    };
    let all: Vec<String> = counts.iter().map(|(name, count)| format!("{count} of {name}")).collect();
    eprintln!("inject: {} ({})", if injected { "done" } else { "not done" }, all.join(", "));
    Ok(status)
}

/// Change all bits of a byte of a file, on its disk.
fn flip(path: &str, offset: u64) -> std::io::Result<()> {
    let file = std::fs::OpenOptions::new().read(true).write(true).open(path)?;
    let mut byte = [0];
    file.read_exact_at(&mut byte, offset)?;
    file.write_all_at(&[!byte[0]], offset)?;
    file.sync_data()
}

/// Whether a call is about one of the files.
fn touches(tracee: &Tracee, call: &Call, known: &Known, files: &[String]) -> bool {
    let named = |path: &str| files.iter().any(|file| file == path || file.ends_with(&format!("/{path}")));
    let within = |path: &str| {
        files.iter().any(|file| path.strip_prefix(file).is_some_and(|rest| rest.starts_with('/')) && is_directory(file))
    };
    let by_path = known.path.and_then(|argument| tracee.text(call.argument(argument)));
    let by_descriptor =
        |&argument: &usize| tracee.path_of(call.argument(argument)).is_some_and(|path| named(&path) || within(&path));
    by_path.is_some_and(|path| named(&path)) || known.descriptors.iter().any(by_descriptor)
}

fn is_directory(path: &str) -> bool {
    std::path::Path::new(path).is_dir()
}
