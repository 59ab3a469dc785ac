//! An open image: its header, and what entries of its tables may name.

use alloc::format;
use alloc::string::String;
use core::ops::Range;
use instar_guest_sdk::abi::{device_flags, DeviceConfig, ErrorCode, ImageInfo};
use instar_guest_sdk::table::Disk;
use instar_guest_sdk::{checked_end, BlockIo, DriverError, DriverResult};
use instar_qcow_format::{field, Entry, Header, Trouble, ENCRYPTED, ENTRY_BYTES, HEADER_BYTES};

/// Bytes of the file, from its begin on, in which everything has to lie: what is used of it is marked, a window at a time.
const REACH: u64 = 1 << 46;

/// An open image.
#[derive(Debug)]
pub struct Image {
    pub device: u32,
    pub header: Header,
    /// Bytes of the file.
    pub file_length: u64,
    /// The longest that the host lets the file become, in bytes.
    pub max_length: u64,
    /// It stands on a device that keeps its length.
    pub fixed_length: bool,
    /// The code of what no image may say.
    corrupt: ErrorCode,
}

/// Whether two ranges have a byte in common.
fn overlap(one: &Range<u64>, other: &Range<u64>) -> bool {
    one.start.max(other.start) < one.end.min(other.end)
}

impl Image {
    /// Read the header. `corrupt` is the code of what no image may say.
    ///
    /// # Errors
    /// [`ErrorCode::HeaderMismatch`] when the image is not what the host saw; corruption; I/O errors.
    pub fn open(io: &mut dyn BlockIo, device: &DeviceConfig, corrupt: ErrorCode) -> DriverResult<Self> {
        let (number, file_length) = (device.device, device.file_length);
        let mut bytes = [0; HEADER_BYTES];
        io.read(number, 0, &mut bytes)?;
        let header = Header::parse(&bytes).map_err(|error| {
            let code = if error.trouble == Trouble::Corrupt { corrupt } else { ErrorCode::UnsupportedFormat };
            DriverError::new(code, error.text).at(number, 0)
        })?;
        let fixed_length = device.flags & device_flags::FIXED_LENGTH != 0;
        let image = Self { device: number, header, file_length, max_length: device.max_length, fixed_length, corrupt };
        let ImageInfo { virtual_size, cluster_size } = image.info();
        if (virtual_size, cluster_size) != (device.virtual_size, device.cluster_size) {
            let text = format!(
                "the header says {virtual_size} bytes in clusters of {cluster_size}, the host saw {} and {}",
                device.virtual_size, device.cluster_size
            );
            return Err(DriverError::new(ErrorCode::HeaderMismatch, text).at(number, 0));
        }
        if header.encrypted {
            return Err(DriverError::new(ErrorCode::LuksUnsupported, ENCRYPTED).at(number, field::CRYPT as u64));
        }
        if header.keep_end() > file_length {
            return Err(image.corrupt(header.l1_offset, "L1 table or backing file name go past the end of the file"));
        }
        Ok(image)
    }

    pub fn info(&self) -> ImageInfo {
        ImageInfo { virtual_size: self.header.virtual_size(), cluster_size: self.header.cluster_size() }
    }

    /// What no image may say, at byte `offset`.
    pub fn corrupt(&self, offset: u64, text: impl Into<String>) -> DriverError {
        DriverError::new(self.corrupt, text).at(self.device, offset)
    }

    /// The disk with this size in bytes: what the image has, or will have.
    pub fn disk(&self, size: u64) -> Disk {
        Disk { size, cluster: self.header.cluster_size() }
    }

    /// Clusters that an L2 table maps.
    pub fn span(&self) -> u64 {
        1 << self.header.l2_bits
    }

    /// Clusters of the disk.
    pub fn disk_clusters(&self) -> u64 {
        self.header.virtual_size().div_ceil(self.header.cluster_size())
    }

    /// Where the L1 entry with this index stands in the file.
    pub fn l1_place(&self, index: u64) -> u64 {
        self.header.l1_offset.saturating_add(index.saturating_mul(ENTRY_BYTES))
    }

    /// Where the entry of a guest cluster stands, in a table that begins at byte `table` of the file.
    pub fn l2_place(&self, table: u64, cluster: u64) -> u64 {
        let index = cluster & ((1 << self.header.l2_bits) - 1);
        table.saturating_add(index * ENTRY_BYTES)
    }

    /// What is wrong with a range that an entry names, if anything is; it has to end at `limit` at the latest.
    fn wrong(&self, range: &Range<u64>, limit: u64) -> Option<&'static str> {
        let header = 0..HEADER_BYTES as u64;
        let of_image = [header, self.header.l1_range(), self.header.name_range()];
        if of_image.iter().any(|used| overlap(used, range)) {
            Some("where the header or the L1 table lie")
        } else if range.end > limit {
            Some("past the end of the file, which may have been cut off")
        } else if range.end > REACH {
            Some("further than 64 TiB into the file")
        } else {
            None
        }
    }

    /// The place of an L2 table, as an L1 entry has it that is not 0: the start of a cluster, and whole in the file.
    ///
    /// # Errors
    /// A clause that says what is wrong.
    pub fn table(&self, number: u64) -> Result<u64, String> {
        let end = checked_end(number, self.header.table_bytes(), u64::MAX).unwrap_or(u64::MAX);
        let odd = !number.is_multiple_of(self.header.cluster_size());
        let odd = odd.then_some("which is not the start of a cluster");
        match odd.or_else(|| self.wrong(&(number..end), self.file_length)) {
            Some(why) => Err(format!("an L1 entry points to offset {number}, {why}")),
            None => Ok(number),
        }
    }

    /// An L2 entry: a cluster or a stream that lies in the file as a whole. QEMU lengthens the file to the end of a cluster
    /// before it names it (`get_cluster_offset`), so that a file which ends within one was cut off. It takes any sector for a
    /// cluster's start, and every program begins them at multiples of their size.
    ///
    /// # Errors
    /// A clause that says what is wrong.
    pub fn entry(&self, number: u64) -> Result<Entry, String> {
        let entry = Entry::decode(number, self.header.cluster_bits);
        let size = self.header.cluster_size();
        let why = match entry {
            Entry::Free => None,
            Entry::Data(offset) if !offset.is_multiple_of(size) => Some("which is not the start of a cluster"),
            Entry::Data(offset) => self.wrong(&(offset..offset.saturating_add(size)), self.file_length),
            Entry::Compressed { length: 0, .. } => Some("to a stream of 0 bytes"),
            Entry::Compressed { offset, length } => self.wrong(&(offset..offset + length), self.file_length),
        };
        match (why, entry) {
            (None, entry) => Ok(entry),
            (Some(why), Entry::Compressed { offset, .. }) => {
                Err(format!("an L2 entry points to compressed data at offset {offset}, {why}"))
            }
            (Some(why), _) => Err(format!("an L2 entry points to offset {number}, {why}")),
        }
    }
}
