//! A directory with the bitmaps that are made, and how the header comes to refer to it.
//!
//! A disk writes a sector of 512 bytes whole or not at all. Where the image has bitmaps that count, their number, and length and
//! place of the directory, are exchanged in one such write ("Bitmaps extension"). Otherwise nothing of an extension counts until
//! the autoclear bit is set, which comes last. An extension that is new goes where the end marker is: its data and another end
//! marker behind it first, *then a flush*, then its type and length over the old marker. Where the backing file's name is in the
//! way, a copy of it behind comes before that, *then a flush*, then the field that refers to it, *then a flush*. At every instant
//! there are the bitmaps of before, or all.

use crate::image::{overflow, Image};
use crate::metadata::bitmap_directory::BitmapDirectory;
use crate::write::backing::Backing;
use alloc::format;
use alloc::string::String;
use alloc::vec;
use alloc::vec::Vec;
use instar_guest_sdk::abi::{ErrorCode, DEVICE_OUTPUT};
use instar_guest_sdk::{BlockIo, DriverError, DriverResult};
use instar_qcow2_format::{autoclear, Extension, ExtensionKind, HostOffset, Version, AUTOCLEAR_OFFSET, SECTOR};

/// Most bitmaps that QEMU takes (`QCOW2_MAX_BITMAPS`).
const MAX_BITMAPS: u64 = 65535;
/// Longest directory that QEMU takes, in bytes (`QCOW2_MAX_BITMAP_DIRECTORY_SIZE`).
const MAX_DIRECTORY: u64 = 1024 * 65535;
/// Bytes of the extension's data.
const DATA: u64 = 24;
/// Byte offset of `backing_file_offset` (8 bytes).
const BACKING_OFFSET_FIELD: u64 = 8;
/// `flags` of an enabled bitmap.
const AUTO: u32 = 2;

/// A bitmap that is made.
#[derive(Debug)]
pub(crate) struct Made {
    pub(crate) name: Vec<u8>,
    pub(crate) granularity_bits: u32,
    /// It goes on recording.
    pub(crate) enabled: bool,
    /// Entries of its table.
    pub(crate) entries: u32,
    /// Where its table is, once there is room for it.
    pub(crate) table: HostOffset,
}

/// How the extension comes into the header.
#[derive(Debug)]
enum Way {
    /// It is there, and counts: the directory's offset and length, and the number of its bitmaps.
    Exchanged { extension: u64, old: (HostOffset, u64), count: u32 },
    /// It is there, and does not count.
    Revived { extension: u64 },
    /// It is not there. The end marker, and the backing file's name with the offset that it is moved to, if it is in the way.
    Inserted { marker: u64, moved: Option<(u64, Vec<u8>)> },
}

/// What the header is to say.
#[derive(Debug)]
pub(crate) struct Switch {
    way: Way,
}

/// The directory that is new.
pub(crate) struct NewDirectory<'a> {
    pub(crate) offset: HostOffset,
    pub(crate) made: &'a [Made],
}

/// An entry of the directory.
fn entry(made: &Made) -> Vec<u8> {
    let mut bytes = Vec::from(made.table.0.to_be_bytes());
    bytes.extend(made.entries.to_be_bytes());
    bytes.extend((if made.enabled { AUTO } else { 0 }).to_be_bytes());
    // The type, a dirty tracking bitmap, and the granularity.
    bytes.extend([1, u8::try_from(made.granularity_bits).unwrap_or(u8::MAX)]);
    bytes.extend(u16::try_from(made.name.len()).unwrap_or(u16::MAX).to_be_bytes());
    // No extra data.
    bytes.extend([0; 4]);
    bytes.extend(&made.name);
    bytes.resize(bytes.len().next_multiple_of(8), 0);
    bytes
}

/// Whether `length` bytes from `at` on lie in one sector.
const fn in_one_sector(at: u64, length: u64) -> bool {
    at / SECTOR as u64 == (at + length - 1) / SECTOR as u64
}

