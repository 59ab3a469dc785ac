//! The steps of a commit.
//!
//! 1. *check*: the overlay is verified whole;
//! 2. *plan*: the sink is shown every extent, and says no if it has a reason to. Up to here nothing changes;
//! 3. *write*: the extents go into the sink, which keeps itself consistent at every instant, and at the end
//!    makes them durable. A crash up to here leaves the overlay as it was: it hides whatever part of the
//!    data the backing has already;
//! 4. *empty*: only now, with the data durable in the backing, the overlay is emptied. A crash within it
//!    leaves an overlay that reads the same, because what it lost reads the same from the backing.

use alloc::vec;
use alloc::vec::Vec;
use instar_guest_sdk::abi::{ErrorCode, Extent, ExtentKind, PlanSummary};
use instar_guest_sdk::{BlockIo, DriverError, DriverResult, ReadBelow, Sink, Source};

/// Extents that are handed to the sink at once: it flushes a few times for each such batch.
const EXTENTS: usize = 1 << 14;
/// Bytes of decoded data that are handed to the sink at once.
const DECODED_BYTES: u64 = 4 << 20;

/// A step of the commit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// Verifying the overlay.
    Check,
    /// Verifying what will be touched in the backing.
    Plan,
    /// Writing into the backing.
    Write,
    /// Emptying the overlay.
    Empty,
}

impl Step {
    /// The name that messages carry.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Check => "check",
            Self::Plan => "plan",
            Self::Write => "write",
            Self::Empty => "empty",
        }
    }
}

/// What happens, for whoever watches.
#[derive(Clone, Copy, Debug)]
pub enum Event {
    /// `done` of `total` guest bytes of a step are done.
    Progress(Step, u64, u64),
    /// Everything that can refuse has been asked. Clusters, bytes, and what the sink will need.
    Planned(u64, u64, PlanSummary),
}

/// Choices of the operator.
#[derive(Clone, Copy, Debug, Default)]
pub struct Options {
    /// Leave the overlay as it is.
    pub keep_overlay: bool,
    /// Stop before the first change.
    pub dry_run: bool,
}

/// How a commit ended well.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Outcome {
    /// Clusters that the overlay held.
    pub clusters_committed: u64,
    /// Their guest-visible bytes.
    pub bytes_committed: u64,
    /// Clusters that were dropped from the overlay.
    pub overlay_clusters_cleared: u64,
}

/// A commit that failed, and where.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CommitFailure {
    /// The step that failed.
    pub step: Step,
    /// Why.
    pub error: DriverError,
}

/// The images of a commit.
pub struct Commit<'a> {
    /// The overlay.
    pub source: &'a mut dyn Source,
    /// The backing.
    pub sink: &'a mut dyn Sink,
    /// What the backing is backed by.
    pub below: &'a mut dyn ReadBelow,
}

/// Run a commit; `watch` is told how it goes.
///
/// # Errors
/// [`CommitFailure`]. In the steps check and plan, nothing was changed.
pub fn commit(
    io: &mut dyn BlockIo,
    images: &mut Commit<'_>,
    options: Options,
    watch: &mut dyn FnMut(Event),
) -> Result<Outcome, CommitFailure> {
    let at = |step: Step| move |error: DriverError| CommitFailure { step, error };
    let total = images.source.info().virtual_size;

    let clusters = images.source.check(io, !options.keep_overlay).map_err(at(Step::Check))?;

    let mut bytes = 0;
    let sink = &mut *images.sink;
    let limit = sink.info().virtual_size;
    each_batch(io, images.source, &mut |io, _, extents, _| {
        if let Some(extent) = extents.iter().find(|e| e.guest_offset.saturating_add(e.length) > limit) {
            return Err(too_small(extent));
        }
        bytes += extents.iter().map(|extent| extent.length).sum::<u64>();
        sink.plan(io, extents)
    })
    .map_err(at(Step::Plan))?;
    let plan = sink.planned(io).map_err(at(Step::Plan))?;
    watch(Event::Planned(clusters, bytes, plan));
    if options.dry_run {
        return Ok(Outcome { clusters_committed: clusters, bytes_committed: bytes, overlay_clusters_cleared: 0 });
    }

    let below = &mut *images.below;
    each_batch(io, images.source, &mut |io, source, extents, next| {
        write_batch(io, source, sink, extents, below)?;
        watch(Event::Progress(Step::Write, next, total));
        Ok(())
    })
    .and_then(|()| sink.finish(io))
    .map_err(at(Step::Write))?;

    let mut outcome = Outcome { clusters_committed: clusters, bytes_committed: bytes, overlay_clusters_cleared: 0 };
    if !options.keep_overlay {
        watch(Event::Progress(Step::Empty, 0, total));
        outcome.overlay_clusters_cleared = images.source.empty(io).map_err(at(Step::Empty))?;
    }
    Ok(outcome)
}

fn too_small(extent: &Extent) -> DriverError {
    DriverError::new(
        ErrorCode::BackingTooSmall,
        alloc::format!("the overlay holds data at guest offset {}, past the end of the backing", extent.guest_offset),
    )
}

/// What is done with a batch: the last argument is the guest byte at which the next one begins.
type EachBatch<'a> = &'a mut dyn FnMut(&mut dyn BlockIo, &mut dyn Source, &[Extent], u64) -> DriverResult<()>;

/// Hand all extents of the source to `each`, in batches.
fn each_batch(io: &mut dyn BlockIo, source: &mut dyn Source, each: EachBatch<'_>) -> DriverResult<()> {
    let end = source.info().virtual_size;
    let mut from = 0;
    let mut extents = Vec::new();
    while from < end {
        extents.clear();
        let next = source.extents(io, from, EXTENTS, &mut extents)?;
        if next <= from {
            return Err(DriverError::new(ErrorCode::InternalOverflow, "the source does not advance"));
        }
        if !extents.is_empty() {
            each(io, source, &extents, next)?;
        }
        from = next;
    }
    Ok(())
}

/// Write a batch; extents that only the source can decode are decoded first.
fn write_batch(
    io: &mut dyn BlockIo,
    source: &mut dyn Source,
    sink: &mut dyn Sink,
    extents: &[Extent],
    below: &mut dyn ReadBelow,
) -> DriverResult<()> {
    let encoded = |extent: &Extent| extent.kind == ExtentKind::Encoded as u32;
    for run in extents.chunk_by(|a, b| encoded(a) == encoded(b)) {
        if !run.first().is_some_and(encoded) {
            sink.write(io, run, below)?;
            continue;
        }
        for extent in run {
            let mut at = extent.guest_offset;
            let end = extent.guest_offset + extent.length;
            while at < end {
                let length = (end - at).min(DECODED_BYTES);
                let mut bytes = vec![0u8; usize::try_from(length).unwrap_or(0)];
                source.read(io, extent, at, &mut bytes)?;
                let decoded = Extent {
                    guest_offset: at,
                    length,
                    location: bytes.as_ptr() as u64,
                    kind: ExtentKind::Memory as u32,
                    device: extent.device,
                };
                sink.write(io, &[decoded], below)?;
                at += length;
            }
        }
    }
    Ok(())
}
