//! The steps of a commit, in terms of [`Source`] and [`Sink`].
//!
//! They are part of the SDK, not of the operation's crate, so that the tests of any driver run exactly the steps that the
//! operation runs (the module `conformance`).
//!
//! 1. *check*: verify the whole overlay;
//! 2. *plan*: show every extent to the sink, which refuses here if it has a reason to. Nothing has changed yet;
//! 3. *write*: grow the sink, where the operator asks for that, by zeroes; then write the extents into it. The sink stays
//!    consistent at every instant. Merge the bitmaps, where the operator asks for that, and make everything durable. A crash up
//!    to here leaves the overlay unchanged, and it hides the part of the data that the backing already has;
//! 4. *verify*, where the operator asks for it: [read back](ReadBack) the data while the overlay still holds all of it;
//! 5. *empty*: empty the overlay, now that the data is durable in the backing. A crash within this step leaves an overlay that
//!    reads the same, because the clusters that it lost read the same from the backing.
//!
//! After that the overlay's children may be made to name the backing ([`Relinks`]), which step 2 plans as well.

use crate::bitmaps::{self, MergedBitmap};
use crate::decoded::{plan_batch, write_batch, Arena};
use crate::{check_extents, BlockIo, DriverError, DriverResult, Extent, Extents, ReadBelow, Relinks, Sink, Source};
use alloc::vec::Vec;
use instar_guest_abi::{ErrorCode, ParentStage, Phase, PlanSummary};

/// Number of extents that are handed to the sink at once: it flushes a few times for each such batch.
const EXTENTS: usize = 1 << 14;

/// A step of the commit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// Verifying the overlay.
    Check,
    /// Verifying what will be touched in the backing.
    Plan,
    /// Writing into the backing.
    Write,
    /// Reading back what was written.
    Verify,
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
            Self::Verify => "verify",
            Self::Empty => "empty",
        }
    }
}

/// An event of the commit, for the observer.
#[derive(Clone, Copy, Debug)]
pub enum Event<'a> {
    /// `done` of `total` guest bytes of a step are done.
    Progress(Step, u64, u64),
    /// The outcome for a bitmap; reported before the plan.
    Bitmap(&'a MergedBitmap),
    /// Everything that can refuse has agreed.
    Planned(Plan),
    /// The target is complete and durable: the steps that depend on this follow.
    Complete,
}

/// The amount of work that lies ahead.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    /// Clusters that the overlay holds.
    pub clusters: u64,
    /// Their guest-visible bytes …
    pub bytes: u64,
    /// … and the number of these that have to be decoded.
    pub encoded_bytes: u64,
    /// The needs of the sink.
    pub sink: PlanSummary,
}

/// Choices of the operator.
#[derive(Clone, Copy, Debug, Default)]
pub struct Options {
    /// Keep the overlay's content.
    pub keep_overlay: bool,
    /// Stop before the first change.
    pub dry_run: bool,
    /// Let a smaller backing grow to the overlay's virtual size.
    pub resize_backing: bool,
    /// Merge the bitmaps of the committed layers into those of the target.
    pub bitmaps: bool,
    /// Also make those that are disabled in the target, disabled as they are: nothing has been recorded in them since they
    /// were, and what is made says what they say.
    pub disabled_bitmaps: bool,
    /// The target was just created, and nobody uses it before the operation ends: flushes take no time there.
    pub new_target: bool,
}

/// The result of a successful commit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Outcome {
    /// Clusters that the overlay held.
    pub clusters_committed: u64,
    /// Their guest-visible bytes.
    pub bytes_committed: u64,
    /// Clusters that were dropped from the overlay.
    pub overlay_clusters_cleared: u64,
}

/// The failure of a commit.
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
    /// The layers below the backing.
    pub below: &'a mut dyn ReadBelow,
}

