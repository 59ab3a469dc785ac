//! The target as its next user opens it, and the images below it.

use crate::open::open;
use alloc::boxed::Box;
use alloc::vec::Vec;
use core::cell::RefCell;
use instar_guest_protocol::commit::event::Kind;
use instar_guest_protocol::commit::Event;
use instar_guest_sdk::abi::{DeviceConfig, ErrorCode, FileDevice, FileList};
use instar_guest_sdk::ffi::Operation;
use instar_guest_sdk::{BlockIo, DriverError, DriverResult, Source};
use instar_guest_view::Reporter;

/// Bytes of tables that the drivers of all that is seen hold together: those that commit still have their own.
const CACHES: u64 = 8 << 20;

/// The target and what is below it, to be opened once more.
pub struct Target<'a, 'r, 's> {
    /// The operation that they belong to.
    pub operation: &'a Operation<'a>,
    /// The image that is written.
    pub output: &'a DeviceConfig,
    /// What is below it, nearest first.
    pub below: &'a [&'a DeviceConfig],
    /// Who tells the host.
    pub reporter: &'r RefCell<Reporter<'s>>,
}

impl Target<'_, '_, '_> {
    /// Tell the host something.
    pub fn tell(&self, kind: Kind) {
        self.reporter.borrow_mut().event(&Event { kind: Some(kind) });
    }
}

impl<'a> Target<'a, '_, '_> {
    /// Open the target, whose files may be longer by now and whose disk has `virtual_size` bytes, and what is below it; above
    /// them come these images, the top-most first.
    ///
    /// # Errors
    /// What the images cannot be opened for.
    pub fn open_below(
        &self,
        io: &mut dyn BlockIo,
        above: &[&'a DeviceConfig],
        virtual_size: u64,
    ) -> DriverResult<Vec<Box<dyn Source + 'a>>> {
        let cache_bytes = CACHES / ((above.len() + self.below.len()) as u64 + 1);
        let mut layers = Vec::new();
        for device in above {
            layers.push(open(self.operation, &DeviceConfig { cache_bytes, ..**device })?);
        }
        let mut files = Vec::new();
        for file in self.output.files.as_slice() {
            files.push(FileDevice { file_length: io.length(file.device)?, ..*file });
        }
        let target = DeviceConfig {
            file_length: io.length(self.output.device)?,
            virtual_size,
            cache_bytes,
            // They live as long as the guest, which ends after this.
            files: FileList::of(files.leak()),
            ..*self.output
        };
        layers.push(open(self.operation, &target).map_err(|error| match error.code {
            // A driver takes what it reads for an overlay.
            ErrorCode::OverlayCorrupt => DriverError { code: ErrorCode::BackingCorrupt, ..error },
            _ => error,
        })?);
        for device in self.below {
            layers.push(open(self.operation, &DeviceConfig { cache_bytes, ..**device })?);
        }
        Ok(layers)
    }
}
