//! The source role: what an overlay holds, and emptying it.

use crate::image::Image;
use core::ops::Range;
use instar_guest_sdk::abi::{ErrorCode, ImageInfo, Request};
use instar_guest_sdk::{BlockIo, Content, DriverError, DriverResult, Extent, Extents, Source};

/// An image that data comes from.
pub struct QedSource(pub(crate) Image);

impl Source for QedSource {
    fn info(&self) -> ImageInfo {
        self.0.info()
    }

    fn verify(&mut self, io: &mut dyn BlockIo, _: bool) -> DriverResult<u64> {
        self.0.verify(io)
    }

    fn extents(&mut self, io: &mut dyn BlockIo, range: Range<u64>, out: &mut Extents) -> DriverResult<u64> {
        let header = self.0.header;
        let mut at = range.start - range.start % header.cluster_size;
        while at < range.end.min(header.image_size) {
            let Some(table) = self.0.table(io, at / header.coverage())? else {
                at = (at / header.coverage() + 1).saturating_mul(header.coverage());
                continue;
            };
            let entry = table + at % header.coverage() / header.cluster_size * 8;
            self.0.shrink();
            let length = header.cluster_size.min(header.image_size - at);
            let content = match self.0.cluster(io, entry)? {
                0 => None,
                1 => Some(Content::Zero),
                offset => Some(Content::Data { device: self.0.device, offset }),
            };
            if content.is_some_and(|content| !out.push(Extent { guest_offset: at, length, content })) {
                return Ok(at);
            }
            at += length;
        }
        Ok(at.min(header.image_size))
    }

    fn read(&mut self, _: &mut dyn BlockIo, _: &Extent, _: u64, _: &mut [u8]) -> DriverResult<()> {
        Err(DriverError::new(ErrorCode::InternalOverflow, "a QED image has nothing to decode"))
    }

    /// Tables and clusters are dropped with the L1 entries, any of them first: all read the same through the backing by now.
    /// What nothing refers to any more is cut off once that is durable.
    fn empty(&mut self, io: &mut dyn BlockIo) -> DriverResult<u64> {
        let held = self.0.verify(io)?;
        let (device, header) = (self.0.device, self.0.header);
        io.run(&mut [Request::zero(device, header.l1_table, header.table_bytes), Request::flush(device)])?;
        let end = header.l1_table + header.table_bytes;
        io.run(&mut [Request::set_length(device, end), Request::flush(device)])?;
        Ok(held)
    }
}
