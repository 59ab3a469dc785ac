//! An open image: its header, verified against what the host saw, and the bounds of its file.

use crate::data_file::DataFile;
use alloc::format;
use alloc::string::String;
use alloc::vec;
use instar_guest_sdk::abi::{device_flags, DeviceConfig, ErrorCode};
pub use instar_guest_sdk::overflow;
use instar_guest_sdk::{checked_end, BlockIo, DriverError, DriverResult};
use instar_qcow2_format::{
    autoclear, encryption_method, encryption_refusal, incompatible, ClusterSize, ExtensionKind, GuestCluster, Header,
    HeaderErrorKind, HostCluster, HostOffset, L2Entry, Version, AUTOCLEAR_OFFSET,
};

/// Which role the image is opened for: it decides which side a corruption is reported on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Data comes from it.
    Source,
    /// Data goes into it.
    Sink,
}

/// An open image.
#[derive(Clone, Debug)]
pub struct Image {
    /// Device number for requests.
    pub device: u32,
    /// Length of the file in bytes when it was opened.
    pub file_length: u64,
    /// The longest that the host lets the file become, in bytes.
    pub max_length: u64,
    /// Whether the image stands on a device that keeps its length, such as a block device. Clusters that are not in use
    /// hold stale bytes there.
    pub fixed_length: bool,
    /// The file that holds the guest's clusters, if it is another one.
    pub data: Option<DataFile>,
    /// The header.
    pub header: Header,
    role: Role,
    /// As in [`DeviceConfig::cache_bytes`].
    cache_bytes: u64,
}

impl Image {
    /// Read and verify the header.
    ///
    /// # Errors
    /// [`ErrorCode::HeaderMismatch`] if it is not what the host saw; the code of a feature that cannot be
    /// read; corruption of this side.
    pub fn open(io: &mut dyn BlockIo, device: &DeviceConfig, role: Role) -> DriverResult<Self> {
        let first = device.cluster_size.clamp(512, 2 << 20).min(device.file_length);
        let mut bytes = vec![0; usize::try_from(first).unwrap_or(0)];
        io.read(device.device, 0, &mut bytes)?;
        let header = Header::parse(&bytes).map_err(|error| {
            let code = match (error.kind, role) {
                (HeaderErrorKind::NotQcow2, _) => ErrorCode::HeaderMismatch,
                (HeaderErrorKind::Unsupported, _) => ErrorCode::UnsupportedFormat,
                (_, Role::Source) => ErrorCode::OverlayCorrupt,
                (_, Role::Sink) => ErrorCode::BackingCorrupt,
            };
            DriverError::new(code, error.text).at(device.device, error.offset)
        })?;
        // The size of a snapshot's disk is compared when the snapshot is looked up.
        let same_size = device.snapshot != 0 || header.virtual_size == device.virtual_size;
        if !same_size || header.cluster_size.bytes() != device.cluster_size {
            return Err(DriverError::new(
                ErrorCode::HeaderMismatch,
                format!(
                    "the header changed: virtual size {} and cluster size {} bytes, before {} and {}",
                    header.virtual_size,
                    header.cluster_size.bytes(),
                    device.virtual_size,
                    device.cluster_size
                ),
            )
            .at(device.device, 0));
        }
        let image = Self {
            device: device.device,
            file_length: device.file_length,
            max_length: device.max_length,
            fixed_length: device.flags & device_flags::FIXED_LENGTH != 0,
            data: DataFile::of(&header, device)?,
            header,
            role,
            cache_bytes: device.cache_bytes,
        };
        image.refuse_unreadable()?;
        image.check_table_bounds()?;
        Ok(image)
    }

    /// How many bytes of tables to hold while they are read: `most`, or less if other images share the heap.
    pub fn cache_bytes(&self, most: u64) -> u64 {
        if self.cache_bytes == 0 {
            most
        } else {
            most.min(self.cache_bytes)
        }
    }

    /// Features that make the content unreadable for this driver. The host half refuses them first, by the
    /// same header; this is what holds if it did not.
    fn refuse_unreadable(&self) -> DriverResult<()> {
        let refused = |code, text: &str| Err(DriverError::new(code, text).at(self.device, 72));
        let header = &self.header;
        if header.crypt_method != 0 {
            let text = encryption_refusal(encryption_method(header.crypt_method));
            return refused(ErrorCode::LuksUnsupported, &text);
        }
        if header.incompatible & !incompatible::KNOWN != 0 {
            return refused(ErrorCode::UnsupportedFormat, "the image has an unknown incompatible feature");
        }
        Ok(())
    }

    /// The device that holds the guest's clusters.
    #[must_use]
    pub fn data_device(&self) -> u32 {
        self.data.map_or(self.device, |data| data.device)
    }

    /// The cluster of this file that an L2 entry refers to, with its COPIED flag: none of an image with a data file.
    #[must_use]
    pub fn own_host(&self, entry: L2Entry) -> Option<(HostOffset, bool)> {
        entry.host().filter(|_| self.data.is_none())
    }

    /// Whether the image was not closed cleanly (`lazy_refcounts`): its refcounts and COPIED flags may be wrong.
    #[must_use]
    pub fn is_dirty(&self) -> bool {
        self.header.has(incompatible::DIRTY)
    }

    /// Whether clusters of the file may belong to others than the active state: to snapshots, to bitmaps, or to a header
    /// extension that this program does not know.
    #[must_use]
    pub fn is_shared(&self) -> bool {
        let known =
            |kind| matches!(kind, ExtensionKind::BackingFormat | ExtensionKind::FeatureNames | ExtensionKind::DataFile);
        self.header.snapshots != 0 || self.header.extensions.iter().any(|e| !known(e.kind))
    }

