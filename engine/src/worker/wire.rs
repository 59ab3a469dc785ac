//! The messages between a caller and its worker: `prost` messages with a length prefix. Paths are bytes, so that every name
//! arrives unchanged. An image may have taken over the worker, so its messages are bounded and believed no further than their
//! content.

use crate::commit::{
    AtomicWay, CommitMode, CommitOutcome, CommitRequest, DiskDigest, GuestRun, MergedBitmap, Preview, Relinked,
    BITMAP_RESULTS,
};
use crate::devices::Cache;
use crate::error::{Error, Role};
use crate::operation::{Observer, Progress, Settings, Stage, Timing};
use crate::plugins::SearchPath;
use crate::sandbox::{Sandbox, SandboxChoice};
use instar_guest_abi::ErrorCode;
use prost::Message;
use std::ffi::OsStr;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

/// Longest message in bytes.
const MESSAGE_MAX: usize = 16 << 20;

#[derive(Clone, PartialEq, Message)]
struct CommitMessage {
    #[prost(bytes = "vec", tag = "1")]
    overlay: Vec<u8>,
    #[prost(string, optional, tag = "2")]
    format: Option<String>,
    #[prost(bytes = "vec", optional, tag = "3")]
    base: Option<Vec<u8>>,
    #[prost(string, optional, tag = "4")]
    base_format: Option<String>,
    #[prost(bool, tag = "5")]
    keep_overlay: bool,
    #[prost(uint32, tag = "6")]
    mode: u32,
    #[prost(bool, tag = "7")]
    resize_backing: bool,
    #[prost(uint64, tag = "8")]
    rate_limit: u64,
    #[prost(uint32, tag = "9")]
    cache: u32,
    #[prost(uint64, tag = "10")]
    wait: u64,
    #[prost(bytes = "vec", repeated, tag = "11")]
    allowed: Vec<Vec<u8>>,
    #[prost(bytes = "vec", repeated, tag = "12")]
    plugins: Vec<Vec<u8>>,
    #[prost(bytes = "vec", repeated, tag = "13")]
    requested_plugins: Vec<Vec<u8>>,
    #[prost(bool, tag = "14")]
    notes: bool,
    #[prost(bool, tag = "15")]
    progress: bool,
    #[prost(uint32, tag = "16")]
    sandbox: u32,
    #[prost(bool, tag = "17")]
    ignore_siblings: bool,
    #[prost(bytes = "vec", repeated, tag = "18")]
    relink: Vec<Vec<u8>>,
    #[prost(bytes = "vec", repeated, tag = "19")]
    relink_in: Vec<Vec<u8>>,
    #[prost(bool, tag = "20")]
    wipe: bool,
    #[prost(bool, tag = "21")]
    bitmaps: bool,
    #[prost(bool, tag = "22")]
    verify: bool,
    #[prost(bool, tag = "23")]
    delete_overlay: bool,
    #[prost(bool, tag = "24")]
    digest: bool,
    #[prost(bool, tag = "25")]
    detect_zeroes: bool,
    #[prost(bool, tag = "30")]
    atomic: bool,
    #[prost(bytes = "vec", optional, tag = "31")]
    keep_backup: Option<Vec<u8>>,
    #[prost(bytes = "vec", optional, tag = "32")]
    undo_directory: Option<Vec<u8>>,
}

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

#[derive(Clone, PartialEq, Message)]
struct OutcomeEvent {
    #[prost(bytes = "vec", tag = "1")]
    overlay: Vec<u8>,
    #[prost(string, tag = "2")]
    overlay_format: String,
    #[prost(bytes = "vec", tag = "3")]
    backing: Vec<u8>,
    #[prost(string, tag = "4")]
    backing_format: String,
    #[prost(uint64, tag = "5")]
    clusters_committed: u64,
    #[prost(uint64, tag = "6")]
    bytes_committed: u64,
    #[prost(uint64, tag = "7")]
    overlay_clusters_cleared: u64,
    #[prost(bytes = "vec", repeated, tag = "8")]
    stale: Vec<Vec<u8>>,
    #[prost(string, repeated, tag = "9")]
    warnings: Vec<String>,
    #[prost(message, optional, tag = "10")]
    preview: Option<PreviewEvent>,
    #[prost(uint64, optional, tag = "11")]
    backing_grows_to: Option<u64>,
    #[prost(bytes = "vec", tag = "12")]
    overlay_given: Vec<u8>,
    #[prost(uint32, tag = "13")]
    sandbox: u32,
    #[prost(message, optional, tag = "14")]
    relinked: Option<RelinkedEvent>,
    #[prost(uint64, optional, tag = "15")]
    overlay_bytes_wiped: Option<u64>,
    #[prost(message, optional, tag = "16")]
    bitmaps: Option<BitmapsEvent>,
    #[prost(uint64, optional, tag = "17")]
    verified_bytes: Option<u64>,
    #[prost(bool, optional, tag = "18")]
    overlay_deleted: Option<bool>,
    #[prost(message, optional, tag = "19")]
    digest: Option<DigestEvent>,
    #[prost(uint32, optional, tag = "30")]
    atomic: Option<u32>,
    #[prost(bytes = "vec", optional, tag = "31")]
    backup: Option<Vec<u8>>,
}

