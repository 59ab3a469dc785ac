//! VHDX: headers, region tables, metadata, parent locator, log and bitmap, on any bytes.

use instar_vhdx_format::{
    active_sequence, create, Bits, CreateOptions, Guid, Header, Headers, Locator, LogEntry, Metadata, NewEntry, Parent,
    Region, RegionTable, Replay, Update, HEADER_BYTES, LOG_SECTOR, REGION_TABLE_BYTES,
};

/// Bytes of a log that is looked at.
const LOG_BYTES: usize = 64 << 10;
const MIB: u64 = 1 << 20;

/// `data`, then zeroes up to `length`.
fn padded(data: &[u8], length: usize) -> Vec<u8> {
    let mut bytes = data[..data.len().min(length)].to_vec();
    bytes.resize(length, 0);
    bytes
}

/// The bytes as each of the structures.
pub fn parts(data: &[u8]) {
    let first: [u8; HEADER_BYTES] = padded(data, HEADER_BYTES).try_into().unwrap();
    if let Ok(headers) = Headers::choose(&first, &[0; HEADER_BYTES]) {
        let again = headers.current.encode();
        assert_eq!(Headers::choose(&again, &again).map(|again| again.current), Ok(headers.current));
        assert!(headers.current.log_offset >= MIB && headers.current.log().end <= i64::MAX as u64);
    }
    let table = padded(data, REGION_TABLE_BYTES);
    if let Ok(regions) = RegionTable::choose(&table, &table, &(MIB..2 * MIB), 1 << 40) {
        let bytes = regions.encode();
        assert_eq!(RegionTable::choose(&bytes, &bytes, &(MIB..2 * MIB), 1 << 40), Ok(regions));
    }
    let region = Region { id: instar_vhdx_format::ids::METADATA, offset: 0, length: 1 << 20, required: true };
    // The table is in front; items begin behind 64 KiB, where the bytes stand once more.
    let metadata = [padded(data, REGION_TABLE_BYTES), padded(data, REGION_TABLE_BYTES)].concat();
    let read = &mut |offset: u64, buffer: &mut [u8]| {
        let at = usize::try_from(offset).unwrap().min(metadata.len());
        buffer.copy_from_slice(&padded(&metadata[at..], buffer.len()));
        Ok::<(), ()>(())
    };
    if let Ok(metadata) = Metadata::load(&region, read) {
        assert!(metadata.block_size.is_power_of_two() && metadata.size > 0 && metadata.size <= 64 << 40);
        assert!(metadata.size.is_multiple_of(metadata.logical_sector));
    }
    if let Ok(locator) = Locator::parse(data, 0) {
        assert!(locator.linkage2 != Some(Guid::NULL));
    }
    log(data);
    let bits = Bits(data.to_vec());
    let mut at = 0;
    while let Some(run) = bits.next_run(at, data.len() * 8) {
        assert!(run.start >= at && run.clone().all(|sector| bits.has(sector)) && !bits.has(run.end));
        assert!((at..run.start).all(|sector| !bits.has(sector)));
        at = run.end;
    }
}

/// The bytes as a log, in which entries get the checksum that is right: no chance finds it.
fn log(data: &[u8]) {
    let mut log = padded(data, LOG_BYTES);
    let guid = Guid([3; 16]);
    let mut header = Header::new(1, Guid([1; 16]), Guid([2; 16]), MIB, 1 << 16);
    header.log_guid = guid;
    let wanted = data.first().copied().unwrap_or(0);
    for (index, place) in [0usize, 8192, 16384].into_iter().enumerate() {
        // What stands there becomes the page of an entry, at a place that the bytes name.
        let offset = u64::from(wanted) * (index as u64 + 1) * LOG_SECTOR as u64;
        let updates = [Update::Page { offset, bytes: padded(&data[place.min(data.len())..], LOG_SECTOR) }];
        let at = u32::try_from(place).unwrap();
        let sequence = u64::from(data.get(1 + index).copied().unwrap_or(1));
        let entry = NewEntry { at, sequence, guid, file_length: MIB, updates: &updates }.encode();
        if wanted.is_multiple_of(2) {
            log[place..place + entry.len()].copy_from_slice(&entry);
            let read = LogEntry::read(&log, place, &guid);
            assert_eq!(read.map(|read| read.updates), (sequence > 0).then(|| updates.to_vec()));
        }
    }
    if let Ok(entries) = active_sequence(&log, &header) {
        assert!(entries.windows(2).all(|pair| pair[0].sequence + 1 == pair[1].sequence));
        if let Ok(replay) = Replay::new(entries, &header.log(), 4 * MIB) {
            assert!(!replay.touches(&(0..192 << 10)) && !replay.touches(&header.log()));
        }
    }
}

/// The beginning of each structure of an image that is as it should be.
#[must_use]
pub fn part_seeds() -> Vec<Vec<u8>> {
    let parent = Some(Parent { data_write: Guid([7; 16]), path: "sub/base.vhdx".to_owned() });
    let options = CreateOptions {
        virtual_size: 1 << 24,
        block_size: 1 << 20,
        logical_sector: 512,
        physical_sector: 4096,
        fixed: false,
        file_write: Guid([1; 16]),
        data_write: Guid([2; 16]),
        disk_id: Guid([3; 16]),
        parent,
    };
    let image = create(&options).unwrap();
    let mut seeds: Vec<Vec<u8>> =
        image.regions.iter().map(|(_, bytes)| bytes[..bytes.len().min(16 << 10)].to_vec()).collect();
    let metadata = image.regions.last().map_or(&[][..], |(_, bytes)| bytes);
    seeds.extend(metadata.get(0x11000..).map(<[u8]>::to_vec));
    seeds.push([&[2, 1, 2, 3][..], &[7; 9000]].concat());
    seeds
}
