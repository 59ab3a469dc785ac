//! Another backing file for an image.
//!
//! Only the header's cluster is changed. Refcounts, mappings, snapshots and bitmaps say nothing of the backing file, so that
//! neither the dirty bit nor any of these is in the way; the corrupt bit is, as for every change.

use crate::image::{overflow, Image};
use alloc::vec;
use alloc::vec::Vec;
use instar_guest_sdk::abi::ErrorCode;
use instar_guest_sdk::{BlockIo, DriverError, DriverResult, OrderedWriter, Parent};
use instar_qcow2_format::{parent_steps, Steps, SECTOR};

/// How the header's cluster is changed.
pub struct ParentChange {
    /// What it holds, as far as it is changed.
    before: Vec<u8>,
    steps: Steps,
}

impl ParentChange {
    /// Find out how the image can name this parent, or none. Changes nothing.
    ///
    /// # Errors
    /// [`ErrorCode::UnsupportedFormat`] if it cannot, corruption, I/O errors.
    pub fn plan(io: &mut dyn BlockIo, image: &Image, parent: Option<&Parent<'_>>) -> DriverResult<Self> {
        image.refuse_unwritable()?;
        if parent.is_some() && image.data.is_some_and(|data| data.raw) {
            let text =
                "its data file is to be read without it (data_file_raw), which a backing file would make impossible";
            return Err(DriverError::new(ErrorCode::ExternalDataFile, text).at(image.device, 88));
        }
        let cluster = usize::try_from(image.cluster_size().bytes()).map_err(|_| overflow("the size of a cluster"))?;
        let mut before = vec![0; cluster];
        io.read(image.device, 0, &mut before)?;
        let named = parent.map(|parent| (parent.name, parent.format.as_bytes()));
        let steps = parent_steps(&before, &image.header, named)
            .map_err(|text| DriverError::new(ErrorCode::UnsupportedFormat, text).at(image.device, 8))?;
        before.truncate(steps.last().map_or(0, Vec::len));
        Ok(Self { before, steps })
    }

    /// Do it. A crash leaves the backing file of before until the first sector of a step is on the disk, and the new one from
    /// then on: a disk writes a sector whole or not at all, and what its fields point to is durable before.
    ///
    /// # Errors
    /// I/O errors.
    pub fn execute(self, io: &mut dyn BlockIo, image: &Image) -> DriverResult<()> {
        image.clear_autoclear(io)?;
        let mut out = OrderedWriter::new(image.device);
        let mut before = self.before;
        for after in self.steps {
            let sectors = || (0_u64..).zip(before.chunks(SECTOR).zip(after.chunks(SECTOR)));
            let mut write = |io: &mut dyn BlockIo, is_first: bool| {
                let changed = sectors().filter(|(number, (old, new))| (*number == 0) == is_first && old != new);
                for (number, (_, new)) in changed {
                    out.write(io, number.saturating_mul(SECTOR as u64), new)?;
                }
                out.barrier(io)
            };
            write(io, false)?;
            write(io, true)?;
            before = after;
        }
        Ok(())
    }
}
