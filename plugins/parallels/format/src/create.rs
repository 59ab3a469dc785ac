//! New, empty images, of the same bytes as QEMU's (`parallels_co_create`).

use crate::header::{field, Header, InUse, Variant, HEADER_BYTES, MOST_ENTRIES};
use crate::{FormatError, SECTOR};
use alloc::format;

/// Bytes of a cluster, if nothing else is asked for.
pub const DEFAULT_CLUSTER: u64 = 1 << 20;
/// The largest cluster in bytes that is made.
pub const LARGEST_CLUSTER: u64 = 1 << 30;

/// Heads, and sectors of a track, of the geometry that nobody goes by.
const HEADS: u32 = 16;
const TRACK: u64 = 32;

/// A new image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CreateOptions {
    /// Bytes of the disk; made whole sectors.
    pub virtual_size: u64,
    /// Bytes of a cluster: a power of two from 512 to [`LARGEST_CLUSTER`].
    pub cluster: u64,
}

/// The bytes of a new image: the file is zero behind them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NewImage {
    /// Length of the file in bytes: up to where the data begins.
    pub length: u64,
    /// Its first bytes.
    pub start: [u8; HEADER_BYTES],
}

/// Make a new image.
///
/// # Errors
/// One clause on what cannot be.
pub fn create(options: &CreateOptions) -> Result<NewImage, FormatError> {
    let CreateOptions { virtual_size, cluster } = *options;
    if !cluster.is_power_of_two() || !(SECTOR..=LARGEST_CLUSTER).contains(&cluster) {
        let text =
            format!("a cluster of {cluster} bytes cannot be: powers of two from {SECTOR} to {LARGEST_CLUSTER} can");
        return Err(FormatError::unsupported(text));
    }
    let most = u64::from(MOST_ENTRIES).saturating_mul(cluster);
    if virtual_size == 0 || virtual_size > most {
        let text =
            format!("a disk of {virtual_size} bytes cannot be: with clusters of {cluster}, from 1 to {most} can");
        return Err(FormatError::unsupported(text));
    }
    let too_large = || FormatError::unsupported("the disk is too large");
    let narrow = |number: u64| u32::try_from(number).map_err(|_| too_large());
    let sectors = virtual_size.div_ceil(SECTOR);
    let entries = narrow(virtual_size.div_ceil(cluster))?;
    let length = Header::entry_place(entries.into()).next_multiple_of(cluster);
    let header = Header {
        variant: Variant::Clusters,
        tracks: narrow(cluster / SECTOR)?,
        entries,
        sectors,
        in_use: InUse::ClosedByOld,
        data_off: narrow(length / SECTOR)?,
        flags: 0,
        ext_off: 0,
    };
    let mut start = [0; HEADER_BYTES];
    start[..field::VERSION].copy_from_slice(header.variant.magic());
    // As QEMU: a number of cylinders that does not fit is cut.
    let cylinders = (sectors / u64::from(HEADS) / TRACK).to_le_bytes();
    start[field::VERSION] = 2;
    start[field::VERSION + 4..field::VERSION + 8].copy_from_slice(&HEADS.to_le_bytes());
    start[field::VERSION + 8..field::TRACKS].copy_from_slice(&cylinders[..4]);
    start[field::TRACKS..field::ENTRIES].copy_from_slice(&header.tracks.to_le_bytes());
    start[field::ENTRIES..].copy_from_slice(&header.update());
    Ok(NewImage { length, start })
}
