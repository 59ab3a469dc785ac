//! The request of a commit, as a caller sends it to its worker.

use super::{all_bytes, by_number, bytes, number, path, paths};
use crate::commit::{CommitMode, CommitRequest};
use crate::devices::Cache;
use crate::operation::{Observer, Settings};
use crate::plugins::SearchPath;
use crate::sandbox::SandboxChoice;
use prost::Message;

/// In the order of their numbers.
const CACHES: [Cache; 5] = [Cache::Writeback, Cache::Writethrough, Cache::Unsafe, Cache::None, Cache::Directsync];
const MODES: [CommitMode; 3] = [CommitMode::Whole, CommitMode::DryRun, CommitMode::Measure];

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

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use std::ffi::OsStr;
    use std::os::unix::ffi::OsStrExt;
    use std::path::PathBuf;

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
}
