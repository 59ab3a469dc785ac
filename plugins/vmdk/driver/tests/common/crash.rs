//! The states that a crash can leave: every prefix of what was written, with one of the unflushed changes only, or without one.

use super::pair::Files;
use instar_guest_sdk::memory::Change;

/// Unflushed changes that are drawn at each end.
const DRAWN: usize = 24;

/// Hand every state to `verify`; returns how many there were.
pub fn each_crash(before: &Files, log: &[Change], verify: &mut dyn FnMut(Files)) -> usize {
    let mut states = 0;
    let mut state = |chosen: &dyn Fn(usize) -> bool, end: usize| {
        let mut files = before.clone();
        log[..end].iter().enumerate().filter(|(i, _)| chosen(*i)).for_each(|(_, change)| change.apply(&mut files));
        states += 1;
        verify(files);
    };
    for end in 0..=log.len() {
        state(&|_| true, end);
        let flushed = |i: usize| {
            let device = match &log[i] {
                Change::Write { device, .. } | Change::SetLength { device, .. } | Change::Flush { device } => *device,
            };
            log[i..end].contains(&Change::Flush { device })
        };
        let unflushed: Vec<usize> = (0..end).filter(|&i| !flushed(i)).collect();
        for &one in unflushed.iter().rev().take(DRAWN) {
            state(&|i| flushed(i) || i == one, end);
            state(&|i| flushed(i) || i != one, end);
        }
    }
    states
}
