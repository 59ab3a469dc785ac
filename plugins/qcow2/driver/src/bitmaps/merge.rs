//! Merging bitmaps into those of the backing, and making those that are missing. The order, with the crash that each step
//! survives:
//!
//! 1. Before any other cluster is taken: a run of new clusters for the tables of the bitmaps that are made, and a directory that
//!    has them. It reads as zeroes. A crash leaves leaks.
//! 2. When all data is durable or on its way: the bits, as [`record_bits`](crate::write::record_bits) sets them. A bitmap that is
//!    there may claim more than has changed, never less. Of one that is made, nothing that is durable refers to its table: a
//!    crash leaves leaks.
//! 3. The new directory, *then a flush*; then the header refers to it, see [`made`](crate::bitmaps::made). All bitmaps that are
//!    made appear at one stroke, with all their bits.
//! 4. The clusters of the old directory are freed. A crash leaves leaks.
//!
//! Merging sets bits alone, so that a commit that is run again finds the bits of before and sets the others.

use crate::bitmaps::list::{list, verified};
use crate::bitmaps::made::{unsupported, Made, NewDirectory, Switch};
use crate::image::{overflow, Image};
use crate::metadata::cluster_run::ClusterRun;
use crate::write::backing::Backing;
use crate::write::enabled_bitmaps::{EnabledBitmaps, Recorded};
use alloc::format;
use alloc::vec;
use alloc::vec::Vec;
use instar_guest_sdk::abi::DirtyRange;
use instar_guest_sdk::{Bitmap, BlockIo, DriverResult};
use instar_qcow2_format::{Bitmap as Entry, HostCluster, HostOffset, AUTOCLEAR_OFFSET};

/// Where the bits of a bitmap go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    /// Into the one with this number among those that are kept up.
    Kept(usize),
    /// Into the one with this number among those that are made.
    Made(usize),
}

/// A bitmap that is made, as one whose bits are set.
fn recorded(made: &Made) -> Recorded {
    let entries = u64::from(made.entries);
    let held = if made.table.0 == 0 { 0 } else { entries };
    Recorded { table: made.table, entries, held, granularity_bits: made.granularity_bits }
}

/// The bitmaps that are merged.
#[derive(Default)]
pub(crate) struct Merging {
    /// The names of the backing's bitmaps, each with its number among those that are kept up, if it is one; once they were read.
    names: Option<Vec<(Vec<u8>, Option<usize>)>>,
    made: Vec<Made>,
    switch: Option<Switch>,
    /// The directory's place in the run of new clusters, once there is room.
    directory: Option<HostOffset>,
    /// The bitmap of the last call, alone, for its caches.
    current: Option<(Place, EnabledBitmaps)>,
}

impl Merging {
    /// Bitmap and ranges for the first time: find out where the bits go, and count what they need. Returns single clusters.
    ///
    /// # Errors
    /// As [`Sink::plan_bitmap`](instar_guest_sdk::Sink::plan_bitmap).
    pub(crate) fn plan(
        &mut self,
        io: &mut dyn BlockIo,
        image: &Image,
        kept: &EnabledBitmaps,
        (bitmap, dirty): (&Bitmap, &[DirtyRange]),
    ) -> DriverResult<u64> {
        let place = match self.place(io, image, bitmap)? {
            Some(place) => place,
            None => self.add(io, image, bitmap)?,
        };
        self.at(image, kept, place)?.plan_ranges(io, image, &ranges(dirty))
    }

    /// Clusters that follow each other, for what is made.
    pub(crate) fn clusters(&self, image: &Image) -> u64 {
        let size = image.cluster_size();
        let tables: u64 = self.made.iter().map(|made| size.count_for(u64::from(made.entries) * 8)).sum();
        tables + self.switch.as_ref().map_or(0, |switch| size.count_for(switch.directory_bytes(&self.made)))
    }

    /// Step 1.
    ///
    /// # Errors
    /// I/O errors.
    pub(crate) fn reserve(&mut self, io: &mut dyn BlockIo, backing: &mut Backing) -> DriverResult<()> {
        let count = self.clusters(&backing.image);
        if count == 0 || self.directory.is_some() {
            return Ok(());
        }
        self.current = None;
        let size = backing.image.cluster_size();
        let mut next = backing.reserve_run(io, count)?.0;
        for made in &mut self.made {
            made.table = backing.image.host_offset(HostCluster(next))?;
            next += size.count_for(u64::from(made.entries) * 8);
        }
        self.directory = Some(backing.image.host_offset(HostCluster(next))?);
        Ok(())
    }

    /// Step 2.
    ///
    /// # Errors
    /// I/O errors.
    pub(crate) fn merge(
        &mut self,
        io: &mut dyn BlockIo,
        backing: &mut Backing,
        kept: &EnabledBitmaps,
        (bitmap, dirty): (&Bitmap, &[DirtyRange]),
    ) -> DriverResult<()> {
        let place = self.place(io, &backing.image, bitmap)?.ok_or_else(|| overflow("a bitmap that was not planned"))?;
        self.at(&backing.image, kept, place)?.record_ranges(io, backing, &ranges(dirty))
    }

