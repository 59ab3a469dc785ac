//! What the host tells the guest before it starts.

use crate::list::List;

/// The longest chain, in images besides the one that is written. Nothing but memory for the table of members depends on it.
pub const MAX_CHAIN_DEVICES: usize = 512;

/// The device number of the image that is written (for a commit, the backing that is committed into). Members that are
/// read have the numbers below it.
pub const DEVICE_OUTPUT: u32 = 512;
const _: () = assert!(DEVICE_OUTPUT as usize == MAX_CHAIN_DEVICES);

/// How many members an operation may have: the chain, and the image that is written.
pub const MAX_MEMBERS: usize = MAX_CHAIN_DEVICES + 1;

/// How many files the images of a chain may have together besides the one that each is named by.
pub const MAX_FILE_DEVICES: usize = 512;

/// The device number of the first of those files.
pub const FIRST_FILE_DEVICE: u32 = DEVICE_OUTPUT + 1;

/// How many modules the host loads at most: core, the operation, and the formats in play.
pub const MAX_MODULES: usize = 16;

/// [`OperationConfig::magic`]: `"INSTOPER"`.
pub const OPERATION_CONFIG_MAGIC: u64 = u64::from_le_bytes(*b"INSTOPER");
/// [`ChainConfig::magic`]: `"INSTCHAI"`.
pub const CHAIN_CONFIG_MAGIC: u64 = u64::from_le_bytes(*b"INSTCHAI");
/// [`ModuleTable::magic`]: `"INSTMODS"`.
pub const MODULE_TABLE_MAGIC: u64 = u64::from_le_bytes(*b"INSTMODS");

/// Bits of [`DeviceConfig::flags`].
pub mod device_flags {
    /// The device is there.
    pub const PRESENT: u32 = 1;
    /// The host lets the guest write to it, in the phase that belongs to it.
    pub const WRITABLE: u32 = 2;
    /// The device cannot change its length (a block device).
    pub const FIXED_LENGTH: u32 = 4;
    /// The image gets data, and reads as before at every instant: it keeps its identity, too, so that whatever is above it still
    /// knows it.
    pub const KEEPS_IDENTITY: u32 = 8;
    /// What is written to the image is to be compressed, wherever it shrinks. That is asked only of an image whose host half says
    /// `compresses` in its facts.
    pub const COMPRESS: u32 = 16;
}

/// Written by the host at [`OPERATION_CONFIG_ADDR`](crate::OPERATION_CONFIG_ADDR): the same for every operation.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct OperationConfig {
    /// [`OPERATION_CONFIG_MAGIC`].
    pub magic: u64,
    /// [`MODULE_ABI_MAJOR`](crate::MODULE_ABI_MAJOR) of the host.
    pub abi_major: u32,
    /// How many workers there are: processors besides the main one, [`MAX_WORKERS`](crate::MAX_WORKERS) at most.
    pub workers: u32,
    /// First address of the heap.
    pub heap_start: u64,
    /// First address after the heap.
    pub heap_end: u64,
    /// What the operator wants of this operation: an encoded message that only the operation understands.
    pub payload: List<u8>,
}

/// What a member is to an operation. Stored as `u32` in [`Member::role`].
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum MemberRole {
    /// Its content is what the operation works on.
    Read = 1,
    /// Data goes into it.
    Write = 2,
    /// As [`MemberRole::Read`], and it is emptied once its content is elsewhere.
    Empty = 3,
    /// It is below a member that is written: looked at only where that one holds nothing.
    Below = 4,
    /// It gets another parent: the one that is written.
    Relinked = 5,
}

impl MemberRole {
    /// The role with this number, if there is one.
    #[must_use]
    pub const fn from_u32(value: u32) -> Option<Self> {
        Some(match value {
            1 => Self::Read,
            2 => Self::Write,
            3 => Self::Empty,
            4 => Self::Below,
            5 => Self::Relinked,
            _ => return None,
        })
    }
}

