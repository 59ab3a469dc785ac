//! Internal snapshots and persistent bitmaps, as far as their tables can be read here: the guest looks at these tables
//! properly.

use instar_plugin_api::{BitmapFacts, FactValue, Feature, ImageReader, SnapshotFacts};
use instar_qcow2_format::{autoclear, Bitmap, ExtensionKind, Header, SnapshotDetails, BITMAP_ENTRY_BYTES};

/// Bytes of a table that are looked at: entries of some thousand snapshots or bitmaps.
const TABLE_BYTES: u64 = 512 << 10;
/// Name of the list of bitmaps, which `instar info` shows as it is.
pub const BITMAP_LIST: &str = "bitmaps";

/// The internal snapshots in the order of their table.
pub fn snapshots(image: &ImageReader<'_>, header: &Header) -> Vec<SnapshotFacts> {
    let count = usize::try_from(header.snapshots).unwrap_or(usize::MAX);
    if count == 0 {
        return Vec::new();
    }
    let table = read(image, header.snapshot_table.0, TABLE_BYTES);
    let (mut list, mut at) = (Vec::new(), 0);
    while list.len() < count {
        let Ok(Some((snapshot, next))) = SnapshotDetails::parse(&table, at, header.snapshot_table.0) else { break };
        list.push(snapshot_facts(snapshot, header.virtual_size));
        at = next;
    }
    list
}

fn snapshot_facts(snapshot: SnapshotDetails, virtual_size: u64) -> SnapshotFacts {
    SnapshotFacts {
        id: snapshot.id.into(),
        name: snapshot.name.into(),
        // Version 2 need not record it: there, an image with snapshots keeps its size.
        virtual_size: snapshot.virtual_size.unwrap_or(virtual_size).min(i64::MAX as u64),
        vm_state_size: snapshot.vm_state_bytes,
        date_seconds: snapshot.date_seconds.into(),
        date_nanoseconds: snapshot.date_nanoseconds,
        vm_clock_nanoseconds: snapshot.vm_clock_nanoseconds,
        instructions: snapshot.instructions.into(),
    }
}

/// Bytes of the image, fewer where it ends or cannot be read.
fn read(image: &ImageReader<'_>, offset: u64, length: u64) -> Vec<u8> {
    let length = length.min(image.length().saturating_sub(offset));
    image.read_vec(offset, usize::try_from(length).unwrap_or(0)).unwrap_or_default()
}

/// The persistent bitmaps; none without the autoclear bit, as for QEMU.
pub fn bitmaps(image: &ImageReader<'_>, header: &Header) -> Vec<BitmapFacts> {
    let extension = header.extension(ExtensionKind::Bitmaps).filter(|_| header.autoclear & autoclear::BITMAPS != 0);
    let checked = |data: &[u8]| instar_qcow2_format::Bitmaps::checked(data, header.cluster_size).ok();
    let Some(bitmaps) = extension.and_then(|extension| checked(&extension.data)) else { return Vec::new() };
    let directory = read(image, bitmaps.directory_offset, bitmaps.directory_size.min(TABLE_BYTES));
    let mut at = 0;
    let mut next = || {
        let fixed = directory.get(at..at + BITMAP_ENTRY_BYTES)?.try_into().ok()?;
        let bitmap = Bitmap::parse(fixed, header.cluster_size).ok()?;
        let extra = usize::try_from(bitmap.extra_data_bytes).ok()?;
        let name_at = at.checked_add(BITMAP_ENTRY_BYTES)?.checked_add(extra)?;
        let name = directory.get(name_at..name_at.checked_add(usize::from(bitmap.name_bytes))?)?;
        at = at.checked_add(usize::try_from(bitmap.entry_bytes()).ok()?)?;
        let granularity = 1 << bitmap.granularity_bits;
        Some(BitmapFacts { name: name.to_vec().into(), granularity, enabled: bitmap.auto, in_use: bitmap.in_use })
    };
    (0..bitmaps.count).map_while(|_| next()).collect()
}

/// The bitmaps with the keys of `qemu-img info`; `None` if there are none.
pub fn bitmap_list(bitmaps: &[BitmapFacts]) -> Option<Feature> {
    let record = |bitmap: &BitmapFacts| {
        let flags = [(bitmap.in_use, "in-use"), (bitmap.enabled, "auto")];
        let flags = FactValue::list(flags.into_iter().filter(|(set, _)| *set).map(|(_, name)| name));
        let name = String::from_utf8_lossy(&bitmap.name).into_owned().into();
        FactValue::record([("flags", flags), ("name", name), ("granularity", bitmap.granularity.into())])
    };
    (!bitmaps.is_empty()).then(|| Feature::new(BITMAP_LIST, FactValue::list(bitmaps.iter().map(record)), true))
}
