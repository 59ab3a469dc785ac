//! A program that commits through the library's worker: it is told what happens, can end it, and is not confined by it.

#![allow(clippy::unwrap_used, clippy::panic)]

use instar::commit::CommitRequest;
use instar::error::Role;
use instar::operation::{Cancel, Observer, Progress, Settings, Stage};
use instar::plugins::SearchPath;
use instar::worker::Worker;
use instar_guest_abi::ErrorCode;
use instar_test_lab::lab::Lab;
use instar_test_lab::{program, sandbox};
use std::cell::RefCell;
use std::process::Command;

/// Keeps what it is told, and ends the commit once this many bytes are written.
struct Watches {
    stages: RefCell<Vec<Progress>>,
    notes: RefCell<Vec<String>>,
    cancel: Cancel,
    at: u64,
}

impl Watches {
    fn new(at: u64) -> Self {
        Self { stages: RefCell::default(), notes: RefCell::default(), cancel: Cancel::new(), at }
    }
}

impl Observer for Watches {
    fn wants_notes(&self) -> bool {
        true
    }

    fn note(&self, line: &str) {
        self.notes.borrow_mut().push(line.to_owned());
    }

    fn wants_progress(&self) -> bool {
        true
    }

    fn progress(&self, progress: Progress) {
        if progress.stage == Stage::Writing && progress.done >= self.at {
            self.cancel.cancel();
        }
        self.stages.borrow_mut().push(progress);
    }
}

fn request(lab: &Lab) -> CommitRequest {
    let plugins = vec![lab.plugins().path().to_owned()];
    let search = SearchPath::with_requested(plugins.clone(), plugins);
    let settings = Settings { search, sandbox: sandbox(), ..Settings::default() };
    CommitRequest { overlay: lab.path("top"), settings, ..CommitRequest::default() }
}

/// Whether this process may still do what a confined one may not.
fn is_free(lab: &Lab) -> bool {
    std::fs::write(lab.path("new"), "x").is_ok() && Command::new("true").status().is_ok_and(|status| status.success())
}

#[test]
fn a_commit_is_told_and_confines_nobody() {
    let lab = Lab::pair();
    lab.qemu_img(&["convert", "-O", "raw", "top", "want"]);
    let watches = Watches::new(u64::MAX);
    let outcome = Worker::new(program()).commit(&request(&lab), &watches, &watches.cancel).unwrap();
    assert_eq!((outcome.overlay_format.as_str(), outcome.bytes_committed > 0), ("qcow2", true));
    assert_eq!(outcome.backing, lab.path("base").canonicalize().unwrap());
    for image in ["top", "base"] {
        lab.qemu_img(&["compare", "-q", image, "want"]);
    }
    let stages = watches.stages.take();
    assert_eq!(stages.first().map(|progress| progress.stage), Some(Stage::Checking));
    let whole = |stage| stages.iter().rfind(|progress| progress.stage == stage).is_some_and(|p| p.done == p.total);
    assert!(whole(Stage::Writing) && whole(Stage::Emptying), "{stages:?}");
    assert!(watches.notes.take().iter().any(|note| note.starts_with("confinement: ")));
    assert!(is_free(&lab));
}

#[test]
fn a_refusal_arrives_whole() {
    let lab = Lab::pair();
    std::fs::remove_file(lab.path("base")).unwrap();
    let error = Worker::new(program()).commit(&request(&lab), &(), &Cancel::new()).unwrap_err();
    assert_eq!((error.code, error.role(), error.errno()), (ErrorCode::BackingNotFound, Some(Role::Backing), Some(2)));
    assert!(error.path().is_some_and(|path| path.ends_with("base")) && error.message.contains("does not exist"));
}

#[test]
fn a_commit_is_ended_at_a_safe_point() {
    let lab = Lab::pair();
    lab.qemu_img(&["convert", "-O", "raw", "top", "want"]);
    let watches = Watches::new(1);
    let slow = CommitRequest { rate_limit: 1 << 20, ..request(&lab) };
    let error = Worker::new(program()).commit(&slow, &watches, &watches.cancel).unwrap_err();
    assert_eq!(error.code, ErrorCode::Interrupted, "{error}");
    lab.qemu_img(&["compare", "-q", "top", "want"]);
    let outcome = Worker::new(program()).commit(&request(&lab), &(), &Cancel::new()).unwrap();
    assert!(outcome.clusters_committed > 0);
    lab.qemu_img(&["compare", "-q", "base", "want"]);
}

#[test]
fn what_is_no_worker_is_said() {
    let lab = Lab::pair();
    let before = lab.files();
    for (program, words) in [("/no/such/program", "cannot be started"), ("/bin/false", "ended without an answer")] {
        let error = Worker::new(program).commit(&request(&lab), &(), &Cancel::new()).unwrap_err();
        assert!(error.message.contains(words), "{error}");
    }
    assert!(lab.files() == before);
    let said = Command::new(program()).args(["worker", "/dev/null"]).output().unwrap();
    assert_eq!(said.status.code(), Some(2), "{}", String::from_utf8_lossy(&said.stderr));
}
