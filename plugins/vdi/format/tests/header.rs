//! Headers, as `VDICore.h` and `VDI.cpp` have them: what is taken, what is not, and what a new image says.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation, missing_docs)]

use instar_vdi_format::{create, field, CreateOptions, Header, ImageType, Trouble, Uuid, HEADER_BYTES};

const MIB: u64 = 1 << 20;

fn options(virtual_size: u64) -> CreateOptions {
    CreateOptions {
        virtual_size,
        preallocated: false,
        create: Uuid([1; 16]),
        modify: Uuid([2; 16]),
        parent: Some((Uuid([3; 16]), Uuid([4; 16]))),
    }
}

fn bytes(options: &CreateOptions) -> [u8; HEADER_BYTES] {
    create(options).unwrap().regions[0].1.as_slice().try_into().unwrap()
}

fn with(change: impl FnOnce(&mut [u8; HEADER_BYTES])) -> Result<Header, instar_vdi_format::FormatError> {
    let mut bytes = bytes(&options(5 * MIB + 512));
    change(&mut bytes);
    Header::parse(&bytes)
}

fn put(at: usize, number: u32) -> impl FnOnce(&mut [u8; HEADER_BYTES]) {
    move |bytes| bytes[at..at + 4].copy_from_slice(&number.to_le_bytes())
}

#[test]
fn a_new_child() {
    let image = create(&options(5 * MIB + 511)).unwrap();
    let header = Header::parse(image.regions[0].1.as_slice().try_into().unwrap()).unwrap();
    assert_eq!((header.image_type, header.virtual_size(), header.blocks), (ImageType::Differencing, 5 * MIB + 512, 6));
    assert_eq!((header.map_offset, header.data_offset, header.block_size), (MIB, 2 * MIB, MIB));
    assert_eq!((header.allocated, image.length, header.block_extra), (0, 2 * MIB, 0));
    assert_eq!(image.regions[1], (MIB, vec![0xff; 24]));
    assert_eq!(header.identity()[..], [[1; 16], [2; 16]].concat());
    assert_eq!(header.parent_identity().unwrap()[..], [[3; 16], [4; 16]].concat());
    assert!(header.contradiction().is_none() && header.why_not_written().is_none() && !header.parent_announced());
}

#[test]
fn new_bases() {
    let fixed = CreateOptions { preallocated: true, parent: None, ..options(3 * MIB) };
    let image = create(&fixed).unwrap();
    assert_eq!((image.length, image.data_offset), (5 * MIB, 2 * MIB));
    assert_eq!(image.regions[1].1, [0, 0, 0, 0, 1, 0, 0, 0, 2, 0, 0, 0]);
    let header = Header::parse(&bytes(&fixed)).unwrap();
    assert_eq!((header.image_type, header.allocated, header.has_parent()), (ImageType::Static, 3, false));
    assert!(create(&CreateOptions { preallocated: true, ..options(MIB) }).is_err(), "a static one has no parent");
    let dynamic = CreateOptions { parent: None, ..options(1) };
    assert_eq!(Header::parse(&bytes(&dynamic)).unwrap().image_type, ImageType::Dynamic);
    for size in [0, (MIB << 26) + 1, u64::MAX] {
        assert!(create(&CreateOptions { parent: None, ..options(size) }).is_err(), "{size}");
    }
    // A map of more than 1 MiB moves the data.
    let image = create(&CreateOptions { parent: None, ..options(262_145 * MIB) }).unwrap();
    assert_eq!((image.data_offset, image.regions[1].1.len()), (3 * MIB, 262_145 * 4));
}

