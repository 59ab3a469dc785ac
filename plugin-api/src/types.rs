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

/// Longest identity of an image in bytes.
pub const IDENTITY_MAX: usize = instar_guest_abi::IMAGE_ID_MAX;

/// Why a plugin could not answer.
#[repr(C)]
#[derive(StableAbi, Clone, Debug, PartialEq, Eq)]
pub struct PluginError {
    /// An `ERROR_*` code as a number.
    pub code: u32,
    /// One clause that names the field and what is wrong with it; the engine adds the file's name.
    pub message: RString,
}

impl PluginError {
    /// An error with a code and a clause.
    pub fn new(code: ErrorCode, message: impl Into<String>) -> Self {
        Self { code: code.number(), message: RString::from(message.into()) }
    }
}

/// A file that an image has besides the one that it is named by.
#[repr(C)]
#[derive(StableAbi, Clone, Debug, PartialEq, Eq)]
pub struct ImageFile {
    /// The recorded name, as the bytes that stand in the image, or converted to UTF-8 if they are in another encoding.
    /// Hostile: the engine decides whether it is followed.
    pub name: RVec<u8>,
    /// Other names that may be meant, to be looked for in this order if there is no such file: usually none.
    pub other_names: RVec<RVec<u8>>,
    /// Whether the file may become longer when the image is written: by as much as [`Verdict::max_length`] lets the image.
    pub grows: bool,
    /// Name of the format whose mark the file has: the plugin's own, or `raw` for plain bytes. A file with the certain mark of
    /// another format is not written to, unless the operator insists: it may be somebody else's image.
    pub format: RString,
}

/// What an image records about the image it is backed by.
#[repr(C)]
#[derive(StableAbi, Clone, Debug, PartialEq, Eq)]
pub struct BackingPointer {
    /// The recorded name, as the bytes that stand in the image, or converted to UTF-8 if they are in another encoding. Empty
    /// in a format that records nothing but [an identity](ImageFacts::parent_identity_unique). Hostile.
    pub name: RVec<u8>,
    /// Other names that may be meant, to be looked for in this order if there is no such file: usually none.
    pub other_names: RVec<RVec<u8>>,
    /// The recorded format, if there is one, as the bytes that stand in the image.
    pub format: ROption<RVec<u8>>,
}

impl ImageFile {
    /// All names that may be meant, the first of which is there is the one.
    pub fn names(&self) -> impl Iterator<Item = &[u8]> {
        std::iter::once(&self.name).chain(&self.other_names).map(RVec::as_slice)
    }
}

impl BackingPointer {
    /// A pointer with this name, and this format if one is recorded.
    #[must_use]
    pub fn new(name: Vec<u8>, format: Option<Vec<u8>>) -> Self {
        Self { name: name.into(), other_names: RVec::new(), format: format.map(RVec::from).into() }
    }

    /// All names that may be meant, the first of which is there is the one.
    pub fn names(&self) -> impl Iterator<Item = &[u8]> {
        std::iter::once(&self.name).chain(&self.other_names).map(RVec::as_slice)
    }
}

/// What a plugin knows of an image from its header.
#[repr(C)]
#[derive(StableAbi, Clone, Debug, PartialEq, Eq)]
pub struct ImageFacts {
    /// Name of the format: the plugin's name.
    pub format: RString,
    /// Virtual size in bytes.
    pub virtual_size: u64,
    /// Cluster or grain size in bytes, 0 for a format without one.
    pub cluster_size: u64,
    /// Length of the file in bytes when it was looked at; of an image in several files, that of those that were open,
    /// together.
    pub file_length: u64,
    /// In how many of its clusters ([`unit`](Self::unit)) the image itself can hold something at most, data or zeroes, counted
    /// from the begin of the disk. Headers do not say how many there are, but the length of the file bounds it: an entry of a
    /// mapping table stands for each. A format without tables holds all of the disk.
    pub max_allocated_clusters: u64,
    /// The backing pointer, if there is one.
    pub backing: ROption<BackingPointer>,
    /// The image says of itself that it was not closed cleanly.
    pub dirty: bool,
    /// The image says of itself that it is corrupt.
    pub corrupt: bool,
    /// The content is encrypted.
    pub encrypted: bool,
    /// Which content the image has, as its format tells it (the CID of a vmdk, the unique ID of a VHD): up to
    /// [`IDENTITY_MAX`] bytes that the engine compares with other images' [`ImageFacts::parent_identity`], and nothing
    /// else. Empty for a format without one.
    pub identity: RVec<u8>,
    /// The identity that the image records of what it is backed by: with another one below it, its content makes no sense.
    /// Empty if it records none.
    pub parent_identity: RVec<u8>,
    /// `parent_identity` is no image's but the parent's (a UUID, not a number that other images may have as well): an image
    /// that has it *is* the parent, whatever its name. Then the operator may name a parent whose recorded name leads nowhere,
    /// or that has none: a [`BackingPointer`] with an empty name. With such a pointer and no `parent_identity` at all, the
    /// format has no place for a parent: the operator may name any, and without that there is none.
    pub parent_identity_unique: bool,
    /// The image says that its content was being moved into its parent when that was interrupted, and that it still holds all
    /// of it: `parent_identity` may be one that what is below it was yet to get, its
    /// [`next_identity`](crate::FormatPlugin::next_identity).
    pub parent_announced: bool,
    /// What is written into the image is compressed, always or where its driver is asked for it
    /// ([`device_flags::COMPRESS`](instar_guest_abi::device_flags::COMPRESS)). A format without compression leaves it `false`.
    pub compresses: bool,
    /// Its internal snapshots, in an order that the guest half knows, too: it is asked for the disk of one by its place here.
    pub snapshots: RVec<SnapshotFacts>,
    /// Its persistent bitmaps; `RNone` if the image can have none.
    pub bitmaps: ROption<RVec<BitmapFacts>>,
    /// Other features, in the order in which they are shown.
    pub features: RVec<Feature>,
}

