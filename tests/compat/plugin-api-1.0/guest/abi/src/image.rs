//! What an image is, what it holds, and which parent it has.

/// What a [`WireExtent`] holds. Stored as `u32` in [`WireExtent::kind`].
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum ExtentKind {
    /// Plain bytes at `location` of `device`.
    Data = 1,
    /// Reads as zeroes.
    Zero = 2,
    /// Allocated, but only the source can decode it (compressed): ask [`SourceOps::read`](crate::SourceOps::read).
    Encoded = 3,
    /// Plain bytes in guest memory at address `location`.
    Memory = 4,
}

impl ExtentKind {
    /// The kind with this number, if there is one.
    #[must_use]
    pub fn from_u32(value: u32) -> Option<Self> {
        Some(match value {
            1 => Self::Data,
            2 => Self::Zero,
            3 => Self::Encoded,
            4 => Self::Memory,
            _ => return None,
        })
    }
}

/// A run of guest bytes that a layer holds itself, as it crosses from module to module. Drivers see the SDK's `Extent`, whose
/// content is an enum.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct WireExtent {
    /// Guest offset in bytes.
    pub guest_offset: u64,
    /// Length in bytes, at least 1, not past the virtual size.
    pub length: u64,
    /// Byte offset on `device`, or address, depending on `kind`; private to the source for `Encoded`.
    pub location: u64,
    /// An [`ExtentKind`] as a number.
    pub kind: u32,
    /// The device for `Data`.
    pub device: u32,
}

/// What a driver knows of an open image.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ImageInfo {
    /// Virtual size in bytes.
    pub virtual_size: u64,
    /// Cluster or grain size in bytes: the unit in which the format allocates; 1 for raw.
    pub cluster_size: u64,
}

/// What a sink found out while planning.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PlanSummary {
    /// Upper bound of the file's length in bytes when everything is written.
    pub final_length: u64,
    /// Clusters that will be allocated for data.
    pub new_data_clusters: u64,
    /// Clusters that will be allocated for metadata.
    pub new_metadata_clusters: u64,
    /// Mapping tables of the image that were not read because that would cost more than the commit: damage in them goes
    /// unnoticed.
    pub unread_tables: u64,
}

/// Longest [`ImageId`] in bytes.
pub const IMAGE_ID_MAX: usize = 32;

/// Which content an image has, as its format tells it (the content ID of a vmdk): bytes that are only compared, and that
/// only drivers of the format take apart.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct ImageId {
    length: u32,
    bytes: [u8; IMAGE_ID_MAX],
}

impl ImageId {
    /// The identity with these bytes; `None` if there are none, or more than [`IMAGE_ID_MAX`].
    #[must_use]
    pub fn new(id: &[u8]) -> Option<Self> {
        let mut bytes = [0; IMAGE_ID_MAX];
        bytes.get_mut(..id.len()).filter(|_| !id.is_empty())?.copy_from_slice(id);
        Some(Self { length: u32::try_from(id.len()).ok()?, bytes })
    }

    /// Its bytes.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8] {
        usize::try_from(self.length).ok().and_then(|length| self.bytes.get(..length)).unwrap_or_default()
    }
}

impl core::fmt::Debug for ImageId {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        write!(f, "ImageId({:02x?})", self.as_bytes())
    }
}

/// How far a commit is that changes the identity of a source's parent. Passed as `u32`.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ParentStage {
    /// The parent is about to get the identity, and then what the source holds. Until it is [`Reached`](Self::Reached), the
    /// source keeps everything that it holds, so that the parent may have its old identity as well.
    Announced = 1,
    /// The parent has the identity, and holds durably what was committed: no other one goes with the source any more.
    Reached = 2,
}

impl ParentStage {
    /// The stage with this number, if there is one.
    #[must_use]
    pub fn from_u32(value: u32) -> Option<Self> {
        Some(match value {
            1 => Self::Announced,
            2 => Self::Reached,
            _ => return None,
        })
    }
}

/// What an image is to record of its parent.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct WireParent {
    /// The parent's name: `name_length` bytes, without a zero byte.
    pub name: *const u8,
    /// At least 1.
    pub name_length: usize,
    /// Name of the parent's format, UTF-8: `format_length` bytes.
    pub format: *const u8,
    /// At least 1.
    pub format_length: usize,
    /// The parent's identity, or null if it has none.
    pub identity: *const ImageId,
    /// Virtual size of the parent in bytes.
    pub virtual_size: u64,
}
