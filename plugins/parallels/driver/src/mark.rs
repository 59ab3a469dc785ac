//! The field `in_use`: the image says that it is open for writing before anything of it changes, and that it was closed when
//! everything is durable (the specification, "Header").
//!
//! It is set in one write of the header within its first sector, and flushed before the next change. With it, in the same
//! write, the image stops saying that it is empty, and gives up its format extension: dirty bitmaps would be wrong from here
//! on. A crash before that is durable leaves the image as it was. One between that and the end leaves an image with all of
//! its content that says that it was not closed: QEMU and Parallels check it when they open it, and find nothing to repair but
//! space behind the last cluster; running the commit again closes it.

use crate::image::Image;
use instar_guest_sdk::{BlockIo, DriverResult, OrderedWriter};
use instar_parallels_format::{field, InUse};

/// What an image that is open for writing says once it is closed.
#[derive(Debug)]
pub struct Mark {
    closed: InUse,
}

impl Mark {
    /// Have the image say that it is open, durably.
    ///
    /// # Errors
    /// I/O errors.
    pub fn open(io: &mut dyn BlockIo, image: &mut Image, out: &mut OrderedWriter) -> DriverResult<Self> {
        // An image that QEMU closed has no extension that anybody believes: it may go on saying so.
        let closed = match image.header.in_use {
            InUse::ClosedByOld => InUse::ClosedByOld,
            InUse::Open | InUse::Closed => InUse::Closed,
        };
        let opened = image.header.opened();
        if opened != image.header {
            image.header = opened;
            write_header(io, image, out)?;
            out.barrier(io)?;
        }
        Ok(Self { closed })
    }

    /// The mark that an interrupted run has left in this image, if there is one.
    pub fn left(image: &Image) -> Option<Self> {
        (image.header.in_use == InUse::Open).then_some(Self { closed: InUse::Closed })
    }

    /// Make everything durable, and then have the image say that it is closed.
    ///
    /// # Errors
    /// I/O errors.
    pub fn close(self, io: &mut dyn BlockIo, image: &mut Image, out: &mut OrderedWriter) -> DriverResult<()> {
        out.barrier(io)?;
        image.header.in_use = self.closed;
        write_header(io, image, out)?;
        out.barrier(io)
    }
}

/// Write the fields of the header that ever change, in one write within the first sector.
///
/// # Errors
/// I/O errors.
pub fn write_header(io: &mut dyn BlockIo, image: &Image, out: &mut OrderedWriter) -> DriverResult<()> {
    out.write(io, field::ENTRIES as u64, &image.header.update())
}
