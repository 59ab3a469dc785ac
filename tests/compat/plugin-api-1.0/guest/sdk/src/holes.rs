//! The holes of a device: a driver need not read tables that lie in them.
//!
//! An entry of eight bytes can name a table of megabytes in a hole, which takes no space and reads as zeroes. Reading all such
//! tables would take time out of proportion to the data in the file.

use crate::error::DriverResult;
use crate::io::BlockIo;
use alloc::vec;
use alloc::vec::Vec;
use core::ops::Range;
use instar_guest_abi::{Request, RequestOp};

/// Bytes after a range that a question covers as well, because the next question is mostly about a neighbor.
const LOOK_AHEAD: u64 = 1 << 30;
/// Maximum number of questions in a batch.
const QUESTIONS: usize = 256;

/// An answer: `from..data` is a hole, `data..end` is data.
#[derive(Clone, Copy, Debug)]
struct Span {
    from: u64,
    data: u64,
    end: u64,
}

impl Span {
    /// Whether a range that begins within the span holds data; `None` if it begins elsewhere.
    fn holds_data(&self, range: &Range<u64>) -> Option<bool> {
        let known = self.from <= range.start && range.start < self.end;
        known.then_some(range.end > self.data)
    }
}

/// The latest answers of the host about the holes of one device.
#[derive(Clone, Debug, Default)]
pub struct Holes {
    /// Sorted by their beginning.
    spans: Vec<Span>,
}

impl Holes {
    fn known(&self, range: &Range<u64>) -> Option<bool> {
        let after = self.spans.partition_point(|span| span.from <= range.start);
        self.spans.get(after.checked_sub(1)?)?.holds_data(range)
    }

    /// Decide for each of these byte ranges of a device whether it holds any data. The questions are batched, and one answer
    /// covers all neighbors in the same hole.
    ///
    /// # Errors
    /// I/O errors.
    pub fn hold_data(&mut self, io: &mut dyn BlockIo, device: u32, ranges: &[Range<u64>]) -> DriverResult<Vec<bool>> {
        let mut answers = vec![None; ranges.len()];
        loop {
            let mut questions: Vec<Range<u64>> = Vec::new();
            for (answer, range) in answers.iter_mut().zip(ranges).filter(|(answer, _)| answer.is_none()) {
                *answer = if range.is_empty() { Some(false) } else { self.known(range) };
                if answer.is_some() {
                    continue;
                }
                let full = questions.len() == QUESTIONS;
                match questions.last_mut() {
                    Some(last) if last.end == range.start => last.end = range.end,
                    _ if full => break,
                    _ => questions.push(range.clone()),
                }
            }
            if questions.is_empty() {
                return Ok(answers.into_iter().map(|answer| answer.unwrap_or(true)).collect());
            }
            self.ask(io, device, &questions)?;
        }
    }

    /// Replace what is known by the answers to these questions.
    fn ask(&mut self, io: &mut dyn BlockIo, device: u32, questions: &[Range<u64>]) -> DriverResult<()> {
        let most = i64::MAX as u64;
        let ahead = |range: &Range<u64>| range.end.saturating_add(LOOK_AHEAD).min(most).saturating_sub(range.start);
        let mut requests: Vec<Request> =
            questions.iter().map(|range| Request::next_data(device, range.start, ahead(range))).collect();
        io.run(&mut requests)?;
        debug_assert!(requests.iter().all(|request| request.op == RequestOp::NextData as u32));
        let answer = |(question, request): (&Range<u64>, &Request)| {
            // An invalid answer counts as data, so that the range is read.
            let data = request.offset.max(question.start);
            let end = data.saturating_add(request.length).max(question.start.saturating_add(1));
            Span { from: question.start, data, end }
        };
        self.spans = questions.iter().zip(&requests).map(answer).collect();
        self.spans.sort_unstable_by_key(|span| span.from);
        Ok(())
    }
}