#[derive(Clone, PartialEq, Message)]
struct DigestEvent {
    #[prost(uint64, tag = "1")]
    length: u64,
    #[prost(string, tag = "2")]
    before: String,
    #[prost(string, optional, tag = "3")]
    after: Option<String>,
}

#[derive(Clone, PartialEq, Message)]
struct BitmapsEvent {
    #[prost(message, repeated, tag = "1")]
    bitmaps: Vec<BitmapEvent>,
}

#[derive(Clone, PartialEq, Message)]
struct BitmapEvent {
    #[prost(bytes = "vec", tag = "1")]
    name: Vec<u8>,
    #[prost(uint64, tag = "2")]
    granularity: u64,
    #[prost(string, tag = "3")]
    result: String,
}

#[derive(Clone, PartialEq, Message)]
struct RelinkedEvent {
    #[prost(message, repeated, tag = "1")]
    children: Vec<ChildEvent>,
}

#[derive(Clone, PartialEq, Message)]
struct ChildEvent {
    #[prost(bytes = "vec", tag = "1")]
    image: Vec<u8>,
    #[prost(bytes = "vec", tag = "2")]
    backing: Vec<u8>,
    #[prost(bool, tag = "3")]
    already: bool,
}

#[derive(Clone, Copy, PartialEq, Message)]
struct PreviewEvent {
    #[prost(uint64, tag = "1")]
    growth: u64,
    #[prost(uint64, tag = "2")]
    space: u64,
    #[prost(uint64, optional, tag = "3")]
    free: Option<u64>,
    #[prost(uint64, tag = "4")]
    length: u64,
    #[prost(uint64, optional, tag = "5")]
    undo_log: Option<u64>,
    #[prost(uint64, optional, tag = "6")]
    undo_free: Option<u64>,
    #[prost(uint64, optional, tag = "7")]
    lacking: Option<u64>,
}

#[derive(Clone, PartialEq, Message)]
struct ErrorEvent {
    #[prost(uint32, tag = "1")]
    code: u32,
    #[prost(string, tag = "2")]
    message: String,
    #[prost(bytes = "vec", optional, tag = "3")]
    path: Option<Vec<u8>>,
    #[prost(string, optional, tag = "4")]
    role: Option<String>,
    #[prost(uint32, optional, tag = "5")]
    device: Option<u32>,
    #[prost(uint64, optional, tag = "6")]
    offset: Option<u64>,
    #[prost(int32, tag = "7")]
    errno: i32,
    #[prost(string, tag = "8")]
    step: String,
    #[prost(uint32, optional, tag = "9")]
    holder: Option<u32>,
}

/// The end of a worker's operation.
#[derive(Debug)]
pub enum Answer {
    /// Well.
    Outcome(Box<CommitOutcome>),
    /// With an error.
    Error(Error),
}

/// In the order of their numbers.
const CACHES: [Cache; 5] = [Cache::Writeback, Cache::Writethrough, Cache::Unsafe, Cache::None, Cache::Directsync];
const MODES: [CommitMode; 3] = [CommitMode::Whole, CommitMode::DryRun, CommitMode::Measure];
const WAYS: [AtomicWay; 2] = [AtomicWay::Clone, AtomicWay::UndoLog];
const STAGES: [Stage; 6] =
    [Stage::Checking, Stage::Writing, Stage::Emptying, Stage::Reading, Stage::Verifying, Stage::Hashing];

