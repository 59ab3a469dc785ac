//! The two roles of a format: source and sink.

use crate::bitmap::{Bitmap, DirtyRanges};
use crate::error::{DriverError, DriverResult};
use crate::extent::Extent;
use crate::extents::Extents;
use crate::io::BlockIo;
use crate::parent::Parent;
use alloc::vec::Vec;
use core::ops::Range;
use instar_guest_abi::{
    CheckSummary, DeviceConfig, DirtyRange, ErrorCode, FindingKind, ImageId, ImageInfo, ParentStage, PlanSummary,
    Repair, RepairSummary, DEVICE_OUTPUT,
};

/// An image that data comes from: enumerates the content of the layer itself, reads it, and empties it.
///
/// # Example
///
/// A format whose file is the disk itself: nothing has to be decoded, and nothing can be dropped.
///
/// ```
/// use core::ops::Range;
/// use instar_guest_sdk::abi::{ErrorCode, ImageInfo};
/// use instar_guest_sdk::{BlockIo, DriverError, DriverResult, Extent, Extents, Source};
///
/// struct Plain {
///     device: u32,
///     virtual_size: u64,
/// }
///
/// impl Source for Plain {
///     fn info(&self) -> ImageInfo {
///         ImageInfo { virtual_size: self.virtual_size, cluster_size: 1 }
///     }
///
///     fn verify(&mut self, _: &mut dyn BlockIo, _will_empty: bool) -> DriverResult<u64> {
///         Ok(self.virtual_size)
///     }
///
///     fn extents(&mut self, _: &mut dyn BlockIo, range: Range<u64>, out: &mut Extents) -> DriverResult<u64> {
///         let length = self.virtual_size.saturating_sub(range.start);
///         let all = Extent::data(range.start, length, self.device, range.start);
///         Ok(if length == 0 || out.push(all) { self.virtual_size.max(range.end) } else { range.start })
///     }
///
///     fn read(&mut self, _: &mut dyn BlockIo, _: &Extent, _: u64, _: &mut [u8]) -> DriverResult<()> {
///         Err(DriverError::new(ErrorCode::InternalOverflow, "nothing is encoded"))
///     }
///
///     fn empty(&mut self, _: &mut dyn BlockIo) -> DriverResult<u64> {
///         Err(DriverError::new(ErrorCode::UnsupportedFormat, "there is no backing to read from afterwards"))
///     }
/// }
/// ```
pub trait Source {
    /// Return the facts of the open image.
    fn info(&self) -> ImageInfo;

    /// Verify all metadata before a commit, and, with `will_empty`, everything that
    /// [`Source::empty`] relies on. Changes nothing. Returns the number of clusters that the layer holds.
    ///
    /// # Errors
    /// [`ErrorCode::OverlayCorrupt`] and I/O errors.
    fn verify(&mut self, io: &mut dyn BlockIo, will_empty: bool) -> DriverResult<u64>;

    /// Push the extents that the layer holds in this range of guest bytes, ascending, until [`Extents::push`] has no room for
    /// one. The first may begin before the range, and the last may end after it. Returns the guest byte at which to continue:
    /// greater than `range.start`, never inside an extent; `range.end` or more once the range is exhausted.
    ///
    /// Filling a gap from the layers below asks for a few bytes of a large disk, so the work must depend on the length of the
    /// range and not on the size of the disk.
    ///
    /// # Errors
    /// [`ErrorCode::OverlayCorrupt`] and I/O errors.
    fn extents(&mut self, io: &mut dyn BlockIo, range: Range<u64>, out: &mut Extents) -> DriverResult<u64>;

    /// Decode `buffer.len()` bytes of an `Encoded` extent of this source, from guest byte `guest_offset` on.
    ///
    /// # Errors
    /// [`ErrorCode::ParseFailed`] when the data does not decode, and I/O errors.
    fn read(&mut self, io: &mut dyn BlockIo, extent: &Extent, guest_offset: u64, buffer: &mut [u8])
        -> DriverResult<()>;

    /// Drop everything that the layer holds, so that it reads as its backing, and give the space back. The result is durable
    /// when this returns; at every instant before, the content of the layer is unchanged. Returns the number of clusters that
    /// were dropped.
    ///
    /// # Errors
    /// I/O errors.
    fn empty(&mut self, io: &mut dyn BlockIo) -> DriverResult<u64>;

    /// Return the identity of the image as the host half reports it; `None` for a format without one.
    fn identity(&self) -> Option<ImageId> {
        None
    }

