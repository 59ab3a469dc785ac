//! The consistency pass: every entry of the BAT names a cluster that lies in the file, and no two name the same one.
//!
//! What is used is marked in a bitmap of the file's clusters, a [window](Windows) of it at a time.

use crate::image::{Image, Place};
use alloc::format;
use alloc::string::String;
use instar_guest_sdk::table::{Little32, Table, Used, Windows, Wrong};
use instar_guest_sdk::{BlockIo, DriverResult};
use instar_parallels_format::Header;

/// What the BAT says, all of it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Survey {
    /// Clusters of the disk that the image holds.
    pub held: u64,
    /// How many of the clusters that the image is said to have they are: only those of the disk, past whose end the last one
    /// may reach.
    pub units: u64,
    /// Entries behind those of the disk's clusters that say anything.
    pub beyond: u64,
    /// Clusters that do not follow the one of the cluster before, where that has one.
    pub fragmented: u64,
    /// Where the last cluster ends in the file; where the data begins if there is none.
    pub end: u64,
}

/// Hand each entry that is not 0 to `each`, with the cluster of the disk that it is for. What lies in a hole is not read.
///
/// # Errors
/// Those of `each`; I/O errors.
pub fn each_entry(
    io: &mut dyn BlockIo,
    image: &Image,
    each: &mut dyn FnMut(u64, u32) -> DriverResult<()>,
) -> DriverResult<()> {
    let mut bat = Table::<Little32>::sparse(image.device, 0);
    bat.each(io, image.bat().start, image.header.entries.into(), &mut |_, cluster, entry| each(cluster, entry))
}

/// Go through the BAT. What is wrong goes to `wrong`, which may end the pass.
///
/// # Errors
/// Those of `wrong`; I/O errors.
pub fn survey(io: &mut dyn BlockIo, image: &Image, wrong: Wrong<'_>) -> DriverResult<Survey> {
    let mut found = Survey { end: image.header.data_start(), ..Survey::default() };
    let mut windows = Windows::over(io, image.slots_in_file(), 1);
    while let Some(window) = windows.next_window() {
        let mut used = Used::of(window)?;
        let mut pass = Pass { image, windows: &mut windows, before: None, found: &mut found };
        each_entry(io, image, &mut |cluster, entry| {
            let place = pass.entry(cluster, entry, wrong)?;
            if place.is_some_and(|place| !used.add(place.slot)) {
                let text = format!("cluster {cluster} of the disk lies in the same place as another one");
                wrong(Header::entry_place(cluster), text)?;
            }
            Ok(())
        })?;
    }
    Ok(found)
}

/// [`survey`] of an image in which nothing may be wrong.
///
/// # Errors
/// Corruption and I/O errors.
pub fn verified(io: &mut dyn BlockIo, image: &Image) -> DriverResult<Survey> {
    let found = survey(io, image, &mut |offset, text| Err(image.corrupt(offset, text)))?;
    match contradiction(image, &found) {
        Some(text) => Err(image.corrupt(0, text)),
        None => Ok(found),
    }
}

/// What header and BAT say that cannot both be. Programs disagree about such an image: QEMU does not look at the flag.
pub fn contradiction(image: &Image, found: &Survey) -> Option<String> {
    let clusters = found.held + found.beyond;
    (image.header.says_empty() && clusters > 0)
        .then(|| format!("flags say that the image is empty, and the BAT names {clusters} clusters"))
}

/// A pass over the BAT; what it counts and tells, it does in the first window only.
struct Pass<'a> {
    image: &'a Image,
    windows: &'a mut Windows,
    /// The cluster of the disk before, and where it ends in the file.
    before: Option<(u64, u64)>,
    found: &'a mut Survey,
}

impl Pass<'_> {
    fn entry(&mut self, cluster: u64, entry: u32, wrong: Wrong<'_>) -> DriverResult<Option<Place>> {
        let place = self.image.place(entry);
        if !self.windows.is_first() {
            return Ok(place.ok());
        }
        let place = match place {
            Ok(place) => place,
            Err(text) => {
                let text = format!("cluster {cluster} of the disk: {text}");
                return wrong(Header::entry_place(cluster), text).map(|()| None);
            }
        };
        self.windows.reach(&(place.slot..place.slot.saturating_add(1)));
        let in_disk = cluster < self.image.header.disk_clusters();
        if in_disk {
            self.found.held += 1;
            self.found.units += self.image.units_of(cluster);
        } else {
            self.found.beyond += 1;
        }
        // As QEMU counts (`parallels_collect_statistics`): a cluster behind a gap begins a new run.
        let follows = |(before, end): (u64, u64)| before + 1 != cluster || end == place.offset;
        self.found.fragmented += u64::from(!self.before.is_none_or(follows));
        let end = place.offset + self.image.header.cluster_bytes();
        self.before = Some((cluster, end));
        self.found.end = self.found.end.max(end);
        Ok(Some(place))
    }
}