#[test]
fn what_no_image_may_say() {
    let corrupt = [
        (64, 0, "signature"),
        (field::HEADER_SIZE, 383, "cbHeader is 383"),
        (field::MAP_OFFSET, 511, "offBlocks is 511"),
        (field::MAP_OFFSET, 456, "offBlocks is 456"),
        (field::DATA_OFFSET, 0x0010_0010, "offData is 1048592"),
        (field::DATA_OFFSET, 0x0010_0000, "within the map"),
        (field::MAP_OFFSET, u32::MAX - 511, "within the map"),
        (field::BLOCK_SIZE, 0, "cbBlock is 0"),
        (field::BLOCK_SIZE, 3 << 19, "cbBlock is"),
        (field::BLOCK_SIZE, 256, "cbBlock is 256"),
        (field::BLOCK_EXTRA, 48, "cbBlockExtra is 48"),
        (field::BLOCKS, 0, "is none"),
        (field::BLOCKS, 5, "is none"),
        (field::BLOCKS, u32::MAX, "within the map"),
        (field::DISK_SIZE + 4, u32::MAX, "is none"),
    ];
    for (at, number, why) in corrupt {
        let error = with(put(at, number)).unwrap_err();
        assert!(error.trouble == Trouble::Corrupt && error.text.contains(why), "{at}: {error}");
    }
    for (at, why) in [(field::CREATE, "uuidCreate is null"), (field::MODIFY, "uuidModify is null")] {
        assert_eq!(with(|bytes| bytes[at..at + 16].fill(0)).unwrap_err().text, why);
    }
    let unsupported = [
        (68, 2, "version 0.2"),
        (68, 0x0002_0000, "version 2.0"),
        (field::TYPE, 0, "image type 0"),
        (field::TYPE, 5, "image type 5"),
        (field::FLAGS, 2, "fFlags is 0x2"),
        (field::SECTOR_SIZE, 4096, "another size than 512"),
        (field::GEOMETRY + 12, 4096, "another size than 512"),
    ];
    for (at, number, why) in unsupported {
        let error = with(put(at, number)).unwrap_err();
        assert!(error.trouble == Trouble::Unsupported && error.text.contains(why), "{at}: {error}");
    }
}

#[test]
fn what_other_programs_write_is_taken() {
    // QEMU has a short header, and what would be a geometry is anything; FATtools a long one, and no geometry.
    assert!(with(|bytes| {
        put(field::HEADER_SIZE, 384)(bytes);
        put(field::GEOMETRY + 12, 7)(bytes);
    })
    .is_ok());
    assert!(with(|bytes| {
        put(field::HEADER_SIZE, 512)(bytes);
        put(field::GEOMETRY + 12, 0)(bytes);
    })
    .is_ok());
    assert!(with(put(field::FLAGS, 0x301)).is_ok());
    let older = with(|bytes| {
        put(field::MAP_OFFSET, 512)(bytes);
        put(field::DATA_OFFSET, 1024)(bytes);
    });
    assert_eq!(older.unwrap().slot_offset(3), 1024 + 3 * MIB);
    let more = with(put(field::BLOCKS, 1000)).unwrap();
    assert_eq!((more.blocks, more.virtual_size()), (1000, 5 * MIB + 512));
    let commented = with(|bytes| bytes[field::COMMENT..field::COMMENT + 6].copy_from_slice(b"hello\0"));
    assert_eq!(commented.unwrap().comment(), b"hello");
    assert_eq!(with(|bytes| bytes[field::COMMENT..field::MAP_OFFSET].fill(b'x')).unwrap().comment().len(), 256);
}

#[test]
fn data_begins_behind_the_map_and_may_touch_it() {
    let with_blocks = |blocks| {
        with(|bytes| {
            put(field::BLOCKS, blocks)(bytes);
            put(field::MAP_OFFSET, 512)(bytes);
            put(field::DATA_OFFSET, 1024)(bytes);
        })
    };
    assert_eq!(with_blocks(128).unwrap().map_bytes(), 512);
    let error = with_blocks(129).unwrap_err();
    assert!(error.trouble == Trouble::Corrupt && error.text.contains("within the map of 129 entries"), "{error}");
}