impl Switch {
    /// Find out how the header can refer to another directory. Changes nothing.
    ///
    /// # Errors
    /// [`ErrorCode::UnsupportedFormat`](instar_guest_sdk::abi::ErrorCode::UnsupportedFormat) if it cannot; corruption; I/O errors.
    pub(crate) fn plan(io: &mut dyn BlockIo, image: &Image) -> DriverResult<Self> {
        if image.header.version == Version::V2 {
            let text = "version 2 of qcow2 has no bitmaps, and one is to be made: run `qemu-img amend -o compat=1.1` on it first";
            return Err(unsupported(image, 4, text.into()));
        }
        let mut extensions = image.header.extensions.iter().filter(|e| e.kind == ExtensionKind::Bitmaps);
        let way = match (extensions.next(), extensions.next()) {
            (None, _) => Self::insert(io, image)?,
            (Some(found), None) if found.data.len() as u64 == DATA => Self::exchange(io, image, found)?,
            (Some(found), _) => return Err(image.corrupt(found.offset, "the bitmaps extensions are damaged")),
        };
        Ok(Self { way })
    }

    fn exchange(io: &mut dyn BlockIo, image: &Image, found: &Extension) -> DriverResult<Way> {
        let extension = found.offset;
        if image.header.autoclear & autoclear::BITMAPS == 0 {
            return Ok(Way::Revived { extension });
        }
        let directory = BitmapDirectory::read(io, image, &mut |_| Ok(()))?;
        let place = directory.place.ok_or_else(|| overflow("the bitmap directory"))?;
        if !in_one_sector(extension + 8, DATA) {
            let text =
                "the header's table of bitmaps crosses a sector, so that no bitmap can be made safely: make one with \
                        `qemu-img bitmap --add`, which moves the table, and remove it again, or leave out --bitmaps";
            return Err(unsupported(image, extension, text.into()));
        }
        let count = u32::try_from(directory.entries.len()).map_err(|_| overflow("the number of bitmaps"))?;
        Ok(Way::Exchanged { extension, old: (place.offset, place.bytes), count })
    }

    fn insert(io: &mut dyn BlockIo, image: &Image) -> DriverResult<Way> {
        let cluster = image.cluster_size().bytes();
        let mut first = vec![0; usize::try_from(cluster).map_err(|_| overflow("the size of a cluster"))?];
        io.read(image.device, 0, &mut first)?;
        let u64_at = |at: usize| first.get(at..at + 8).and_then(|b| b.try_into().ok()).map_or(0, u64::from_be_bytes);
        let (name_at, name_length) = (u64_at(8), u64_at(16) >> 32);
        let marker = match image.header.extensions.last() {
            None => u64::from(image.header.header_length),
            Some(last) => last.offset + 8 + (last.data.len() as u64).next_multiple_of(8),
        };
        let end = marker + 8 + DATA + 8;
        let limit = if name_at == 0 { cluster } else { name_at };
        let no_room = || {
            let text =
                "the header has no room to refer to bitmaps: leave out --bitmaps, or copy the image into one with \
                        larger clusters first";
            unsupported(image, marker, text.into())
        };
        let marked = usize::try_from(marker).ok().and_then(|at| first.get(at..at + 8)).is_some_and(|b| *b == [0; 8]);
        if !marked || marker % 8 != 0 || marker + 8 > limit || end > cluster {
            return Err(no_room());
        }
        if name_at == 0 || name_at >= end {
            return Ok(Way::Inserted { marker, moved: None });
        }
        let (from, to) = (name_at, end.max(name_at + name_length));
        let range = usize::try_from(from).ok().zip(usize::try_from(from + name_length).ok());
        let name = range.and_then(|(from, end)| first.get(from..end)).ok_or_else(no_room)?.to_vec();
        if to + name_length > cluster {
            return Err(no_room());
        }
        Ok(Way::Inserted { marker, moved: Some((to, name)) })
    }

    /// Bytes and number of the bitmaps of before.
    fn before(&self) -> (u64, u32) {
        match self.way {
            Way::Exchanged { old, count, .. } => (old.1, count),
            Way::Revived { .. } | Way::Inserted { .. } => (0, 0),
        }
    }

