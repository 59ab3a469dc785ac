//! What the kernel says of a guest's process, while the guest waits for its host.

use super::code::{ring, run_with, told};
use instar::sandbox::{BadRequest, BufferAccess, Host};
use instar_guest_abi::{request_status, Request, GUEST_MEMORY_SIZE, PORT_EXIT, WORKER_STACKS_ADDR};
use instar_guest_protocol::guest_message;
use std::fs::{read, read_dir, read_link, read_to_string, File};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

/// The numbers of the processes that this thread has started.
pub fn children() -> Vec<i32> {
    let children = read_to_string("/proc/thread-self/children").unwrap();
    children.split_whitespace().map(|child| child.parse().unwrap()).collect()
}

/// The number of the only one.
pub fn child() -> i32 {
    let children = children();
    assert_eq!(children.len(), 1, "{children:?}");
    children[0]
}

pub fn path(child: i32, name: &str) -> PathBuf {
    PathBuf::from(format!("/proc/{child}/{name}"))
}

/// Whether this process has a capability (`linux/capability.h`).
fn has(capability: u32) -> bool {
    let status = read_to_string("/proc/self/status").unwrap();
    let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:")).unwrap();
    u64::from_str_radix(effective.trim(), 16).unwrap() & 1 << capability != 0
}

const CAP_SETGID: u32 = 6;
const CAP_SETPCAP: u32 = 8;
const CAP_SYS_PTRACE: u32 = 19;

/// Whether this process may look into one that is not dumpable (`ptrace(2)`, "Ptrace access mode checking").
pub fn can_look() -> bool {
    let can = has(CAP_SYS_PTRACE);
    if !can {
        eprintln!("not tested: only who may trace everything can look into the process");
    }
    can
}

/// A mapping of a process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Map {
    pub range: Range<u64>,
    pub rights: String,
    pub name: String,
}

/// The mappings of a process (`proc_pid_maps(5)`).
pub fn maps(child: i32) -> Vec<Map> {
    let parse = |line: &str| {
        let mut words = line.split_whitespace();
        let (start, end) = words.next()?.split_once('-')?;
        let number = |text| u64::from_str_radix(text, 16).ok();
        let rights = words.next()?.to_owned();
        Some(Map { range: number(start)?..number(end)?, rights, name: words.skip(3).collect::<Vec<_>>().join(" ") })
    };
    read_to_string(path(child, "maps")).unwrap().lines().map(|line| parse(line).unwrap()).collect()
}

/// Memory of a process.
pub fn memory(child: i32, range: &Range<u64>) -> Vec<u8> {
    let mut bytes = vec![0; usize::try_from(range.end - range.start).unwrap()];
    File::open(path(child, "mem")).unwrap().read_exact_at(&mut bytes, range.start).unwrap();
    bytes
}

/// A host that answers a request with what a function knows of the process.
pub struct Telling<'a> {
    tell: Box<dyn FnMut(i32) -> u64 + 'a>,
    pub asked: usize,
}

impl<'a> Telling<'a> {
    pub fn new(tell: impl FnMut(i32) -> u64 + 'a) -> Self {
        Self { tell: Box::new(tell), asked: 0 }
    }
}

impl Host for Telling<'_> {
    fn requests(&mut self, memory: &dyn BufferAccess, requests: &mut [Request]) -> Result<(), BadRequest> {
        let [request] = requests else { panic!("{requests:?}") };
        let value = (self.tell)(child());
        self.asked += 1;
        memory.heap_slice(request.buffer, 8).unwrap().copy_from(&value.to_le_bytes());
        request.status = request_status::OK;
        Ok(())
    }

    fn message(&mut self, message: guest_message::Kind) -> Result<(), BadRequest> {
        Err(BadRequest(format!("{message:?}")))
    }
}

/// Look at the process of a guest that asks for something, which is then let go.
fn look(at: impl FnMut(i32) -> u64) {
    let mut host = Telling::new(at);
    run_with(&[told(), ring(PORT_EXIT.into(), 0)].concat(), &mut host).unwrap();
    assert_eq!(host.asked, 1);
}

#[test]
fn the_guest_and_the_starter_are_all_that_is_mapped() {
    if !can_look() {
        return;
    }
    look(|child| {
        let maps = maps(child);
        let (guest, others): (Vec<_>, Vec<_>) = maps.into_iter().partition(|map| map.range.end <= GUEST_MEMORY_SIZE);
        let expected = |range: Range<u64>, rights: &str| {
            let name = if rights == "r-xs" {
                "/memfd:instar-guest-text (deleted)"
            } else {
                "/memfd:instar-guest-memory (deleted)"
            };
            Map { range, rights: rights.to_owned(), name: name.to_owned() }
        };
        // Configuration, ring, messages, stack; then the modules. Nothing is private, nothing is both writable and executable.
        let beside = [
            expected(0x4_0000..0x5_3000, "r--s"),
            expected(0x5_7000..0x5_f000, "rw-s"),
            expected(0x6_0000..0x6_4000, "rw-s"),
            expected(0x8_0000..0x10_0000, "rw-s"),
            expected(0x10_1000..0x10_2000, "r-xs"),
        ];
        assert_eq!(guest[..5], beside);
        assert_eq!(guest.last().unwrap().range.end, WORKER_STACKS_ADDR, "the heap; there are no workers");
        for map in &guest[5..] {
            assert_eq!(*map, expected(map.range.clone(), &map.rights));
            assert!(["r--s", "rw-s", "r-xs"].contains(&map.rights.as_str()), "{map:?}");
        }
        // The starter's text and constants, 64 KiB for signals, and the kernel's page, which nothing can unmap.
        let mut kinds: Vec<(&str, &str)> =
            others.iter().map(|map| (map.rights.as_str(), map.name.split(' ').next().unwrap())).collect();
        kinds.sort_unstable();
        if kinds.first() == Some(&("--xp", "[vsyscall]")) {
            kinds.remove(0);
        }
        assert_eq!(kinds, [("r--p", "/memfd:instar-guest"), ("r-xp", "/memfd:instar-guest"), ("rw-p", "")]);
        let signals = others.iter().find(|map| map.name.is_empty()).unwrap();
        assert_eq!(signals.range.end - signals.range.start, 64 << 10);
        0
    });
}

