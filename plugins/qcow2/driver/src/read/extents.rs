//! The clusters of a layer as its reader sees them.

use crate::data_file::DataFile;
use crate::image::Image;
use crate::metadata::l2_entry::{compressed_range, Mapped};
use alloc::format;
use instar_guest_sdk::{Content, DriverResult, Extent};
use instar_qcow2_format::{L2Entry, SUBCLUSTERS};

/// What a cluster means for the reader of the layer: up to 32 extents.
pub(crate) fn extents_of(image: &Image, mapped: &Mapped, push: &mut dyn FnMut(Extent)) -> DriverResult<()> {
    let Mapped { guest, at, entry, subclusters } = *mapped;
    let visible = image.cluster_size().bytes().min(image.header.virtual_size - guest);
    let extent = |start: u64, length: u64, content: Content| Extent {
        guest_offset: guest + start,
        length: length.min(visible - start),
        content,
    };
    if let Some(data) = &image.data {
        return outside(image, data, mapped, push);
    }
    if let L2Entry::Data { offset, .. } = entry {
        if !image.holds_bytes(offset, mapped.data_end(image)) {
            return Err(image.corrupt(
                at,
                format!("the L2 entry of guest offset {guest} points to offset {offset}, past the end of the file"),
            ));
        }
    }
    let host = entry.host().map_or(0, |(offset, _)| offset.0);
    let plain = |start: u64| Content::Data { device: image.device, offset: host + start };
    if let Some(subclusters) = subclusters {
        let bytes = image.cluster_size().bytes() / u64::from(SUBCLUSTERS);
        for (first, count, data) in subclusters.runs() {
            let (start, length) = (u64::from(first) * bytes, u64::from(count) * bytes);
            if start < visible {
                push(extent(start, length, if data { plain(start) } else { Content::Zero }));
            }
        }
        return Ok(());
    }
    match entry {
        L2Entry::Data { .. } => push(extent(0, visible, plain(0))),
        L2Entry::Zero { .. } => push(extent(0, visible, Content::Zero)),
        L2Entry::Compressed { descriptor } => {
            compressed_range(image, guest, at, descriptor)?;
            push(extent(0, visible, Content::Encoded { location: descriptor }));
        }
        L2Entry::Unallocated => {}
    }
    Ok(())
}

/// The same of a cluster in the data file. Past its end, everything reads as zeroes.
fn outside(image: &Image, data: &DataFile, mapped: &Mapped, push: &mut dyn FnMut(Extent)) -> DriverResult<()> {
    let Mapped { guest, entry, subclusters, .. } = *mapped;
    let visible = image.cluster_size().bytes().min(image.header.virtual_size - guest);
    let mut extent = |start: u64, length: u64, is_data: bool| {
        let (at, length) = (guest + start, length.min(visible - start));
        let held = if is_data { data.held(at, length) } else { 0 };
        if held > 0 {
            push(Extent { guest_offset: at, length: held, content: Content::Data { device: data.device, offset: at } });
        }
        if held < length {
            push(Extent::zero(at + held, length - held));
        }
    };
    match (entry, subclusters) {
        (_, Some(subclusters)) => {
            let bytes = image.cluster_size().bytes() / u64::from(SUBCLUSTERS);
            for (first, count, is_data) in subclusters.runs() {
                let (start, length) = (u64::from(first) * bytes, u64::from(count) * bytes);
                if start < visible {
                    extent(start, length, is_data);
                }
            }
        }
        (L2Entry::Data { .. }, None) => extent(0, visible, true),
        (L2Entry::Zero { .. }, None) => extent(0, visible, false),
        // Decoding has refused compressed clusters.
        (L2Entry::Compressed { .. } | L2Entry::Unallocated, None) => {}
    }
    Ok(())
}
