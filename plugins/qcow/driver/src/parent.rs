//! Another backing file for an image.
//!
//! Its name may stand anywhere in the file. Where the old name shares the first sector with the header and the new one is no
//! longer, both are exchanged in one write; else the new name goes behind everything else, and the first sector then points
//! to it.

use crate::image::Image;
use crate::survey::verified;
use alloc::format;
use alloc::vec;
use alloc::vec::Vec;
use core::ops::Range;
use instar_guest_sdk::abi::ErrorCode;
use instar_guest_sdk::{overflow, BlockIo, DriverError, DriverResult, OrderedWriter, Parent};
use instar_qcow_format::{field, MAX_NAME, SECTOR};

/// How an image gets another backing file.
#[derive(Debug)]
pub struct ParentChange {
    /// The first sector, as far as the file has it, with the new fields.
    first: Vec<u8>,
    /// A new name that does not stand in it, as whole sectors, and its place.
    behind: Option<(u64, Vec<u8>)>,
    /// The place of the old name, if nobody needs that any more and it does not stand in the first sector.
    old: Option<Range<u64>>,
}

impl ParentChange {
    /// Find out how the image can name this parent, or none. Changes nothing.
    ///
    /// # Errors
    /// [`ErrorCode::UnsupportedFormat`] if it cannot, [`ErrorCode::NoSpace`] on a device that is full, corruption, I/O errors.
    pub fn plan(io: &mut dyn BlockIo, image: &Image, parent: Option<&Parent<'_>>) -> DriverResult<Self> {
        let refused = |text: &str| Err(DriverError::new(ErrorCode::UnsupportedFormat, text).at(image.device, 8));
        let name = parent.map_or(&[][..], |parent| parent.name);
        if name.len() as u64 > MAX_NAME {
            return refused(&format!(
                "a backing file's name of {} bytes is longer than the {MAX_NAME} that a qcow has room for: move the images \
                 to a shorter path",
                name.len()
            ));
        }
        if parent.is_some_and(|parent| parent.format == "raw") {
            return refused(
                "a qcow cannot record that its backing file is raw, and a guest could make it look like an image: convert it \
                 to qcow2",
            );
        }
        if parent.is_some() && (name.is_empty() || name.contains(&0)) {
            return refused("a backing file whose name is empty or has a zero byte");
        }
        // What points behind the end of the file, if anything does, would find the name there.
        let top = verified(io, image)?.top;
        let length = usize::try_from(image.file_length.min(SECTOR)).map_err(|_| overflow("the first sector"))?;
        let mut first = vec![0; length];
        io.read(image.device, 0, &mut first)?;

        let old = Some(image.header.name_range()).filter(|old| !old.is_empty());
        let old_part = old
            .clone()
            .filter(|old| old.end <= length as u64)
            .and_then(|old| Some(usize::try_from(old.start).ok()?..usize::try_from(old.end).ok()?));
        let inside = old_part.clone().filter(|part| name.len() <= part.len() && !name.is_empty());
        if let Some(part) = &old_part {
            first.get_mut(part.clone()).unwrap_or_default().fill(0);
        }
        let (at, behind) = match (inside, name.is_empty()) {
            (_, true) => (0, None),
            (Some(part), false) => {
                let place = first.get_mut(part.start..part.start + name.len()).unwrap_or_default();
                place.copy_from_slice(name);
                (part.start as u64, None)
            }
            (None, false) => {
                let (at, bytes) = Self::behind(image, top, name)?;
                (at, Some((at, bytes)))
            }
        };
        let size = u32::try_from(name.len()).map_err(|_| overflow("the length of a name"))?;
        let mut put = |at: usize, bytes: &[u8]| {
            let place = at.checked_add(bytes.len()).and_then(|end| first.get_mut(at..end));
            place.map(|place| place.copy_from_slice(bytes)).ok_or_else(|| overflow("a field of the header"))
        };
        put(field::BACKING_OFFSET, &at.to_be_bytes())?;
        put(field::BACKING_SIZE, &size.to_be_bytes())?;
        Ok(Self { first, behind, old: old.filter(|_| old_part.is_none()) })
    }

    /// The place behind everything that is used, in sectors of its own, and what is written there.
    fn behind(image: &Image, top: u64, name: &[u8]) -> DriverResult<(u64, Vec<u8>)> {
        // A device is longer than what is used of it, a file ends there, or with what a crash has left.
        let from = if image.fixed_length { top } else { image.file_length };
        let at = from.checked_next_multiple_of(SECTOR).ok_or_else(|| overflow("the end of the file"))?;
        let mut bytes = name.to_vec();
        bytes.resize(bytes.len().next_multiple_of(512), 0);
        let end = at.checked_add(bytes.len() as u64).filter(|&end| end <= image.max_length);
        if end.is_none() {
            let text =
                "the device has no room for the name of another backing file behind what is used of it: copy the image";
            return Err(DriverError::new(ErrorCode::NoSpace, text).at(image.device, at));
        }
        Ok((at, bytes))
    }

    /// Do it. A crash leaves the old name until the first sector is on the disk, and the new one from then on: a disk writes a
    /// sector whole or not at all, and a name that stands elsewhere is durable before. It leaves a name behind the end of the
    /// image at worst.
    ///
    /// # Errors
    /// I/O errors.
    pub fn execute(self, io: &mut dyn BlockIo, image: &Image) -> DriverResult<()> {
        let mut out = OrderedWriter::new(image.device);
        if let Some((at, bytes)) = &self.behind {
            out.write(io, *at, bytes)?;
            out.barrier(io)?;
        }
        out.write(io, 0, &self.first)?;
        out.barrier(io)?;
        if let Some(old) = self.old {
            // What nobody reads any more is zero.
            out.write(io, old.start, &vec![0; usize::try_from(old.end - old.start).unwrap_or(0)])?;
            out.barrier(io)?;
        }
        Ok(())
    }
}
