//! The pieces of a driver whose format cuts the disk into clusters and keeps a flat table that says where each of them lies:
//! a BAT, a block map, an L2 table, and the table of tables above it.
//!
//! Such formats differ in the encoding and the meaning of an entry, and in little else. The code that they share has to be
//! careful about power losses, so it is here once:
//!
//! | piece | what it does |
//! |---|---|
//! | [`Table`] | reads entries, a part of the table at a time and none that lies in a hole; holds changed entries back, and writes them once what they name is durable |
//! | [`Disk`], [`Arriving`], [`ClusterParts`] | cut arriving extents into clusters, each with all of its parts |
//! | [`Held`], [`Action`] | decide how to store a cluster: in place, in a new one, by an entry that says zeroes, or not at all |
//! | [`ClusterData`], [`ClusterPlace`] | collects the data of clusters, and fills up new ones from below |
//! | [`Slots`] | gives out the lowest place in the file that no entry names |
//! | [`Used`], [`Windows`] | mark used places of a file, within a bounded memory, to find two entries that name one place |
//! | [`tell_findings`] | reports the findings of such a pass, up to a bound |
//!
//! A sink is made of them like this:
//!
//! 1. [`Disk::each_cluster`] passes it each cluster for which extents arrive; it looks the entry up with [`Table::get`].
//! 2. Data goes into the cluster where it lies, or into a new one, through [`ClusterData`]. A new cluster is named by
//!    [`Table::set`], in memory only.
//! 3. Once [`Table::is_full`], and at the end of each [`Sink::write`](crate::Sink::write), [`ClusterData::submit`] writes the
//!    data, and [`Table::write`] flushes it before the first entry that names it is written.
//!
//! Whatever subset of the unflushed writes a power loss leaves, every entry is the old one or the new one, and names what is
//! durable: an entry never straddles two sectors of 512 bytes, the unit that a disk writes as a whole.
//!
//! ```
//! use instar_guest_sdk::table::{ClusterData, ClusterPlace, Little32, Table};
//! use instar_guest_sdk::{BlockIo, DriverResult, Extent, OrderedWriter};
//!
//! /// Put data into a new cluster at byte `place` of the file, and name it by entry 0 of a BAT of 64 bytes behind the header.
//! fn put(io: &mut dyn BlockIo, data: Extent, place: u32) -> DriverResult<()> {
//!     let (device, bat) = (7, 512..576);
//!     let mut out = OrderedWriter::new(device);
//!     let (mut table, mut clusters) = (Table::<Little32>::sparse(device, 0), ClusterData::default());
//!     if table.get(io, bat.start, bat.end)? == 0 {
//!         let guest = data.guest_offset..data.end();
//!         let cluster = ClusterPlace { guest, offset: place.into(), is_new: true };
//!         clusters.write_parts(io, &mut out, &cluster, &[data])?;
//!         table.set(io, bat.start, bat.end, place)?;
//!     }
//!     clusters.submit(io, &mut out)?;
//!     table.write(io, &mut out)?;
//!     out.barrier(io)
//! }
//! ```

mod changes;
mod data;
mod decide;
mod entries;
mod findings;
mod kind;
mod parts;
mod slots;
mod used;
mod window;

pub use data::{ClusterData, ClusterPlace};
pub use decide::{Action, Held, ZeroEntries};
pub use entries::{EachEntry, Table};
pub use findings::{tell_findings, Wrong};
pub use kind::{Big32, Big64, EntryKind, Little32, Little64};
pub use parts::{Arrival, Arriving, ClusterParts, Disk, EachCluster};
pub use slots::Slots;
pub use used::{Used, Windows};

/// Bytes that a disk writes as a whole: after a power loss, a sector is the old one or the new one.
const SECTOR: u64 = 512;
