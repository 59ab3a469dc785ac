//! The source role.

use crate::header::CLUSTER;
use crate::image::{Entry, Image};
use alloc::vec::Vec;
use instar_guest_sdk::abi::{Examination, Extent, ExtentKind, FindingKind, ImageInfo, Request};
use instar_guest_sdk::{BlockIo, DriverResult, Source};

/// An image that data comes from.
pub struct SlateSource(pub(crate) Image);

impl Source for SlateSource {
    fn info(&self) -> ImageInfo {
        self.0.info()
    }

    fn check(&mut self, _: &mut dyn BlockIo, _: bool) -> DriverResult<u64> {
        self.0.verify()
    }

    fn extents(&mut self, _: &mut dyn BlockIo, from: u64, max: usize, out: &mut Vec<Extent>) -> DriverResult<u64> {
        let (size, start) = (self.0.header.virtual_size, out.len());
        for index in (from / CLUSTER) as usize..self.0.table.len() {
            let at = index as u64 * CLUSTER;
            let (kind, location) = match self.0.entry(index) {
                Entry::Absent => continue,
                Entry::Zero => (ExtentKind::Zero, 0),
                Entry::Full(byte) => (ExtentKind::Encoded, u64::from(byte)),
                Entry::At(offset) => (ExtentKind::Data, offset),
            };
            let (length, found) = (CLUSTER.min(size - at), out.len() - start);
            let last = out.last_mut().filter(|last| last.kind == kind as u32 && last.guest_offset + last.length == at);
            let follows = |last: &&mut Extent| match kind {
                ExtentKind::Data => last.location + last.length == location,
                _ => last.location == location,
            };
            match last.filter(|_| found > 0).filter(follows) {
                Some(last) => last.length += length,
                None if found == max => return Ok(at),
                None => {
                    out.push(Extent { guest_offset: at, length, location, kind: kind as u32, device: self.0.device })
                }
            }
        }
        Ok(size)
    }

    fn read(&mut self, _: &mut dyn BlockIo, extent: &Extent, _: u64, buffer: &mut [u8]) -> DriverResult<()> {
        buffer.fill(extent.location as u8);
        Ok(())
    }

    fn empty(&mut self, io: &mut dyn BlockIo) -> DriverResult<u64> {
        let held = self.0.verify()?;
        self.0.table.fill(0);
        self.0.write_table(io)?;
        let length = self.0.header.data_start();
        io.run(&mut [Request::set_length(self.0.device, length), Request::flush(self.0.device)])?;
        Ok(held)
    }

    fn follow_parent(&mut self, io: &mut dyn BlockIo, content_id: u64) -> DriverResult<()> {
        self.0.header.parent_id = content_id;
        self.0.write_header(io)
    }

    fn examine(
        &mut self,
        _: &mut dyn BlockIo,
        finding: &mut dyn FnMut(FindingKind, &str),
    ) -> DriverResult<Examination> {
        let faults = self.0.faults();
        faults.iter().for_each(|(_, text)| finding(FindingKind::Corruption, text));
        Ok(Examination {
            image_end_offset: self.0.file_length,
            total_clusters: self.0.header.clusters(),
            allocated_clusters: self.0.table.iter().filter(|&&entry| entry != 0).count() as u64,
            corruptions: faults.len() as u64,
            ..Examination::default()
        })
    }
}
