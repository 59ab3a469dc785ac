//! The sink role: an open backing, and how the extents of a commit fall onto its clusters.

use crate::check::repair::Outstanding;
use crate::grow::planned::Growth;
use crate::image::{overflow, Image};
use crate::metadata::entries::decode_l1;
use crate::metadata::l2_entry::{decode_halves, Mapped};
use crate::metadata::slice_cache::SliceCache;
use crate::read::compressed::CompressedReader;
use crate::refcount::space::Space;
use crate::write::action::Action;
use crate::write::cluster_extent::ClusterExtent;
use crate::write::contents::{Fill, Old};
use crate::write::enabled_bitmaps::Bitmaps;
use crate::write::planned::Planned;
use alloc::format;
use alloc::vec;
use alloc::vec::Vec;
use instar_guest_sdk::abi::{ErrorCode, ImageInfo, PlanSummary};
use instar_guest_sdk::{BlockIo, DriverResult, Extent, OrderedWriter, ReadBelow, Sink};
use instar_qcow2_format::{incompatible, GuestCluster, HostOffset, L2Entry, Version};

/// Slices of L2 tables that are held at once, at most.
pub(crate) const WINDOW_SLICES: usize = 2048;

/// An image that data goes into.
pub struct Qcow2Sink {
    pub(crate) image: Image,
    pub(crate) has_backing: bool,
    pub(crate) l1: SliceCache,
    pub(crate) l2: SliceCache,
    pub(crate) space: Space,
    pub(crate) planned: Planned,
    /// Growth that was planned and is still to be done.
    pub(crate) growth: Option<Growth>,
    pub(crate) compressed: CompressedReader,
    pub(crate) bitmaps: Bitmaps,
    /// Whether the first change was made.
    pub(crate) started: bool,
    /// What planning has found wrong, to be written before everything else. `image`, `space`, `l1` and `l2`
    /// have it already.
    pub(crate) repair: Option<Outstanding>,
    /// What writes to the device of the image, and knows whether a flush is due.
    pub(crate) out: OrderedWriter,
    /// Length of the file in bytes before the commit.
    pub(crate) opened_length: u64,
}

impl Qcow2Sink {
    pub(crate) fn new(image: Image, has_backing: bool) -> Self {
        let size = image.slice_size();
        Self {
            l1: SliceCache::new(image.device, size),
            l2: SliceCache::new(image.device, size),
            space: Space::new(&image),
            compressed: CompressedReader::default(),
            bitmaps: Bitmaps::new(&image),
            planned: Planned::new(),
            growth: None,
            started: false,
            repair: None,
            out: OrderedWriter::new(image.device),
            opened_length: image.file_length,
            has_backing,
            image,
        }
    }

    /// Bytes of a cluster that the virtual disk has: fewer than a cluster at its end.
    pub(crate) fn visible_bytes(&self, cluster: GuestCluster) -> u64 {
        let size = self.image.cluster_size();
        (self.image.header.virtual_size - (cluster.0 << size.bits())).min(size.bytes())
    }

    /// What is to be done with a cluster, given its entry and the pieces that fall into it.
    pub(crate) fn action(&self, pieces: &[ClusterExtent], mapped: &Mapped) -> Action {
        let Some(first) = pieces.first() else {
            return Action::Nothing;
        };
        let entry = mapped.entry;
        if self.image.header.has(incompatible::EXTENDED_L2) {
            return self.change(pieces, entry, mapped.subclusters).map_or(Action::Nothing, Action::Subclusters);
        }
        let all_zero = pieces.iter().all(ClusterExtent::is_zero);
        let covered: u64 = pieces.iter().map(|piece| piece.length).sum();
        let whole = covered >= self.visible_bytes(first.cluster);
        let zero_flag = self.image.header.version == Version::V3;
        // A zero cluster can be had without writing zeroes: by the flag, or by falling through to nothing.
        let can_be_zero = all_zero && whole && (zero_flag || !self.has_backing);
        match entry {
            L2Entry::Data { offset, .. } if can_be_zero => Action::MakeZero(zero_flag, Old::Cluster(offset)),
            L2Entry::Data { offset, copied: true } => Action::InPlace(offset),
            // Shared with a snapshot: copy on write.
            L2Entry::Data { offset, copied: false } => Action::Allocate(Fill::Cluster(offset), Old::Cluster(offset)),
            L2Entry::Zero { .. } if all_zero => Action::Nothing,
            L2Entry::Zero { offset: Some(offset), copied: true } => Action::Revive(offset),
            L2Entry::Zero { offset: Some(offset), .. } => Action::Allocate(Fill::Zero, Old::Cluster(offset)),
            L2Entry::Zero { offset: None, .. } => Action::Allocate(Fill::Zero, Old::Nothing),
            L2Entry::Unallocated if all_zero && !self.has_backing => Action::Nothing,
            L2Entry::Unallocated if can_be_zero => Action::MakeZero(true, Old::Nothing),
            L2Entry::Unallocated if self.has_backing && !whole => Action::Allocate(Fill::Below, Old::Nothing),
            L2Entry::Unallocated => Action::Allocate(Fill::Zero, Old::Nothing),
            L2Entry::Compressed { descriptor } if can_be_zero => {
                Action::MakeZero(zero_flag, Old::Compressed(descriptor))
            }
            L2Entry::Compressed { descriptor } => {
                let fill = if whole { Fill::Zero } else { Fill::Compressed(descriptor) };
                Action::Allocate(fill, Old::Compressed(descriptor))
            }
        }
    }

