//! The sink role: a backing, in parts, and the order in which they are planned and written.

use crate::bitmaps::list::{list, verified};
use crate::bitmaps::merge::Merging;
use crate::check::repair::{Outstanding, Repair};
use crate::check::verify::Verifier;
use crate::grow::room::find_room;
use crate::grow::Growth;
use crate::image::{overflow, Image};
use crate::metadata::map::MetadataMap;
use crate::metadata::mapped_clusters::MappedClusters;
use crate::shrink::Shrink;
use crate::write::backing::Backing;
use crate::write::cluster_extent::ClusterExtent;
use crate::write::compressing::Compressing;
use crate::write::enabled_bitmaps::EnabledBitmaps;
use crate::write::plan::Plan;
use crate::write::summary::summarize;
use crate::write::window::write_window;
use crate::write::windows::Windows;
use alloc::vec::Vec;
use instar_guest_sdk::abi::{DirtyRange, ErrorCode, ImageInfo, PlanSummary};
use instar_guest_sdk::{Bitmap, BlockIo, DriverResult, Extent, ReadBelow, Sink};

/// An image that data goes into.
pub struct Qcow2Sink {
    backing: Backing,
    bitmaps: EnabledBitmaps,
    /// The bitmaps of what is committed that are merged into these, or made.
    merging: Merging,
    /// What arrives is compressed, if it is to be.
    compressing: Option<Compressing>,
    /// What planning has found out, once it has begun.
    plan: Option<Plan>,
    /// Growth that was planned and is still to be done.
    growth: Option<Growth>,
    /// The same, if the disk is to be cut.
    shrink: Option<Shrink>,
    /// What planning has found wrong, to be written before everything else. The backing has it already.
    repair: Option<Outstanding>,
    /// Whether the first change was made.
    started: bool,
}

impl Qcow2Sink {
    pub(crate) fn new(image: Image, has_backing: bool, compresses: bool) -> Self {
        let mut backing = Backing::new(image, has_backing);
        backing.compresses = compresses;
        let compressing = compresses.then(Compressing::new);
        Self {
            bitmaps: EnabledBitmaps::new(&backing.image),
            backing,
            merging: Merging::default(),
            compressing,
            plan: None,
            growth: None,
            shrink: None,
            repair: None,
            started: false,
        }
    }

    /// Before the first window: what can be refused from the header, and where all metadata is. Of an image with the dirty
    /// bit, all references are counted, and planning sees it as the repair will leave it.
    fn prepare(&mut self, io: &mut dyn BlockIo) -> DriverResult<&mut Plan> {
        let plan = match self.plan.take() {
            Some(plan) => plan,
            None => {
                self.backing.image.refuse_unwritable()?;
                // The repair has looked for all references, also from bitmaps, in the file as it is.
                if self.backing.image.is_dirty() {
                    self.plan_repair(io)?;
                }
                let Backing { image, space, .. } = &mut self.backing;
                let (bitmaps, clusters) = EnabledBitmaps::load(io, image, &mut space.refcounts)?;
                self.bitmaps = bitmaps;
                Plan::new(MetadataMap::build(io, image, clusters)?)
            }
        };
        Ok(self.plan.insert(plan))
    }

    /// Work out what the dirty bit stands for, and go on with the image as the repair will leave it.
    fn plan_repair(&mut self, io: &mut dyn BlockIo) -> DriverResult<()> {
        let image = &self.backing.image;
        let metadata = MetadataMap::build(io, image, Vec::new())?;
        let mapped = &mut MappedClusters::new(image);
        Verifier { image, mapped, will_empty: false }.structure(io)?;
        let Repair { image, space, mapping, outstanding, .. } = Repair::plan(io, image, &metadata)?;
        (self.backing.image, self.backing.space, self.backing.mapping) = (image, space, mapping);
        self.repair = Some(outstanding);
        Ok(())
    }

    /// Verify and count one window.
    fn plan_window(&mut self, io: &mut dyn BlockIo, extents: &[ClusterExtent]) -> DriverResult<()> {
        self.make_room_for_bitmaps();
        let needed = self.bitmaps.plan(io, &self.backing.image, extents)?;
        let Some(plan) = &mut self.plan else { return Ok(()) };
        plan.needs.tables += needed;
        plan.window(io, &mut self.backing, extents)
    }

    /// Write one window.
    fn write_window(
        &mut self,
        io: &mut dyn BlockIo,
        extents: &[ClusterExtent],
        below: &mut dyn ReadBelow,
    ) -> DriverResult<()> {
        self.start(io)?;
        self.make_room_for_bitmaps();
        self.bitmaps.record(io, &mut self.backing, extents)?;
        match &mut self.compressing {
            Some(compressing) => compressing.window(io, &mut self.backing, extents, below),
            None => write_window(io, &mut self.backing, extents, below),
        }
    }

    /// Nothing more is written: what was kept so far goes into the image.
    fn write_rest(&mut self, io: &mut dyn BlockIo) -> DriverResult<()> {
        let Self { compressing: Some(compressing), backing, .. } = self else { return Ok(()) };
        compressing.finish(io, backing).map_err(|error| match error.code {
            ErrorCode::NoSpace => backing.disk_is_full(io, error),
            _ => error,
        })
    }

    /// The mapping of the last window makes room: that of the next one is loaded after the bitmaps were looked at.
    fn make_room_for_bitmaps(&mut self) {
        if !self.bitmaps.is_empty() {
            self.backing.mapping.forget_l2();
        }
    }

