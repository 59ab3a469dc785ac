//! What a worker tells its caller while it works, and at the end.

use super::error::{error_event, error_of, ErrorEvent};
use super::outcome::{outcome_event, outcome_of, OutcomeEvent};
use super::{by_number, number};
use crate::commit::CommitOutcome;
use crate::error::Error;
use crate::operation::{Observer, Progress, Stage};
use prost::Message;

/// In the order of their numbers.
const STAGES: [Stage; 6] =
    [Stage::Checking, Stage::Writing, Stage::Emptying, Stage::Reading, Stage::Verifying, Stage::Hashing];

#[derive(Clone, PartialEq, Message)]
pub struct Event {
    #[prost(oneof = "Kind", tags = "1, 2, 3, 4, 5")]
    kind: Option<Kind>,
}

#[derive(Clone, PartialEq, prost::Oneof)]
enum Kind {
    #[prost(string, tag = "1")]
    Note(String),
    #[prost(string, tag = "2")]
    Warning(String),
    #[prost(message, tag = "3")]
    Progress(ProgressEvent),
    #[prost(message, boxed, tag = "4")]
    Outcome(Box<OutcomeEvent>),
    #[prost(message, tag = "5")]
    Error(ErrorEvent),
}

#[derive(Clone, Copy, PartialEq, Message)]
struct ProgressEvent {
    #[prost(uint32, tag = "1")]
    stage: u32,
    #[prost(uint64, tag = "2")]
    done: u64,
    #[prost(uint64, tag = "3")]
    total: u64,
}

/// The end of a worker's operation.
#[derive(Debug)]
pub enum Answer {
    /// Well.
    Outcome(Box<CommitOutcome>),
    /// With an error.
    Error(Error),
}

fn framed(kind: Kind) -> Vec<u8> {
    Event { kind: Some(kind) }.encode_length_delimited_to_vec()
}

/// A note as it is sent.
pub fn note(line: &str) -> Vec<u8> {
    framed(Kind::Note(line.to_owned()))
}

/// A warning as it is sent.
pub fn warning(line: &str) -> Vec<u8> {
    framed(Kind::Warning(line.to_owned()))
}

/// How far it is, as it is sent.
pub fn progress(Progress { stage, done, total }: Progress) -> Vec<u8> {
    framed(Kind::Progress(ProgressEvent { stage: number(&STAGES, &stage), done, total }))
}

/// How it ended, as it is sent.
pub fn answer(result: &Result<CommitOutcome, Error>) -> Vec<u8> {
    framed(match result {
        Ok(outcome) => Kind::Outcome(Box::new(outcome_event(outcome))),
        Err(error) => Kind::Error(error_event(error)),
    })
}

/// Tell an observer what a worker says; its answer, if that was one.
pub fn tell(event: Event, observer: &dyn Observer) -> Option<Answer> {
    match event.kind? {
        Kind::Note(line) => observer.note(&line),
        Kind::Warning(line) => observer.warning(&line),
        Kind::Progress(ProgressEvent { stage, done, total }) => {
            let stage = by_number(&STAGES, stage)?;
            observer.progress(Progress { stage, done, total });
        }
        Kind::Outcome(outcome) => return Some(Answer::Outcome(Box::new(outcome_of(*outcome)))),
        Kind::Error(error) => return Some(Answer::Error(error_of(error))),
    }
    None
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::super::Frames;
    use super::*;
    use crate::error::Role;
    use instar_guest_abi::ErrorCode;
    use std::cell::RefCell;
    use std::path::Path;

    #[derive(Default)]
    struct Kept(RefCell<Vec<String>>);

    impl Observer for Kept {
        fn note(&self, line: &str) {
            self.0.borrow_mut().push(format!("note {line}"));
        }
        fn progress(&self, progress: Progress) {
            self.0.borrow_mut().push(format!("{:?} {}", progress.stage, progress.done));
        }
    }

    #[test]
    fn messages_arrive_in_any_pieces() {
        let failure = Error::image(Path::new("/x"), ErrorCode::NoSpace, "is full")
            .with_errno(28)
            .in_role(Role::Backing)
            .held_by(Some(7));
        let emptying = Progress { stage: Stage::Emptying, done: 5, total: 9 };
        let all = [note("a"), progress(emptying), note(&"b".repeat(300)), answer(&Err(failure.clone()))].concat();
        for size in [1, 2, 7, 1000] {
            let (mut frames, kept, mut answer) = (Frames::default(), Kept::default(), None);
            for piece in all.chunks(size) {
                frames.take(piece, |event| answer = answer.take().or(tell(event, &kept))).unwrap();
            }
            let Some(Answer::Error(error)) = answer else { unreachable!("no answer") };
            assert_eq!(error, failure);
            assert_eq!(kept.0.take(), ["note a", "Emptying 5", &format!("note {}", "b".repeat(300))]);
        }
    }
}
