//! vmdk: headers, footer, descriptor and its extents, and entries of seSparse, on any bytes.

use instar_vmdk_format::{
    create, sesparse_table, CowdHeader, CreateOptions, Descriptor, Header, SeGrain, SeSparseHeader, Subformat,
    COWD_MAGIC, FOOTER_BYTES, SESPARSE_MAGIC,
};

/// Headers of all kinds of extents, footer and descriptor.
pub fn header(data: &[u8]) {
    delta(data);
    if let Some(Ok(header)) = data.first_chunk().map(Header::parse) {
        assert!(header.directory_entries() <= instar_vmdk_format::MAX_DIRECTORY && header.directory_entries() > 0);
        assert_eq!(Header::parse(&header.encode()).map(|again| again.capacity), Ok(header.capacity));
    }
    let _ = data.first_chunk::<FOOTER_BYTES>().map(Header::parse_footer);
    for text in [data, data.get(512..).unwrap_or_default()] {
        if let Ok(descriptor) = Descriptor::parse(text) {
            if let Ok(extents) = descriptor.disk_extents() {
                assert_eq!(extents.len(), descriptor.extents.len());
            }
            for id in std::iter::once(&descriptor.content_id).chain(&descriptor.parent_id) {
                let digits = std::str::from_utf8(&text[id.digits.clone()]).unwrap();
                assert_eq!(u32::from_str_radix(digits, 16), Ok(id.value));
                let next = instar_vmdk_format::next_content_id(id.value, None);
                for marked in [false, true] {
                    let Ok(replacement) = id.replacement(next, marked, 512) else { continue };
                    assert_eq!((replacement.len(), u32::from_str_radix(&replacement, 16)), (digits.len(), Ok(next)));
                    assert_eq!(replacement.bytes().any(|digit| digit.is_ascii_uppercase()), marked);
                }
            }
        }
    }
}

/// Headers of delta disks, and the entries of a seSparse one.
fn delta(data: &[u8]) {
    if let Some(Ok(header)) = data.first_chunk().map(CowdHeader::parse) {
        let layout = header.layout();
        let needed = layout.directory_entries();
        assert!((1..=1 << 20).contains(&needed) && needed * 4 <= layout.directory_sectors * 512);
        assert!(layout.overhead > layout.directory && layout.directory >= layout.header);
        assert_eq!(CowdHeader::parse(&header.encode()), Ok(header));
    }
    if let Some(Ok(header)) = data.first_chunk().map(SeSparseHeader::parse) {
        let needed = header.directory_entries();
        assert!((1..=1 << 22).contains(&needed) && needed * 8 <= header.directory.size.saturating_mul(512));
        for region in [header.volatile, header.directory, header.tables, header.grains] {
            assert!(region.within(1 << 40).is_none_or(|(start, size)| start + size <= 1 << 40));
        }
    }
    let _ = data.first_chunk().map(SeSparseHeader::check_volatile);
    for entry in data.chunks_exact(8) {
        let entry = u64::from_le_bytes(entry.try_into().unwrap());
        assert!(sesparse_table(entry).is_err() || sesparse_table(entry) == Ok(None) || entry >> 60 == 1);
        assert!(
            !matches!(SeGrain::decode(entry), Ok(SeGrain::Number(number)) if entry >> 60 != 3 || number >> 60 != 0)
        );
    }
}

/// Images that are as they should be.
#[must_use]
pub fn header_seeds() -> Vec<Vec<u8>> {
    let options = |subformat, parent| CreateOptions {
        virtual_size: 1 << 30,
        file_name: b"x.vmdk".to_vec(),
        content_id: 0x1234_5678,
        parent,
        subformat,
        zeroed_grains: true,
        adapter_type: "ide".into(),
        hardware_version: "4".into(),
    };
    let all = [
        options(Subformat::MonolithicSparse, None),
        options(Subformat::StreamOptimized, Some((b"base.vmdk".to_vec(), 0xabc))),
    ];
    let bytes = |options: &CreateOptions| {
        let mut bytes = vec![0; 2048];
        for (offset, region) in create(options).unwrap().image.regions {
            let at = offset as usize;
            if let Some(place) = bytes.get_mut(at..at + region.len()) {
                place.copy_from_slice(&region);
            }
        }
        bytes
    };
    let mut seeds: Vec<Vec<u8>> = all.iter().map(bytes).collect();
    let cowd = CowdHeader { capacity: 9000, grain: 1, directory: 4, directory_entries: 3, next_free: 5 };
    seeds.push(cowd.encode().to_vec());
    assert!(seeds.iter().any(|seed| seed.starts_with(&COWD_MAGIC)));
    // Constant and volatile header, an entry of a directory, and entries of a table.
    let fields = [0, 0x2_0000_0001, 9000, 8, 64, 0, 0, 0, 0, 0, 1, 1, 2, 1, 3, 4, 8, 1, 16, 64, 7, 1, 7, 1, 80, 9000];
    let mut sesparse: Vec<u64> = fields.to_vec();
    sesparse[0] = u64::from_le_bytes(SESPARSE_MAGIC);
    sesparse.resize(64, 0);
    sesparse.extend([0xcafe_cafe, 1, 7, 0, 0x1000_0000_0000_0000, 0x3001_0000_0000_0000, 0x2000_0000_0000_0000]);
    seeds.push(sesparse.iter().flat_map(|field| field.to_le_bytes()).collect());
    seeds
}