fn number<T: PartialEq>(all: &[T], one: &T) -> u32 {
    all.iter().position(|other| other == one).and_then(|at| u32::try_from(at).ok()).unwrap_or(0)
}

fn by_number<T: Copy>(all: &[T], number: u32) -> Option<T> {
    all.get(usize::try_from(number).ok()?).copied()
}

fn bytes(path: &Path) -> Vec<u8> {
    path.as_os_str().as_bytes().to_vec()
}

fn all_bytes(paths: &[PathBuf]) -> Vec<Vec<u8>> {
    paths.iter().map(|path| bytes(path)).collect()
}

fn path(bytes: &[u8]) -> PathBuf {
    PathBuf::from(OsStr::from_bytes(bytes))
}

fn paths(all: &[Vec<u8>]) -> Vec<PathBuf> {
    all.iter().map(|bytes| path(bytes)).collect()
}

/// A request as it is sent, and what the observer wants to know.
pub fn request(request: &CommitRequest, observer: &dyn Observer) -> Vec<u8> {
    let Settings { search, allowed_directories, wait, sandbox, undo_directory } = &request.settings;
    let message = CommitMessage {
        overlay: bytes(&request.overlay),
        format: request.format.clone(),
        base: request.base.as_deref().map(bytes),
        base_format: request.base_format.clone(),
        keep_overlay: request.keep_overlay,
        mode: number(&MODES, &request.mode),
        resize_backing: request.resize_backing,
        bitmaps: request.bitmaps,
        ignore_siblings: request.ignore_siblings,
        rate_limit: request.rate_limit,
        cache: number(&CACHES, &request.cache),
        wait: *wait,
        allowed: all_bytes(allowed_directories),
        plugins: all_bytes(search.directories()),
        requested_plugins: all_bytes(search.requested()),
        notes: observer.wants_notes(),
        progress: observer.wants_progress(),
        sandbox: number(&SandboxChoice::ALL, sandbox),
        relink: all_bytes(&request.relink),
        relink_in: all_bytes(&request.relink_in),
        wipe: request.wipe,
        verify: request.verify,
        digest: request.digest,
        detect_zeroes: request.detect_zeroes,
        delete_overlay: request.delete_overlay,
        atomic: request.atomic,
        keep_backup: request.keep_backup.as_deref().map(bytes),
        undo_directory: undo_directory.as_deref().map(bytes),
    };
    message.encode_to_vec()
}

/// A request, and whether notes and progress are wanted.
pub fn parse(bytes: &[u8]) -> Option<(CommitRequest, bool, bool)> {
    let message = CommitMessage::decode(bytes).ok()?;
    let sandbox = by_number(&SandboxChoice::ALL, message.sandbox)?;
    let search = SearchPath::with_requested(paths(&message.plugins), paths(&message.requested_plugins));
    let request = CommitRequest {
        overlay: path(&message.overlay),
        format: message.format,
        base: message.base.as_deref().map(path),
        base_format: message.base_format,
        keep_overlay: message.keep_overlay,
        mode: by_number(&MODES, message.mode)?,
        resize_backing: message.resize_backing,
        bitmaps: message.bitmaps,
        ignore_siblings: message.ignore_siblings,
        rate_limit: message.rate_limit,
        cache: by_number(&CACHES, message.cache)?,
        relink: paths(&message.relink),
        relink_in: paths(&message.relink_in),
        wipe: message.wipe,
        verify: message.verify,
        digest: message.digest,
        detect_zeroes: message.detect_zeroes,
        delete_overlay: message.delete_overlay,
        atomic: message.atomic,
        keep_backup: message.keep_backup.as_deref().map(path),
        settings: Settings {
            search,
            allowed_directories: paths(&message.allowed),
            wait: message.wait,
            sandbox,
            undo_directory: message.undo_directory.as_deref().map(path),
        },
    };
    (!request.overlay.as_os_str().is_empty()).then_some((request, message.notes, message.progress))
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
        Ok(outcome) => Kind::Outcome(Box::new(OutcomeEvent {
            overlay: bytes(&outcome.overlay),
            overlay_given: bytes(&outcome.overlay_given),
            overlay_format: outcome.overlay_format.clone(),
            backing: bytes(&outcome.backing),
            backing_format: outcome.backing_format.clone(),
            clusters_committed: outcome.clusters_committed,
            bytes_committed: outcome.bytes_committed,
            overlay_clusters_cleared: outcome.overlay_clusters_cleared,
            overlay_bytes_wiped: outcome.overlay_bytes_wiped,
            verified_bytes: outcome.verified_bytes,
            digest: outcome.digest.as_ref().map(|digest| DigestEvent {
                length: digest.length,
                before: digest.before.clone(),
                after: digest.after.clone(),
            }),
            overlay_deleted: outcome.overlay_deleted,
            stale: all_bytes(&outcome.stale),
            warnings: outcome.warnings.clone(),
            preview: outcome.preview.map(|preview| PreviewEvent {
                growth: preview.backing_growth_bytes,
                space: preview.backing_space_bytes,
                free: preview.free_bytes,
                length: preview.backing_length_bytes,
                undo_log: preview.undo_log_bytes,
                undo_free: preview.undo_free_bytes,
                lacking: preview.lacking_bytes,
            }),
            backing_grows_to: outcome.backing_grows_to,
            sandbox: SandboxChoice::from_name(outcome.sandbox)
                .map_or(0, |sandbox| number(&SandboxChoice::ALL, &sandbox)),
            relinked: outcome
                .relinked
                .as_ref()
                .map(|children| RelinkedEvent { children: children.iter().map(child_event).collect() }),
            bitmaps: outcome
                .bitmaps
                .as_ref()
                .map(|bitmaps| BitmapsEvent { bitmaps: bitmaps.iter().map(bitmap_event).collect() }),
            atomic: outcome.atomic.map(|way| number(&WAYS, &way)),
            backup: outcome.backup.as_deref().map(bytes),
        })),
        Err(error) => Kind::Error(error_event(error)),
    })
}

