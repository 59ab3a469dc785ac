//! Internal snapshots and persistent bitmaps as `qemu-img info` lists them. What cannot be read is left out: the guest
//! looks at these tables properly.

use instar_plugin_api::{Feature, ImageReader};
use instar_qcow2_format::{autoclear, Bitmap, BitmapError, ExtensionKind, Header, SnapshotDetails, BITMAP_ENTRY_BYTES};
use std::fmt::Write as _;

/// Bytes of a table that are looked at: entries of some thousand snapshots or bitmaps.
const TABLE_BYTES: u64 = 512 << 10;
/// Longest list as JSON text in bytes: values of features end at 1 MiB.
const LIST_BYTES: usize = 900 << 10;
/// Name of the list of internal snapshots: what `instar info` has as `snapshots`.
pub const SNAPSHOT_LIST: &str = "snapshot-list";
/// Name of the list of bitmaps, which `instar info` shows as it is.
pub const BITMAP_LIST: &str = "bitmaps";

/// The internal snapshots in the order of their table.
pub fn snapshots(image: &ImageReader<'_>, header: &Header) -> Vec<SnapshotDetails> {
    let count = usize::try_from(header.snapshots).unwrap_or(usize::MAX);
    if count == 0 {
        return Vec::new();
    }
    let table = read(image, header.snapshot_table.0, TABLE_BYTES);
    let (mut list, mut at) = (Vec::new(), 0);
    while list.len() < count {
        let Ok(Some((snapshot, next))) = SnapshotDetails::parse(&table, at, header.snapshot_table.0) else { break };
        list.push(snapshot);
        at = next;
    }
    list
}

/// Bytes of the image, fewer where it ends or cannot be read.
fn read(image: &ImageReader<'_>, offset: u64, length: u64) -> Vec<u8> {
    let length = length.min(image.length().saturating_sub(offset));
    image.read_vec(offset, usize::try_from(length).unwrap_or(0)).unwrap_or_default()
}

/// The list of internal snapshots, with the keys of `qemu-img info`.
pub fn snapshot_list(snapshots: &[SnapshotDetails]) -> Option<Feature> {
    let object = |snapshot: &SnapshotDetails| {
        let mut json = String::from("{");
        if let Some(count) = snapshot.instructions {
            let _ = write!(json, "\"icount\":{count},");
        }
        let _ = write!(
            json,
            "\"vm-clock-nsec\":{},\"name\":{},\"date-sec\":{},\"date-nsec\":{},\"vm-clock-sec\":{},\"id\":{},\
             \"vm-state-size\":{}}}",
            snapshot.vm_clock_nanoseconds % 1_000_000_000,
            text(&snapshot.name),
            snapshot.date_seconds,
            snapshot.date_nanoseconds,
            snapshot.vm_clock_nanoseconds / 1_000_000_000,
            text(&snapshot.id),
            snapshot.vm_state_bytes
        );
        json
    };
    list(SNAPSHOT_LIST, snapshots.iter().map(object), false)
}

/// The list of persistent bitmaps, with the keys of `qemu-img info`; none without the autoclear bit, as there.
pub fn bitmap_list(image: &ImageReader<'_>, header: &Header) -> Option<Feature> {
    let extension = header.extension(ExtensionKind::Bitmaps).filter(|_| header.autoclear & autoclear::BITMAPS != 0)?;
    let bitmaps = instar_qcow2_format::Bitmaps::checked(&extension.data, header.cluster_size).ok()?;
    let directory = read(image, bitmaps.directory_offset, bitmaps.directory_size.min(TABLE_BYTES));
    let mut at = 0;
    let mut next = || {
        let fixed = directory.get(at..at + BITMAP_ENTRY_BYTES)?.try_into().ok()?;
        let bitmap: Result<Bitmap, BitmapError> = Bitmap::parse(fixed, header.cluster_size);
        let bitmap = bitmap.ok()?;
        let extra = usize::try_from(bitmap.extra_data_bytes).ok()?;
        let name_at = at.checked_add(BITMAP_ENTRY_BYTES)?.checked_add(extra)?;
        let name = directory.get(name_at..name_at.checked_add(usize::from(bitmap.name_bytes))?)?;
        at = at.checked_add(usize::try_from(bitmap.entry_bytes()).ok()?)?;
        let flags = [(bitmap.in_use, "\"in-use\""), (bitmap.auto, "\"auto\"")];
        let flags: Vec<&str> = flags.into_iter().filter(|(set, _)| *set).map(|(_, name)| name).collect();
        let granularity = 1u64 << bitmap.granularity_bits;
        Some(format!("{{\"flags\":[{}],\"name\":{},\"granularity\":{granularity}}}", flags.join(","), text(name)))
    };
    list(BITMAP_LIST, (0..bitmaps.count).map_while(|_| next()), true)
}

/// A JSON array; `None` for one of nothing.
fn list(name: &str, objects: impl Iterator<Item = String>, in_info: bool) -> Option<Feature> {
    let mut json = String::new();
    for object in objects {
        if json.len() + object.len() > LIST_BYTES {
            break;
        }
        json.push(if json.is_empty() { '[' } else { ',' });
        json.push_str(&object);
    }
    if json.is_empty() {
        return None;
    }
    json.push(']');
    Some(Feature { name: name.into(), json: json.into(), in_info })
}

/// Bytes of the image as JSON text of plain ASCII.
fn text(bytes: &[u8]) -> String {
    Feature::text("", &String::from_utf8_lossy(bytes), false).json.into_string()
}
