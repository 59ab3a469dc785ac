//! The work follows from what the files hold, and not from the size of the disk: requests and bytes are counted.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation, missing_docs)]

mod common;

use common::builder::{build, pattern, Spec, State};
use common::damage::put64;
use common::{be32, be64, config, ANCESTOR};
use instar_guest_commit::Ancestors;
use instar_guest_sdk::memory::MemoryDevices;
use instar_guest_sdk::{FormatDriver, ReadBelow};
use instar_qcow2_driver::Qcow2;

const SIZE: u64 = 512;
/// Guest bytes that an L2 table maps.
const COVERAGE: u64 = SIZE / 8 * SIZE;

/// An image of `tables` L1 entries that all name the L2 table of the first: 0.3 MiB can be a disk of terabytes.
fn one_table_many_times(tables: u64) -> Vec<u8> {
    let mut spec = Spec::new(9, tables * COVERAGE).with([(5, State::Data(3))]);
    spec.table_clusters = 8;
    let mut bytes = build(&spec);
    let (l1, entries) = (be64(&bytes, 40), u64::from(be32(&bytes, 36)));
    let first = be64(&bytes, l1 as usize);
    (0..entries).for_each(|index| put64(&mut bytes, l1 + index * 8, first));
    bytes
}

#[test]
fn filling_a_gap_reads_the_tables_of_the_gap() {
    let mut io = MemoryDevices::new([(ANCESTOR, one_table_many_times(4096))]);
    let device = config(&io, ANCESTOR);
    let source = Qcow2::open_source(&mut io, &device).unwrap();
    let mut below = Ancestors::new(vec![Box::new(source)]);
    let (requests, bytes) = (io.executed(), io.bytes_read);
    // The second half of the cluster, and the one after it, in every fourth of the first 400 tables.
    for table in (0..400).step_by(4) {
        let mut buffer = [0xff; 768];
        below.read(&mut io, table * COVERAGE + 5 * SIZE + 256, &mut buffer).unwrap();
        assert_eq!(buffer[..256], pattern(3, 5, 512)[256..]);
        assert_eq!(buffer[256..], [0; 512]);
        // Again, and what is before it: the table is there already.
        below.read(&mut io, table * COVERAGE + 4 * SIZE, &mut buffer[..512]).unwrap();
        assert_eq!(buffer[..512], [0; 512]);
    }
    let (requests, bytes) = (io.executed() - requests, io.bytes_read - bytes);
    // For each gap a table and the data; the L1 table once.
    assert!(requests <= 100 * 2 + 4096 * 8 / 512, "{requests} requests");
    assert!(bytes <= 100 * (SIZE + 256) + 4096 * 8, "{bytes} bytes");
}