    /// Record that the parent gets another identity ([`Sink::next_identity`]): a format that records its parent's identity
    /// stores the new one and the stage, durably. [`ParentStage::Announced`] comes before the first write to the parent,
    /// [`ParentStage::Reached`] with the same identity once the last one is durable. An image at the first stage accepts a
    /// parent with the old identity and one with the new.
    ///
    /// # Errors
    /// I/O errors.
    fn follow_parent(&mut self, io: &mut dyn BlockIo, identity: &ImageId, stage: ParentStage) -> DriverResult<()> {
        let _ = (io, identity, stage);
        Ok(())
    }

    /// Examine all metadata for a report, and change nothing: pass each fault to `finding`, in one line. Called on a source
    /// that was just opened. Only a fault that prevents any further examination is an error.
    ///
    /// # Errors
    /// [`ErrorCode::NotImplemented`] for a format without metadata that could be inconsistent, and I/O errors.
    fn check(
        &mut self,
        io: &mut dyn BlockIo,
        finding: &mut dyn FnMut(FindingKind, &str),
    ) -> DriverResult<CheckSummary> {
        let _ = (io, finding);
        Err(DriverError::new(ErrorCode::NotImplemented, "images of this format cannot be checked"))
    }

    /// Plan how to mend what `repair` covers. Changes nothing, and is called on a source that was just opened. Passes each
    /// fault that cannot be mended without loss to `finding`, in one line that says what would be lost.
    ///
    /// # Errors
    /// [`ErrorCode::NotImplemented`] for a format that cannot be repaired, and I/O errors.
    fn plan_repair(
        &mut self,
        io: &mut dyn BlockIo,
        repair: Repair,
        finding: &mut dyn FnMut(FindingKind, &str),
    ) -> DriverResult<RepairSummary> {
        let _ = (io, repair, finding);
        Err(DriverError::new(ErrorCode::NotImplemented, "images of this format cannot be repaired"))
    }

    /// Mend the faults that [`Source::plan_repair`] counted. The result is durable when this returns; at every instant before,
    /// the content is unchanged and no fault is worse than it was. The source is not used afterwards.
    ///
    /// # Errors
    /// I/O errors.
    fn repair(&mut self, io: &mut dyn BlockIo) -> DriverResult<()> {
        let _ = io;
        Err(DriverError::new(ErrorCode::NotImplemented, "images of this format cannot be repaired"))
    }

    /// Verify that the image can record `parent`, or no parent, in place of its present one. Changes nothing, and does not look
    /// at the content of either parent.
    ///
    /// # Errors
    /// [`ErrorCode::UnsupportedFormat`] for a parent that the format cannot name, [`ErrorCode::NotImplemented`] for a format
    /// that records no parent, and I/O errors.
    fn plan_parent(&mut self, io: &mut dyn BlockIo, parent: Option<&Parent<'_>>) -> DriverResult<()> {
        let _ = (io, parent);
        Err(DriverError::new(ErrorCode::NotImplemented, "the plugin of this format records no parent by name"))
    }

    /// Record the parent that [`Source::plan_parent`] accepted last: its name, format and identity, as far as the format has
    /// them. The record is durable when this returns; at every instant before, the image names either parent completely. The
    /// file grows by at most [`PARENT_ROOM`](instar_guest_abi::PARENT_ROOM) bytes.
    ///
    /// # Errors
    /// I/O errors.
    fn set_parent(&mut self, io: &mut dyn BlockIo) -> DriverResult<()> {
        let _ = io;
        Err(DriverError::new(ErrorCode::NotImplemented, "the plugin of this format records no parent by name"))
    }

    /// List the persistent bitmaps of the image, in an order that never changes; empty for a format without bitmaps.
    ///
    /// # Errors
    /// [`ErrorCode::OverlayCorrupt`] and I/O errors.
    fn bitmaps(&mut self, io: &mut dyn BlockIo) -> DriverResult<Vec<Bitmap>> {
        let _ = io;
        Ok(Vec::new())
    }

    /// Push the dirty ranges of bitmap `index` of [`Source::bitmaps`] from guest byte `from` on, ascending, until
    /// [`DirtyRanges::push`] has no room for one. Returns the guest byte at which to continue: greater than `from`; the virtual
    /// size once the bitmap is exhausted. A bitmap may exceed the guest's memory, so hold only a window of it.
    ///
    /// # Errors
    /// [`ErrorCode::OverlayCorrupt`] and I/O errors.
    fn dirty(&mut self, io: &mut dyn BlockIo, index: u32, from: u64, out: &mut DirtyRanges) -> DriverResult<u64> {
        let _ = (io, index, from, out);
        Err(DriverError::new(ErrorCode::NotImplemented, "images of this format have no bitmaps"))
    }
}

