//! The snapshot table: each field of an entry, padding, limits, and tables of many entries.
#![allow(clippy::unwrap_used, missing_docs)]

use instar_qcow2_format::{HeaderErrorKind, HostOffset, Snapshot};
use proptest::prelude::*;

/// The virtual size in extra data that has room for it.
const SIZE: u64 = 0x1112_1314_1516_1718;

/// An entry as the specification has it, padded; fields that are not looked at are full of ones.
fn entry(l1: u64, l1_entries: u32, id: &[u8], name: &[u8], extra: usize) -> Vec<u8> {
    let mut bytes = Vec::new();
    bytes.extend(l1.to_be_bytes());
    bytes.extend(l1_entries.to_be_bytes());
    bytes.extend(u16::try_from(id.len()).unwrap().to_be_bytes());
    bytes.extend(u16::try_from(name.len()).unwrap().to_be_bytes());
    // Date (seconds, nanoseconds), clock of the guest, size of the state of the machine.
    bytes.extend([0xff; 20]);
    bytes.extend(u32::try_from(extra).unwrap().to_be_bytes());
    let mut more = vec![0xee; extra];
    if extra >= 16 {
        more[8..16].copy_from_slice(&SIZE.to_be_bytes());
    }
    bytes.extend(more);
    bytes.extend(id);
    bytes.extend(name);
    bytes.resize(bytes.len().next_multiple_of(8), 0xdd);
    bytes
}

fn parse(table: &[u8], at: usize) -> Option<(Snapshot, usize)> {
    Snapshot::parse(table, at, 0x1_0000).unwrap()
}

#[test]
fn every_field() {
    let table = entry(0x0102_0304_0506_0708, 0x090a_0b0c, b"17", b"before the update", 24);
    let (snapshot, next) = parse(&table, 0).unwrap();
    assert_eq!(snapshot.l1_table, HostOffset(0x0102_0304_0506_0708));
    assert_eq!(snapshot.l1_entries, 0x090a_0b0c);
    assert_eq!(snapshot.virtual_size, Some(SIZE));
    assert_eq!(snapshot.name, b"before the update");
    assert_eq!(next, table.len());
}

#[test]
fn lengths_of_id_name_and_extra_data() {
    // Version 2 has no extra data, version 3 at least 16 bytes; the largest that QEMU takes is 1024.
    for extra in [0, 8, 16, 24, 1023, 1024] {
        for (id, name) in [(0, 0), (1, 0), (0, 1), (7, 9), (255, 65535), (65535, 65535)] {
            let table = entry(0, 0, &vec![b'i'; id], &vec![b'n'; name], extra);
            let (snapshot, next) = parse(&table, 0).unwrap();
            assert_eq!((snapshot.name.len(), next), (name, (40 + extra + id + name).next_multiple_of(8)));
            assert_eq!(snapshot.virtual_size, (extra >= 16).then_some(SIZE));
            assert!(snapshot.name.iter().all(|&byte| byte == b'n'));
        }
    }
}

#[test]
fn extra_data_that_is_too_long() {
    let mut table = entry(0, 0, b"1", b"n", 1024);
    for extra in [1025u32, 1 << 31, u32::MAX] {
        table[36..40].copy_from_slice(&extra.to_be_bytes());
        let error = Snapshot::parse(&table, 0, 0x1_0000).unwrap_err();
        assert_eq!((error.kind, error.offset), (HeaderErrorKind::Corrupt, 0x1_0000));
        assert!(error.text.contains(&extra.to_string()), "{error}");
        // Wherever the table stands.
        assert_eq!(Snapshot::parse(&table, 0, u64::MAX).unwrap_err().offset, u64::MAX);
    }
    // The offset is that of the entry.
    let mut two = entry(0, 0, b"1", b"n", 16);
    let at = two.len();
    two.extend(table);
    assert_eq!(Snapshot::parse(&two, at, 512).unwrap_err().offset, 512 + at as u64);
}

#[test]
fn the_padding_of_the_last_entry_may_be_cut_off() {
    let table = entry(5, 6, b"1", b"ab", 16);
    assert_eq!(table.len(), 64);
    assert_eq!(parse(&table[..59], 0), parse(&table, 0));
    assert_eq!(parse(&table[..58], 0), None);
    assert_eq!(parse(&table, 64), None);
}

proptest! {
    #[test]
    fn tables_of_many_entries(
        all in prop::collection::vec(
            (any::<u64>(), any::<u32>(), 0..20usize, prop::collection::vec(any::<u8>(), 0..40), 0..40usize), 0..20),
        cut in any::<prop::sample::Index>(),
    ) {
        let mut table = Vec::new();
        for (l1, entries, id, name, extra) in &all {
            table.extend(entry(*l1, *entries, &vec![b'i'; *id], name, *extra));
        }
        let mut at = 0;
        for (l1, entries, _, name, extra) in &all {
            let (found, next) = parse(&table, at).unwrap();
            let virtual_size = (*extra >= 16).then_some(SIZE);
            let name = name.clone();
            prop_assert_eq!(
                &found,
                &Snapshot { l1_table: HostOffset(*l1), l1_entries: *entries, virtual_size, name }
            );
            at = next;
        }
        prop_assert_eq!(at, table.len());
        // Cut off anywhere: what is whole still reads the same, and it always advances.
        let cut = &table[..cut.index(table.len() + 1)];
        let mut at = 0;
        while let Some((_, next)) = parse(cut, at) {
            prop_assert!(next >= at + 40);
            at = next;
        }
    }

    #[test]
    fn no_bytes_make_it_panic(bytes in prop::collection::vec(any::<u8>(), 0..200), at in 0..220usize, base: u64) {
        let _ = Snapshot::parse(&bytes, at, base);
    }
}
