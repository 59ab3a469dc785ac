//! The error codes. Append-only: a code never changes its number, name or meaning.

macro_rules! error_codes {
    ($($(#[doc = $doc:literal])* $variant:ident = $value:literal, $constant:ident;)*) => {
        /// Every way in which an operation can fail. Success is no error, and has no place here: see [`ERROR_OK`].
        #[repr(u32)]
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub enum ErrorCode { $($(#[doc = $doc])* $variant = $value,)* }

        $($(#[doc = $doc])* pub const $constant: u32 = $value;)*

        impl ErrorCode {
            /// All codes in the order of their numbers.
            pub const ALL: &'static [Self] = &[$(Self::$variant,)*];

            /// The code with this number, if there is one.
            #[must_use]
            pub const fn from_u32(value: u32) -> Option<Self> {
                match value { $($value => Some(Self::$variant),)* _ => None }
            }

            /// The name as it stands in messages and JSON.
            #[must_use]
            pub const fn name(self) -> &'static str {
                match self { $(Self::$variant => stringify!($constant),)* }
            }

            /// When it is given, in one sentence.
            #[must_use]
            pub const fn meaning(self) -> &'static str {
                match self { $(Self::$variant => concat!($($doc),*),)* }
            }

            /// The number as it stands in messages and JSON.
            #[must_use]
            pub const fn number(self) -> u32 { self as u32 }
        }
    };
}

/// What stands for no error where a number is wanted.
pub const ERROR_OK: u32 = 0;

error_codes! {
    /// The format, subformat or feature is not supported; the message names it.
    UnsupportedFormat = 1, ERROR_UNSUPPORTED_FORMAT;
    /// The overlay records no backing file and none was given.
    NoBacking = 2, ERROR_NO_BACKING;
    /// An external data file that cannot be used: the image does not name it, or contradicts itself.
    ExternalDataFile = 3, ERROR_EXTERNAL_DATA_FILE;
    /// Encryption on either side.
    LuksUnsupported = 4, ERROR_LUKS_UNSUPPORTED;
    /// The backing cannot hold the overlay's highest allocated cluster.
    BackingTooSmall = 5, ERROR_BACKING_TOO_SMALL;
    /// The overlay's virtual size is larger than the backing's, without `--resize-backing`.
    OverlayLargerThanBacking = 6, ERROR_OVERLAY_LARGER_THAN_BACKING;
    /// The file changed between the host's look and the guest's.
    HeaderMismatch = 7, ERROR_HEADER_MISMATCH;
    /// The overlay's metadata is corrupt.
    OverlayCorrupt = 8, ERROR_OVERLAY_CORRUPT;
    /// The backing's metadata is corrupt.
    BackingCorrupt = 9, ERROR_BACKING_CORRUPT;
    /// Bounded guest memory cannot hold what is needed.
    ScratchTooSmall = 10, ERROR_SCRATCH_TOO_SMALL;
    /// The backing's refcounts cannot count higher, or their table cannot grow.
    RefcountExhausted = 11, ERROR_REFCOUNT_EXHAUSTED;
    /// A structure, or what is compressed, could not be decoded.
    ParseFailed = 12, ERROR_PARSE_FAILED;
    /// An arithmetic guard fired: a bug of the tool.
    InternalOverflow = 13, ERROR_INTERNAL_OVERFLOW;
    /// Reading or writing the overlay, or a layer below it that is read, failed.
    OverlayIo = 14, ERROR_OVERLAY_IO;
    /// Reading or writing the backing, or a new image, failed.
    BackingIo = 15, ERROR_BACKING_IO;
    /// No space is left on the file system.
    NoSpace = 16, ERROR_NO_SPACE;
    /// Another process uses the image.
    ImageInUse = 17, ERROR_IMAGE_IN_USE;
    /// The guest raised a processor fault.
    GuestFault = 18, ERROR_GUEST_FAULT;
    /// The guest panicked.
    GuestPanic = 19, ERROR_GUEST_PANIC;
    /// The guest makes no progress.
    GuestStalled = 20, ERROR_GUEST_STALLED;
    /// The guest broke the protocol: a bad request, an unreadable message, no result.
    GuestProtocol = 21, ERROR_GUEST_PROTOCOL;
    /// A plugin refused the pair.
    PluginRefused = 22, ERROR_PLUGIN_REFUSED;
    /// The recorded backing may not be written without the operator naming it.
    WriteTargetNotAllowed = 23, ERROR_WRITE_TARGET_NOT_ALLOWED;
    /// An image that the operator named does not exist.
    ImageNotFound = 24, ERROR_IMAGE_NOT_FOUND;
    /// What an image records, a backing or another file of its own, or what `-b` names does not exist.
    BackingNotFound = 25, ERROR_BACKING_NOT_FOUND;
    /// `-b` names a file outside the overlay's backing chain.
    NotInChain = 26, ERROR_NOT_IN_CHAIN;
    /// The chain has more layers than the engine takes.
    ChainTooDeep = 27, ERROR_CHAIN_TOO_DEEP;
    /// The chain contains the same file twice.
    ChainLoop = 28, ERROR_CHAIN_LOOP;
    /// There is no KVM device.
    KvmMissing = 29, ERROR_KVM_MISSING;
    /// The KVM device may not be opened.
    KvmPermission = 30, ERROR_KVM_PERMISSION;
    /// KVM is there but cannot run a virtual machine.
    KvmUnusable = 31, ERROR_KVM_UNUSABLE;
    /// The plugin of the format lacks what is asked for: it cannot check images.
    NotImplemented = 32, ERROR_NOT_IMPLEMENTED;
    /// A plugin that is needed is missing or cannot be loaded.
    PluginUnavailable = 33, ERROR_PLUGIN_UNAVAILABLE;
    /// The image is not of the format that was named.
    FormatMismatch = 34, ERROR_FORMAT_MISMATCH;
    /// An image could not be opened as needed.
    OpenFailed = 35, ERROR_OPEN_FAILED;
    /// A signal stopped the commit at a safe point.
    Interrupted = 36, ERROR_INTERRUPTED;
    /// The command line cannot be understood: an unknown option, a missing argument, a value that makes no sense.
    BadUsage = 37, ERROR_BAD_USAGE;
    /// The command did its work, but its result could not be printed.
    OutputFailed = 38, ERROR_OUTPUT_FAILED;
    /// The caller lacks the permission to use a file as needed.
    PermissionDenied = 39, ERROR_PERMISSION_DENIED;
    /// A file, a device or its file system is read-only, and the command would write to it.
    ReadOnly = 40, ERROR_READ_ONLY;
    /// The image below is not the one that the image above it was made on.
    ParentMismatch = 41, ERROR_PARENT_MISMATCH;
    /// The metadata would take more requests or processor time than the files' allocated size justifies.
    LimitExceeded = 42, ERROR_LIMIT_EXCEEDED;
    /// The process sandbox cannot be used: the kernel or a container refuses what it needs.
    SandboxUnusable = 43, ERROR_SANDBOX_UNUSABLE;
    /// The process of the sandbox was ended or stopped from outside.
    SandboxLost = 44, ERROR_SANDBOX_LOST;
    /// Other images have the same backing, which a commit into it would damage.
    BackingShared = 45, ERROR_BACKING_SHARED;
    /// An atomic commit into this image did not end.
    RecoveryNeeded = 46, ERROR_RECOVERY_NEEDED;
}
