#![allow(clippy::unwrap_used)]

use super::*;

fn header() -> Header {
    let (nonce, name) = ([7; 16], b"base.qcow2".to_vec());
    let mut samples = [0; SAMPLES];
    samples.iter_mut().zip(7..).for_each(|(sample, sum)| *sample = sum);
    let times =
        Header { changed: (91, 92), begun: (93, 94), subject: [5; 32], sources: 3, samples, ..Header::default() };
    Header { nonce, length: 5000, inode: 12, device: 34, born: (56, 78), durable: 2, name, ..times }
}

#[test]
fn what_is_written_is_read() {
    let block = header().encode().unwrap();
    assert_eq!(Header::decode(&block).unwrap(), header());
    for kind in [Kind::Data(9), Kind::Hole] {
        let record = Record { sequence: 3, batch: 2, offset: 4096, length: 904, kind };
        let block = record.encode(&[7; 16]);
        assert_eq!(Record::decode(&block, &[7; 16], 5000), Some(record));
        assert_eq!(Record::decode(&block, &[8; 16], 5000), None, "of another log");
        assert_eq!(Record::decode(&block, &[7; 16], 4999), None, "past the end");
    }
}

#[test]
fn the_newer_beat_is_whole() {
    let beat = Beat { number: 3, time: (1 << 40, 5) };
    let block = beat.encode(&[7; 16]);
    assert_eq!(Beat::decode(&block, &[7; 16]), Some(beat));
    assert_eq!(Beat::decode(&block, &[8; 16]), None);
    for bit in 0..block.len() * 8 {
        let mut torn = block.clone();
        torn[bit / 8] ^= 1 << (bit % 8);
        assert_eq!(Beat::decode(&torn, &[7; 16]), None, "{bit}");
    }
}

#[test]
fn samples_are_blocks_of_the_file_each_once() {
    for length in [0, 1, 4095, 4096, 4097, 31 * 4096, 32 * 4096, 33 * 4096 + 1, 70_000, 1 << 40, u64::MAX >> 1] {
        let all: Vec<_> = (0..SAMPLES).map(|index| sample(index, length)).collect();
        assert!(all.windows(2).all(|two| two[0].end <= two[1].start), "{length}: {all:?}");
        assert!(all.iter().all(|range| range.end <= length && range.end - range.start <= SAMPLE), "{length}");
        let filled: Vec<_> = all.iter().filter(|range| range.start < range.end).collect();
        assert_eq!(filled.first().map_or(0, |range| range.start), 0, "{length}");
        assert_eq!(filled.last().map_or(0, |range| range.end), length, "{length}: the end is one");
    }
}

#[test]
fn every_bit_counts() {
    let good = header().encode().unwrap();
    let record = Record { sequence: 0, batch: 0, offset: 0, length: 1, kind: Kind::Hole }.encode(&[7; 16]);
    for bit in (0..good.len() * 8).step_by(3) {
        let mut block = good.clone();
        block[bit / 8] ^= 1 << (bit % 8);
        assert!(Header::decode(&block).is_err(), "{bit}");
    }
    for bit in 0..record.len() * 8 {
        let mut block = record.clone();
        block[bit / 8] ^= 1 << (bit % 8);
        assert_eq!(Record::decode(&block, &[7; 16], 5000), None, "{bit}");
    }
}

#[test]
fn numbers_that_make_no_sense_are_no_record() {
    let good = Record { sequence: 3, batch: 3, offset: 0, length: 1, kind: Kind::Hole };
    let read = |record: Record| Record::decode(&record.encode(&[0; 16]), &[0; 16], u64::MAX >> 1);
    assert_eq!(read(good), Some(good));
    assert_eq!(read(Record { offset: u64::MAX, ..good }), None);
    assert_eq!(read(Record { length: 0, ..good }), None);
    assert_eq!(read(Record { batch: 4, ..good }), None);
    assert_eq!(read(Record { length: MOST_DATA + 1, kind: Kind::Data(0), ..good }), None);
    assert!(Header { name: Vec::new(), ..header() }.encode().is_none());
    assert!(Header::decode(&Header { sources: MOST_SOURCES + 1, ..header() }.encode().unwrap()).is_err());
    assert!(Header::decode(&Header { length: u64::MAX, ..header() }.encode().unwrap()).is_err());
}