    /// Steps 3 and 4.
    ///
    /// # Errors
    /// I/O errors.
    pub(crate) fn finish(&mut self, io: &mut dyn BlockIo, backing: &mut Backing) -> DriverResult<()> {
        let (Some(offset), Some(switch)) = (self.directory.take(), self.switch.take()) else { return Ok(()) };
        let new = NewDirectory { offset, made: &self.made };
        switch.write_directory(io, backing, &new)?;
        backing.publish(io)?;
        backing.flush(io)?;
        backing.space.referenced();
        switch.apply(io, backing, &new)?;
        if let Some((old, bytes)) = switch.old_directory() {
            let old = ClusterRun::of(backing.image.cluster_size(), old, bytes);
            backing.release(io, old.clusters().collect())?;
        }
        self.made.clear();
        Ok(())
    }

    /// Where the bits of a bitmap go; `None` if it is to be made.
    fn place(&mut self, io: &mut dyn BlockIo, image: &Image, bitmap: &Bitmap) -> DriverResult<Option<Place>> {
        if let Some(made) = self.made.iter().position(|made| made.name == bitmap.name) {
            return Ok(Some(Place::Made(made)));
        }
        let names = match self.names.take() {
            Some(names) => names,
            None => {
                let (bitmaps, entries) = list(io, image, verified)?;
                let mut kept = 0..;
                let numbers = entries.iter().map(|entry| entry.bitmap.is_recording().then(|| kept.next()).flatten());
                bitmaps.into_iter().map(|bitmap| bitmap.name).zip(numbers).collect()
            }
        };
        let found = self.names.insert(names).iter().find(|(name, _)| *name == bitmap.name);
        match found {
            None => Ok(None),
            Some((_, Some(kept))) => Ok(Some(Place::Kept(*kept))),
            Some((_, None)) => Err(unsupported(
                image,
                AUTOCLEAR_OFFSET,
                "a bitmap that is disabled, or was not saved, takes no bits".into(),
            )),
        }
    }

    /// A bitmap is to be made.
    fn add(&mut self, io: &mut dyn BlockIo, image: &Image, bitmap: &Bitmap) -> DriverResult<Place> {
        let granularity_bits = bitmap.granularity.trailing_zeros();
        let (table, name_bytes) = (HostOffset(image.cluster_size().bytes()), u16::try_from(bitmap.name.len()));
        let name = name_bytes.map_err(|_| overflow("the length of a bitmap's name"))?;
        let mut entry = Entry {
            table,
            table_entries: 1,
            in_use: false,
            auto: bitmap.enabled,
            extra_data_compatible: false,
            granularity_bits,
            extra_data_bytes: 0,
            name_bytes: name,
        };
        let fits = (9..=31).contains(&granularity_bits);
        let entries = entry.entries_for(image.header.virtual_size, image.cluster_size()).filter(|_| fits);
        entry.table_entries = entries.ok_or_else(|| {
            let text = format!(
                "a bitmap with a granularity of {} bytes cannot be made for a disk of this size: leave out --bitmaps",
                bitmap.granularity
            );
            unsupported(image, AUTOCLEAR_OFFSET, text)
        })?;
        let made = Made {
            name: bitmap.name.clone(),
            granularity_bits,
            enabled: bitmap.enabled,
            entries: entry.table_entries.max(1),
            table: HostOffset(0),
        };
        let switch = match self.switch.take() {
            Some(switch) => switch,
            None => Switch::plan(io, image)?,
        };
        self.made.push(made);
        let result = switch.fits(&self.made, image);
        self.switch = Some(switch);
        result.map(|()| Place::Made(self.made.len() - 1))
    }

    /// The bitmap at this place, alone.
    fn at(&mut self, image: &Image, kept: &EnabledBitmaps, place: Place) -> DriverResult<&mut EnabledBitmaps> {
        let current = match self.current.take() {
            Some(current) if current.0 == place => current,
            _ => {
                let recorded = match place {
                    Place::Kept(number) => kept.recorded.get(number).copied(),
                    Place::Made(number) => self.made.get(number).map(recorded),
                };
                let recorded = vec![recorded.ok_or_else(|| overflow("the number of a bitmap"))?];
                (place, EnabledBitmaps { recorded, last_planned: vec![None], ..EnabledBitmaps::new(image) })
            }
        };
        Ok(&mut self.current.insert(current).1)
    }

    /// Planning is over: the next steps read tables again.
    pub(crate) fn planned(&mut self) {
        self.current = None;
    }

    /// Whether there is anything to make.
    pub(crate) fn makes(&self) -> bool {
        !self.made.is_empty()
    }
}

fn ranges(dirty: &[DirtyRange]) -> Vec<(u64, u64)> {
    dirty.iter().map(|range| (range.start, range.end)).collect()
}