    /// The image as another L1 table maps it: all of its entries, whatever the size of the virtual disk.
    #[must_use]
    pub fn mapped_by(&self, l1_table: HostOffset, l1_entries: u32) -> Self {
        let mut view = self.clone();
        view.header.l1_table = l1_table;
        view.header.l1_entries = l1_entries;
        let bytes = u64::from(l1_entries).saturating_mul(view.header.l2_coverage());
        view.header.virtual_size = bytes.min(i64::MAX as u64);
        view
    }

    /// Before the first change: autoclear features that this program does not keep up must go ("Header",
    /// `autoclear_features`). Durable when it returns, so that no change is while they still claim to hold.
    ///
    /// # Errors
    /// I/O errors.
    pub fn clear_autoclear(&self, io: &mut dyn BlockIo) -> DriverResult<()> {
        let raw = if self.data.is_some() { autoclear::DATA_FILE_RAW } else { 0 };
        let kept = self.header.autoclear & (autoclear::BITMAPS | raw);
        if self.header.version == Version::V3 && self.header.autoclear != kept {
            io.write(self.device, AUTOCLEAR_OFFSET, &kept.to_be_bytes())?;
            io.flush(self.device)?;
        }
        Ok(())
    }

    /// Features that forbid changing the image.
    ///
    /// # Errors
    /// The code of the feature.
    pub fn refuse_unwritable(&self) -> DriverResult<()> {
        if self.header.has(incompatible::CORRUPT) {
            return Err(self.corrupt(72, "the image is marked corrupt"));
        }
        Ok(())
    }

    fn check_table_bounds(&self) -> DriverResult<()> {
        let header = &self.header;
        let l1_end = header.l1_table.0.saturating_add(header.l1_bytes());
        if header.l1_entries != 0 && l1_end > self.file_length {
            return Err(self.corrupt(
                40,
                format!("the L1 table ends at {l1_end}, past the end of the file at {}", self.file_length),
            ));
        }
        let end = header.refcount_table.0.saturating_add(header.refcount_table_bytes());
        if end > self.clustered_length() {
            return Err(self.corrupt(
                48,
                format!("the refcount table ends at {end}, past the end of the file at {}", self.file_length),
            ));
        }
        Ok(())
    }

    /// The error code for corruption of this side.
    #[must_use]
    pub fn corrupt_code(&self) -> ErrorCode {
        match self.role {
            Role::Source => ErrorCode::OverlayCorrupt,
            Role::Sink => ErrorCode::BackingCorrupt,
        }
    }

    /// Corruption of this image at byte `offset` of the file.
    pub fn corrupt(&self, offset: u64, text: impl Into<String>) -> DriverError {
        DriverError::new(self.corrupt_code(), text).at(self.device, offset)
    }

    /// The cluster size.
    #[must_use]
    pub fn cluster_size(&self) -> ClusterSize {
        self.header.cluster_size
    }

    /// Length of the file in bytes, rounded up to whole clusters.
    #[must_use]
    pub fn clustered_length(&self) -> u64 {
        self.cluster_size().round_up(self.file_length).unwrap_or(u64::MAX)
    }

    /// Whether a whole cluster at this offset lies within the file (its last cluster may be cut short).
    #[must_use]
    pub fn holds_cluster(&self, offset: HostOffset) -> bool {
        checked_end(offset.0, self.cluster_size().bytes(), self.clustered_length()).is_some()
    }

    /// Whether all bytes `offset..offset + length` lie within the file.
    #[must_use]
    pub fn holds_bytes(&self, offset: HostOffset, length: u64) -> bool {
        checked_end(offset.0, length, self.file_length).is_some()
    }

    /// The host cluster of an offset.
    #[must_use]
    pub fn host_cluster(&self, offset: HostOffset) -> HostCluster {
        self.cluster_size().host_cluster(offset)
    }

    /// The offset of a host cluster.
    ///
    /// # Errors
    /// A bug of the driver: a cluster that no file is long enough for.
    pub fn host_offset(&self, cluster: HostCluster) -> DriverResult<HostOffset> {
        self.cluster_size().host_offset(cluster).ok_or_else(|| overflow("a host offset"))
    }

    /// Bytes of a cluster that the virtual disk has: fewer than a cluster at its end.
    #[must_use]
    pub fn visible_bytes(&self, cluster: GuestCluster) -> u64 {
        let size = self.cluster_size();
        (self.header.virtual_size - (cluster.0 << size.bits())).min(size.bytes())
    }

    /// Number of L1 entries that map the virtual disk; entries after them mean nothing.
    #[must_use]
    pub fn used_l1_entries(&self) -> u64 {
        self.mapped_size().div_ceil(self.header.l2_coverage())
    }

    /// Bytes of the virtual disk that the L1 table can map: all of them, unless it is about to grow.
    #[must_use]
    pub fn mapped_size(&self) -> u64 {
        self.header.virtual_size.min(u64::from(self.header.l1_entries).saturating_mul(self.header.l2_coverage()))
    }

    /// Size of the pieces in which metadata is read and written, in bytes: 4 KiB, or a smaller cluster.
    #[must_use]
    pub fn slice_size(&self) -> usize {
        usize::try_from(self.cluster_size().bytes().min(4096)).unwrap_or(4096)
    }
}
