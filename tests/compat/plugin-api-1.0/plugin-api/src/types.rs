//! The values that cross the border between engine and plugin.

use crate::{BitmapFacts, FactValue, Feature, SnapshotFacts};
use abi_stable::std_types::{ROption, RSlice, RString, RVec};
use abi_stable::StableAbi;
use instar_guest_abi::{ErrorCode, ERROR_OK, MODULE_ABI_LEAST_MINOR, MODULE_ABI_MAJOR, MODULE_ABI_MINOR};

/// Bit of [`GuestModule::roles`]: the module offers the source role.
pub const ROLE_SOURCE: u32 = 1;
/// Bit of [`GuestModule::roles`]: the module offers the sink role.
pub const ROLE_SINK: u32 = 2;

/// Bytes of a sector, of which every disk is made.
const SECTOR: u64 = 512;

/// Maximum length in bytes of an image's identity, such as a UUID.
pub const IDENTITY_MAX: usize = instar_guest_abi::IMAGE_ID_MAX;

/// The reason why a plugin could not answer.
#[repr(C)]
#[derive(StableAbi, Clone, Debug, PartialEq, Eq)]
pub struct PluginError {
    /// An `ERROR_*` code as a number.
    pub code: u32,
    /// One clause that names the field and what is wrong with it; the engine adds the file's name.
    pub message: RString,
}

impl PluginError {
    /// Make an error from a code and a clause.
    pub fn new(code: ErrorCode, message: impl Into<String>) -> Self {
        Self { code: code.number(), message: RString::from(message.into()) }
    }
}

/// Another file of an image, in addition to the one that names it.
#[repr(C)]
#[derive(StableAbi, Clone, Debug, PartialEq, Eq)]
pub struct ImageFile {
    /// The recorded name, byte for byte as in the image, or converted to UTF-8 from another encoding.
    /// Hostile: the engine decides whether it is followed.
    pub name: RVec<u8>,
    /// Alternative names, tried in this order if no file has that one; usually none.
    pub other_names: RVec<RVec<u8>>,
    /// Whether the file may grow when the image is written, within the [`Verdict::max_length`] of the image.
    pub grows: bool,
    /// Name of the format whose signature the file has: the plugin's own, or `raw` for plain bytes. The engine does not write
    /// to a file with the certain signature of another format unless the operator insists: it may be someone else's image.
    pub format: RString,
}

/// The record that an image keeps of the image that backs it.
#[repr(C)]
#[derive(StableAbi, Clone, Debug, PartialEq, Eq)]
pub struct BackingPointer {
    /// The recorded name, byte for byte as in the image, or converted to UTF-8 from another encoding. Empty
    /// in a format that records nothing but [an identity](ImageFacts::parent_identity_unique). Hostile.
    pub name: RVec<u8>,
    /// Alternative names, tried in this order if no file has that one; usually none.
    pub other_names: RVec<RVec<u8>>,
    /// The recorded format, if any, byte for byte as in the image.
    pub format: ROption<RVec<u8>>,
}

impl ImageFile {
    /// Iterate over all names, in the order in which the engine looks for an existing file.
    pub fn names(&self) -> impl Iterator<Item = &[u8]> {
        std::iter::once(&self.name).chain(&self.other_names).map(RVec::as_slice)
    }
}

impl BackingPointer {
    /// Make a pointer with this name, and this format if the image records one.
    #[must_use]
    pub fn new(name: Vec<u8>, format: Option<Vec<u8>>) -> Self {
        Self { name: name.into(), other_names: RVec::new(), format: format.map(RVec::from).into() }
    }

    /// Iterate over all names, in the order in which the engine looks for an existing file.
    pub fn names(&self) -> impl Iterator<Item = &[u8]> {
        std::iter::once(&self.name).chain(&self.other_names).map(RVec::as_slice)
    }
}

