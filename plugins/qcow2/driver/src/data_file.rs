//! The external data file of an image ("Header", incompatible feature bit 2; "External Data File Name Header Extension").
//!
//! It holds the guest's clusters, each at its guest offset ("Standard Cluster Descriptor"), and nothing else: no refcount
//! counts them, no snapshot shares them, none is compressed. Past the end of the data file, clusters read as zeroes. A cluster
//! that no entry refers to may hold stale bytes there, unless the data file is *raw* (autoclear feature bit 1): then it reads
//! as the disk does.
//!
//! What is written goes in this order: the data file, *then a flush* of it, then tables that refer to it. A crash leaves bytes
//! in clusters that nothing refers to. Clusters are given back the other way round: no table refers to them any more, *then a
//! flush*, then they are punched out of the data file. A crash leaves the same.

use alloc::format;
use instar_guest_sdk::abi::{device_flags, DeviceConfig, ErrorCode, FileDevice};
use instar_guest_sdk::{DriverError, DriverResult};
use instar_qcow2_format::{autoclear, incompatible, Header};

/// The data file.
#[derive(Clone, Copy, Debug)]
pub struct DataFile {
    /// Device number for requests.
    pub device: u32,
    /// Length in bytes, as it is now.
    pub file_length: u64,
    /// The longest that the host lets it become, in bytes.
    pub max_length: u64,
    /// Whether it stands on a device that keeps its length.
    pub fixed_length: bool,
    /// Whether it reads as the disk does, without the image.
    pub raw: bool,
}

impl DataFile {
    /// The data file of an image with this header, if it has one.
    ///
    /// # Errors
    /// [`ErrorCode::HeaderMismatch`] if the host saw another number of files; [`ErrorCode::ExternalDataFile`] for features that
    /// exclude each other.
    pub(crate) fn of(header: &Header, config: &DeviceConfig) -> DriverResult<Option<Self>> {
        let files = config.files.as_slice();
        let refused = |code, at, text: &str| Err(DriverError::new(code, text).at(config.device, at));
        if files.len() != usize::from(header.has(incompatible::DATA_FILE)) {
            return refused(ErrorCode::HeaderMismatch, 72, "the header changed: it has another data file than before");
        }
        let Some(&FileDevice { flags, device, file_length, max_length }) = files.first() else { return Ok(None) };
        let raw = header.autoclear & autoclear::DATA_FILE_RAW != 0;
        if header.snapshots != 0 {
            return refused(
                ErrorCode::ExternalDataFile,
                60,
                "the image has internal snapshots and an external data file",
            );
        }
        if raw && header.backing_name.is_some() {
            let text = "the image has a backing file, and a data file that is to be read without it (data_file_raw)";
            return refused(ErrorCode::ExternalDataFile, 88, text);
        }
        let fixed_length = flags & device_flags::FIXED_LENGTH != 0;
        Ok(Some(Self { device, file_length, max_length, fixed_length, raw }))
    }

    /// How many of the `length` bytes from `start` on the data file has.
    pub(crate) fn held(&self, start: u64, length: u64) -> u64 {
        self.file_length.saturating_sub(start).min(length)
    }

    /// Bytes were written up to `end`.
    pub(crate) fn wrote(&mut self, end: u64) {
        self.file_length = self.file_length.max(end);
    }

    /// Refuse to write up to byte `end` if the data file cannot become so long.
    ///
    /// # Errors
    /// [`ErrorCode::NoSpace`].
    pub(crate) fn refuse_too_long(&self, end: u64) -> DriverResult<()> {
        if end <= self.max_length {
            return Ok(());
        }
        let text = format!("the data file ends at {} bytes, and {end} are needed: enlarge it", self.max_length);
        Err(DriverError::new(ErrorCode::NoSpace, text).at(self.device, self.max_length))
    }
}
