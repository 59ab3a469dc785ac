//! The engine's side of the plugins' reader, which bounds the bytes that are read and remembers I/O errors.

use super::{ImageFiles, ImageRead};
use instar_plugin_api::{ErrorCode, PluginError, ReadImage, READ_BUDGET};
use std::cell::{Cell, RefCell};
use std::io;

/// Every read costs at least this many bytes of the budget, so that their number is bounded as well.
const LEAST_COST: u64 = 512;

/// The view of an image during one call.
pub struct BudgetedReader<'a> {
    files: ImageFiles<'a>,
    left: Cell<u64>,
    failure: RefCell<Option<(u64, io::Error)>>,
}

impl<'a> BudgetedReader<'a> {
    /// Make a view that allows [`READ_BUDGET`] bytes.
    pub fn new(files: ImageFiles<'a>) -> Self {
        Self { files, left: Cell::new(READ_BUDGET), failure: RefCell::new(None) }
    }

    /// Return the first I/O error, with its byte offset, if any.
    pub fn into_failure(self) -> Option<(u64, io::Error)> {
        self.failure.into_inner()
    }
}

impl BudgetedReader<'_> {
    fn read(&self, image: &dyn ImageRead, offset: u64, buffer: &mut [u8]) -> Result<usize, PluginError> {
        let cost = (buffer.len() as u64).max(LEAST_COST);
        let Some(left) = self.left.get().checked_sub(cost) else {
            let message = format!("the plugin read more than {READ_BUDGET} bytes in one call");
            return Err(PluginError::new(ErrorCode::ScratchTooSmall, message));
        };
        self.left.set(left);
        image.read_at(offset, buffer).map_err(|error| {
            let message = format!("reading at byte {offset} failed: {error}");
            if let Ok(mut slot) = self.failure.try_borrow_mut() {
                slot.get_or_insert((offset, error));
            }
            PluginError::new(ErrorCode::OverlayIo, message)
        })
    }
}

impl ReadImage for BudgetedReader<'_> {
    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<usize, PluginError> {
        self.read(self.files.first, offset, buffer)
    }

    fn read_file_at(&self, file: usize, offset: u64, buffer: &mut [u8]) -> Result<usize, PluginError> {
        match self.files.others.get(file) {
            Some(&image) => self.read(image, offset, buffer),
            None => Err(PluginError::new(ErrorCode::InternalOverflow, format!("the image has no open file {file}"))),
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    struct Endless;
    impl ImageRead for Endless {
        fn length(&self) -> u64 {
            u64::MAX
        }
        fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<usize> {
            if offset == 13 {
                return Err(io::Error::from_raw_os_error(5));
            }
            Ok(buffer.len())
        }
    }

    #[test]
    fn bytes_and_reads_are_bounded() {
        let reader = BudgetedReader::new(ImageFiles::one(&Endless));
        let mut large = vec![0; 5 << 20];
        assert!(reader.read_at(0, &mut large).is_ok());
        assert!(reader.read_at(0, &mut large).is_err());
        let reader = BudgetedReader::new(ImageFiles::one(&Endless));
        let count = (0..1_000_000).take_while(|_| reader.read_at(0, &mut [0]).is_ok()).count();
        assert_eq!(count as u64, READ_BUDGET / LEAST_COST);
    }

    #[test]
    fn the_first_io_error_is_kept() {
        let reader = BudgetedReader::new(ImageFiles::one(&Endless));
        assert!(reader.read_at(13, &mut [0]).is_err());
        let (offset, error) = reader.into_failure().unwrap();
        assert_eq!((offset, error.raw_os_error()), (13, Some(5)));
    }
}
