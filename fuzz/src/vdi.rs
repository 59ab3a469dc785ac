//! VDI: the header, on any bytes.

use instar_vdi_format::{create, CreateOptions, Entry, Header, Uuid, SECTOR};

/// Header, what it becomes when it is written, and entries of the map.
pub fn header(data: &[u8]) {
    if let Some(Ok(header)) = data.first_chunk().map(Header::parse) {
        let (disk, map) = (header.virtual_size(), header.map_bytes());
        assert!(disk > 0 && disk.is_multiple_of(SECTOR) && disk <= u64::from(header.blocks) * header.block_size);
        assert!(header.map_offset + map <= header.data_offset && header.slot_offset(u32::MAX) >= header.data_offset);
        let mut changed = header.clone();
        let next = changed.modify.next(&[7; 32]);
        let range = changed.record_parent(next, true);
        assert!(range.end <= 512 && changed.parent_announced());
        (changed.modify, changed.allocated) = (next, 7);
        let range = changed.update();
        assert!(range.end <= 512);
        assert_eq!(Header::parse(&changed.bytes).as_ref(), Ok(&changed));
        assert_eq!((changed.create, changed.link), (header.create, header.link));
    }
    for word in data.chunks_exact(4) {
        let number = u32::from_le_bytes(word.try_into().unwrap());
        assert_eq!(Entry::decode(number).encode(), number);
    }
}

/// Images that are as they should be.
#[must_use]
pub fn header_seeds() -> Vec<Vec<u8>> {
    let options = |preallocated, parent| CreateOptions {
        virtual_size: (5 << 20) + 512,
        preallocated,
        create: Uuid([0x11; 16]),
        modify: Uuid([0x12; 16]),
        parent,
    };
    let all = [options(false, None), options(true, None), options(false, Some((Uuid([0x13; 16]), Uuid([0x14; 16]))))];
    all.iter().map(|options| create(options).unwrap().regions.remove(0).1).collect()
}
