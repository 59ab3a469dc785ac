//! What a commit did, as a worker tells its caller.

use super::{all_bytes, by_number, bytes, number, path, paths};
use crate::commit::{AtomicWay, CommitOutcome, DiskDigest, GuestRun, MergedBitmap, Preview, Relinked, BITMAP_RESULTS};
use crate::operation::Timing;
use crate::sandbox::{Sandbox, SandboxChoice};
use prost::Message;

/// In the order of their numbers.
const WAYS: [AtomicWay; 2] = [AtomicWay::Clone, AtomicWay::UndoLog];

#[derive(Clone, PartialEq, Message)]
pub struct OutcomeEvent {
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

/// The message of an outcome.
pub fn outcome_event(outcome: &CommitOutcome) -> OutcomeEvent {
    OutcomeEvent {
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
        sandbox: SandboxChoice::from_name(outcome.sandbox).map_or(0, |sandbox| number(&SandboxChoice::ALL, &sandbox)),
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
    }
}

/// The outcome of a message.
pub fn outcome_of(event: OutcomeEvent) -> CommitOutcome {
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