    /// Before the first change: autoclear features go, then what the dirty bit stands for is put right. Both are durable.
    fn start(&mut self, io: &mut dyn BlockIo) -> DriverResult<()> {
        if self.started {
            return Ok(());
        }
        let Backing { image, space, mapping, .. } = &mut self.backing;
        image.clear_autoclear(io)?;
        if let Some(repair) = self.repair.take() {
            repair.apply(io, image, space, mapping)?;
        }
        self.started = true;
        Ok(())
    }

    /// Room for the bitmaps that are made, which goes before all single clusters.
    fn make_room(&mut self, io: &mut dyn BlockIo) -> DriverResult<()> {
        if self.merging.makes() {
            self.start(io)?;
        }
        self.merging.reserve(io, &mut self.backing)
    }

    fn write_all(&mut self, io: &mut dyn BlockIo, extents: &[Extent], below: &mut dyn ReadBelow) -> DriverResult<()> {
        if let Some(growth) = self.growth.take() {
            self.start(io)?;
            growth.run(io, &mut self.backing, &mut self.bitmaps, below)?;
        }
        self.make_room(io)?;
        if let Some(shrink) = self.shrink.take() {
            self.start(io)?;
            shrink.run(io, &mut self.backing)?;
        }
        let mut windows = Windows::new(&self.backing, extents, !self.bitmaps.is_empty());
        if self.compressing.is_some() {
            windows = windows.of_at_most(Compressing::window_clusters(&self.backing.image));
        }
        while let Some(window) = windows.next(io, &mut self.backing)? {
            self.write_window(io, window, below)?;
        }
        Ok(())
    }
}

impl Sink for Qcow2Sink {
    fn info(&self) -> ImageInfo {
        let image = &self.backing.image;
        ImageInfo { virtual_size: image.header.virtual_size, cluster_size: image.cluster_size().bytes() }
    }

    fn plan(&mut self, io: &mut dyn BlockIo, extents: &[Extent]) -> DriverResult<()> {
        self.prepare(io)?;
        let mut windows = Windows::new(&self.backing, extents, !self.bitmaps.is_empty());
        while let Some(window) = windows.next(io, &mut self.backing)? {
            self.plan_window(io, window)?;
        }
        Ok(())
    }

    fn planned(&mut self, io: &mut dyn BlockIo) -> DriverResult<PlanSummary> {
        self.prepare(io)?;
        self.merging.planned();
        let made = self.merging.clusters(&self.backing.image);
        if made > 0 {
            let plan = self.plan.as_mut().ok_or_else(|| overflow("the plan"))?;
            plan.needs.runs += made;
            plan.needs.run_span = find_room(io, &mut self.backing, plan.needs.runs)?;
        }
        if self.compressing.is_some() {
            Compressing::refuse_without_room(io, &self.backing.image)?;
        }
        let repaired = self.repair.is_some();
        let plan = self.plan.as_mut().ok_or_else(|| overflow("the plan"))?;
        summarize(io, &mut self.backing, plan, repaired)
    }

    fn write(&mut self, io: &mut dyn BlockIo, extents: &[Extent], below: &mut dyn ReadBelow) -> DriverResult<()> {
        self.write_all(io, extents, below).map_err(|error| match error.code {
            ErrorCode::NoSpace => self.backing.disk_is_full(io, error),
            _ => error,
        })
    }

    fn grow(&mut self, io: &mut dyn BlockIo, virtual_size: u64, below_length: u64) -> DriverResult<()> {
        if virtual_size <= self.backing.image.header.virtual_size {
            return Ok(());
        }
        self.prepare(io)?;
        let plan = self.plan.as_mut().ok_or_else(|| overflow("the plan"))?;
        self.growth = Some(Growth::plan(io, &mut self.backing, &mut self.bitmaps, plan, (virtual_size, below_length))?);
        Ok(())
    }

    fn shrink(&mut self, io: &mut dyn BlockIo, virtual_size: u64) -> DriverResult<()> {
        if virtual_size >= self.backing.image.header.virtual_size {
            return Ok(());
        }
        self.prepare(io)?;
        let plan = self.plan.as_mut().ok_or_else(|| overflow("the plan"))?;
        self.shrink = Some(Shrink::plan(io, &mut self.backing, plan, virtual_size)?);
        Ok(())
    }

    fn bitmaps(&mut self, io: &mut dyn BlockIo) -> DriverResult<Vec<Bitmap>> {
        self.prepare(io)?;
        list(io, &self.backing.image, verified).map(|(bitmaps, _)| bitmaps)
    }

    fn plan_bitmap(&mut self, io: &mut dyn BlockIo, bitmap: &Bitmap, dirty: &[DirtyRange]) -> DriverResult<()> {
        self.prepare(io)?;
        let needed = self.merging.plan(io, &self.backing.image, &self.bitmaps, (bitmap, dirty))?;
        let plan = self.plan.as_mut().ok_or_else(|| overflow("the plan"))?;
        plan.needs.tables += needed;
        Ok(())
    }

    fn merge_bitmap(&mut self, io: &mut dyn BlockIo, bitmap: &Bitmap, dirty: &[DirtyRange]) -> DriverResult<()> {
        self.write_rest(io)?;
        self.start(io)?;
        self.make_room(io)?;
        self.make_room_for_bitmaps();
        self.merging.merge(io, &mut self.backing, &self.bitmaps, (bitmap, dirty)).map_err(|error| match error.code {
            ErrorCode::NoSpace => self.backing.disk_is_full(io, error),
            _ => error,
        })
    }

    fn finish(&mut self, io: &mut dyn BlockIo) -> DriverResult<()> {
        self.write_rest(io)?;
        if self.repair.is_some() {
            self.start(io)?;
        }
        // Data and bits are durable before a bitmap is there that says so.
        self.backing.flush(io)?;
        self.merging.finish(io, &mut self.backing)?;
        self.backing.flush(io)
    }
}