    /// Decode a compressed cluster of the image.
    pub(crate) fn decode(
        &mut self,
        io: &mut dyn BlockIo,
        cluster: GuestCluster,
        descriptor: u64,
    ) -> DriverResult<Vec<u8>> {
        let size = self.image.cluster_size();
        let mut bytes = vec![0; usize::try_from(size.bytes()).map_err(|_| overflow("the cluster size"))?];
        let entry = (cluster.0 << size.bits(), descriptor);
        self.compressed.read(io, &self.image, entry, 0, &mut bytes)?;
        Ok(bytes)
    }

    /// Byte offset in the file of the L1 entry that maps a cluster, and its index.
    pub(crate) fn l1_position(&self, cluster: GuestCluster) -> (u64, u64) {
        let index = cluster.0 / self.image.header.l2_entries();
        (self.image.header.l1_table.0 + index * 8, index)
    }

    /// Load the L1 entries of these pieces, and the slices of the L2 tables that exist.
    pub(crate) fn load_mapping(&mut self, io: &mut dyn BlockIo, pieces: &[ClusterExtent]) -> DriverResult<()> {
        self.l1.shrink(WINDOW_SLICES / 4);
        // Changes that a repair is about to make stay.
        self.l2.shrink(0);
        let base = self.image.header.l1_table.0;
        let entries = self.image.header.l2_entries();
        self.l1.load(io, pieces.iter().map(|piece| base + piece.cluster.0 / entries * 8))?;
        let mut offsets = Vec::new();
        for piece in pieces {
            if let Some(at) = self.l2_position(piece.cluster)? {
                let slice = self.l2.slice_of(at);
                if offsets.last() != Some(&slice) {
                    offsets.push(slice);
                }
            }
        }
        self.l2.load(io, offsets)
    }

    /// The L2 table that maps a cluster, with its COPIED flag; its L1 entry was loaded.
    pub(crate) fn l2_table(&self, cluster: GuestCluster) -> DriverResult<Option<(HostOffset, bool)>> {
        let (at, index) = self.l1_position(cluster);
        if index >= u64::from(self.image.header.l1_entries) {
            // The table is about to grow.
            return Ok(None);
        }
        decode_l1(&self.image, index, at, self.l1.entry(at)?)
    }

    /// Byte offset in the file of the L2 entry of a cluster, if there is a table.
    pub(crate) fn l2_position(&self, cluster: GuestCluster) -> DriverResult<Option<u64>> {
        let header = &self.image.header;
        let in_table = cluster.0 % header.l2_entries() * header.l2_entry_bytes();
        Ok(self.l2_table(cluster)?.map(|(table, _)| table.0 + in_table))
    }

    /// The L2 entry of a cluster whose mapping was loaded.
    pub(crate) fn l2_entry(&self, cluster: GuestCluster) -> DriverResult<Mapped> {
        let guest = cluster.0 << self.image.cluster_size().bits();
        let Some(at) = self.l2_position(cluster)? else {
            return Ok(Mapped { guest, at: 0, entry: L2Entry::Unallocated, subclusters: None });
        };
        let first = self.l2.entry(at)?;
        let second = if self.image.header.has(incompatible::EXTENDED_L2) { self.l2.entry(at + 8)? } else { 0 };
        let (entry, subclusters) = decode_halves(&self.image, first, second)
            .map_err(|error| self.image.corrupt(at, format!("the L2 entry of guest offset {guest} {error}")))?;
        Ok(Mapped { guest, at, entry, subclusters })
    }
}

impl Sink for Qcow2Sink {
    fn info(&self) -> ImageInfo {
        ImageInfo { virtual_size: self.image.header.virtual_size, cluster_size: self.image.cluster_size().bytes() }
    }

    fn plan(&mut self, io: &mut dyn BlockIo, extents: &[Extent]) -> DriverResult<()> {
        self.prepare_plan(io)?;
        self.windows(io, extents, &mut |sink, io, pieces| sink.plan_window(io, pieces))
    }

    fn planned(&mut self, io: &mut dyn BlockIo) -> DriverResult<PlanSummary> {
        self.prepare_plan(io)?;
        self.summarise(io)
    }

    fn write(&mut self, io: &mut dyn BlockIo, extents: &[Extent], below: &mut dyn ReadBelow) -> DriverResult<()> {
        let written = self
            .grow_now(io, below)
            .and_then(|()| self.windows(io, extents, &mut |sink, io, pieces| sink.write_window(io, pieces, below)));
        written.map_err(|error| match error.code {
            ErrorCode::NoSpace => self.disk_is_full(io, error),
            _ => error,
        })
    }

    fn grow(&mut self, io: &mut dyn BlockIo, virtual_size: u64, below_length: u64) -> DriverResult<()> {
        self.plan_growth(io, virtual_size, below_length)
    }

    fn finish(&mut self, io: &mut dyn BlockIo) -> DriverResult<()> {
        if self.repair.is_some() {
            self.start(io)?;
        }
        self.flush(io)
    }
}
