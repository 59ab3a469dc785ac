//! The first program of the process sandbox: it takes from its process everything but the guest's memory and the doorbell, and
//! jumps into the guest.
//!
//! The library is what host and starter say to each other; the program, `starter-module`, is made of the modules that the
//! feature `guest` adds. It is a static program without a C library and without relocations: nobody applies them. The host
//! starts it with the descriptors below and nothing else, before it looks at an image. It confines itself as far as it can
//! without knowing the guest, says [`Step::Done`], and waits. Later the host writes the guest into memory, how it is to be mapped
//! into a [`Plan`], and answers. The starter installs the [filter], says [`Step::Done`] a second time, and jumps: whatever rings
//! after that is the guest. From then on there are three system calls: a `write` of [`RING_SIZE`] bytes to the doorbell, a `read`
//! of [`ANSWER_SIZE`] bytes from it, and the end.
#![no_std]

#[cfg(target_arch = "x86_64")]
pub mod bell;
#[cfg(target_arch = "x86_64")]
pub mod calls;
#[cfg(feature = "guest")]
pub mod capabilities;
#[cfg(feature = "guest")]
pub mod fault;
pub mod filter;
#[cfg(feature = "guest")]
pub mod landlock;
#[cfg(feature = "guest")]
pub mod start;

use core::mem::size_of;
use instar_guest_abi::MAX_MODULES;

/// The descriptor of the guest's memory: a memory file, whose offsets are the guest's addresses.
pub const MEMORY: i32 = 3;
/// The descriptor of the doorbell: a socket of messages (`SOCK_SEQPACKET`, unix(7)).
pub const DOORBELL: i32 = 4;
/// The descriptor of the guest's text: a memory file, whose offsets are the guest's addresses, and which nobody can write.
pub const TEXT: i32 = 5;

/// A message of the guest: what an `out` is in a virtual machine.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Ring {
    /// The port: one of those of a virtual machine.
    pub port: u32,
    /// The value.
    pub value: u32,
}

/// Bytes of a [`Ring`]: no message of the guest is longer or shorter.
pub const RING_SIZE: usize = size_of::<Ring>();
/// Bytes of the host's answer: to the starter, the number of the processor that it becomes, 0 for the main one. The guest gets
/// zeroes.
pub const ANSWER_SIZE: usize = 1;

impl Ring {
    /// The message in these bytes.
    #[must_use]
    pub const fn from_bytes([a, b, c, d, e, f, g, h]: [u8; RING_SIZE]) -> Self {
        Self { port: u32::from_le_bytes([a, b, c, d]), value: u32::from_le_bytes([e, f, g, h]) }
    }
}

/// What the starter did, in its two messages: a [`Ring`] whose port is the step that failed, or 0, and whose value is the errno
/// of that step, or else, in the first, what of Landlock is in force: its version, 0 if there is none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Step {
    /// Everything was done.
    Done = 0,
    /// The kernel knows no seccomp filters, or not the action of this one.
    Seccomp = 1,
    /// The process gave up gaining privileges, being dumped, surviving its host, or reading the time-stamp counter.
    Process = 2,
    /// Landlock is there, and failed.
    Landlock = 3,
    /// The plan could not be read, or makes no sense.
    Plan = 4,
    /// Memory could not be mapped as the plan says.
    Map = 5,
    /// The signals of faults could not be set up.
    Signals = 6,
    /// What the process must not keep could not be given up.
    Unmap = 7,
}

impl Step {
    /// The step with this number.
    #[must_use]
    pub const fn from_u32(number: u32) -> Option<Self> {
        Some(match number {
            0 => Self::Done,
            1 => Self::Seccomp,
            2 => Self::Process,
            3 => Self::Landlock,
            4 => Self::Plan,
            5 => Self::Map,
            6 => Self::Signals,
            7 => Self::Unmap,
            _ => return None,
        })
    }

    /// What was tried, to be followed by "failed".
    #[must_use]
    pub const fn what(self) -> &'static str {
        match self {
            Self::Done => "nothing",
            Self::Seccomp => "setting up seccomp",
            Self::Process => "giving up privileges",
            Self::Landlock => "setting up Landlock",
            Self::Plan => "reading where the guest is",
            Self::Map => "mapping the guest's memory",
            Self::Signals => "setting up the signals of faults",
            Self::Unmap => "unmapping what the kernel put beside the program",
        }
    }
}

/// Most ranges of a [`Plan`]: three segments of each module, and the regions beside the modules.
pub const MAX_RANGES: usize = 3 * MAX_MODULES + 16;

/// A range of the guest's memory.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MappedRange {
    /// Its first address, a page's.
    pub start: u64,
    /// The address behind it, a page's.
    pub end: u64,
    /// [`READ`], [`DATA`] or [`CODE`].
    pub rights: u64,
}

/// [`MappedRange::rights`]: may be read.
pub const READ: u64 = 0;
/// [`MappedRange::rights`]: may be read and written.
pub const DATA: u64 = 1;
/// [`MappedRange::rights`]: may be read and executed; it is the text's file that is mapped.
pub const CODE: u64 = 2;

/// How the guest's memory is mapped. It stands at offset 0 of the memory file, which the guest does not see.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    /// [`PLAN_MAGIC`].
    pub magic: u64,
    /// Where the guest begins.
    pub entry: u64,
    /// How many ranges there are.
    pub count: u64,
    /// The ranges.
    pub ranges: [MappedRange; MAX_RANGES],
}

/// The first field of a [`Plan`].
pub const PLAN_MAGIC: u64 = u64::from_le_bytes(*b"INSTPLAN");

const _: () = assert!(size_of::<Plan>() <= 4096, "page 0 of the guest's memory is nobody's");

/// [`FaultRecord::signal`]: another process sent it.
pub const SENT: u64 = 1 << 32;

/// What a fault left in the message buffer, before the ring on the fault port.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FaultRecord {
    /// The signal, and [`SENT`].
    pub signal: u64,
    /// The processor's vector.
    pub vector: u64,
    /// The processor's error code.
    pub error_code: u64,
    /// Of a page fault: the address. Of `SIGSYS`: the number of the system call, with its architecture in the upper half.
    pub address: u64,
    /// The instruction; of a system call, the one behind it.
    pub rip: u64,
}