/// Reads the target back and compares it with the overlay.
///
/// # Example
///
/// Trust the disk, and only report that everything was compared:
///
/// ```
/// use instar_guest_sdk::commit::ReadBack;
/// use instar_guest_sdk::{BlockIo, DriverResult, Source};
///
/// struct Trusting;
///
/// impl ReadBack for Trusting {
///     fn read_back(
///         &mut self,
///         _: &mut dyn BlockIo,
///         _: &mut dyn Source,
///         virtual_size: u64,
///         done: &mut dyn FnMut(u64),
///     ) -> DriverResult<()> {
///         done(virtual_size);
///         Ok(())
///     }
/// }
/// ```
pub trait ReadBack {
    /// Everything that can refuse has been asked, and nothing was changed yet; in a dry run, nothing will be.
    ///
    /// # Errors
    /// What the images cannot be read for.
    fn look_before(&mut self, io: &mut dyn BlockIo) -> DriverResult<()> {
        let _ = io;
        Ok(())
    }

    /// Compare the target, whose disk has `virtual_size` bytes, with the overlay. The target is complete and durable, and
    /// nothing that depends on it has changed yet. Calls `done` with the guest byte up to which both were compared.
    ///
    /// # Errors
    /// A difference, or an image that cannot be read.
    fn read_back(
        &mut self,
        io: &mut dyn BlockIo,
        source: &mut dyn Source,
        virtual_size: u64,
        done: &mut dyn FnMut(u64),
    ) -> DriverResult<()>;
}

