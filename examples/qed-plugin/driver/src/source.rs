//! The source role: what an overlay holds, and emptying it.

use crate::image::Image;
use alloc::vec::Vec;
use core::ops::Range;
use instar_guest_sdk::abi::{ErrorCode, Extent, ExtentKind, ImageInfo, Request};
use instar_guest_sdk::{BlockIo, DriverError, DriverResult, Source};

/// An image that data comes from.
pub struct QedSource(pub(crate) Image);

impl Source for QedSource {
    fn info(&self) -> ImageInfo {
        self.0.info()
    }

    fn check(&mut self, io: &mut dyn BlockIo, _: bool) -> DriverResult<u64> {
        self.0.verify(io)
    }

    fn extents(
        &mut self,
        io: &mut dyn BlockIo,
        range: Range<u64>,
        max: usize,
        out: &mut Vec<Extent>,
    ) -> DriverResult<u64> {
        let header = self.0.header;
        let (first, mut at) = (out.len(), range.start - range.start % header.cluster_size);
        while at < range.end.min(header.image_size) {
            let Some(table) = self.0.table(io, at / header.coverage())? else {
                at = (at / header.coverage() + 1).saturating_mul(header.coverage());
                continue;
            };
            let entry = table + at % header.coverage() / header.cluster_size * 8;
            self.0.shrink();
            let offset = self.0.cluster(io, entry)?;
            let length = header.cluster_size.min(header.image_size - at);
            let (kind, location) = if offset == 1 { (ExtentKind::Zero, 0) } else { (ExtentKind::Data, offset) };
            let kind = kind as u32;
            let goes_on = |last: &&mut Extent| {
                let behind = offset == 1 || last.location + last.length == offset;
                last.kind == kind && last.guest_offset + last.length == at && behind
            };
            let found = out.len() - first;
            match out.last_mut().filter(|_| found > 0).filter(goes_on) {
                _ if offset == 0 => {}
                Some(last) => last.length += length,
                None if found == max => return Ok(at),
                None => out.push(Extent { guest_offset: at, length, location, kind, device: self.0.device }),
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