/// The facts about an image that its header tells a plugin.
#[repr(C)]
#[derive(StableAbi, Clone, Debug, PartialEq, Eq)]
pub struct ImageFacts {
    /// Name of the format: the plugin's name.
    pub format: RString,
    /// Virtual size in bytes.
    pub virtual_size: u64,
    /// Cluster or grain size in bytes, 0 for a format without one.
    pub cluster_size: u64,
    /// Length of the file in bytes at the time of the call; for an image in several files, the sum over those that were open.
    pub file_length: u64,
    /// Upper bound for the number of clusters ([`unit`](Self::unit)), counted from the beginning of the disk, in which the
    /// image itself can hold data or zeroes. No header states the number, but the length of the file bounds it, because each
    /// cluster needs an entry in a mapping table. A format without tables holds the whole disk.
    pub max_allocated_clusters: u64,
    /// The backing pointer, if any.
    pub backing: ROption<BackingPointer>,
    /// Whether the image says that it was not closed cleanly.
    pub dirty: bool,
    /// Whether the image says that it is corrupt.
    pub corrupt: bool,
    /// Whether the content is encrypted.
    pub encrypted: bool,
    /// Identity of the image's content in the terms of its format (the CID of a vmdk, the unique ID of a VHD): up to
    /// [`IDENTITY_MAX`] bytes, which the engine only compares with the [`ImageFacts::parent_identity`] of other images. Empty
    /// for a format without one.
    pub identity: RVec<u8>,
    /// Identity that the image records of the image that backs it: above an image with another identity, its content is
    /// invalid. Empty if it records none.
    pub parent_identity: RVec<u8>,
    /// Whether no image but the parent can have `parent_identity` (a UUID, not a number that other images may share): an image
    /// that has it *is* the parent, whatever its name. The operator may then name a parent whose recorded name does not
    /// resolve, or that has none: a [`BackingPointer`] with an empty name. Such a pointer without a `parent_identity` means
    /// that the format cannot record a parent: the operator may name any image, and if they name none, the image has no parent.
    pub parent_identity_unique: bool,
    /// Whether the image says that a move of its content into its parent was interrupted, and that it still holds all of it.
    /// `parent_identity` may then be an identity that the parent had yet to get, its
    /// [`next_identity`](crate::FormatPlugin::next_identity).
    pub parent_announced: bool,
    /// What is written into the image is compressed, always or where its driver is asked for it
    /// ([`device_flags::COMPRESS`](instar_guest_abi::device_flags::COMPRESS)). A format without compression leaves it `false`.
    pub compresses: bool,
    /// The internal snapshots, in an order that the guest half shares: the engine asks it for the disk of a snapshot by its
    /// index here.
    pub snapshots: RVec<SnapshotFacts>,
    /// The persistent bitmaps; `RNone` if the image cannot have any.
    pub bitmaps: ROption<RVec<BitmapFacts>>,
    /// Other features, in the order in which they are shown.
    pub features: RVec<Feature>,
}

impl ImageFacts {
    /// Describe a clean image without a backing and without features, which may hold its whole disk. Sizes are in bytes.
    #[must_use]
    pub fn new(format: &str, virtual_size: u64, cluster_size: u64, file_length: u64) -> Self {
        let unit = if cluster_size == 0 { SECTOR } else { cluster_size };
        Self {
            format: format.into(),
            virtual_size,
            cluster_size,
            file_length,
            max_allocated_clusters: virtual_size.div_ceil(unit),
            backing: ROption::RNone,
            dirty: false,
            corrupt: false,
            encrypted: false,
            identity: RVec::new(),
            parent_identity: RVec::new(),
            parent_identity_unique: false,
            parent_announced: false,
            compresses: false,
            snapshots: RVec::new(),
            bitmaps: ROption::RNone,
            features: RVec::new(),
        }
    }

    /// Limit [`max_allocated_clusters`](Self::max_allocated_clusters) to the number of mapping table entries that the file has
    /// room for, and to the clusters of the disk.
    #[must_use]
    pub fn with_clusters_at_most(mut self, entries: u64) -> Self {
        self.max_allocated_clusters = entries.min(self.virtual_size.div_ceil(self.unit()));
        self
    }

