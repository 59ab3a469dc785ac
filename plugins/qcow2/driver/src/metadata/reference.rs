//! References to clusters of the file: to which structure, and from where.

use crate::image::Image;
use crate::metadata::cluster_run::ClusterRun;
use alloc::format;
use core::fmt;
use instar_guest_sdk::DriverResult;
use instar_qcow2_format::{CompressedRange, HostOffset, L2Entry};

/// What clusters of the file are used for. Indices count from 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Structure {
    /// The header.
    Header,
    /// The refcount table.
    RefcountTable,
    /// The L1 table of the active state.
    ActiveL1,
    /// The snapshot table.
    SnapshotTable,
    /// The L1 table of the snapshot with this index.
    InactiveL1(usize),
    /// The refcount block that this entry of the refcount table refers to.
    RefcountBlock(u64),
    /// The directory of persistent bitmaps.
    BitmapDirectory,
    /// The table of the bitmap with this index.
    BitmapTable(usize),
    /// A cluster with bits of the bitmap with this index.
    BitmapData(usize),
    /// The L2 table that this entry of the active L1 table refers to.
    ActiveL2(u64),
    /// An L2 table of the snapshot with this index.
    InactiveL2(usize),
    /// An L2 table, whatever L1 tables refer to it.
    L2Table,
    /// What an L2 entry refers to: data, also compressed, or a cluster that is kept for zeroes.
    GuestData(L2Entry),
}

impl fmt::Display for Structure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Header => write!(f, "the header"),
            Self::RefcountTable => write!(f, "the refcount table"),
            Self::ActiveL1 => write!(f, "the L1 table"),
            Self::SnapshotTable => write!(f, "the snapshot table"),
            Self::InactiveL1(_) => write!(f, "the L1 table of a snapshot"),
            Self::RefcountBlock(index) => write!(f, "refcount block {index}"),
            Self::BitmapDirectory => write!(f, "the bitmap directory"),
            Self::BitmapTable(_) => write!(f, "the table of a bitmap"),
            Self::BitmapData(_) => write!(f, "the data of a bitmap"),
            Self::ActiveL2(index) => write!(f, "L2 table {index}"),
            Self::InactiveL2(_) => write!(f, "an L2 table of a snapshot"),
            Self::L2Table => write!(f, "an L2 table"),
            Self::GuestData(_) => write!(f, "a data cluster"),
        }
    }
}

/// A structure, where it is, and what refers to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Reference {
    pub(crate) structure: Structure,
    /// Where the structure begins.
    pub(crate) offset: HostOffset,
    /// The clusters that it takes.
    pub(crate) run: ClusterRun,
    /// Byte offset in the file of the header field, or of the entry of a table, that refers to it.
    pub(crate) at: u64,
    /// How often it is referred to from there: an entry of an L2 table counts once for each L1 entry of the table.
    pub(crate) times: u32,
}

impl Reference {
    /// A structure of `bytes` bytes that has one reference, from byte `at` of the file.
    pub(crate) fn one(image: &Image, structure: Structure, offset: HostOffset, bytes: u64, at: u64) -> Self {
        Self { structure, offset, run: ClusterRun::of(image.cluster_size(), offset, bytes), at, times: 1 }
    }
}

impl Reference {
    /// Verify that what an L2 entry refers to lies in the file. Anything else does by the time that it is visited.
    ///
    /// # Errors
    /// Corruption.
    pub(crate) fn verify_bounds(&self, image: &Image) -> DriverResult<()> {
        let Structure::GuestData(entry) = self.structure else { return Ok(()) };
        let inside = match entry {
            // Only its last sector may be cut off.
            L2Entry::Compressed { descriptor } => {
                let range = CompressedRange::decode(descriptor, image.cluster_size());
                image.holds_bytes(range.last_sector(), 1)
            }
            _ => image.holds_cluster(self.offset),
        };
        if inside {
            return Ok(());
        }
        let offset = self.offset;
        Err(image.corrupt(self.at, format!("an L2 entry points to offset {offset}, past the end of the file: it is damaged, or the file is cut off")))
    }
}