/// An error as bytes, for a process that is told it by another one of the same program.
#[must_use]
pub fn encode_error(error: &Error) -> Vec<u8> {
    error_event(error).encode_to_vec()
}

/// The error that [`encode_error`] made these bytes of; `None` if it did not.
#[must_use]
pub fn decode_error(bytes: &[u8]) -> Option<Error> {
    ErrorEvent::decode(bytes).ok().map(error_of)
}

fn error_event(error: &Error) -> ErrorEvent {
    ErrorEvent {
        code: error.code.number(),
        message: error.message.clone(),
        path: error.path().map(bytes),
        role: error.role().map(|role| role.name().to_owned()),
        device: error.device(),
        offset: error.offset(),
        errno: error.errno().unwrap_or(0),
        step: error.step().unwrap_or_default().to_owned(),
        holder: error.holder(),
    }
}

fn child_event(Relinked { image, backing, already }: &Relinked) -> ChildEvent {
    ChildEvent { image: bytes(image), backing: backing.clone(), already: *already }
}

fn bitmap_event(MergedBitmap { name, granularity, result }: &MergedBitmap) -> BitmapEvent {
    BitmapEvent { name: name.clone(), granularity: *granularity, result: (*result).to_owned() }
}

fn bitmap_of(BitmapEvent { name, granularity, result }: BitmapEvent) -> Option<MergedBitmap> {
    let (_, result) = BITMAP_RESULTS.iter().find(|(_, known)| *known == result)?;
    Some(MergedBitmap { name, granularity, result })
}

