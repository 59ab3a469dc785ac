//! What the host tells the guest before it starts.

/// How many image devices a commit may have besides the output device.
pub const MAX_CHAIN_DEVICES: usize = 16;

/// The device number of the output device (the backing that is committed into).
pub const DEVICE_OUTPUT: u32 = 16;
const _: () = assert!(DEVICE_OUTPUT as usize == MAX_CHAIN_DEVICES);

/// How many files the images of a chain may have together besides the one that each is named by.
pub const MAX_FILE_DEVICES: usize = 512;

/// The device number of the first of those files.
pub const FIRST_FILE_DEVICE: u32 = DEVICE_OUTPUT + 1;

/// How many modules the host loads at most: core, the operation, and the formats in play.
pub const MAX_MODULES: usize = 16;

/// [`CommitConfig::magic`]: `"INSTCOMM"`.
pub const COMMIT_CONFIG_MAGIC: u64 = u64::from_le_bytes(*b"INSTCOMM");
/// [`ChainConfig::magic`]: `"INSTCHAI"`.
pub const CHAIN_CONFIG_MAGIC: u64 = u64::from_le_bytes(*b"INSTCHAI");
/// [`ModuleTable::magic`]: `"INSTMODS"`.
pub const MODULE_TABLE_MAGIC: u64 = u64::from_le_bytes(*b"INSTMODS");

/// Bits of [`CommitConfig::flags`].
pub mod commit_flags {
    /// Leave the overlay's content in place (`-d`, or a commit into a deeper ancestor).
    pub const KEEP_OVERLAY: u32 = 1;
    /// Stop before the first change (`--dry-run`).
    pub const DRY_RUN: u32 = 2;
    /// The backing may grow to the overlay's virtual size (`--resize-backing`).
    pub const RESIZE_BACKING: u32 = 4;
}

/// Bits of [`DeviceConfig::flags`].
pub mod device_flags {
    /// The device is there.
    pub const PRESENT: u32 = 1;
    /// The host lets the guest write to it.
    pub const WRITABLE: u32 = 2;
    /// The device cannot change its length (a block device).
    pub const FIXED_LENGTH: u32 = 4;
}

/// Written by the host at [`OPERATION_CONFIG_ADDR`](crate::OPERATION_CONFIG_ADDR).
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct CommitConfig {
    /// [`COMMIT_CONFIG_MAGIC`].
    pub magic: u64,
    /// [`MODULE_ABI_MAJOR`](crate::MODULE_ABI_MAJOR) of the host.
    pub abi_major: u32,
    /// Bits of [`commit_flags`].
    pub flags: u32,
    /// First address of the heap, a multiple of 2 MiB.
    pub heap_start: u64,
    /// First address after the heap.
    pub heap_end: u64,
}

/// One device of the chain.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct DeviceConfig {
    /// Bits of [`device_flags`]; a slot without `PRESENT` is all zero.
    pub flags: u32,
    /// The device number to use in requests.
    pub device: u32,
    /// Index into [`ModuleTable::entries`] of the module that implements the device's format.
    pub module: u32,
    /// Zero.
    pub reserved: u32,
    /// Length of the file or device in bytes when the host opened it.
    pub file_length: u64,
    /// The longest that the file may become in bytes; the host ends a guest that asks for more.
    pub max_length: u64,
    /// Virtual size in bytes as the host half saw it; the guest refuses a different one with
    /// [`ERROR_HEADER_MISMATCH`](crate::ERROR_HEADER_MISMATCH).
    pub virtual_size: u64,
    /// Cluster (or grain) size in bytes as the host half saw it, 0 for formats without one; checked likewise.
    pub cluster_size: u64,
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
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct FileList {
    address: u64,
    count: u64,
}

impl FileList {
    /// The files of a list that is never freed.
    #[must_use]
    pub fn of(files: &'static [FileDevice]) -> Self {
        Self { address: files.as_ptr() as u64, count: files.len() as u64 }
    }

    /// The `count` files that stand at `address` of the memory in which the list is looked at.
    ///
    /// # Safety
    /// They stand there, and do not change, as long as anything looks at the list.
    #[must_use]
    pub const unsafe fn at(address: u64, count: u64) -> Self {
        Self { address, count }
    }

    /// The files.
    #[must_use]
    #[allow(clippy::cast_possible_truncation, reason = "built for 64 bits only")]
    pub fn as_slice(&self) -> &'static [FileDevice] {
        if self.count == 0 {
            return &[];
        }
        // SAFETY: the two ways to make a list that is not empty promise it.
        unsafe { core::slice::from_raw_parts(self.address as *const FileDevice, self.count as usize) }
    }
}

/// Written by the host at [`CHAIN_CONFIG_ADDR`](crate::CHAIN_CONFIG_ADDR).
///
/// Slot 0 is the overlay. Slots `1..merge_count` are the layers between overlay and backing that are
/// merged too; slots `merge_count..count` are the backing's own ancestors, nearest first. The backing itself
/// is `output`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct ChainConfig {
    /// [`CHAIN_CONFIG_MAGIC`].
    pub magic: u64,
    /// Number of devices in `devices`, 1 to [`MAX_CHAIN_DEVICES`].
    pub count: u32,
    /// How many of them are committed, from slot 0 on: 1 for a commit into the immediate backing.
    pub merge_count: u32,
    /// The devices.
    pub devices: [DeviceConfig; MAX_CHAIN_DEVICES],
    /// The backing that is committed into.
    pub output: DeviceConfig,
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

const _: () = assert!(core::mem::size_of::<CommitConfig>() as u64 <= crate::PAGE_SIZE);
const _: () = assert!(core::mem::size_of::<ChainConfig>() as u64 <= 2 * crate::PAGE_SIZE);
const _: () = assert!(core::mem::size_of::<ModuleTable>() as u64 <= crate::PAGE_SIZE);
const _: () = assert!(
    (core::mem::size_of::<FileDevice>() * MAX_FILE_DEVICES) as u64 <= crate::CONFIG_END - crate::FILE_TABLE_ADDR
);
