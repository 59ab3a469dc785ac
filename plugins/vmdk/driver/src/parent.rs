//! Another parent for a disk: see [`change_parent`] for the order of writes.

use crate::disk::{Body, Part};
use crate::failures::at;
use crate::source::VmdkSource;
use crate::sparse_source::SparseSource;
use alloc::vec;
use alloc::vec::Vec;
use instar_guest_sdk::abi::ErrorCode;
use instar_guest_sdk::{overflow, BlockIo, DriverError, DriverResult, Parent, Source};
use instar_vmdk_format::{change_parent, Embedded, Step, SECTOR};

impl VmdkSource {
    /// The steps that have the image record `parent`.
    ///
    /// # Errors
    /// As [`Source::plan_parent`].
    pub(crate) fn parent_steps(
        &mut self,
        io: &mut dyn BlockIo,
        parent: Option<&Parent<'_>>,
    ) -> DriverResult<Vec<Step>> {
        let (device, offset, longest) = (self.descriptor.device, self.descriptor.offset, self.descriptor.longest);
        let refused = |error: DriverError| error.at(device, offset);
        let parent = parent.ok_or_else(|| {
            let text = "a vmdk with a parent cannot be without one: commit it into its present one";
            refused(DriverError::new(ErrorCode::UnsupportedFormat, text))
        })?;
        let (name, id) = parent.of_format("vmdk", self.info().virtual_size).map_err(refused)?;
        self.verify(io, false)?;
        let mut bytes = vec![0; usize::try_from(self.descriptor.length).map_err(|_| overflow("the descriptor"))?];
        io.read(device, offset, &mut bytes)?;
        let embedded = self.parts.iter().find_map(|part| embedded(part, device));
        change_parent(&bytes, (name, u32::from_be_bytes(id)), embedded, longest).map_err(at(
            ErrorCode::OverlayCorrupt,
            device,
            offset,
        ))
    }
}

/// The descriptor that stands in a sparse extent on this device. A crash while it got another parent may have left it behind
/// the grains: it belongs between the header and whatever comes next.
fn embedded(part: &Part<SparseSource>, device: u32) -> Option<Embedded> {
    let Body::Sparse(SparseSource { image, .. }) = &part.body else { return None };
    if image.device != device {
        return None;
    }
    Some(Embedded {
        offset: image.layout.descriptor_offset * SECTOR,
        home: image.descriptor_home(),
        file_length: (!image.footer).then_some(image.file_length),
    })
}