fn child_of(ChildEvent { image, backing, already }: ChildEvent) -> Relinked {
    Relinked { image: path(&image), backing, already }
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

fn outcome_of(event: OutcomeEvent) -> CommitOutcome {
    CommitOutcome {
        overlay: path(&event.overlay),
        overlay_given: path(&event.overlay_given),
        overlay_format: event.overlay_format,
        backing: path(&event.backing),
        backing_format: event.backing_format,
        clusters_committed: event.clusters_committed,
        bytes_committed: event.bytes_committed,
        overlay_clusters_cleared: event.overlay_clusters_cleared,
        overlay_bytes_wiped: event.overlay_bytes_wiped,
        verified_bytes: event.verified_bytes,
        digest: event.digest.map(|event| DiskDigest::sha256(event.length, event.before, event.after)),
        overlay_deleted: event.overlay_deleted,
        atomic: event.atomic.and_then(|way| by_number(&WAYS, way)),
        backup: event.backup.as_deref().map(path),
        stale: paths(&event.stale),
        warnings: event.warnings,
        preview: event.preview.map(|preview| Preview {
            dry_run: true,
            backing_length_bytes: preview.length,
            backing_growth_bytes: preview.growth,
            backing_space_bytes: preview.space,
            free_bytes: preview.free,
            undo_log_bytes: preview.undo_log,
            undo_free_bytes: preview.undo_free,
            lacking_bytes: preview.lacking,
        }),
        backing_grows_to: event.backing_grows_to,
        bitmaps: event.bitmaps.map(|event| event.bitmaps.into_iter().filter_map(bitmap_of).collect()),
        relinked: event.relinked.map(|event| event.children.into_iter().map(child_of).collect()),
        sandbox: by_number(&SandboxChoice::ALL, event.sandbox).unwrap_or_default().name(),
        run: GuestRun::default(),
        timing: Timing::default(),
    }
}

fn error_of(event: ErrorEvent) -> Error {
    let code = ErrorCode::from_u32(event.code).unwrap_or(ErrorCode::InternalOverflow);
    let error = Error::new(code, event.message)
        .on_device(event.device, event.offset)
        .with_errno(event.errno)
        .in_step(&event.step)
        .held_by(event.holder);
    let error = event.path.iter().fold(error, |error, bytes| error.at_path(&path(bytes)));
    event.role.as_deref().and_then(Role::from_name).into_iter().fold(error, Error::in_role)
}

/// Messages that arrive in pieces.
#[derive(Debug, Default)]
pub struct Frames {
    bytes: Vec<u8>,
}

impl Frames {
    /// Take the next piece, and hand over each message that is whole.
    ///
    /// # Errors
    /// `InvalidData` for a message that is too long, or is none.
    pub fn take(&mut self, piece: &[u8], mut each: impl FnMut(Event)) -> io::Result<()> {
        self.bytes.extend_from_slice(piece);
        loop {
            let mut rest = self.bytes.as_slice();
            let length = match prost::decode_length_delimiter(&mut rest) {
                Ok(length) => length,
                // The longest length takes ten bytes.
                Err(_) if self.bytes.len() < 10 => return Ok(()),
                Err(error) => return Err(io::Error::new(io::ErrorKind::InvalidData, error)),
            };
            if length > MESSAGE_MAX {
                return Err(io::Error::new(io::ErrorKind::InvalidData, "a message that is too long"));
            }
            let Some(message) = rest.get(..length) else { return Ok(()) };
            let event = Event::decode(message).map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
            let used = self.bytes.len() - rest.len() + length;
            self.bytes.drain(..used);
            each(event);
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use std::cell::RefCell;

    #[test]
    fn a_request_arrives_as_it_was() {
        let odd = || PathBuf::from(OsStr::from_bytes(b"/a\xff\n"));
        let sent = CommitRequest {
            overlay: odd(),
            format: Some("qcow2".into()),
            base: Some(odd()),
            base_format: Some("raw".into()),
            keep_overlay: true,
            mode: CommitMode::Measure,
            resize_backing: true,
            bitmaps: true,
            ignore_siblings: true,
            rate_limit: 7,
            cache: Cache::Directsync,
            relink: vec![odd(), "/c".into()],
            relink_in: vec!["/d".into(), odd()],
            wipe: true,
            verify: true,
            digest: true,
            detect_zeroes: true,
            delete_overlay: true,
            atomic: true,
            keep_backup: Some(odd()),
            settings: Settings {
                search: SearchPath::with_requested(vec![odd(), "/b".into()], vec!["/b".into()]),
                allowed_directories: vec![odd()],
                wait: 9,
                sandbox: SandboxChoice::Process,
                undo_directory: Some(odd()),
            },
        };
        let (arrived, notes, progress) = parse(&request(&sent, &())).unwrap();
        assert_eq!(format!("{arrived:?}"), format!("{sent:?}"));
        assert!(!notes && !progress);
        assert!(parse(b"").is_none() && parse(b"\xff\xff").is_none());
    }

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

    #[test]
    fn a_worker_cannot_make_its_caller_take_memory() {
        let too_long = [0xff, 0xff, 0xff, 0xff, 0x0f];
        assert!(Frames::default().take(&too_long, |_| ()).is_err());
        assert!(Frames::default().take(&[0xff; 32], |_| ()).is_err());
    }
}