/// An image that takes part in an operation.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct Member {
    /// A [`MemberRole`] as a number.
    pub role: u32,
    /// Which view of a disk the member belongs to. Operations on one chain have only group 0.
    pub group: u32,
    /// Place in the chain of its group: 0 is the top-most.
    pub depth: u32,
    /// Zero.
    pub reserved: u32,
    /// The image's device, and what it may do there.
    pub device: DeviceConfig,
}

/// The device of an image.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct DeviceConfig {
    /// Bits of [`device_flags`].
    pub flags: u32,
    /// The device number to use in requests.
    pub device: u32,
    /// Index into [`ModuleTable::entries`] of the module that implements the device's format.
    pub module: u32,
    /// 0 for the disk of the image itself; *n* for that of its *n*-th internal snapshot, in the order in which the host half
    /// lists them. Only an image that is read is asked for one.
    pub snapshot: u32,
    /// Length of the file or device in bytes when the host opened it.
    pub file_length: u64,
    /// The longest that the file may become in bytes; the host ends a guest that asks for more. That of a device whose length
    /// is fixed is its length, unless the operation only plans: then a plan may need more than there is.
    pub max_length: u64,
    /// Virtual size in bytes as the host half saw it; the guest refuses a different one with
    /// [`ERROR_HEADER_MISMATCH`](crate::ERROR_HEADER_MISMATCH).
    pub virtual_size: u64,
    /// Cluster (or grain) size in bytes as the host half saw it, 0 for formats without one; checked likewise.
    pub cluster_size: u64,
    /// How many bytes of the image's tables a driver should hold at most while it reads them, because other images share
    /// the heap; 0 where there is no such bound.
    pub cache_bytes: u64,
    /// The other files of the image, in the order in which the host half named them.
    pub files: FileList,
}

/// One of the other files of an image: a device of its own.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FileDevice {
    /// Bits of [`device_flags`].
    pub flags: u32,
    /// The device number to use in requests.
    pub device: u32,
    /// Length of the file or device in bytes when the host opened it.
    pub file_length: u64,
    /// The longest that the file may become in bytes; the host ends a guest that asks for more.
    pub max_length: u64,
}

/// A list of [`FileDevice`]s that lives as long as the guest. The default is an empty one.
pub type FileList = List<FileDevice>;

/// Written by the host at [`CHAIN_CONFIG_ADDR`](crate::CHAIN_CONFIG_ADDR): who takes part.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct ChainConfig {
    /// [`CHAIN_CONFIG_MAGIC`].
    pub magic: u64,
    /// The members, [`MAX_MEMBERS`] at most, by group and, within a group, by depth.
    pub members: List<Member>,
}

/// One module that the host loaded.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct ModuleEntry {
    /// Address of the module's entry function, of type [`ModuleEntryFn`](crate::ModuleDescriptor).
    pub entry: u64,
    /// First address of the module's image.
    pub base: u64,
    /// Length of the module's image in bytes.
    pub length: u64,
    /// Name, UTF-8, padded with zero bytes: `core`, `commit`, or the format's name.
    pub name: [u8; 32],
}

/// Written by the host at [`MODULE_TABLE_ADDR`](crate::MODULE_TABLE_ADDR). Entry 0 is core, entry 1 the
/// operation, the rest are formats.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct ModuleTable {
    /// [`MODULE_TABLE_MAGIC`].
    pub magic: u64,
    /// Number of entries in use.
    pub count: u32,
    /// Zero.
    pub reserved: u32,
    /// The entries.
    pub entries: [ModuleEntry; MAX_MODULES],
}

const _: () = assert!(core::mem::size_of::<OperationConfig>() as u64 <= crate::PAGE_SIZE);
const _: () = assert!(core::mem::size_of::<ChainConfig>() as u64 <= crate::PAGE_SIZE);
const _: () = assert!(core::mem::size_of::<ModuleTable>() as u64 <= crate::PAGE_SIZE);
const _: () = assert!(
    (core::mem::size_of::<FileDevice>() * MAX_FILE_DEVICES) as u64 <= crate::MEMBER_TABLE_ADDR - crate::FILE_TABLE_ADDR
);
const _: () =
    assert!((core::mem::size_of::<Member>() * MAX_MEMBERS) as u64 <= crate::CONFIG_END - crate::MEMBER_TABLE_ADDR);
