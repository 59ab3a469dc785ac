//! The steps of giving an image another size, in terms of [`Sink`].
//!
//! They are part of the SDK, as those of a [commit](crate::commit) are, so that the tests of any driver run exactly the steps
//! that the operation runs.
//!
//! 1. *plan*: ask the sink whether it can grow or shrink, and show it the zeroes that will take space. Nothing has changed yet;
//! 2. *write*: let the sink switch from the old size to the new one, atomically and durably. A crash before that leaves an
//!    image of the old size and content, a crash after it an image of the new size with the old content up to the smaller of
//!    the two sizes and zeroes after it;
//! 3. *write*, if the operator asks for preallocation: write zeroes where the image reads as zeroes. A crash leaves an image
//!    with the same content, part of which has no space yet.

use crate::{BlockIo, Content, DriverError, DriverResult, Extent, ReadBelow, Sink};
use alloc::vec;
use alloc::vec::Vec;
use core::cmp::Ordering;
use instar_guest_abi::{Phase, PlanSummary};

/// Bytes of zeroes in memory, which serve for every write.
const ZEROES: u64 = 1 << 20;
/// Number of extents that are handed to the sink at once.
const EXTENTS: usize = 256;

/// A step of a resize.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// Verifying what will be touched.
    Plan,
    /// Changing the image.
    Write,
}

impl Step {
    /// The name that messages carry.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Plan => "plan",
            Self::Write => "write",
        }
    }
}

/// An event of the resize, for the observer.
#[derive(Clone, Copy, Debug)]
pub enum Event {
    /// Everything that can refuse has agreed.
    Planned {
        /// The virtual size in bytes that the image will have.
        new_size: u64,
        /// The needs of the sink.
        plan: PlanSummary,
    },
    /// `done` of `total` bytes that are preallocated are written.
    Progress(u64, u64),
}

/// The order of the operator.
#[derive(Clone, Copy, Debug, Default)]
pub struct Options {
    /// The new virtual size in bytes, a multiple of 512.
    pub virtual_size: u64,
    /// Fill the new part of the disk with zeroes that take space.
    pub preallocate: bool,
    /// Stop before the first change.
    pub dry_run: bool,
}

/// The failure of a resize.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ResizeFailure {
    /// The step that failed.
    pub step: Step,
    /// Why.
    pub error: DriverError,
}

/// Give an image another size, and report the events to `watch`. Returns the final virtual size in bytes, which formats that
/// count in larger units than sectors may have rounded up. An image of the requested size is not changed.
///
/// # Errors
/// [`ResizeFailure`]. In the step plan, nothing was changed.
pub fn resize(
    io: &mut dyn BlockIo,
    sink: &mut dyn Sink,
    below: &mut dyn ReadBelow,
    options: Options,
    watch: &mut dyn FnMut(Event),
) -> Result<u64, ResizeFailure> {
    let at = |step: Step| move |error: DriverError| ResizeFailure { step, error };
    let Options { virtual_size, preallocate, dry_run } = options;
    let old = sink.info().virtual_size;
    match virtual_size.cmp(&old) {
        Ordering::Less => sink.shrink(io, virtual_size),
        Ordering::Equal => Ok(()),
        Ordering::Greater => sink.grow(io, virtual_size, below.length()),
    }
    .map_err(at(Step::Plan))?;
    let changes = virtual_size != old;
    let size = sink.info().virtual_size;
    let filled = old..if preallocate { size.max(old) } else { old };
    let bytes = if filled.is_empty() { 0 } else { ZEROES };
    let zeroes = vec![0; usize::try_from(bytes).unwrap_or(0)];
    each_batch(&zeroes, filled.clone(), &mut |extents, _| sink.plan(io, extents)).map_err(at(Step::Plan))?;
    let plan = sink.planned(io).map_err(at(Step::Plan))?;
    watch(Event::Planned { new_size: size, plan });
    if dry_run || !changes {
        return Ok(size);
    }
    io.enter(Phase::Target);
    let total = filled.end - filled.start;
    sink.write(io, &[], below)
        .and_then(|()| {
            each_batch(&zeroes, filled.clone(), &mut |extents, next| {
                sink.write(io, extents, below)?;
                watch(Event::Progress(next - filled.start, total));
                Ok(())
            })
        })
        .and_then(|()| sink.finish(io))
        .map_err(at(Step::Write))?;
    Ok(sink.info().virtual_size)
}

/// What is done with a batch of extents; the second argument is the guest byte at which the next one begins.
type EachBatch<'a> = &'a mut dyn FnMut(&[Extent], u64) -> DriverResult<()>;

/// Hand extents of zeroes in memory that fill a range of guest bytes to `each`, in batches.
fn each_batch(zeroes: &[u8], range: core::ops::Range<u64>, each: EachBatch<'_>) -> DriverResult<()> {
    let content = Content::Memory { address: zeroes.as_ptr() as u64 };
    let mut from = range.start;
    while from < range.end {
        let mut extents = Vec::with_capacity(EXTENTS);
        while extents.len() < EXTENTS && from < range.end {
            // They end at multiples of their length, so that a cluster is written once.
            let end = (from / ZEROES).saturating_add(1).saturating_mul(ZEROES).min(range.end);
            extents.push(Extent { guest_offset: from, length: end - from, content });
            from = end;
        }
        each(&extents, from)?;
    }
    Ok(())
}