#[test]
fn what_can_be_read_and_not_written() {
    let extra = with(put(field::BLOCK_EXTRA, 512)).unwrap();
    assert_eq!(extra.slot_offset(2), 2 * MIB + 2 * (MIB + 512) + 512);
    assert!(extra.why_not_written().unwrap().contains("cbBlockExtra"));
    let odd = with(put(field::DISK_SIZE, 5 * MIB as u32 + 1)).unwrap();
    assert_eq!(odd.virtual_size(), 5 * MIB + 512);
    assert!(odd.why_not_written().unwrap().contains("multiple of 512"));
    for (number, link, why) in [(4, 0, "uuidLinkage is null"), (3, 0, "uuidLinkage is null"), (2, 3, "static")] {
        let header = with(|bytes| {
            put(field::TYPE, number)(bytes);
            bytes[field::LINK..field::LINK + 16].fill(link);
        });
        assert!(header.unwrap().contradiction().unwrap().contains(why), "{number}");
    }
    // VirtualBox judges by the link.
    assert!(with(put(field::TYPE, 1)).unwrap().has_parent());
}

#[test]
fn another_parent_changes_the_type_with_it() {
    let (link, modify, null) = (Uuid([7; 16]), Uuid([8; 16]), Uuid([0; 16]));
    for (number, with_parent, without) in [
        (1, ImageType::Differencing, ImageType::Dynamic),
        (2, ImageType::Static, ImageType::Static),
        (3, ImageType::Undo, ImageType::Dynamic),
        (4, ImageType::Differencing, ImageType::Dynamic),
    ] {
        for (link, modify, wanted) in [(link, modify, with_parent), (null, null, without)] {
            let mut header = with(put(field::TYPE, number)).unwrap();
            header.set_parent(link, modify);
            let again = Header::parse(&header.bytes).unwrap();
            assert_eq!((header.image_type, again.image_type), (wanted, wanted), "type {number}");
            assert_eq!((again.link, again.parent_modify), (link, modify), "type {number}");
        }
    }
}

#[test]
fn a_parent_is_announced_and_reached_in_one_sector() {
    let mut header = with(put(field::UNUSED, 2)).unwrap();
    let before = header.bytes;
    let next = Uuid([9; 16]);
    for announced in [true, false] {
        let range = header.record_parent(next, announced);
        let again = Header::parse(&header.bytes).unwrap();
        assert_eq!((again.parent_announced(), again.parent_modify, again.link), (announced, next, header.link));
        let changed = (0..HEADER_BYTES).filter(|&at| before[at] != header.bytes[at]);
        assert!(changed.clone().count() > 0 && changed.into_iter().all(|at| range.contains(&at)));
    }
    assert_eq!(header.bytes[field::UNUSED], 2, "what an old program wrote there stays");
}

#[test]
fn an_update_keeps_what_it_does_not_know() {
    let geometry = |bytes: &mut [u8; HEADER_BYTES]| {
        for (at, number) in [(0, 100), (4, 16), (8, 63)] {
            put(field::GEOMETRY + at, number)(bytes);
        }
    };
    let mut header = with(geometry).unwrap();
    let before = header.bytes;
    (header.allocated, header.modify) = (3, Uuid([7; 16]));
    let range = header.update();
    assert_eq!(header.bytes[field::GEOMETRY..], before[field::GEOMETRY..], "the disk has the size that it had");
    assert_eq!(Header::parse(&header.bytes).unwrap(), header);
    assert!((0..HEADER_BYTES).all(|at| range.contains(&at) || before[at] == header.bytes[at]));
    (header.disk_size, header.blocks, header.map_offset) = (9 * MIB, 9, 512);
    let range = header.update();
    assert_eq!(header.bytes[field::GEOMETRY..field::GEOMETRY + 12], [0; 12]);
    assert_eq!(Header::parse(&header.bytes).unwrap(), header);
    assert!((0..HEADER_BYTES).all(|at| range.contains(&at) || before[at] == header.bytes[at]));
}