/// Reads the guest-visible bytes below the sink's image.
///
/// # Example
///
/// Read the surroundings of data that fills only a part of a new cluster:
///
/// ```
/// use instar_guest_sdk::{BlockIo, DriverResult, ReadBelow};
///
/// fn around(io: &mut dyn BlockIo, below: &mut dyn ReadBelow, cluster: u64, size: usize) -> DriverResult<Vec<u8>> {
///     let mut bytes = vec![0; size];
///     if below.exists() {
///         below.read(io, cluster, &mut bytes)?;
///     }
///     Ok(bytes)
/// }
/// ```
pub trait ReadBelow {
    /// Whether there is any ancestor; if not, everything reads as zeroes.
    fn exists(&self) -> bool;

    /// Return the guest byte from which on everything below reads as zeroes.
    fn length(&self) -> u64 {
        if self.exists() {
            u64::MAX
        } else {
            0
        }
    }

    /// Fill `buffer` with the guest bytes from `guest_offset` on.
    ///
    /// # Errors
    /// I/O errors, and corruption of an ancestor.
    fn read(&mut self, io: &mut dyn BlockIo, guest_offset: u64, buffer: &mut [u8]) -> DriverResult<()>;
}

/// An image that data goes into: allocates space, writes, and makes the result durable.
///
/// The calls come in this order: `grow` or `shrink` if the image gets another size, `plan` for all extents of the commit,
/// `planned`, then `write` for all extents again, `finish`. If bitmaps are merged, `plan_bitmap` comes before the first `plan`,
/// and `merge_bitmap` after the last `write`. A sink changes nothing before the first `write`, or before `finish` if there is
/// nothing to write.
///
/// # Example
///
/// A format whose file is the disk itself: nothing has to be allocated, so planning only checks the bounds.
///
/// ```
/// use instar_guest_sdk::abi::{ImageInfo, PlanSummary};
/// use instar_guest_sdk::{BlockIo, DriverResult, Extent, ReadBelow, Sink};
///
/// struct Plain {
///     device: u32,
///     virtual_size: u64,
/// }
///
/// impl Sink for Plain {
///     fn info(&self) -> ImageInfo {
///         ImageInfo { virtual_size: self.virtual_size, cluster_size: 1 }
///     }
///
///     fn plan(&mut self, _: &mut dyn BlockIo, extents: &[Extent]) -> DriverResult<()> {
///         extents.iter().try_for_each(|extent| extent.end_within(self.virtual_size).map(|_| ()))
///     }
///
///     fn planned(&mut self, _: &mut dyn BlockIo) -> DriverResult<PlanSummary> {
///         Ok(PlanSummary { final_length: self.virtual_size, ..PlanSummary::default() })
///     }
///
///     fn write(&mut self, io: &mut dyn BlockIo, extents: &[Extent], _: &mut dyn ReadBelow) -> DriverResult<()> {
///         let place = |extent: &Extent| extent.request(self.device, extent.guest_offset);
///         io.run(&mut extents.iter().map(place).collect::<DriverResult<Vec<_>>>()?)
///     }
///
///     fn finish(&mut self, io: &mut dyn BlockIo) -> DriverResult<()> {
///         io.flush(self.device)
///     }
/// }
/// ```
pub trait Sink {
    /// Return the facts of the open image, with the new virtual size once [`Sink::grow`] has accepted it.
    fn info(&self) -> ImageInfo;

    /// Verify that the image can grow to `virtual_size` bytes, and count the clusters that this allocates. Changes nothing: the
    /// image grows with the first `write`, which may have no extents. A guest reads zeroes past the image's end before and must
    /// do so afterwards; the layers below read as zeroes from byte `below_length` on.
    ///
    /// # Errors
    /// [`ErrorCode::UnsupportedFormat`] if it cannot; as [`Sink::plan`].
    fn grow(&mut self, io: &mut dyn BlockIo, virtual_size: u64, below_length: u64) -> DriverResult<()> {
        let _ = (io, virtual_size, below_length);
        let text = "an image of this format cannot grow: let a larger copy of it take its place";
        Err(DriverError { device: Some(DEVICE_OUTPUT), ..DriverError::new(ErrorCode::UnsupportedFormat, text) })
    }

