//! The program of a guest, and the report about its run.

use instar_guest_abi::{FileDevice, Member};
use std::time::Duration;

/// A guest module that the engine carries: the core, or an operation. Its folder is `guest/NAME`.
macro_rules! guest_module {
    ($name:literal) => {
        $crate::sandbox::ModuleSpec {
            name: $name,
            version: env!("CARGO_PKG_VERSION"),
            elf: include_bytes!(concat!(env!("OUT_DIR"), "/", $name, "-module.elf")),
        }
    };
}
pub(crate) use guest_module;

/// A guest module.
#[derive(Clone, Copy, Debug)]
pub struct ModuleSpec<'a> {
    /// Its name, at most 31 bytes: the format's, or the operation's.
    pub name: &'a str,
    /// Its version, for messages.
    pub version: &'a str,
    /// The ELF.
    pub elf: &'a [u8],
}

/// A program of guest modules.
#[derive(Clone, Debug)]
pub struct Program<'a> {
    /// The operation's own configuration: an encoded message of [`PAYLOAD_SIZE`](instar_guest_abi::PAYLOAD_SIZE) bytes at
    /// most.
    pub payload: Vec<u8>,
    /// Who takes part: [`MAX_MEMBERS`](instar_guest_abi::MAX_MEMBERS) at most. A device's `module` is [`FIRST_FORMAT`] plus
    /// the index of its format in `modules`.
    pub members: Vec<Member>,
    /// The other files of the images, written at [`FILE_TABLE_ADDR`](instar_guest_abi::FILE_TABLE_ADDR), where the
    /// devices' lists lie; [`MAX_FILE_DEVICES`](instar_guest_abi::MAX_FILE_DEVICES) at most.
    pub files: Vec<FileDevice>,
    /// The formats in play.
    pub modules: Vec<ModuleSpec<'a>>,
    /// How long the guest may run without asking for anything, in processor time; default 30 seconds.
    pub stall_limit: Duration,
    /// Bytes of messages that the guest may send, default 16 MiB; a message counts for 256 at least.
    pub message_limit: u64,
    /// A core instead of the sandbox's own, for tests of hostile guests.
    pub core: Option<ModuleSpec<'a>>,
    /// The operation.
    pub operation: ModuleSpec<'a>,
}

/// Index in the module table of the first format: [`Program::modules`] begins there.
pub const FIRST_FORMAT: u32 = 2;

impl<'a> Program<'a> {
    /// An operation with the sandbox's own core.
    #[must_use]
    pub fn new(
        operation: ModuleSpec<'a>,
        payload: Vec<u8>,
        members: Vec<Member>,
        modules: Vec<ModuleSpec<'a>>,
    ) -> Self {
        Self {
            payload,
            members,
            files: Vec::new(),
            modules,
            stall_limit: Duration::from_secs(30),
            message_limit: 16 << 20,
            core: None,
            operation,
        }
    }

    /// Another core, for tests of hostile guests.
    #[must_use]
    pub fn with_core(mut self, elf: &'a [u8]) -> Self {
        self.core = Some(ModuleSpec { name: "core", version: env!("CARGO_PKG_VERSION"), elf });
        self
    }

    /// Another operation, for tests of hostile guests.
    #[must_use]
    pub fn with_operation(mut self, operation: ModuleSpec<'a>) -> Self {
        self.operation = operation;
        self
    }

    /// Another bound on messages.
    #[must_use]
    pub fn with_message_limit(mut self, bytes: u64) -> Self {
        self.message_limit = bytes;
        self
    }

    /// Another stall limit.
    #[must_use]
    pub fn with_stall_limit(mut self, limit: Duration) -> Self {
        self.stall_limit = limit;
        self
    }
}

/// The report about a guest's run.
#[derive(Clone, Copy, Debug, Default)]
pub struct Report {
    /// The sandbox's name.
    pub sandbox: &'static str,
    /// Times that the guest left for the host, but for its workers: how often that is depends on the machine.
    pub exits: u64,
    /// Doorbells.
    pub doorbells: u64,
    /// Block requests.
    pub requests: u64,
    /// Messages.
    pub messages: u64,
    /// How many workers have worked at the same time, at most.
    pub workers: usize,
    /// Creating the virtual machine, its memory and its vCPU, or starting the process.
    pub time_create: Duration,
    /// Loading the modules, and page tables if the sandbox has its own.
    pub time_load: Duration,
    /// From entering the guest to its first exit.
    pub time_first_exit: Duration,
    /// From entering the guest to its end, the host's work included.
    pub time_run: Duration,
    /// Time spent in the guest.
    pub time_guest: Duration,
    /// Privilege level of the guest: of a vCPU, read back from its code segment at the first exit; of a process, 3.
    pub ring: u8,
}