    /// Return the allocation unit in bytes: a cluster, or a sector of 512 bytes in a format without clusters.
    #[must_use]
    pub fn unit(&self) -> u64 {
        if self.cluster_size == 0 {
            SECTOR
        } else {
            self.cluster_size
        }
    }

    /// Whether this image was made on `parent`, as far as both tell: the parent has the identity that this image records, or an
    /// interrupted operation announced that it would get it. `next` is the
    /// [`next_identity`](crate::FormatPlugin::next_identity) of the parent for this image.
    #[must_use]
    pub fn goes_with(&self, parent: &Self, next: &[u8]) -> bool {
        let recorded = self.parent_identity.as_slice();
        recorded.is_empty() || recorded == parent.identity.as_slice() || (self.parent_announced && recorded == next)
    }

    /// Whether both identities prove that this image was made on `parent`; `next` as for [`goes_with`](Self::goes_with).
    #[must_use]
    pub fn is_proven_child_of(&self, parent: &Self, next: &[u8]) -> bool {
        self.parent_identity_unique && !self.parent_identity.is_empty() && self.goes_with(parent, next)
    }

    /// Whether writing into the parent changes what this image records of it; `next` as for [`goes_with`](Self::goes_with).
    #[must_use]
    pub fn follows(&self, next: &[u8]) -> bool {
        !self.parent_identity.is_empty() && !next.is_empty()
    }

    /// Return the value of the feature with this name, if any.
    #[must_use]
    pub fn feature(&self, name: &str) -> Option<&FactValue> {
        self.features.iter().find(|feature| feature.name == name).map(|feature| &feature.value)
    }

    /// Return the value of a feature that is a number.
    #[must_use]
    pub fn number(&self, name: &str) -> Option<u64> {
        match self.feature(name)? {
            FactValue::Number(number) => Some(*number),
            _ => None,
        }
    }

    /// Return the value of a feature that is a text, unescaped: text from an image may hold control characters.
    #[must_use]
    pub fn text(&self, name: &str) -> Option<&str> {
        match self.feature(name)? {
            FactValue::Text(text) => Some(text.as_str()),
            _ => None,
        }
    }

    /// Whether a feature is on. A missing feature is off.
    #[must_use]
    pub fn flag(&self, name: &str) -> bool {
        matches!(self.feature(name), Some(FactValue::Flag(true)))
    }
}

/// The part that an image takes in an operation: it is read, written, read and then emptied, or lies below a written image.
/// The guest half has the same four.
#[repr(u8)]
#[derive(StableAbi, Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// The operation works on its content.
    Read,
    /// Data goes into it.
    Write,
    /// As [`Role::Read`]; the operation empties it once its content is stored elsewhere.
    Empty,
    /// It lies below an image that is written, and is read only where that one holds nothing. If the written image has a
    /// parent, its plugin is asked for this role as well.
    Below,
}

/// The decision whether an image may take its part in an operation.
#[repr(C)]
#[derive(StableAbi, Clone, Debug, PartialEq, Eq)]
pub struct Verdict {
    /// `ERROR_OK` if it may, otherwise the code of the refusal.
    pub code: u32,
    /// The reason of a refusal: one clause that names the feature and what to do. With `ERROR_OK`, a warning for the operator,
    /// unless it is empty.
    pub reason: RString,
    /// For [`Role::Write`]: upper bound for the length of the file in bytes; for an image in several files, of all together.
    /// The engine ends a guest that asks for more. For [`Role::Empty`]: the same, where 0 means the present length. Without
    /// meaning in the other roles.
    pub max_length: u64,
}

impl Verdict {
    /// Let the image take its part; `max_length` as in [`Verdict::max_length`].
    #[must_use]
    pub fn supported(max_length: u64) -> Self {
        Self { code: ERROR_OK, reason: RString::new(), max_length }
    }

    /// Refuse the image its part.
    pub fn refused(code: ErrorCode, reason: impl Into<String>) -> Self {
        Self { code: code.number(), reason: RString::from(reason.into()), max_length: 0 }
    }
}