    /// Verify that the image can shrink to `virtual_size` bytes, a multiple of 512 below its present size, and count the
    /// clusters that this allocates. Changes nothing: the image shrinks with the first `write`, which has no extents, and none
    /// follow. Never called together with [`Sink::grow`].
    ///
    /// At every instant the image has the old size and content, or the new size and the old content up to it: switch the size
    /// atomically, and only then give back the space past the new end, so that a crash leaves leaked space at most. After a
    /// later [`Sink::grow`] that part reads as zeroes, whatever the shrinking left.
    ///
    /// # Errors
    /// [`ErrorCode::UnsupportedFormat`] if it cannot; as [`Sink::plan`].
    fn shrink(&mut self, io: &mut dyn BlockIo, virtual_size: u64) -> DriverResult<()> {
        let _ = (io, virtual_size);
        let text = "an image of this format cannot shrink: convert it to qcow2, shrink that, and convert it back";
        Err(DriverError { device: Some(DEVICE_OUTPUT), ..DriverError::new(ErrorCode::UnsupportedFormat, text) })
    }

    /// Verify the metadata that these extents (ascending over all calls; any kind) will touch, and count the clusters that they
    /// allocate. Changes nothing.
    ///
    /// # Errors
    /// [`ErrorCode::BackingCorrupt`] and every other reason to refuse the commit. [`ErrorCode::NotImplemented`], before
    /// counting anything, if the answer depends on the bytes of an `Encoded` extent: the operation then passes the same extents
    /// again, decoded.
    fn plan(&mut self, io: &mut dyn BlockIo, extents: &[Extent]) -> DriverResult<()>;

    /// End the planning: after this, nothing can refuse any more. Changes nothing.
    ///
    /// # Errors
    /// As [`Sink::plan`].
    fn planned(&mut self, io: &mut dyn BlockIo) -> DriverResult<PlanSummary>;

    /// Derive the identity that the image gets, durably, with the first [`Sink::write`] of any extents and before they are
    /// written; `None` for a format without one. It depends only on the image's present identity and that of the `child` that
    /// data comes from, if any: a commit that was interrupted between the two images derives the same identity when it runs
    /// again, and no other child leads to it. Called once, after [`Sink::planned`].
    fn next_identity(&mut self, child: Option<&ImageId>) -> Option<ImageId> {
        let _ = child;
        None
    }

    /// List the persistent bitmaps of the image.
    ///
    /// # Errors
    /// [`ErrorCode::NotImplemented`] for a format that has none, corruption, I/O errors.
    fn bitmaps(&mut self, io: &mut dyn BlockIo) -> DriverResult<Vec<Bitmap>> {
        let _ = io;
        Err(no_bitmaps())
    }

    /// Verify that the bitmap with this name can mark these ranges dirty, rounded outward to its granularity, and count the
    /// clusters that this allocates; a missing bitmap is made with this granularity. Changes nothing. Called after
    /// [`Sink::grow`] and before the first [`Sink::plan`], for each bitmap in order, any number of times, with ranges that
    /// ascend over all calls and may be empty.
    ///
    /// # Errors
    /// [`ErrorCode::NotImplemented`] for a format that has no bitmaps; [`ErrorCode::UnsupportedFormat`] for a bitmap that the
    /// image cannot have; as [`Sink::plan`].
    fn plan_bitmap(&mut self, io: &mut dyn BlockIo, bitmap: &Bitmap, dirty: &[DirtyRange]) -> DriverResult<()> {
        let _ = (io, bitmap, dirty);
        Err(no_bitmaps())
    }

    /// Mark these ranges dirty, as planned with [`Sink::plan_bitmap`]; called in the same way, after the last [`Sink::write`].
    /// At every instant an existing bitmap keeps all bits that it had, and a new one does not exist before it has all its bits.
    /// All bitmaps are durable when [`Sink::finish`] returns.
    ///
    /// # Errors
    /// I/O errors.
    fn merge_bitmap(&mut self, io: &mut dyn BlockIo, bitmap: &Bitmap, dirty: &[DirtyRange]) -> DriverResult<()> {
        let _ = (io, bitmap, dirty);
        Err(no_bitmaps())
    }

