//! Headers, as QEMU's `qcow_open` has them: what is taken, what is not, and what a new image says.
#![allow(clippy::unwrap_used, missing_docs)]

use instar_qcow_format::{create, field, CreateOptions, Header, Trouble, HEADER_BYTES, MOST_L1_ENTRIES};

const MIB: u64 = 1 << 20;

fn bytes(virtual_size: u64, backing: Option<&[u8]>) -> [u8; HEADER_BYTES] {
    let image = create(&CreateOptions { virtual_size, backing: backing.map(<[u8]>::to_vec) }).unwrap();
    *image.start.first_chunk().unwrap()
}

fn with(at: usize, change: &[u8]) -> Result<Header, instar_qcow_format::FormatError> {
    let mut bytes = bytes(5 * MIB + 512, Some(b"base.qcow"));
    bytes[at..at + change.len()].copy_from_slice(change);
    Header::parse(&bytes)
}

#[test]
fn new_images_have_qemus_shapes() {
    let image = create(&CreateOptions { virtual_size: 5 * MIB + 1, backing: Some(b"base.qcow".to_vec()) }).unwrap();
    let header = Header::parse(image.start.first_chunk().unwrap()).unwrap();
    assert_eq!((header.size, header.cluster_size(), header.table_bytes()), (5 * MIB + 512, 512, 32768));
    assert_eq!((header.backing, header.l1_range(), header.l1_entries()), (Some((48, 9)), 64..88, 3));
    assert_eq!((image.length, image.start.len(), &image.start[48..]), (64 + 512, 57, &b"base.qcow"[..]));
    let image = create(&CreateOptions { virtual_size: 2 * MIB, backing: None }).unwrap();
    let header = Header::parse(image.start.first_chunk().unwrap()).unwrap();
    assert_eq!((header.cluster_size(), header.table_bytes(), header.coverage()), (4096, 4096, 2 * MIB));
    assert_eq!((header.l1_range(), header.name_range(), image.length), (48..56, 0..0, 560));
    assert_eq!((header.keep_end(), header.encrypted), (56, false));
}

#[test]
fn what_cannot_be_made_is_refused() {
    for size in [0, MOST_L1_ENTRIES * 2 * MIB + 1, u64::MAX] {
        assert!(create(&CreateOptions { virtual_size: size, backing: None }).is_err(), "{size}");
    }
    assert!(create(&CreateOptions { virtual_size: MOST_L1_ENTRIES * 2 * MIB, backing: None }).is_ok());
    for (length, good) in [(1023, true), (1024, false)] {
        assert_eq!(create(&CreateOptions { virtual_size: 1, backing: Some(vec![b'x'; length]) }).is_ok(), good);
    }
}

#[test]
fn what_no_image_may_say() {
    let corrupt: [(usize, &[u8], &str); 11] = [
        (0, b"QFJ", "magic number"),
        (field::CLUSTER_BITS, &[8], "cluster_bits is 8"),
        (field::CLUSTER_BITS, &[17], "cluster_bits is 17"),
        (field::L2_BITS, &[5], "l2_bits is 5"),
        (field::L2_BITS, &[14], "l2_bits is 14"),
        (field::SIZE, &[0, 0, 0, 0, 0, 0, 0, 1], "less than 2"),
        (field::SIZE, &[0xff; 8], "more than the L1 table can map"),
        (field::L1_OFFSET, &[0, 0, 0, 0, 0, 0, 0, 40], "l1_table_offset is 40"),
        (field::L1_OFFSET, &[0xff; 8], "cannot be a table's"),
        (field::BACKING_SIZE, &[0, 0, 4, 0], "backing_file_size is 1024"),
        (field::BACKING_OFFSET, &[0, 0, 0, 0, 0, 0, 0, 60], "backing_file_offset is 60"),
    ];
    for (at, change, why) in corrupt {
        let error = with(at, change).unwrap_err();
        assert!(error.trouble == Trouble::Corrupt && error.text.contains(why), "{why}: {error}");
    }
    let unsupported: [(usize, &[u8], &str); 3] = [
        (7, &[2], "version 2"),
        (field::CRYPT + 3, &[2], "crypt_method 2"),
        (field::L1_OFFSET + 7, &[65], "no multiple of 8"),
    ];
    for (at, change, why) in unsupported {
        let error = with(at, change).unwrap_err();
        assert!(error.trouble == Trouble::Unsupported && error.text.contains(why), "{why}: {error}");
    }
}

#[test]
fn what_other_programs_write_is_taken() {
    let odd = with(field::SIZE, &[0, 0, 0, 0, 0, 0, 4, 1]).unwrap();
    assert_eq!((odd.size, odd.virtual_size(), odd.l1_entries()), (1025, 1024, 1));
    assert!(with(field::CRYPT + 3, &[1]).unwrap().encrypted);
    assert_eq!(with(field::BACKING_SIZE, &[0; 4]).unwrap().backing, None);
    // A name behind the L1 table stays when the image is emptied.
    let behind = with(field::BACKING_OFFSET, &[0, 0, 0, 0, 0, 0, 1, 0]).unwrap();
    assert_eq!((behind.name_range(), behind.keep_end()), (256..265, 265));
}

#[test]
fn a_new_size_changes_nothing_else() {
    let mut before = bytes(5 * MIB, Some(b"base.qcow"));
    let header = Header::parse(&before).unwrap();
    before[field::SIZE..].copy_from_slice(&header.resized(9 * MIB, 1024));
    let after = Header::parse(&before).unwrap();
    assert_eq!(after, Header { size: 9 * MIB, l1_offset: 1024, ..header });
}
