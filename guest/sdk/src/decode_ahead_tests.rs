//! Streams of which the first byte fills a cluster: the tests are about what is read, and when.
#![allow(clippy::unwrap_used)]

use super::*;
use crate::memory::MemoryDevices;
use instar_guest_abi::DEVICE_OUTPUT;

const CLUSTER: usize = 64 << 10;
/// Bytes of a stream: the first one fills the cluster.
const STREAM: u64 = 1000;
const DAMAGED: u8 = 0xff;

struct Fill {
    /// There is no memory for a second one: one processor does all.
    alone: bool,
}

impl Decoder for Fill {
    fn decode(&mut self, _: u64, stream: &[u8], cluster: &mut [u8]) -> bool {
        assert_eq!(stream.len() as u64, STREAM);
        cluster.fill(stream[0]);
        stream[0] != DAMAGED
    }

    fn has_memory(&self) -> bool {
        !self.alone
    }
}

/// A device with the streams of clusters, each at its offset, all of which were enumerated.
struct Image {
    io: MemoryDevices,
    ahead: DecodeAhead<Fill>,
    offsets: Vec<u64>,
    alone: bool,
}

fn byte(index: usize) -> u8 {
    u8::try_from(index % 250).unwrap_or(0)
}

fn image(count: usize, offset: impl Fn(usize) -> u64, alone: bool) -> Image {
    let offsets: Vec<u64> = (0..count).map(offset).collect();
    let length = offsets.iter().max().map_or(0, |last| last + STREAM);
    let mut file = vec![0; usize::try_from(length).unwrap_or(0)];
    let mut ahead = DecodeAhead::default();
    ahead.enumerate(0);
    for (index, &offset) in offsets.iter().enumerate() {
        file[usize::try_from(offset).unwrap_or(0)] = byte(index);
        ahead.note((index * CLUSTER) as u64, offset, offset..offset + STREAM);
    }
    Image { io: MemoryDevices::new([(DEVICE_OUTPUT, file)]), ahead, offsets, alone }
}

impl Image {
    /// The byte that fills a cluster, if it is decoded ahead.
    fn take(&mut self, index: usize) -> DriverResult<Option<u8>> {
        let Self { io, ahead, offsets, alone } = self;
        let (key, mut cluster) = (((index * CLUSTER) as u64, offsets[index]), vec![0; CLUSTER]);
        let is_decoded = ahead.take(io, DEVICE_OUTPUT, key, &mut cluster, &|| Fill { alone: *alone })?;
        assert!(!is_decoded || cluster.iter().all(|&byte| byte == cluster[0]));
        Ok(is_decoded.then_some(cluster[0]))
    }
}

/// Where streams stand one behind the other.
fn packed(index: usize) -> u64 {
    index as u64 * STREAM
}

#[test]
fn all_are_decoded_with_few_requests_for_each_stream_once() {
    let mut asked = Vec::new();
    // The streams in order, from the last one to the first, and with some of every eight exchanged.
    for offset in [packed, |index| packed(499 - index), |index| packed(index ^ 5)] {
        for alone in [false, true] {
            let mut image = image(500, offset, alone);
            for index in 0..500 {
                assert_eq!(image.take(index).unwrap(), Some(byte(index)), "{index}");
            }
            let batches = image.io.submits;
            assert!((16..24).contains(&batches), "{batches} batches");
            assert!(image.io.bytes_read < 520 * STREAM, "{} bytes", image.io.bytes_read);
            asked.push((alone, image.io.submits, image.io.executed(), image.io.bytes_read));
        }
    }
    for pair in asked.chunks(2) {
        assert!(pair[0].1 == pair[1].1 && pair[0].2 == pair[1].2 && pair[0].3 == pair[1].3, "{pair:?}");
    }
}

#[test]
fn streams_far_from_each_other_are_read_alone_and_together() {
    let mut image = image(64, |index| packed(index) + index as u64 / 4 * 2 * GAP, false);
    for index in 0..64 {
        assert_eq!(image.take(index).unwrap(), Some(byte(index)));
    }
    assert_eq!((image.io.executed(), image.io.bytes_read), (16, 64 * STREAM));
    assert!(image.io.submits < 8, "{} batches", image.io.submits);
}

#[test]
fn a_damaged_cluster_among_good_ones_is_left_to_the_driver() {
    for alone in [false, true] {
        let mut image = image(100, packed, alone);
        let file = image.io.files.get_mut(&DEVICE_OUTPUT).unwrap();
        for damaged in [0, 30, 31, 99] {
            file[damaged * 1000] = DAMAGED;
        }
        for index in 0..100 {
            let expected = Some(byte(index)).filter(|_| ![0, 30, 31, 99].contains(&index));
            assert_eq!(image.take(index).unwrap(), expected, "{index}");
        }
    }
}

#[test]
fn who_jumps_about_reads_nothing_ahead() {
    let mut image = image(400, packed, false);
    for index in [300, 20, 210, 7, 399] {
        assert_eq!(image.take(index).unwrap(), None);
    }
    assert_eq!(image.io.submits, 0);
    // Two in a row, and it begins; one that is left out is none's loss.
    assert_eq!(image.take(100).unwrap(), None);
    for index in [101, 102, 104, 105] {
        assert_eq!(image.take(index).unwrap(), Some(byte(index)));
    }
    assert_eq!(image.io.submits, 2);
    // Of another enumeration, what was decoded is not that cluster any more.
    image.offsets[106] = packed(200);
    assert_eq!(image.take(106).unwrap(), None);
}

#[test]
fn many_are_enumerated_before_the_first_is_asked_for() {
    let mut image = image(REMEMBERED / 2, packed, false);
    for index in (0..64).chain(REMEMBERED / 2 - 64..REMEMBERED / 2) {
        // Behind the jump, the first one is left to the driver.
        let expected = Some(byte(index)).filter(|_| index != REMEMBERED / 2 - 64);
        assert_eq!(image.take(index).unwrap(), expected, "{index}");
    }
}

#[test]
fn a_failed_read_is_told() {
    let mut image = image(40, packed, false);
    image.io.fail_at = Some(0);
    image.take(0).unwrap_err();
    image.io.fail_at = None;
    assert_eq!(image.take(1).unwrap(), Some(byte(1)));
}

#[test]
fn without_room_nothing_is_decoded_ahead() {
    let mut image = image(40, packed, false);
    image.io.heap = Some(ROOM - 1);
    for index in 0..40 {
        assert_eq!(image.take(index).unwrap(), None);
    }
    assert_eq!(image.io.submits, 0);
}
