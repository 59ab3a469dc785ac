//! Writing clusters: data in place and into new clusters, then the entries of the BAT.
//!
//! The order, and what a crash leaves:
//! 1. data. In place it is hidden by the overlay; new clusters lie where no entry names them, and with them the file becomes
//!    as long as they need;
//! 2. *flush*; then entries, each of which is there or not. They name clusters that are durable and lie in the file as a
//!    whole: QEMU drops an entry for one that does not when it opens an image that was not closed.
//!
//! Whatever subset of the writes since the last flush is on the disk, every entry names what it should. At worst clusters are
//! lost, which the next run [finds free](crate::slots). [`crate::mark`] says what comes before and after.

use crate::changes::Changes;
use crate::decide::{decide, Action};
use crate::image::Image;
use crate::parts::{ClusterParts, Shape};
use crate::slots::Slots;
use crate::survey::Survey;
use crate::window::Window;
use alloc::vec;
use alloc::vec::Vec;
use core::ops::Range;
use instar_guest_sdk::abi::Request;
use instar_guest_sdk::{overflow, Batch, BlockIo, DriverResult, Extent, OrderedWriter, ReadBelow};
use instar_parallels_format::Header;

/// Requests that are collected before they are submitted.
const BATCH: usize = 4096;
/// Bytes from below that are collected before they are written, and that are read at once.
const FILL_BYTES: usize = 4 << 20;
const FILL_CHUNK: u64 = 1 << 20;

/// Requests that were not submitted yet, and the bytes that they write.
#[derive(Debug, Default)]
struct Pending {
    requests: Batch,
    buffers: Vec<Vec<u8>>,
    bytes: usize,
}

/// An image that is written to.
#[derive(Debug)]
pub struct Writer {
    pub image: Image,
    pub out: OrderedWriter,
    pub slots: Slots,
    /// The device cannot change its length.
    pub fixed: bool,
    bat: Window,
    changes: Changes,
    pending: Pending,
}

impl Writer {
    pub fn new(image: Image, fixed: bool) -> Self {
        let out = OrderedWriter::new(image.device);
        let (changes, pending) = Default::default();
        let slots = Slots::new(&image.header, &Survey::default());
        Self { image, out, slots, fixed, bat: Window::new(0), changes, pending }
    }

    /// The byte of the file at which a cluster of the disk lies, if the image holds it. A cluster behind all entries it does not
    /// hold.
    ///
    /// # Errors
    /// Corruption and I/O errors.
    pub fn place(&mut self, io: &mut dyn BlockIo, cluster: u64) -> DriverResult<Option<u64>> {
        if cluster >= u64::from(self.image.header.entries) {
            return Ok(None);
        }
        if let Some(entry) = self.changes.get(cluster) {
            // Our own may lie behind the end that the file has by now.
            return Ok((entry != 0).then(|| self.image.header.offset(entry)));
        }
        let entry = self.bat.get(io, &self.image, cluster, self.image.header.entries.into())?;
        if entry == 0 {
            return Ok(None);
        }
        let place = self.image.place(entry).map_err(|text| self.image.corrupt(Header::entry_place(cluster), text))?;
        Ok(Some(place.offset))
    }

    /// Whether the entries of these clusters of the disk lie in a hole of the file, so that none of them says anything.
    ///
    /// # Errors
    /// I/O errors.
    pub fn in_hole(&mut self, io: &mut dyn BlockIo, clusters: &Range<u64>) -> DriverResult<bool> {
        let end = clusters.end.min(self.image.header.entries.into());
        if clusters.start >= end {
            return Ok(true);
        }
        let entry = self.bat.get(io, &self.image, clusters.start, end)?;
        let zeroes = self.bat.zeroes(clusters.start);
        Ok(entry == 0 && zeroes >= end - clusters.start && !self.changes.touch(&(clusters.start..end)))
    }

    /// A cluster of the file that nothing uses, which reads as zeroes: the byte at which it begins.
    ///
    /// # Errors
    /// `NoSpace` where no entry or file reaches; I/O errors.
    pub fn new_cluster(&mut self, io: &mut dyn BlockIo) -> DriverResult<u64> {
        let (offset, length) = (self.slots.take(io, &self.image)?, self.image.header.cluster_bytes());
        if offset < self.image.file_length {
            // A gap, what a crash left, or a block device: what was there before may be anything.
            self.pending.requests.push(Request::zero(self.image.device, offset, length));
        }
        Ok(offset)
    }

    /// Have the entry of a cluster of the disk name the cluster at this byte of the file. [`Writer::step`] writes it.
    ///
    /// # Errors
    /// I/O errors.
    pub fn set_place(&mut self, io: &mut dyn BlockIo, cluster: u64, offset: u64) -> DriverResult<()> {
        let entry = self.image.header.entry(offset).ok_or_else(|| overflow("the place of a cluster"))?;
        if self.changes.get(cluster).is_none() {
            // The window is to hold the sector around it.
            self.bat.get(io, &self.image, cluster, self.image.header.entries.into())?;
        }
        self.changes.set(&self.bat, cluster, entry)
    }