#[test]
fn the_doorbell_is_the_only_descriptor() {
    if !can_look() {
        return;
    }
    look(|child| {
        let descriptors: Vec<(String, String)> = read_dir(path(child, "fd"))
            .unwrap()
            .map(|entry| entry.unwrap())
            .map(|entry| {
                (entry.file_name().into_string().unwrap(), read_link(entry.path()).unwrap().display().to_string())
            })
            .collect();
        assert_eq!(descriptors.len(), 1, "{descriptors:?}");
        assert!(descriptors[0].0 == "4" && descriptors[0].1.starts_with("socket:"), "{descriptors:?}");
        0
    });
}

#[test]
fn nothing_of_the_hosts_rights_is_left() {
    look(|child| {
        let status = read_to_string(path(child, "status")).unwrap();
        let field = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
            line.unwrap_or_else(|| panic!("{name}")).trim().to_owned()
        };
        for (name, value) in [("Name", "instar-guest"), ("Threads", "1"), ("Seccomp", "2"), ("NoNewPrivs", "1")] {
            assert_eq!(field(name), value, "{name}");
        }
        for name in ["CapInh", "CapPrm", "CapEff", "CapAmb"] {
            assert_eq!(field(name), "0000000000000000", "{name}");
        }
        // What the host itself may not give up, the guest gets no more than the host has: nothing, without a right to start from.
        if has(CAP_SETPCAP) {
            assert_eq!(field("CapBnd"), "0000000000000000");
        }
        if has(CAP_SETGID) {
            assert_eq!(field("Groups"), "");
        }
        // Signals: those of faults and the host's question are handled, all others that can be blocked are.
        let mask = |name: &str| u64::from_str_radix(&field(name), 16).unwrap();
        let bits = |signals: &[i32]| signals.iter().fold(0_u64, |mask, signal| mask | 1 << (signal - 1));
        let handled =
            [libc::SIGILL, libc::SIGTRAP, libc::SIGBUS, libc::SIGFPE, libc::SIGSEGV, libc::SIGXCPU, libc::SIGSYS];
        assert_eq!(mask("SigCgt"), bits(&handled));
        assert_eq!(mask("SigBlk"), !bits(&handled) & !bits(&[libc::SIGKILL, libc::SIGSTOP]));
        0
    });
}

#[test]
fn its_limits_are_zero() {
    look(|child| {
        let limits = read_to_string(path(child, "limits")).unwrap();
        for name in [
            "Max file size",
            "Max core file size",
            "Max processes",
            "Max open files",
            "Max locked memory",
            "Max address space",
            "Max msgqueue size",
        ] {
            let line = limits.lines().find_map(|line| line.strip_prefix(name)).unwrap();
            let words: Vec<&str> = line.split_whitespace().take(2).collect();
            assert_eq!(words, ["0", "0"], "{name}");
        }
        0
    });
}

#[test]
fn neither_arguments_nor_environment_are_told() {
    look(|child| {
        // They were on the stack that the kernel made, which is gone. Without the right to look, the kernel refuses.
        for name in ["environ", "cmdline"] {
            match read(path(child, name)) {
                Ok(bytes) => assert_eq!(bytes, b"", "{name}"),
                Err(error) => assert!(
                    matches!(error.raw_os_error(), Some(libc::EACCES | libc::EPERM | libc::EIO)),
                    "{name}: {error}"
                ),
            }
        }
        0
    });
}

#[test]
fn other_processes_of_the_user_cannot_look_into_it() {
    if !has(CAP_SYS_PTRACE) {
        look(|child| {
            for name in ["mem", "maps", "environ"] {
                let denied =
                    File::open(path(child, name)).and_then(|file| file.read_at(&mut [0], 0x4_0000)).unwrap_err();
                assert!(
                    matches!(denied.raw_os_error(), Some(libc::EACCES | libc::EPERM | libc::EIO)),
                    "{name}: {denied}"
                );
            }
            // SAFETY: it attaches to our own process, which it is not let.
            let attached = unsafe { libc::ptrace(libc::PTRACE_ATTACH, child, 0, 0) };
            assert_eq!((attached, std::io::Error::last_os_error().raw_os_error()), (-1, Some(libc::EPERM)));
            0
        });
        return;
    }
    // Who may trace everything may look. In `/proc`, a process that is not dumpable belongs to root, no matter which
    // user started it.
    look(|child| {
        use std::os::unix::fs::MetadataExt;
        let owner = std::fs::metadata(path(child, "mem")).unwrap();
        assert_eq!((owner.uid(), owner.mode() & 0o077), (0, 0));
        0
    });
}
