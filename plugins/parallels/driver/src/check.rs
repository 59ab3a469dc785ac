//! The report on an image, for `instar check`: the header, the BAT, and the format extension.

use crate::image::Image;
use crate::survey::{contradiction, each_entry, survey};
use alloc::collections::BTreeSet;
use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec;
use instar_guest_sdk::abi::{CheckSummary, FindingKind};
use instar_guest_sdk::table::tell_findings;
use instar_guest_sdk::{checked_end, BlockIo, DriverResult};
use instar_parallels_format::{Extension, InUse, SECTOR};

/// Bytes of a cluster with a format extension that are read: it is summed up as a whole.
const MOST_EXTENSION: u64 = 8 << 20;

/// Where the clusters of the format extension and its bitmaps begin, in bytes; what is wrong with it instead.
fn extension(io: &mut dyn BlockIo, image: &Image) -> DriverResult<Result<BTreeSet<u64>, String>> {
    let (size, start) = (image.header.cluster_bytes(), image.header.ext_off.checked_mul(SECTOR));
    let fits = |offset: u64| {
        let whole = checked_end(offset, size, image.file_length).is_some();
        whole && image.header.slot(offset).is_some()
    };
    let Some(start) = start.filter(|&start| fits(start)) else {
        return Ok(Err(format!("ext_off is sector {}, where no cluster lies", image.header.ext_off)));
    };
    if size > MOST_EXTENSION {
        return Ok(Ok(BTreeSet::from([start])));
    }
    let length = usize::try_from(size).map_err(|_| instar_guest_sdk::overflow("a cluster"))?;
    let mut bytes = vec![0; length];
    io.read(image.device, start, &mut bytes)?;
    let extension = match Extension::parse(&bytes) {
        Ok(extension) => extension,
        Err(error) => return Ok(Err(error.text)),
    };
    let mut places = BTreeSet::from([start]);
    for offset in extension.sections.iter().flat_map(|section| &section.clusters) {
        if !fits(*offset) {
            return Ok(Err(format!("a dirty bitmap has a cluster at offset {offset}, where none lies")));
        }
        if !places.insert(*offset) {
            return Ok(Err(format!("two parts of the format extension lie at offset {offset}")));
        }
    }
    Ok(Ok(places))
}

/// Look at all of an image; whether it was closed counts only if the `mark` is to be looked at.
///
/// # Errors
/// I/O errors.
pub fn check(
    io: &mut dyn BlockIo,
    image: &Image,
    mark: bool,
    finding: &mut dyn FnMut(FindingKind, &str),
) -> DriverResult<CheckSummary> {
    let rest = "the BAT is damaged throughout: the rest of it was not looked at";
    let (found, mut corruptions) = tell_findings(finding, rest, |wrong| survey(io, image, wrong))?;
    let Some(mut found) = found else {
        return Ok(CheckSummary { corruptions, ..CheckSummary::default() });
    };
    let mut wrong = |text: &str| {
        corruptions += 1;
        finding(FindingKind::Corruption, text);
    };
    if let Some(text) = contradiction(image, &found) {
        wrong(&text);
    }
    if !image.header.data_is_aligned() {
        let text = format!("data_off is sector {}, which is not the start of a cluster", image.header.data_off);
        wrong(&text);
    }
    if mark && image.header.in_use == InUse::Open {
        // QEMU counts that as a corruption, too (`parallels_check_unclean`).
        wrong("the image was not closed, or is open for writing");
    }
    if image.header.ext_off != 0 {
        match extension(io, image)? {
            Ok(places) => {
                found.end = places.iter().map(|at| at + image.header.cluster_bytes()).fold(found.end, u64::max);
                let mut shared = 0;
                each_entry(io, image, &mut |_, entry| {
                    shared += u64::from(places.contains(&image.header.offset(entry)));
                    Ok(())
                })?;
                if shared > 0 {
                    wrong(&format!("{shared} clusters of the disk lie where the format extension does"));
                }
            }
            Err(text) => wrong(&text),
        }
    }
    if found.beyond > 0 {
        let text = format!("{} entries of the BAT are for clusters past the end of the disk", found.beyond);
        finding(FindingKind::Leak, &text.to_string());
    }
    let unused = image.file_length.saturating_sub(found.end);
    Ok(CheckSummary {
        image_end_offset: found.end.min(image.file_length),
        total_clusters: image.header.disk_clusters(),
        allocated_clusters: found.held,
        fragmented_clusters: found.fragmented,
        compressed_clusters: 0,
        corruptions,
        leaks: found.beyond,
        unused_tail: unused - unused % image.header.cluster_bytes(),
    })
}