impl ImageFacts {
    /// Facts of a clean image without a backing and without features, which may hold all of its disk. Sizes in bytes.
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

    /// The same with [`max_allocated_clusters`](Self::max_allocated_clusters) for a file that has room for so many entries of
    /// mapping tables: no more than the disk has clusters.
    #[must_use]
    pub fn with_clusters_at_most(mut self, entries: u64) -> Self {
        self.max_allocated_clusters = entries.min(self.virtual_size.div_ceil(self.unit()));
        self
    }

    /// Size in bytes of what is allocated at once: a cluster, or a sector of 512 bytes in a format without clusters.
    #[must_use]
    pub fn unit(&self) -> u64 {
        if self.cluster_size == 0 {
            SECTOR
        } else {
            self.cluster_size
        }
    }

    /// Whether this image was made on `parent`, as far as both say: it has the identity that this one records, or is about
    /// to get it, which an operation that was interrupted announced. `next` is the
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

    /// The value of a feature, if there is one of this name.
    #[must_use]
    pub fn feature(&self, name: &str) -> Option<&FactValue> {
        self.features.iter().find(|feature| feature.name == name).map(|feature| &feature.value)
    }

    /// The value of a feature that is a number.
    #[must_use]
    pub fn number(&self, name: &str) -> Option<u64> {
        match self.feature(name)? {
            FactValue::Number(number) => Some(*number),
            _ => None,
        }
    }

    /// The value of a feature that is a text, as it is: what comes from an image may hold control characters.
    #[must_use]
    pub fn text(&self, name: &str) -> Option<&str> {
        match self.feature(name)? {
            FactValue::Text(text) => Some(text.as_str()),
            _ => None,
        }
    }

    /// Whether a feature is on. One that is not there is off.
    #[must_use]
    pub fn flag(&self, name: &str) -> bool {
        matches!(self.feature(name), Some(FactValue::Flag(true)))
    }
}

/// What an image is to an operation, whichever that is. The guest half knows the same four.
#[repr(u8)]
#[derive(StableAbi, Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Its content is what the operation works on.
    Read,
    /// Data goes into it.
    Write,
    /// As [`Role::Read`], and it is emptied once its content is elsewhere.
    Empty,
    /// It is below a member that is written: read only where that one holds nothing. The written image itself is asked in
    /// this role, too, if it has a parent.
    Below,
}

/// Whether an image may take its part in an operation.
#[repr(C)]
#[derive(StableAbi, Clone, Debug, PartialEq, Eq)]
pub struct Verdict {
    /// `ERROR_OK` if it may, else the code of the refusal.
    pub code: u32,
    /// Why not: one clause that names the feature and what to do. With `ERROR_OK`, a warning for the operator, if it is
    /// not empty.
    pub reason: RString,
    /// For [`Role::Write`]: the longest that the file may become, in bytes; of an image in several files, all together. The
    /// engine ends a guest that asks for more. For [`Role::Empty`]: the same; 0 for no longer than it is. Of no meaning in the
    /// other roles.
    pub max_length: u64,
}

impl Verdict {
    /// The image may take its part; `max_length` as in [`Verdict::max_length`].
    #[must_use]
    pub fn supported(max_length: u64) -> Self {
        Self { code: ERROR_OK, reason: RString::new(), max_length }
    }