/// The guest half of a plugin: the bytes of its ELF, and the roles that it offers.
#[repr(C)]
#[derive(StableAbi, Clone, Copy, Debug)]
pub struct GuestModule {
    /// The relocatable ELF that the guest build helper makes.
    pub elf: RSlice<'static, u8>,
    /// Bits [`ROLE_SOURCE`] and [`ROLE_SINK`].
    pub roles: u32,
    /// `MODULE_ABI_MAJOR` at build time.
    pub abi_major: u32,
    /// `MODULE_ABI_MINOR` at build time: the engine does not use functions that it does not know.
    pub abi_minor: u32,
    /// `MODULE_ABI_LEAST_MINOR` at build time: an engine whose `MODULE_ABI_MINOR` is lower refuses the module.
    pub least_minor: u32,
}

impl GuestModule {
    /// Describe a module that offers `roles`, built with the module interface of this crate's `instar-guest-abi`.
    #[must_use]
    pub const fn new(elf: &'static [u8], roles: u32) -> Self {
        Self {
            elf: RSlice::from_slice(elf),
            roles,
            abi_major: MODULE_ABI_MAJOR,
            abi_minor: MODULE_ABI_MINOR,
            least_minor: MODULE_ABI_LEAST_MINOR,
        }
    }

    /// Describe a module that offers both roles.
    #[must_use]
    pub const fn source_and_sink(elf: &'static [u8]) -> Self {
        Self::new(elf, ROLE_SOURCE | ROLE_SINK)
    }

    /// Describe a module whose images can only be read.
    #[must_use]
    pub const fn source_only(elf: &'static [u8]) -> Self {
        Self::new(elf, ROLE_SOURCE)
    }

    /// Describe a module whose images can only be written.
    #[must_use]
    pub const fn sink_only(elf: &'static [u8]) -> Self {
        Self::new(elf, ROLE_SINK)
    }
}

/// The specification of a new, empty image.
#[repr(C)]
#[derive(StableAbi, Clone, Debug)]
pub struct CreateSpec {
    /// Virtual size in bytes.
    pub virtual_size: u64,
    /// Name of the new file without its directory, for formats that record it.
    pub file_name: RVec<u8>,
    /// Backing pointer to record.
    pub backing: ROption<BackingPointer>,
    /// Facts about the backing image, if the engine looked at it.
    pub backing_facts: ROption<ImageFacts>,
    /// `-o` options as name and value, in the order given.
    pub options: RVec<abi_stable::std_types::Tuple2<RString, RString>>,
}

/// A range of bytes that a new image contains at an offset; all other bytes are zero.
#[repr(C)]
#[derive(StableAbi, Clone, Debug, PartialEq, Eq)]
pub struct ImageRegion {
    /// Byte offset in the file.
    pub offset: u64,
    /// The bytes.
    pub bytes: RVec<u8>,
}

/// One more file of a new image: `length` zero bytes with `regions` written over them.
#[repr(C)]
#[derive(StableAbi, Clone, Debug, PartialEq, Eq)]
pub struct CreatedFile {
    /// Its name, without a directory: the engine makes it beside the image's own file, where it must not exist.
    pub name: RVec<u8>,
    /// Length of the file in bytes.
    pub length: u64,
    /// What is not zero.
    pub regions: RVec<ImageRegion>,
}

/// A range of a new image for which the file system reserves space, so that a later write to it cannot fail for lack of space.
#[repr(C)]
#[derive(StableAbi, Clone, Copy, Debug, PartialEq, Eq)]
pub struct ReservedRange {
    /// Byte offset in the file.
    pub offset: u64,
    /// Length in bytes.
    pub length: u64,
    /// Write zeroes, instead of only asking the file system for the space.
    pub written: bool,
}

/// The content of a new image: a file of `length` zero bytes with `regions` written over them.
#[repr(C)]
#[derive(StableAbi, Clone, Debug, PartialEq, Eq)]
pub struct CreatedImage {
    /// Length of the file in bytes.
    pub length: u64,
    /// What is not zero.
    pub regions: RVec<ImageRegion>,
    /// The ranges that take space although they are zero.
    pub reserved: RVec<ReservedRange>,
    /// The other files of an image in several files.
    pub files: RVec<CreatedFile>,
}
