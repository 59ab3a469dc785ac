//! Opening an image: which footer counts, and which kind of disk it describes.

use crate::batmap::{counted_bytes, Batmap};
use crate::failures::at;
use crate::fixed::Fixed;
use crate::image::Image;
use alloc::boxed::Box;
use alloc::format;
use alloc::vec;
use alloc::vec::Vec;
use instar_guest_sdk::abi::{device_flags, DeviceConfig, ErrorCode};
use instar_guest_sdk::{checked_end, overflow, BlockIo, DriverError, DriverResult};
use instar_vhd_format::{BatmapHeader, Footers, Header, Kind, BATMAP_HEADER_BYTES, FOOTER_BYTES, HEADER_BYTES, SECTOR};

/// Longest batmap that is worked with, in bytes: 2 TiB in blocks of 2 MiB, the only size that XenServer knows.
const LONGEST_BATMAP: u64 = 128 << 10;

/// An open image.
#[derive(Debug)]
pub enum Opened {
    /// All of the disk, and a footer.
    Fixed(Box<Fixed>),
    /// Blocks.
    Sparse(Box<Image>),
}

/// Read footers and header. `corrupt` is the code of what no image may say.
///
/// # Errors
/// Corruption, a header that is not the one that the host has seen, and I/O errors.
pub fn open(io: &mut dyn BlockIo, device: &DeviceConfig, corrupt: ErrorCode) -> DriverResult<Opened> {
    let (number, file_length) = (device.device, device.file_length);
    let (mut front, mut end) = ([0; FOOTER_BYTES], [0; FOOTER_BYTES]);
    let no_footer = || DriverError::new(corrupt, "the file has no valid footer, neither at its end nor in front");
    let tail_offset = Footers::tail_offset(file_length).ok_or_else(|| no_footer().at(number, 0))?;
    io.read(number, 0, &mut front)?;
    io.read(number, tail_offset, &mut end)?;
    let footers = Footers::choose(&front, &end, tail_offset).map_err(at(corrupt, number, tail_offset))?;
    let footers = footers.ok_or_else(|| no_footer().at(number, tail_offset))?;
    let size = footers.footer.virtual_size();
    let opened = if footers.footer.kind() == Kind::Fixed {
        if checked_end(0, size, tail_offset).is_none() {
            let text = format!("the file is too short for the {size} bytes of its disk");
            return Err(DriverError::new(corrupt, text).at(number, tail_offset));
        }
        Opened::Fixed(Box::new(Fixed { device: number, footer: footers.footer, size, tail_offset }))
    } else {
        let place = footers.footer.data_offset();
        if checked_end(place, HEADER_BYTES as u64, file_length).is_none() {
            let text = format!("the dynamic header at byte {place} lies past the end of the file");
            return Err(DriverError::new(corrupt, text).at(number, 16));
        }
        if !place.is_multiple_of(SECTOR) {
            let text = format!("the dynamic header at byte {place} is not at a sector");
            return Err(DriverError::new(corrupt, text).at(number, 16));
        }
        let mut bytes = [0; HEADER_BYTES];
        io.read(number, place, &mut bytes)?;
        let header = Header::parse(&bytes).map_err(at(corrupt, number, place))?;
        let fixed_length = device.flags & device_flags::FIXED_LENGTH != 0;
        let mut image = Image {
            device: number,
            file_length,
            fixed_length,
            footers,
            header,
            size,
            batmap: None,
            taken: Vec::new(),
            corrupt,
        };
        image.verify_table_place()?;
        image.batmap = batmap(io, &image, device.cache_bytes)?;
        image.take_metadata();
        Opened::Sparse(Box::new(image))
    };
    let cluster_size = match &opened {
        Opened::Fixed(_) => 0,
        Opened::Sparse(image) => image.header.block_size(),
    };
    if (size, cluster_size) != (device.virtual_size, device.cluster_size) {
        let text = "footer or header have changed since the host has seen them";
        return Err(DriverError::new(ErrorCode::HeaderMismatch, text).at(number, tail_offset));
    }
    Ok(opened)
}

/// Read XenServer's batmap, if there is one. With a bound of `cache_bytes` (0: none) that it would exceed, it is not kept: then the
/// bitmaps are read.
///
/// # Errors
/// [`ErrorCode::UnsupportedFormat`] for an encrypted image; I/O errors.
fn batmap(io: &mut dyn BlockIo, image: &Image, cache_bytes: u64) -> DriverResult<Option<Batmap>> {
    if !BatmapHeader::is_expected(&image.footers.footer) {
        return Ok(None);
    }
    let place = image.header.table_offset().saturating_add(image.header.table_bytes());
    if checked_end(place, BATMAP_HEADER_BYTES as u64, image.file_length).is_none() {
        return Ok(None);
    }
    let mut bytes = [0; BATMAP_HEADER_BYTES];
    io.read(image.device, place, &mut bytes)?;
    let Some(header) = BatmapHeader::parse(&bytes) else { return Ok(None) };
    if header.is_encrypted() {
        let text = "encryption is not supported: convert it to an image without encryption";
        return Err(DriverError::new(ErrorCode::LuksUnsupported, text).at(image.device, place));
    }
    let counted = counted_bytes(image.size, image.header.block_size());
    if counted > LONGEST_BATMAP {
        let text = format!("a batmap of {counted} bytes is longer than the {LONGEST_BATMAP} that are supported");
        return Err(DriverError::new(ErrorCode::UnsupportedFormat, text).at(image.device, place));
    }
    let in_file = checked_end(header.offset(), header.map_bytes(), image.file_length).is_some();
    if !in_file || header.map_bytes() < counted || !header.offset().is_multiple_of(SECTOR) {
        let text = format!("the batmap at byte {} goes past the end of the file, or is too short", header.offset());
        return Err(image.corrupt(place, text));
    }
    let mut map = vec![0; usize::try_from(counted).map_err(|_| overflow("the batmap"))?];
    io.read(image.device, header.offset(), &mut map)?;
    let kept = cache_bytes == 0 || counted <= cache_bytes / 2;
    Ok(Some(Batmap::new(header, place, map, kept)))
}