/// Run a commit, and report its events to `watch`.
///
/// # Errors
/// [`CommitFailure`]. In the steps check and plan, nothing was changed.
pub fn commit(
    io: &mut dyn BlockIo,
    images: &mut Commit<'_>,
    options: Options,
    watch: &mut dyn FnMut(Event<'_>),
) -> Result<Outcome, CommitFailure> {
    commit_before_relinking(io, images, &mut Relinks::none(), options, watch)
}

/// Run a commit, and plan in it that the overlay's children will [name the backing](Relinks::set) afterwards.
///
/// # Errors
/// As [`commit`].
pub fn commit_before_relinking(
    io: &mut dyn BlockIo,
    images: &mut Commit<'_>,
    relinks: &mut Relinks<'_, '_>,
    options: Options,
    watch: &mut dyn FnMut(Event<'_>),
) -> Result<Outcome, CommitFailure> {
    commit_and_read_back(io, images, relinks, None, options, watch)
}

/// Do the same, and let `read_back` compare the target with the overlay before anything depends on it.
///
/// # Errors
/// As [`commit`].
pub fn commit_and_read_back(
    io: &mut dyn BlockIo,
    images: &mut Commit<'_>,
    relinks: &mut Relinks<'_, '_>,
    mut read_back: Option<&mut dyn ReadBack>,
    options: Options,
    watch: &mut dyn FnMut(Event<'_>),
) -> Result<Outcome, CommitFailure> {
    let at = |step: Step| move |error: DriverError| CommitFailure { step, error };
    let total = images.source.info().virtual_size;

    let clusters = images.source.verify(io, !options.keep_overlay).map_err(at(Step::Check))?;

    let (mut bytes, mut encoded_bytes) = (0, 0);
    let sink = &mut *images.sink;
    let growing = options.resize_backing && sink.info().virtual_size < total;
    if growing {
        sink.grow(io, total, images.below.length()).map_err(at(Step::Plan))?;
    }
    let merged = match options.bitmaps {
        true => bitmaps::plan(io, images.source, sink, options.disabled_bitmaps).map_err(at(Step::Plan))?,
        false => Vec::new(),
    };
    merged.iter().for_each(|bitmap| watch(Event::Bitmap(bitmap)));
    let limit = sink.info().virtual_size;
    let mut arena = Arena::new(options.new_target);
    each_batch(io, images.source, &mut |io, source, extents, _| {
        if let Some(extent) = extents.iter().find(|extent| extent.end() > limit) {
            return Err(too_small(extent));
        }
        bytes += extents.iter().map(|extent| extent.length).sum::<u64>();
        let encoded = extents.iter().filter(|extent| extent.is_encoded());
        encoded_bytes += encoded.map(|extent| extent.length).sum::<u64>();
        plan_batch(io, source, sink, extents, &mut arena)
    })
    .map_err(at(Step::Plan))?;
    drop(arena);
    let plan = sink.planned(io).map_err(at(Step::Plan))?;
    let identity = sink.next_identity(images.source.identity().as_ref()).filter(|_| bytes > 0);
    relinks.plan(io, identity, sink.info().virtual_size).map_err(at(Step::Plan))?;
    watch(Event::Planned(Plan { clusters, bytes, encoded_bytes, sink: plan }));
    if let Some(read_back) = &mut read_back {
        read_back.look_before(io).map_err(at(Step::Plan))?;
    }
    if options.dry_run {
        return Ok(Outcome { clusters_committed: clusters, bytes_committed: bytes, overlay_clusters_cleared: 0 });
    }

    io.enter(Phase::Target);
    let below = &mut *images.below;
    if let Some(identity) = &identity {
        // Before the backing has its new identity: a crash between the two is recognized by the overlay's having the one
        // that the backing would have got, and a second run goes on from there.
        images.source.follow_parent(io, identity, ParentStage::Announced).map_err(at(Step::Write))?;
    }
    if growing {
        // An overlay that holds nothing makes its backing grow, too.
        sink.write(io, &[], below).map_err(at(Step::Write))?;
    }
    let mut arena = Arena::new(options.new_target);
    let mut written = 0;
    each_batch(io, images.source, &mut |io, source, extents, _| {
        write_batch(io, source, sink, extents, below, &mut arena)?;
        written += extents.iter().map(|extent| extent.length).sum::<u64>();
        watch(Event::Progress(Step::Write, written, bytes));
        Ok(())
    })
    // After the data, so that a bitmap that is made says what the overlay's says, and not all that arrives.
    .and_then(|()| bitmaps::merge(io, images.source, sink, &merged))
    .and_then(|()| sink.finish(io))
    .map_err(at(Step::Write))?;
    drop(arena);
    if let Some(read_back) = read_back {
        let size = images.sink.info().virtual_size;
        let mut done = |next| watch(Event::Progress(Step::Verify, next, total));
        read_back.read_back(io, images.source, size, &mut done).map_err(at(Step::Verify))?;
    }
    watch(Event::Complete);
    if let Some(identity) = &identity {
        // Before the overlay is emptied: from here on a backing of before, restored from a backup, is refused. A crash in
        // front of it leaves an overlay that still holds everything, and goes with either backing.
        images.source.follow_parent(io, identity, ParentStage::Reached).map_err(at(Step::Write))?;
    }

    let mut outcome = Outcome { clusters_committed: clusters, bytes_committed: bytes, overlay_clusters_cleared: 0 };
    if !options.keep_overlay {
        watch(Event::Progress(Step::Empty, 0, total));
        // The sink has made everything durable: the host sees to it that this is true.
        io.enter(Phase::Overlay);
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
pub(crate) type EachBatch<'a> =
    &'a mut dyn FnMut(&mut dyn BlockIo, &mut dyn Source, &[Extent], u64) -> DriverResult<()>;

/// Hand all extents of the source to `each`, in batches.
pub(crate) fn each_batch(io: &mut dyn BlockIo, source: &mut dyn Source, each: EachBatch<'_>) -> DriverResult<()> {
    let end = source.info().virtual_size;
    let mut from = 0;
    let mut extents = Extents::with_room_for(EXTENTS);
    while from < end {
        extents.clear();
        let next = source.extents(io, from..end, &mut extents)?;
        // Sources of other modules were asked this already; here it holds for those of a test, too.
        check_extents(&extents, from, next, end).map_err(|why| DriverError::new(ErrorCode::GuestProtocol, why))?;
        if !extents.is_empty() {
            each(io, source, &extents, next)?;
        }
        from = next;
    }
    Ok(())
}
