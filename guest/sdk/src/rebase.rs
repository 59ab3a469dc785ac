//! The steps of a rebase, in terms of [`Source`] and [`Sink`]: an image gets another parent and keeps its content.
//!
//! 1. *check*: verify the whole overlay, and find the clusters that it has to hold itself: see `Differences` in `guest/view`;
//! 2. *plan*: ask the overlay whether it can name the new parent, and show it every extent. Nothing has changed yet;
//! 3. *write*: write the differences into the overlay, while it still names the old parent, and make them durable. A crash up
//!    to here leaves an overlay that names the old parent and holds copies of some clusters below it: its content is the same;
//! 4. *switch*: make the overlay name the new parent, in one step. Every cluster that it does not hold itself reads the same
//!    through both parents.
//!
//! Running the rebase again after a crash finishes it, whichever parent the overlay names at that point.

use crate::commit::each_batch;
use crate::decoded::{plan_batch, write_batch, Arena};
use crate::{BlockIo, DriverError, DriverResult, OpenSource, Parent, ReadBelow, Sink, Source};
use instar_guest_abi::{Phase, PlanSummary};

/// A step of the rebase.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// Verifying the overlay, and comparing what is below it.
    Check,
    /// Verifying what will be touched in the overlay.
    Plan,
    /// Writing what differs.
    Write,
    /// Naming the new parent.
    Switch,
}

impl Step {
    /// The name that messages carry.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Check => "check",
            Self::Plan => "plan",
            Self::Write => "write",
            Self::Switch => "switch",
        }
    }
}

/// The amount of work that lies ahead.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// Clusters of the overlay that are written to …
    pub clusters: u64,
    /// … and their guest-visible bytes that are written.
    pub bytes: u64,
    /// The needs of the sink.
    pub sink: PlanSummary,
}

/// The failure of a rebase.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RebaseFailure {
    /// The step that failed.
    pub step: Step,
    /// Why.
    pub error: DriverError,
}

/// The content that the overlay may have to take over.
pub struct Content<'a> {
    /// The clusters that the overlay has to hold itself.
    pub differences: &'a mut dyn Source,
    /// The overlay.
    pub sink: &'a mut dyn Sink,
    /// The layers that are below it before the rebase.
    pub below: &'a mut dyn ReadBelow,
}

/// The layers below the overlay, with their end concealed: zeroes that have to hide another image must be written, although
/// they read as zeroes already.
struct Hidden<'a>(&'a mut dyn ReadBelow);

impl ReadBelow for Hidden<'_> {
    fn exists(&self) -> bool {
        true
    }

    fn read(&mut self, io: &mut dyn BlockIo, guest_offset: u64, buffer: &mut [u8]) -> DriverResult<()> {
        self.0.read(io, guest_offset, buffer)
    }
}

/// The images of a rebase.
pub struct Rebase<'a, 'o> {
    /// Opens the overlay as a source.
    pub overlay: &'a OpenSource<'o>,
    /// `None` if the operator vouches for the content, so that only the record of the parent changes.
    pub content: Option<Content<'a>>,
    /// The new parent, if the overlay gets one.
    pub parent: Option<Parent<'a>>,
}

/// Run a rebase, or with `dry_run` only the part that changes nothing. Calls `planned` with the work ahead, and `written` with
/// the number of guest bytes that step 3 has examined.
///
/// # Errors
/// [`RebaseFailure`]. In the steps check and plan, nothing was changed.
pub fn rebase(
    io: &mut dyn BlockIo,
    images: &mut Rebase<'_, '_>,
    dry_run: bool,
    planned: &mut dyn FnMut(Plan),
    written: &mut dyn FnMut(u64),
) -> Result<Plan, RebaseFailure> {
    let at = |step: Step| move |error: DriverError| RebaseFailure { step, error };
    plan_parent(io, images).map_err(at(Step::Plan))?;
    let plan = match &mut images.content {
        Some(content) => {
            let clusters = content.differences.verify(io, false).map_err(at(Step::Check))?;
            plan_content(io, content, clusters).map_err(at(Step::Plan))?
        }
        None => Plan::default(),
    };
    planned(plan);
    if dry_run {
        return Ok(plan);
    }
    io.enter(Phase::Target);
    if let Some(content) = images.content.as_mut().filter(|_| plan.bytes > 0) {
        let Content { differences, sink, below } = content;
        let mut arena = Arena::new(false);
        each_batch(io, *differences, &mut |io, source, extents, next| {
            write_batch(io, source, *sink, extents, &mut Hidden(*below), &mut arena)?;
            written(next);
            Ok(())
        })
        .and_then(|()| sink.finish(io))
        .map_err(at(Step::Write))?;
    }
    // The overlay holds durably what it is not to find below: the host sees to it that this is true.
    io.enter(Phase::Children);
    // Opened again, because what was known of it before may have changed.
    let mut source = plan_parent(io, images).map_err(at(Step::Switch))?;
    source.set_parent(io).map_err(at(Step::Switch))?;
    Ok(plan)
}

fn plan_parent<'o>(io: &mut dyn BlockIo, images: &Rebase<'_, 'o>) -> DriverResult<alloc::boxed::Box<dyn Source + 'o>> {
    let mut source = (images.overlay)(io)?;
    source.plan_parent(io, images.parent.as_ref())?;
    Ok(source)
}

fn plan_content(io: &mut dyn BlockIo, content: &mut Content<'_>, clusters: u64) -> DriverResult<Plan> {
    let Content { differences, sink, .. } = content;
    let (mut bytes, mut arena) = (0, Arena::new(false));
    each_batch(io, *differences, &mut |io, source, extents, _| {
        bytes += extents.iter().map(|extent| extent.length).sum::<u64>();
        plan_batch(io, source, *sink, extents, &mut arena)
    })?;
    Ok(Plan { clusters, bytes, sink: sink.planned(io)? })
}
