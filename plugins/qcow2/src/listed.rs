//! Internal snapshots and persistent bitmaps as `qemu-img info` lists them. What cannot be read is left out: the guest
//! looks at these tables properly.

use instar_plugin_api::{FactValue, Feature, ImageReader};
use instar_qcow2_format::{autoclear, Bitmap, BitmapError, ExtensionKind, Header, SnapshotDetails, BITMAP_ENTRY_BYTES};

/// Bytes of a table that are looked at: entries of some thousand snapshots or bitmaps.
const TABLE_BYTES: u64 = 512 << 10;
/// Largest list in bytes, as [`FactValue::weight`] counts: there are two, and other features besides.
const LIST_BYTES: u64 = 7 << 19;
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
    let record = |snapshot: &SnapshotDetails| {
        let count = snapshot.instructions.map(|count| ("icount", FactValue::Number(count)));
        let fields = [
            ("vm-clock-nsec", FactValue::Number(snapshot.vm_clock_nanoseconds % 1_000_000_000)),
            ("name", text(&snapshot.name)),
            ("date-sec", snapshot.date_seconds.into()),
            ("date-nsec", snapshot.date_nanoseconds.into()),
            ("vm-clock-sec", FactValue::Number(snapshot.vm_clock_nanoseconds / 1_000_000_000)),
            ("id", text(&snapshot.id)),
            ("vm-state-size", FactValue::Number(snapshot.vm_state_bytes)),
        ];
        FactValue::record(count.into_iter().chain(fields))
    };
    list(SNAPSHOT_LIST, snapshots.iter().map(record), false)
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
        let flags = [(bitmap.in_use, "in-use"), (bitmap.auto, "auto")];
        let flags = FactValue::list(flags.into_iter().filter(|(set, _)| *set).map(|(_, name)| name));
        let granularity = FactValue::Number(1 << bitmap.granularity_bits);
        Some(FactValue::record([("flags", flags), ("name", text(name)), ("granularity", granularity)]))
    };
    list(BITMAP_LIST, (0..bitmaps.count).map_while(|_| next()), true)
}

/// A list of records, the first of them if they are too many; `None` for one of nothing.
fn list(name: &str, records: impl Iterator<Item = FactValue>, in_info: bool) -> Option<Feature> {
    let mut left = LIST_BYTES;
    let fit = records.map_while(|record| {
        left = left.checked_sub(record.weight(left)?)?;
        Some(record)
    });
    let values: Vec<FactValue> = fit.collect();
    (!values.is_empty()).then(|| Feature::new(name, FactValue::list(values), in_info))
}

/// Bytes of the image as text.
fn text(bytes: &[u8]) -> FactValue {
    String::from_utf8_lossy(bytes).into_owned().into()
}
