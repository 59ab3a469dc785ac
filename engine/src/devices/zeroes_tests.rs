#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)]

use super::{Seek, Zeroes, MAX_RANGES};
use instar_guest_sdk::random::Random;
use std::cell::Cell;

/// A file as a file system keeps it: `block` bytes to a block, data or hole, several of them to an extent. It counts the calls
/// and the extents that it has to look at, as a kernel does.
struct Extents {
    data: Vec<bool>,
    block: u64,
    calls: Cell<u64>,
    steps: Cell<u64>,
}

impl Extents {
    fn new(data: Vec<bool>, block: u64) -> Self {
        Self { data, block, calls: Cell::new(0), steps: Cell::new(0) }
    }

    fn seek(&self, from: u64, data: bool) -> Option<u64> {
        self.calls.set(self.calls.get() + 1);
        let first = (from / self.block) as usize;
        for (index, &block) in self.data.iter().enumerate().skip(first) {
            self.steps.set(self.steps.get() + 1);
            if block == data {
                return Some(from.max(index as u64 * self.block));
            }
        }
        Some(if data { u64::MAX } else { (self.data.len() as u64 * self.block).max(from) })
    }
}

impl Seek for Extents {
    fn data(&self, from: u64) -> Option<u64> {
        self.seek(from, true)
    }

    fn hole(&self, from: u64) -> Option<u64> {
        self.seek(from, false)
    }
}

fn orders(count: u64) -> [Vec<u64>; 4] {
    let ascending: Vec<u64> = (0..count).collect();
    let descending = ascending.iter().rev().copied().collect();
    let mut shuffled = ascending.clone();
    let mut random = Random::seeded(5);
    for index in (1..shuffled.len()).rev() {
        shuffled.swap(index, random.index(index + 1));
    }
    // Forward in each of many stretches, which come from the last to the first.
    let stretches = (0..count / 50).rev().flat_map(|stretch| stretch * 50..stretch * 50 + 50).collect();
    [ascending, descending, shuffled, stretches]
}

/// Ask for each block in this order, and compare with what the file has. Returns the calls and the extents looked at.
fn walk(data: &[bool], order: &[u64]) -> (u64, u64) {
    let file = Extents::new(data.to_vec(), 65536);
    let mut zeroes = Zeroes::default();
    for &block in order {
        let (from, end) = (block * 65536, (block + 1) * 65536);
        let wanted = if data[block as usize] { (from, end) } else { (end, end) };
        assert_eq!(zeroes.next_data(&file, from, end), wanted, "block {block}");
    }
    (file.calls.get(), file.steps.get())
}

#[test]
fn all_questions_together_cost_what_the_file_has() {
    const BLOCKS: u64 = 20_000;
    for run in [1, 3, 100, BLOCKS] {
        let data: Vec<bool> = (0..BLOCKS).map(|block| block / run % 2 == 0).collect();
        for (number, order) in orders(BLOCKS).iter().enumerate() {
            let (calls, steps) = walk(&data, order);
            assert!(calls <= 2 * BLOCKS, "runs of {run}, order {number}: {calls} calls for {BLOCKS} requests");
            assert!(steps <= 30 * BLOCKS, "runs of {run}, order {number}: {steps} steps over {BLOCKS} extents");
        }
    }
}

#[test]
fn a_single_question_looks_no_further_back() {
    let file = Extents::new(vec![true; 1000], 65536);
    let mut zeroes = Zeroes::default();
    assert_eq!(zeroes.next_data(&file, 999 * 65536, 1000 * 65536), (999 * 65536, 1000 * 65536));
    assert_eq!((file.calls.get(), file.steps.get()), (2, 2));
}

#[test]
fn what_is_remembered_is_bounded() {
    let blocks = 3 * MAX_RANGES as u64;
    let data: Vec<bool> = (0..blocks).map(|block| block % 2 == 0).collect();
    let file = Extents::new(data, 4096);
    let mut zeroes = Zeroes::default();
    for block in 0..blocks {
        let (from, end) = (block * 4096, (block + 1) * 4096);
        assert_eq!(zeroes.next_data(&file, from, end).0, if block % 2 == 0 { from } else { end });
        zeroes.note(from, end, block % 3 == 0);
        assert!(zeroes.ranges.len() <= MAX_RANGES + 2);
    }
    assert!(file.calls.get() <= 2 * blocks);
}

#[test]
fn changes_are_seen_wherever_they_fall() {
    const BLOCKS: u64 = 64;
    for seed in 1..200 {
        let mut random = Random::seeded(seed);
        let mut file = Extents::new((0..BLOCKS).map(|_| random.below(3) == 0).collect(), 10);
        let mut zeroes = Zeroes::default();
        for _ in 0..300 {
            let (a, b) = (random.below(BLOCKS + 1), random.below(BLOCKS + 1));
            let (first, last) = (a.min(b), a.max(b));
            let (from, end) = (first * 10, last * 10);
            match random.below(4) {
                0 => {
                    let zero = random.coin();
                    file.data[first as usize..last as usize].fill(!zero);
                    zeroes.note(from, end, zero);
                }
                1 => {
                    // Somebody else's change, of which only the place is known.
                    file.data[first as usize..last as usize].fill(random.coin());
                    zeroes.forget(from, end);
                }
                _ if from < end => {
                    let start = file.data[first as usize..last as usize].iter().position(|&data| data);
                    let start = start.map_or(last, |at| first + at as u64);
                    let stop = file.data[start as usize..last as usize].iter().position(|&data| !data);
                    let stop = stop.map_or(last, |at| start + at as u64);
                    assert_eq!(zeroes.next_data(&file, from, end), (start * 10, stop * 10));
                    if zeroes.all_zero(from, end) {
                        assert_eq!(start, last);
                    }
                }
                _ => {}
            }
            let ranges: Vec<_> = zeroes.ranges.iter().collect();
            assert!(ranges.iter().all(|(&start, known)| start < known.end));
            assert!(ranges.windows(2).all(|pair| pair[0].1.end <= *pair[1].0));
        }
    }
}

#[test]
fn without_an_answer_all_is_data() {
    struct Mute;
    impl Seek for Mute {
        fn data(&self, _: u64) -> Option<u64> {
            None
        }
        fn hole(&self, _: u64) -> Option<u64> {
            None
        }
    }
    assert_eq!(Zeroes::default().next_data(&Mute, 10, 20), (10, 20));
    // Nor does one that goes backwards lead on.
    struct Confused;
    impl Seek for Confused {
        fn data(&self, _: u64) -> Option<u64> {
            Some(0)
        }
        fn hole(&self, _: u64) -> Option<u64> {
            Some(3)
        }
    }
    assert_eq!(Zeroes::default().next_data(&Confused, 10, 20), (10, 20));
}