    /// The image may not take its part.
    pub fn refused(code: ErrorCode, reason: impl Into<String>) -> Self {
        Self { code: code.number(), reason: RString::from(reason.into()), max_length: 0 }
    }
}

/// The guest half of a plugin.
#[repr(C)]
#[derive(StableAbi, Clone, Copy, Debug)]
pub struct GuestModule {
    /// A relocatable ELF as the guest build helper makes it.
    pub elf: RSlice<'static, u8>,
    /// [`ROLE_SOURCE`] and [`ROLE_SINK`].
    pub roles: u32,
    /// `MODULE_ABI_MAJOR` that it was built with.
    pub abi_major: u32,
    /// `MODULE_ABI_MINOR` that it was built with: what it offers beyond what the engine knows is not used.
    pub abi_minor: u32,
    /// `MODULE_ABI_LEAST_MINOR` that it was built with: an engine whose `MODULE_ABI_MINOR` is lower refuses it.
    pub least_minor: u32,
}

impl GuestModule {
    /// A module that offers the roles in `roles`, built with the module interface of this crate's `instar-guest-abi`.
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

    /// A module that offers both roles.
    #[must_use]
    pub const fn source_and_sink(elf: &'static [u8]) -> Self {
        Self::new(elf, ROLE_SOURCE | ROLE_SINK)
    }

    /// A module that can only be read from.
    #[must_use]
    pub const fn source_only(elf: &'static [u8]) -> Self {
        Self::new(elf, ROLE_SOURCE)
    }

    /// A module that can only be written to.
    #[must_use]
    pub const fn sink_only(elf: &'static [u8]) -> Self {
        Self::new(elf, ROLE_SINK)
    }
}

/// A new, empty image that is wanted.
#[repr(C)]
#[derive(StableAbi, Clone, Debug)]
pub struct CreateSpec {
    /// Virtual size in bytes.
    pub virtual_size: u64,
    /// Name of the new file without its directory, for a format that records it.
    pub file_name: RVec<u8>,
    /// Backing pointer to record.
    pub backing: ROption<BackingPointer>,
    /// Facts of the backing image, if it was looked at.
    pub backing_facts: ROption<ImageFacts>,
    /// `-o` options as name and value, in the order given.
    pub options: RVec<abi_stable::std_types::Tuple2<RString, RString>>,
}

/// Bytes at an offset of a new image.
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
    /// Its name, without a directory: it is made beside the image's own file, and must not exist.
    pub name: RVec<u8>,
    /// Length of the file in bytes.
    pub length: u64,
    /// What is not zero.
    pub regions: RVec<ImageRegion>,
}

/// Space of a new image that its file system reserves, so that a write to it cannot fail for want of it.
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

/// What to write for a new image: a file of `length` zero bytes with `regions` written over them.
#[repr(C)]
#[derive(StableAbi, Clone, Debug, PartialEq, Eq)]
pub struct CreatedImage {
    /// Length of the file in bytes.
    pub length: u64,
    /// What is not zero.
    pub regions: RVec<ImageRegion>,
    /// What is to take space although it is zero.
    pub reserved: RVec<ReservedRange>,
    /// The other files of an image in several files.
    pub files: RVec<CreatedFile>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_parent_is_known_by_its_identity() {
        let mut parent = ImageFacts::new("a", 1, 0, 1);
        let mut child = ImageFacts::new("b", 1, 0, 1);
        assert!(child.goes_with(&parent, &[]) && !child.follows(&[]), "neither says anything");
        let next = [3, 4];
        parent.identity = vec![1, 2].into();
        assert!(child.goes_with(&parent, &next) && !child.follows(&next));
        child.parent_identity = vec![1, 2].into();
        assert!(child.goes_with(&parent, &next) && child.follows(&next));
        assert!(!child.is_proven_child_of(&parent, &next), "others may have it");
        child.parent_identity_unique = true;
        assert!(child.is_proven_child_of(&parent, &next));
        child.parent_identity = vec![3, 4].into();
        assert!(!child.goes_with(&parent, &next), "restored from a backup");
        child.parent_announced = true;
        assert!(child.goes_with(&parent, &next), "interrupted");
        child.parent_identity = RVec::new();
        assert!(child.goes_with(&parent, &next) && !child.is_proven_child_of(&parent, &next), "none is recorded");
        child.parent_identity = vec![1].into();
        assert!(!child.goes_with(&parent, &next));
        assert!(!child.goes_with(&ImageFacts::new("a", 1, 0, 1), &[]), "a parent without an identity");
    }
}
