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

use crate::image::Image;
use crate::slots::Slots;
use crate::survey::Survey;
use core::ops::Range;
use instar_guest_sdk::abi::Request;
use instar_guest_sdk::table::{
    Action, ClusterData, ClusterParts, ClusterPlace, Disk, Held, Little32, Table, ZeroEntries,
};
use instar_guest_sdk::{overflow, BlockIo, DriverResult, OrderedWriter, ReadBelow};
use instar_parallels_format::Header;

/// An image that is written to.
#[derive(Debug)]
pub struct Writer {
    pub image: Image,
    pub out: OrderedWriter,
    pub slots: Slots,
    /// The device cannot change its length.
    pub fixed: bool,
    bat: Table<Little32>,
    data: ClusterData,
}

impl Writer {
    pub fn new(image: Image, fixed: bool) -> Self {
        let out = OrderedWriter::new(image.device);
        let slots = Slots::new(&image.header, &Survey::default());
        let bat = Table::sparse(image.device, 0);
        Self { image, out, slots, fixed, bat, data: ClusterData::default() }
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
        let at = Header::entry_place(cluster);
        if let Some(entry) = self.bat.changed(at) {
            // Our own may lie behind the end that the file has by now.
            return Ok((entry != 0).then(|| self.image.header.offset(entry)));
        }
        let entry = self.bat.get(io, at, self.image.header.bat_end())?;
        if entry == 0 {
            return Ok(None);
        }
        let place = self.image.place(entry).map_err(|text| self.image.corrupt(at, text))?;
        Ok(Some(place.offset))
    }

    /// Whether the entries of these clusters of the disk lie in a hole of the file, so that none of them says anything.
    ///
    /// # Errors
    /// I/O errors.
    pub fn in_hole(&mut self, io: &mut dyn BlockIo, clusters: &Range<u64>) -> DriverResult<bool> {
        let end = Header::entry_place(clusters.end).min(self.image.header.bat_end());
        self.bat.is_hole(io, &(Header::entry_place(clusters.start)..end))
    }

    /// A cluster of the file that nothing uses, which reads as zeroes: the byte at which it begins.
    ///
    /// # Errors
    /// `NoSpace` where no entry or file reaches; I/O errors.
    pub fn new_cluster(&mut self, io: &mut dyn BlockIo) -> DriverResult<u64> {
        let (offset, length) = (self.slots.take(io, &self.image)?, self.image.header.cluster_bytes());
        if offset < self.image.file_length {
            // A gap, what a crash left, or a block device: what was there before may be anything.
            self.data.push(Request::zero(self.image.device, offset, length));
        }
        Ok(offset)
    }

    /// Have the entry of a cluster of the disk name the cluster at this byte of the file. [`Writer::step`] writes it.
    ///
    /// # Errors
    /// I/O errors.
    pub fn set_place(&mut self, io: &mut dyn BlockIo, cluster: u64, offset: u64) -> DriverResult<()> {
        let entry = self.image.header.entry(offset).ok_or_else(|| overflow("the place of a cluster"))?;
        self.bat.set(io, Header::entry_place(cluster), self.image.header.bat_end(), entry)
    }

    /// Whether [`Writer::step`] is due before more entries change.
    pub fn is_full(&self) -> bool {
        self.bat.is_full()
    }

    /// Write what arrives for a cluster. Its data and its entry are written by [`Writer::step`].
    ///
    /// # Errors
    /// Corruption and I/O errors.
    pub fn write_cluster(
        &mut self,
        io: &mut dyn BlockIo,
        disk: Disk,
        arriving: &ClusterParts,
        below: &mut dyn ReadBelow,
    ) -> DriverResult<()> {
        let (cluster, range) = (arriving.cluster, disk.range(arriving.cluster));
        let shows = below.exists() && range.start < below.length();
        let held = Held::from(self.place(io, cluster)?);
        let (offset, is_new) = match held.decide(arriving.arrival(disk), ZeroEntries::Never, shows) {
            Action::Nothing => return Ok(()),
            Action::InPlace(offset) => (offset, false),
            Action::Allocate | Action::MarkZero(_) => (self.new_cluster(io)?, true),
        };
        let place = ClusterPlace { guest: range, offset, is_new };
        if is_new && shows {
            self.data.fill_around(io, &mut self.out, &place, &arriving.parts, below)?;
        }
        self.data.write_parts(io, &mut self.out, &place, &arriving.parts)?;
        if is_new {
            self.set_place(io, cluster, offset)?;
        }
        if self.is_full() {
            self.step(io)?;
        }
        Ok(())
    }

    /// Copy a cluster of the file to where another one is new.
    ///
    /// # Errors
    /// I/O errors.
    pub fn copy_cluster(&mut self, io: &mut dyn BlockIo, from: u64, to: u64) -> DriverResult<()> {
        let (device, length) = (self.image.device, self.image.header.cluster_bytes());
        self.data.push(Request::copy(device, from, device, to, length));
        self.data.submit_if_full(io, &mut self.out)
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
        self.data.submit(io, &mut self.out)?;
        if self.bat.is_changed() {
            self.lengthen(io)?;
            self.bat.write(io, &mut self.out)?;
        }
        Ok(())
    }

    /// Drop what was read of the BAT: it is another one now.
    pub fn forget(&mut self) {
        self.bat.forget();
    }
}