    /// Whether [`Writer::step`] is due before more entries change.
    pub fn is_full(&self) -> bool {
        self.changes.is_full()
    }

    /// Write what arrives for a cluster. Its data is submitted by [`Writer::submit`], its entry written by [`Writer::step`].
    ///
    /// # Errors
    /// Corruption and I/O errors.
    pub fn write_cluster(
        &mut self,
        io: &mut dyn BlockIo,
        disk: Shape,
        arriving: &ClusterParts,
        below: &mut dyn ReadBelow,
    ) -> DriverResult<()> {
        let (cluster, range) = (arriving.cluster, disk.range(arriving.cluster));
        let shows = below.exists() && range.start < below.length();
        match decide(self.place(io, cluster)?, arriving.arrival(), shows) {
            Action::Nothing => {}
            Action::InPlace(offset) => self.write_parts(io, offset, range.start, &arriving.parts, false)?,
            Action::Allocate => {
                let offset = self.new_cluster(io)?;
                if shows {
                    let mut at = range.start;
                    let end = Extent::zero(range.end, 0);
                    for part in arriving.parts.iter().chain([&end]) {
                        self.fill(io, (at, part.guest_offset), offset + (at - range.start), below)?;
                        at = part.end();
                    }
                }
                self.write_parts(io, offset, range.start, &arriving.parts, true)?;
                self.set_place(io, cluster, offset)?;
            }
        }
        if self.is_full() {
            self.step(io)?;
        }
        Ok(())
    }

    /// Write parts into the cluster at byte `offset` of the file, which is that from guest byte `start` on. One that is new
    /// reads as zeroes.
    fn write_parts(
        &mut self,
        io: &mut dyn BlockIo,
        offset: u64,
        start: u64,
        parts: &[Extent],
        is_new: bool,
    ) -> DriverResult<()> {
        for part in parts {
            if !(is_new && part.is_zero()) {
                self.pending.requests.push(part.request(self.image.device, offset + (part.guest_offset - start))?);
                self.submit_if_full(io)?;
            }
        }
        Ok(())
    }

    /// Write what shows from below at guest bytes `from..to` to byte `offset` of the file, which reads as zeroes.
    fn fill(
        &mut self,
        io: &mut dyn BlockIo,
        (from, to): (u64, u64),
        offset: u64,
        below: &mut dyn ReadBelow,
    ) -> DriverResult<()> {
        let mut at = from;
        let end = to.min(below.length());
        while at < end {
            let length = FILL_CHUNK.min(end - at);
            let mut buffer = vec![0; usize::try_from(length).map_err(|_| overflow("a cluster"))?];
            below.read(io, at, &mut buffer)?;
            if buffer.iter().any(|&byte| byte != 0) {
                let address = buffer.as_ptr() as u64;
                self.pending.requests.push(Request::write(self.image.device, offset + (at - from), address, length));
                self.pending.bytes += buffer.len();
                self.pending.buffers.push(buffer);
            }
            self.submit_if_full(io)?;
            at += length;
        }
        Ok(())
    }

    /// Copy a cluster of the file to where another one is new.
    ///
    /// # Errors
    /// I/O errors.
    pub fn copy_cluster(&mut self, io: &mut dyn BlockIo, from: u64, to: u64) -> DriverResult<()> {
        let (device, length) = (self.image.device, self.image.header.cluster_bytes());
        self.pending.requests.push(Request::copy(device, from, device, to, length));
        self.submit_if_full(io)
    }

    fn submit_if_full(&mut self, io: &mut dyn BlockIo) -> DriverResult<()> {
        if self.pending.requests.len() >= BATCH || self.pending.bytes >= FILL_BYTES {
            self.submit(io)?;
        }
        Ok(())
    }

    /// Submit the data of the clusters so far: what it is read from need not stay where it is any more.
    ///
    /// # Errors
    /// I/O errors.
    pub fn submit(&mut self, io: &mut dyn BlockIo) -> DriverResult<()> {
        self.pending.requests.submit_to(io, &mut self.out)?;
        self.pending = Pending::default();
        Ok(())
    }

    /// Have the file reach to the end of its last cluster.
    ///
    /// # Errors
    /// I/O errors.
    pub fn lengthen(&mut self, io: &mut dyn BlockIo) -> DriverResult<()> {
        let end = self.slots.end();
        if !self.fixed && end > self.image.file_length {
            self.out.set_length(io, end)?;
            self.image.file_length = end;
        }
        Ok(())
    }

    /// Step 2 for the clusters so far. The last of the entries are not flushed: the next step does that, or the end.
    ///
    /// # Errors
    /// I/O errors.
    pub fn step(&mut self, io: &mut dyn BlockIo) -> DriverResult<()> {
        self.submit(io)?;
        if self.changes.is_empty() {
            return Ok(());
        }
        self.lengthen(io)?;
        self.out.barrier(io)?;
        self.changes.write(io, &mut self.out)?;
        self.bat.forget();
        Ok(())
    }

    /// Drop what was read of the BAT: it is another one now.
    pub fn forget(&mut self) {
        self.bat.forget();
    }
}