    /// Write these extents: `Data`, `Zero` and `Memory`, ascending over all calls. At every instant the image's content outside
    /// the extents is unchanged.
    ///
    /// # Errors
    /// I/O errors.
    fn write(&mut self, io: &mut dyn BlockIo, extents: &[Extent], below: &mut dyn ReadBelow) -> DriverResult<()>;

    /// Make everything durable.
    ///
    /// # Errors
    /// I/O errors.
    fn finish(&mut self, io: &mut dyn BlockIo) -> DriverResult<()>;
}

fn no_bitmaps() -> DriverError {
    let text = "images of this format cannot have bitmaps: leave out --bitmaps";
    DriverError { device: Some(DEVICE_OUTPUT), ..DriverError::new(ErrorCode::NotImplemented, text) }
}

/// A format, which opens an image in each role. Use [`NoSource`] or [`NoSink`] for a role that the format does not offer, and
/// keep the default of that function.
///
/// # Example
///
/// A format that can only be written: [`open_source`](Self::open_source) keeps its default, which refuses.
///
/// ```
/// use instar_guest_sdk::abi::{DeviceConfig, ErrorCode};
/// use instar_guest_sdk::{BlockIo, DriverError, DriverResult, FormatDriver, NoSink, NoSource};
///
/// struct Format;
///
/// impl FormatDriver for Format {
///     type Source = NoSource;
///     type Sink = NoSink;
///
///     fn open_sink(io: &mut dyn BlockIo, device: &DeviceConfig, _has_backing: bool) -> DriverResult<NoSink> {
///         let mut magic = [0; 4];
///         io.read(device.device, 0, &mut magic)?;
///         let text = if magic == *b"DEMO" { "images cannot be written yet" } else { "the magic number is not DEMO" };
///         Err(DriverError::new(ErrorCode::UnsupportedFormat, text).at(device.device, 0))
///     }
/// }
/// ```
pub trait FormatDriver {
    /// The source role.
    type Source: Source;
    /// The sink role.
    type Sink: Sink;

    /// Open an image as source. Changes nothing.
    ///
    /// # Errors
    /// [`ErrorCode::HeaderMismatch`] when the image is not what the host saw, [`ErrorCode::OverlayCorrupt`]
    /// when it cannot be an image of this format, and I/O errors.
    fn open_source(io: &mut dyn BlockIo, device: &DeviceConfig) -> DriverResult<Self::Source> {
        let _ = (io, device);
        Err(DriverError::new(ErrorCode::UnsupportedFormat, "the format cannot be read"))
    }

    /// Open an image as sink; `has_backing` tells whether it has ancestors. Changes nothing.
    ///
    /// # Errors
    /// As [`FormatDriver::open_source`], with [`ErrorCode::BackingCorrupt`].
    fn open_sink(io: &mut dyn BlockIo, device: &DeviceConfig, has_backing: bool) -> DriverResult<Self::Sink> {
        let _ = (io, device, has_backing);
        Err(DriverError::new(ErrorCode::UnsupportedFormat, "the format cannot be written"))
    }
}

/// The source role of a format that cannot be read.
pub enum NoSource {}

impl Source for NoSource {
    fn info(&self) -> ImageInfo {
        match *self {}
    }
    fn verify(&mut self, _: &mut dyn BlockIo, _: bool) -> DriverResult<u64> {
        match *self {}
    }
    fn extents(&mut self, _: &mut dyn BlockIo, _: Range<u64>, _: &mut Extents) -> DriverResult<u64> {
        match *self {}
    }
    fn read(&mut self, _: &mut dyn BlockIo, _: &Extent, _: u64, _: &mut [u8]) -> DriverResult<()> {
        match *self {}
    }
    fn empty(&mut self, _: &mut dyn BlockIo) -> DriverResult<u64> {
        match *self {}
    }
}

/// The sink role of a format that cannot be written.
pub enum NoSink {}

impl Sink for NoSink {
    fn info(&self) -> ImageInfo {
        match *self {}
    }
    fn plan(&mut self, _: &mut dyn BlockIo, _: &[Extent]) -> DriverResult<()> {
        match *self {}
    }
    fn planned(&mut self, _: &mut dyn BlockIo) -> DriverResult<PlanSummary> {
        match *self {}
    }
    fn write(&mut self, _: &mut dyn BlockIo, _: &[Extent], _: &mut dyn ReadBelow) -> DriverResult<()> {
        match *self {}
    }
    fn finish(&mut self, _: &mut dyn BlockIo) -> DriverResult<()> {
        match *self {}
    }
}
