//! Every field of the bitmap structures, at and past its bounds.
#![allow(clippy::unwrap_used, clippy::panic)]

use super::*;

fn size() -> ClusterSize {
    ClusterSize::from_bits(16).unwrap()
}

fn extension(count: u32, reserved: u32, length: u64, offset: u64) -> [u8; 24] {
    let mut data = [0; 24];
    data[..4].copy_from_slice(&count.to_be_bytes());
    data[4..8].copy_from_slice(&reserved.to_be_bytes());
    data[8..16].copy_from_slice(&length.to_be_bytes());
    data[16..].copy_from_slice(&offset.to_be_bytes());
    data
}

fn extension_refused(data: &[u8], word: &str) {
    match Bitmaps::checked(data, size()) {
        Err(BitmapError::Corrupt(text)) => assert!(text.contains(word), "{text}"),
        other => panic!("{word}: {other:?}"),
    }
}

#[test]
fn the_extension_and_its_bounds() {
    let good = extension(2, 0, 64, 0x5_0000);
    let parsed = Bitmaps { count: 2, directory_size: 64, directory_offset: 0x5_0000 };
    assert_eq!(Bitmaps::checked(&good, size()), Ok(parsed));
    extension_refused(&good[..23], "23 bytes");
    extension_refused(&[&good[..], &[0; 8]].concat(), "32 bytes");
    extension_refused(&[], "0 bytes");
    extension_refused(&extension(2, 1, 64, 0x5_0000), "reserved");
    extension_refused(&extension(0, 0, 64, 0x5_0000), "counts 0");
    extension_refused(&extension(65536, 0, 65536 * 32, 0x5_0000), "counts 65536");
    extension_refused(&extension(2, 0, 63, 0x5_0000), "63 bytes for 2");
    extension_refused(&extension(2, 0, 1024 * 65535 + 1, 0x5_0000), "bytes for 2");
    extension_refused(&extension(2, 0, u64::MAX, 0x5_0000), "bytes for 2");
    assert!(Bitmaps::checked(&extension(65535, 0, 1024 * 65535, 0x5_0000), size()).is_ok());
    extension_refused(&extension(2, 0, 64, 0), "start of a cluster");
    extension_refused(&extension(2, 0, 64, 0x5_0200), "start of a cluster");
}

fn entry() -> [u8; BITMAP_ENTRY_BYTES] {
    let mut fixed = [0; BITMAP_ENTRY_BYTES];
    fixed[..8].copy_from_slice(&0x1_0005_0000u64.to_be_bytes());
    fixed[8..12].copy_from_slice(&3u32.to_be_bytes());
    fixed[12..16].copy_from_slice(&2u32.to_be_bytes());
    fixed[16] = 1;
    fixed[17] = 16;
    fixed[18..20].copy_from_slice(&5u16.to_be_bytes());
    fixed
}

fn with(at: usize, bytes: &[u8]) -> Result<Bitmap, BitmapError> {
    let mut fixed = entry();
    fixed[at..at + bytes.len()].copy_from_slice(bytes);
    Bitmap::parse(&fixed, size())
}

fn entry_refused(at: usize, bytes: &[u8], word: &str) {
    match with(at, bytes) {
        Err(BitmapError::Corrupt(text)) => assert!(text.contains(word), "{text}"),
        other => panic!("{word}: {other:?}"),
    }
}

#[test]
fn a_directory_entry() {
    let bitmap = Bitmap::parse(&entry(), size()).unwrap();
    assert_eq!((bitmap.table, bitmap.table_entries), (HostOffset(0x1_0005_0000), 3));
    assert_eq!((bitmap.granularity_bits, bitmap.name_bytes, bitmap.extra_data_bytes), (16, 5, 0));
    assert!(bitmap.auto && !bitmap.in_use && !bitmap.extra_data_compatible && bitmap.is_recording());
    assert_eq!((bitmap.entry_bytes(), bitmap.table_bytes()), (32, 24));
    assert_eq!(bitmap.coverage(size()), 3 * 65536 * 8 * 65536);
    for (flags, recording) in [(0, false), (1, false), (2, true), (3, false), (4, false), (6, true)] {
        assert_eq!(with(15, &[flags]).unwrap().is_recording(), recording, "{flags}");
    }
    assert!(with(15, &[7]).unwrap().extra_data_compatible);
    // Extra data, name and padding.
    let extra = with(20, &13u32.to_be_bytes()).unwrap();
    assert_eq!((extra.extra_data_bytes, extra.entry_bytes()), (13, 48));
    assert_eq!(with(20, &[0xff; 4]).unwrap().entry_bytes(), (24 + u64::from(u32::MAX) + 5).next_multiple_of(8));
}

#[test]
fn directory_entries_that_no_bitmap_may_have() {
    entry_refused(0, &0u64.to_be_bytes(), "start of a cluster");
    entry_refused(0, &0x5_0200u64.to_be_bytes(), "start of a cluster");
    entry_refused(8, &0u32.to_be_bytes(), "0 entries");
    // 512 MiB of data are the most.
    assert!(with(8, &8192u32.to_be_bytes()).is_ok());
    entry_refused(8, &8193u32.to_be_bytes(), "8193 entries");
    entry_refused(8, &[0xff; 4], "entries");
    for (bits, good) in [(0, false), (8, false), (9, true), (31, true), (32, false), (255, false)] {
        assert_eq!(with(17, &[bits]).is_ok(), good, "{bits}");
    }
    entry_refused(18, &[0, 0], "name of 0 bytes");
    assert!(with(18, &1023u16.to_be_bytes()).is_ok());
    entry_refused(18, &1024u16.to_be_bytes(), "name of 1024 bytes");
    for (at, bytes, word) in
        [(12, [0, 0, 0, 8], "flags"), (12, [0x80, 0, 0, 2], "flags"), (16, [2, 16, 0, 5], "type 2")]
    {
        match with(at, &bytes) {
            Err(BitmapError::Unsupported(text)) => assert!(text.contains(word), "{text}"),
            other => panic!("{word}: {other:?}"),
        }
    }
}

#[test]
fn table_entries() {
    use BitmapTableEntry::{Data, Ones, Zeroes};
    for (raw, entry) in [(0, Zeroes), (1, Ones), (0x5_0000, Data(HostOffset(0x5_0000)))] {
        assert_eq!(BitmapTableEntry::decode(raw, size()), Ok(entry));
        assert_eq!(entry.encode(), raw);
    }
    let top = 0x00ff_ffff_ffff_0000;
    assert_eq!(BitmapTableEntry::decode(top, size()), Ok(Data(HostOffset(top))));
    assert_eq!(BitmapTableEntry::decode(0x5_0001, size()), Err(EntryError::Reserved(1)));
    for bit in (1..9).chain(56..64) {
        for base in [0, 0x5_0000] {
            assert_eq!(BitmapTableEntry::decode(base | 1 << bit, size()), Err(EntryError::Reserved(1 << bit)), "{bit}");
        }
    }
    let unaligned = Err(EntryError::Unaligned(HostOffset(0x5_0200)));
    assert_eq!(BitmapTableEntry::decode(0x5_0200, size()), unaligned);
}
