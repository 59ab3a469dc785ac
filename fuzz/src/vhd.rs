//! VHD: footers, dynamic header, bitmap and batmap, on any bytes.

use instar_vhd_format::{
    create, BatmapHeader, Bitmap, CreateOptions, Footers, Header, Kind, Parent, DEFAULT_BLOCK, MAX_SECTORS, SECTOR,
};

/// Footers at both ends, the header between them, and the bytes of that as a bitmap and as a batmap.
pub fn header(data: &[u8]) {
    if let (Some(front), Some(end), Some(tail)) =
        (data.first_chunk(), data.last_chunk(), Footers::tail_offset(data.len() as u64))
    {
        if let Ok(Some(footers)) = Footers::choose(front, end, tail) {
            let size = footers.footer.virtual_size();
            assert!(size > 0 && size / SECTOR <= MAX_SECTORS && size.is_multiple_of(SECTOR));
            let again = Footers::choose(&footers.footer.encode(), &footers.footer.encode(), tail.max(1));
            assert_eq!(again.ok().flatten().map(|again| again.footer), Some(footers.footer));
            let grown = footers.footer.with_size(4096);
            assert!(grown.is_version_of(&footers.footer) && grown.virtual_size() == 4096);
            assert!(footers.head || footers.tail.is_some());
        }
    }
    let rest = data.get(512..).unwrap_or_default();
    if let Some(Ok(header)) = rest.first_chunk().map(Header::parse) {
        assert_eq!(Header::parse(&header.encode()), Ok(header));
        assert!(header.bitmap_bytes() * 8 * SECTOR >= header.block_size());
        assert!(header.locators().count() <= 8 && header.parent_name().count() <= 256);
    }
    if let Some(bytes) = rest.first_chunk() {
        let bitmap = Bitmap(*bytes);
        let mut at = 0;
        while let Some(run) = bitmap.next_run(at, 4096) {
            assert!(run.start >= at && run.end <= 4096 && run.clone().all(|sector| bitmap.has(sector)));
            assert!(!bitmap.has(run.end) && (at..run.start).all(|sector| !bitmap.has(sector)));
            at = run.end;
        }
        if let Some(batmap) = BatmapHeader::parse(bytes) {
            assert_eq!(BatmapHeader::parse(&batmap.encode()), Some(batmap));
        }
    }
}

/// Images that are as they should be: a dynamic and a differencing one.
#[must_use]
pub fn header_seeds() -> Vec<Vec<u8>> {
    let parent = Parent { id: [7; 16], path: "sub/base.vhd".to_owned() };
    let image = |parent, fixed| {
        let options = CreateOptions {
            virtual_size: 1 << 11,
            unique_id: [5; 16],
            time: 1,
            fixed,
            block_size: DEFAULT_BLOCK,
            parent,
        };
        let image = create(&options).unwrap();
        let mut bytes = vec![0; usize::try_from(image.length).unwrap()];
        for (offset, region) in image.regions {
            let at = usize::try_from(offset).unwrap();
            bytes[at..at + region.len()].copy_from_slice(&region);
        }
        bytes
    };
    debug_assert_eq!(Kind::Fixed.name(), "fixed");
    vec![image(None, false), image(Some(parent), false), image(None, true)]
}
