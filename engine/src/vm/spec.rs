//! What to run, and what came of it.

use instar_guest_abi::{ChainConfig, FileDevice};
use std::time::Duration;

static CORE: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/core-module.elf"));
static COMMIT: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/commit-module.elf"));
/// The check operation, for [`VmSpec::with_operation`].
pub static CHECK: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/check-module.elf"));
/// The map operation, for [`VmSpec::with_operation`].
pub static MAP: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/map-module.elf"));

/// A guest module.
#[derive(Clone, Copy, Debug)]
pub struct ModuleSpec<'a> {
    /// The format's name, at most 31 bytes.
    pub name: &'a str,
    /// The ELF.
    pub elf: &'a [u8],
}

/// What to run.
#[derive(Clone, Debug)]
pub struct VmSpec<'a> {
    /// Bits of [`commit_flags`](instar_guest_abi::commit_flags).
    pub flags: u32,
    /// The devices. A device's `module` is 2 plus the index of its format in `modules`.
    pub chain: ChainConfig,
    /// The other files of the images, written at [`FILE_TABLE_ADDR`](instar_guest_abi::FILE_TABLE_ADDR), where the
    /// devices' lists lie; [`MAX_FILE_DEVICES`](instar_guest_abi::MAX_FILE_DEVICES) at most.
    pub files: Vec<FileDevice>,
    /// The formats in play.
    pub modules: Vec<ModuleSpec<'a>>,
    /// How long the guest may run without asking for anything, in processor time; default 30 seconds.
    pub stall_limit: Duration,
    /// Bytes of messages that the guest may send, default 16 MiB; a message counts for 256 at least.
    pub message_limit: u64,
    /// The core, loaded as `core`.
    pub core: &'a [u8],
    /// The operation, loaded as `commit`.
    pub operation: &'a [u8],
}

/// Index in the module table of the first format: [`VmSpec::modules`] begins there.
pub const FIRST_FORMAT: u32 = 2;

impl<'a> VmSpec<'a> {
    /// A commit with the engine's own core and operation.
    #[must_use]
    pub fn new(flags: u32, chain: ChainConfig, modules: Vec<ModuleSpec<'a>>) -> Self {
        Self {
            flags,
            chain,
            files: Vec::new(),
            modules,
            stall_limit: Duration::from_secs(30),
            message_limit: 16 << 20,
            core: CORE,
            operation: COMMIT,
        }
    }

    /// Another core, for tests of hostile guests.
    #[must_use]
    pub fn with_core(mut self, elf: &'a [u8]) -> Self {
        self.core = elf;
        self
    }

    /// Another operation.
    #[must_use]
    pub fn with_operation(mut self, elf: &'a [u8]) -> Self {
        self.operation = elf;
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

/// What a guest did, and how long it took.
#[derive(Clone, Copy, Debug, Default)]
pub struct VmReport {
    /// Times that the guest left for the host.
    pub exits: u64,
    /// Doorbells.
    pub doorbells: u64,
    /// Block requests.
    pub requests: u64,
    /// Messages.
    pub messages: u64,
    /// Creating the machine, its memory and its vCPU.
    pub time_create: Duration,
    /// Loading the modules and building the page tables.
    pub time_load: Duration,
    /// From entering the guest to its first exit.
    pub time_first_exit: Duration,
    /// From entering the guest to its end, the host's work included.
    pub time_run: Duration,
    /// Time spent in the guest.
    pub time_guest: Duration,
    /// Privilege level of the guest, read back from the vCPU's code segment at the first exit.
    pub ring: u8,
}
