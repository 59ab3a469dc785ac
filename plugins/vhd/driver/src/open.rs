//! Opening an image: which footer counts, and what kind of disk it says that there is.

use crate::batmap::Batmap;
use crate::failures::at;
use crate::fixed::Fixed;
use crate::image::Image;
use alloc::boxed::Box;
use alloc::vec::Vec;
use instar_guest_sdk::abi::{device_flags, DeviceConfig, ErrorCode};
use instar_guest_sdk::{checked_end, BlockIo, DriverError, DriverResult};
use instar_vhd_format::{Footers, Header, Kind, FOOTER_BYTES, HEADER_BYTES, SECTOR};

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
            let text = alloc::format!("the file is too short for the {size} bytes of its disk");
            return Err(DriverError::new(corrupt, text).at(number, tail_offset));
        }
        Opened::Fixed(Box::new(Fixed { device: number, footer: footers.footer, size, tail_offset }))
    } else {
        let place = footers.footer.data_offset();
        if checked_end(place, HEADER_BYTES as u64, file_length).is_none() {
            let text = alloc::format!("the dynamic header at byte {place} lies past the end of the file");
            return Err(DriverError::new(corrupt, text).at(number, 16));
        }
        if !place.is_multiple_of(SECTOR) {
            let text = alloc::format!("the dynamic header at byte {place} is not at a sector");
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
        image.batmap = Batmap::read(io, &image, device.cache_bytes)?;
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
