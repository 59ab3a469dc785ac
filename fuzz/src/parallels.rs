//! Parallels: the header and the format extension, on any bytes.

use instar_parallels_format::{
    checksum, create, field, CreateOptions, Extension, Header, InUse, Variant, EXTENSION_HEAD, EXTENSION_MAGIC, SECTOR,
};

/// Header, what it becomes when it is written, places of clusters; and an extension whose checksum is right.
pub fn parts(data: &[u8]) {
    if let Some(Ok(header)) = data.first_chunk().map(Header::parse) {
        assert!(header.disk_clusters() <= u64::from(header.entries) && header.floor() >= header.bat_end());
        assert!(header.unit().is_power_of_two() && header.cluster_bytes().is_multiple_of(header.unit()));
        for word in data.chunks_exact(4) {
            let entry = u32::from_le_bytes(word.try_into().unwrap());
            let offset = header.offset(entry);
            assert!(offset.is_multiple_of(SECTOR) && i64::try_from(offset).is_ok());
            assert_eq!(header.entry(offset), (entry != 0).then_some(entry));
            assert!(header.slot(offset).is_none() || offset >= header.floor());
        }
        let mut bytes: [u8; 64] = *data.first_chunk().unwrap();
        bytes[field::ENTRIES..].copy_from_slice(&header.update());
        assert_eq!(Header::parse(&bytes), Ok(header));
        let opened = header.opened();
        bytes[field::ENTRIES..].copy_from_slice(&opened.update());
        assert_eq!(Header::parse(&bytes), Ok(opened));
        assert!(opened.in_use == InUse::Open && opened.ext_off == 0 && !opened.says_empty());
    }
    let mut extension = data.to_vec();
    if extension.len() >= EXTENSION_HEAD {
        let sum = checksum(&extension[EXTENSION_HEAD..]);
        extension[..8].copy_from_slice(&EXTENSION_MAGIC.to_le_bytes());
        extension[8..EXTENSION_HEAD].copy_from_slice(&sum);
    }
    if let Ok(parsed) = Extension::parse(&extension) {
        let clusters: usize = parsed.sections.iter().map(|section| section.clusters.len()).sum();
        assert!(parsed.bitmaps() <= parsed.sections.len() && clusters * 8 <= extension.len());
        let _ = parsed.must_stay();
    }
}

/// Images that are as they should be, and an extension.
#[must_use]
pub fn seeds() -> Vec<Vec<u8>> {
    let new = |cluster| create(&CreateOptions { virtual_size: (5 << 20) + 512, cluster }).unwrap().start.to_vec();
    let mut old = new(1 << 20);
    old[..16].copy_from_slice(Variant::Sectors.magic());
    old[field::TRACKS..field::ENTRIES + 4].copy_from_slice(&[63, 0, 0, 0, 200, 0, 0, 0]);
    old[field::DATA_OFF..field::DATA_OFF + 4].fill(0);
    let mut extension = vec![0; EXTENSION_HEAD];
    extension.extend([instar_parallels_format::DIRTY_BITMAP, 0, 40].map(u64::to_le_bytes).concat());
    extension.extend([0; 28]);
    extension.extend([1, 0, 0, 0, 9, 0, 0, 0, 0, 0, 0, 0]);
    extension.extend([7, 2, 3].map(u64::to_le_bytes).concat());
    extension.extend([0; 40]);
    vec![new(1 << 20), new(4096), old, extension]
}