    /// Length of the new directory in bytes.
    pub(crate) fn directory_bytes(&self, made: &[Made]) -> u64 {
        self.before().0 + made.iter().map(|made| (24 + made.name.len() as u64).next_multiple_of(8)).sum::<u64>()
    }

    /// Whether an image can have this many bitmaps.
    ///
    /// # Errors
    /// If not, as [`plan`](Self::plan).
    pub(crate) fn fits(&self, made: &[Made], image: &Image) -> DriverResult<()> {
        let (count, bytes) = (u64::from(self.before().1) + made.len() as u64, self.directory_bytes(made));
        if count > MAX_BITMAPS || bytes > MAX_DIRECTORY {
            let text = format!("it would have {count} bitmaps, more than fit into an image: remove some of them first");
            return Err(unsupported(image, AUTOCLEAR_OFFSET, text));
        }
        Ok(())
    }

    /// The directory of before, if it counts: its offset and its length in bytes.
    pub(crate) fn old_directory(&self) -> Option<(HostOffset, u64)> {
        match self.way {
            Way::Exchanged { old, .. } => Some(old),
            Way::Revived { .. } | Way::Inserted { .. } => None,
        }
    }

    /// Write the new directory: the entries of before as they are now, and those of the bitmaps that are made.
    ///
    /// # Errors
    /// I/O errors.
    pub(crate) fn write_directory(
        &self,
        io: &mut dyn BlockIo,
        backing: &mut Backing,
        new: &NewDirectory<'_>,
    ) -> DriverResult<()> {
        let mut at = new.offset.0;
        if let Some((old, bytes)) = self.old_directory() {
            backing.out.copy(io, old.0, at, bytes)?;
            at += bytes;
        }
        let entries: Vec<u8> = new.made.iter().flat_map(entry).collect();
        backing.out.write(io, at, &entries)
    }

    /// Have the header refer to it. Durable when it returns.
    ///
    /// # Errors
    /// I/O errors.
    pub(crate) fn apply(
        &self,
        io: &mut dyn BlockIo,
        backing: &mut Backing,
        new: &NewDirectory<'_>,
    ) -> DriverResult<()> {
        let count = u64::from(self.before().1) + new.made.len() as u64;
        let mut data = Vec::from(u32::try_from(count).map_err(|_| overflow("the number of bitmaps"))?.to_be_bytes());
        data.extend([0; 4]);
        data.extend(self.directory_bytes(new.made).to_be_bytes());
        data.extend(new.offset.0.to_be_bytes());
        let bit = backing.image.header.autoclear & autoclear::BITMAPS;
        match &self.way {
            Way::Exchanged { extension, .. } => return backing.write_field(io, extension + 8, &data),
            Way::Revived { extension } => backing.write_field(io, extension + 8, &data)?,
            Way::Inserted { marker, moved } => {
                if bit != 0 {
                    // It says nothing as long as there is no extension.
                    backing.write_field(io, AUTOCLEAR_OFFSET, &0u64.to_be_bytes())?;
                }
                if let Some((to, name)) = moved {
                    backing.write_field(io, *to, name)?;
                    backing.write_field(io, BACKING_OFFSET_FIELD, &to.to_be_bytes())?;
                }
                data.extend([0; 8]);
                backing.write_field(io, marker + 8, &data)?;
                let kind = ExtensionKind::Bitmaps.to_u32().to_be_bytes();
                let length = u32::try_from(DATA).unwrap_or(0).to_be_bytes();
                backing.write_field(io, *marker, &[kind, length].concat())?;
            }
        }
        backing.image.header.autoclear = autoclear::BITMAPS;
        backing.write_field(io, AUTOCLEAR_OFFSET, &autoclear::BITMAPS.to_be_bytes())
    }
}

/// The backing cannot have what is asked for.
pub(crate) fn unsupported(image: &Image, at: u64, text: String) -> DriverError {
    let error = DriverError::new(ErrorCode::UnsupportedFormat, text).at(image.device, at);
    DriverError { device: error.device.or(Some(DEVICE_OUTPUT)), ..error }
}
