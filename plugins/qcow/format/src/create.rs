//! New, empty images, of the same shape as QEMU's (`qcow_co_create`).

use crate::header::{field, HEADER_BYTES, MAGIC, MAX_NAME, MOST_L1_ENTRIES};
use crate::{FormatError, ENTRY_BYTES, SECTOR};
use alloc::format;
use alloc::vec;
use alloc::vec::Vec;

/// A new image.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CreateOptions {
    /// Bytes of the disk; made whole sectors.
    pub virtual_size: u64,
    /// The name of the backing file.
    pub backing: Option<Vec<u8>>,
}

/// The bytes of a new image: the file is zero behind them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NewImage {
    /// Length of the file in bytes.
    pub length: u64,
    /// Its first bytes.
    pub start: Vec<u8>,
}

/// The binary logarithms of cluster and L2 table. With a backing file a cluster is one sector, so that no write has to copy
/// anything from below.
const fn bits(backing: bool) -> (u8, u8) {
    if backing {
        (9, 12)
    } else {
        (12, 9)
    }
}

/// Where the L1 table of a new image begins, and how long the file is, in bytes.
///
/// # Errors
/// One clause on what cannot be.
pub fn l1_place(options: &CreateOptions) -> Result<(u64, u64), FormatError> {
    let name = options.backing.as_ref().map_or(0, |name| name.len() as u64);
    if name > MAX_NAME {
        let text = format!("the name of the backing file has {name} bytes, and there is room for {MAX_NAME}");
        return Err(FormatError::unsupported(text));
    }
    let (cluster, l2) = bits(options.backing.is_some());
    let entries = options.virtual_size.div_ceil(1 << (cluster + l2));
    if options.virtual_size == 0 || entries > MOST_L1_ENTRIES {
        let text = format!(
            "a disk of {} bytes cannot be: from 1 to {} bytes can",
            options.virtual_size,
            MOST_L1_ENTRIES << (cluster + l2)
        );
        return Err(FormatError::unsupported(text));
    }
    let start = (HEADER_BYTES as u64 + name).next_multiple_of(ENTRY_BYTES);
    Ok((start, start + (entries * ENTRY_BYTES).next_multiple_of(SECTOR)))
}

/// Make a new image.
///
/// # Errors
/// One clause on what cannot be.
pub fn create(options: &CreateOptions) -> Result<NewImage, FormatError> {
    let (l1, length) = l1_place(options)?;
    let (cluster, l2) = bits(options.backing.is_some());
    let mut start = vec![0; HEADER_BYTES];
    let mut put = |at: usize, bytes: &[u8]| {
        start.iter_mut().skip(at).zip(bytes).for_each(|(place, byte)| *place = *byte);
    };
    put(0, &MAGIC);
    put(field::SIZE, &options.virtual_size.next_multiple_of(SECTOR).to_be_bytes());
    put(field::CLUSTER_BITS, &[cluster, l2]);
    put(field::L1_OFFSET, &l1.to_be_bytes());
    if let Some(name) = &options.backing {
        put(field::BACKING_OFFSET, &(HEADER_BYTES as u64).to_be_bytes());
        put(field::BACKING_SIZE, &u32::try_from(name.len()).unwrap_or(0).to_be_bytes());
        start.extend(name);
    }
    Ok(NewImage { length, start })
}
