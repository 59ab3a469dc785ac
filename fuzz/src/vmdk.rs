//! vmdk: header, footer, descriptor and its extents, on any bytes.

use instar_vmdk_format::{create, CreateOptions, Descriptor, Header, Subformat, FOOTER_BYTES};

/// Header, footer and descriptor.
pub fn header(data: &[u8]) {
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
                let next = instar_vmdk_format::next_content_id(id.value);
                for marked in [false, true] {
                    let Ok(replacement) = id.replacement(next, marked, 512) else { continue };
                    assert_eq!((replacement.len(), u32::from_str_radix(&replacement, 16)), (digits.len(), Ok(next)));
                    assert_eq!(replacement.bytes().any(|digit| digit.is_ascii_uppercase()), marked);
                }
            }
        }
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
    all.iter().map(bytes).collect()
}
