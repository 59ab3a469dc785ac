//! An image file or block device that is only read.

use super::ImageRead;
use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::{FileExt, FileTypeExt};

/// An opened image.
#[derive(Debug)]
pub struct FileImage {
    file: File,
    length: u64,
}

impl FileImage {
    /// Wrap an open file or block device.
    ///
    /// # Errors
    /// When its length cannot be found out, and for anything that is neither a file nor a block device.
    pub fn new(mut file: File) -> io::Result<Self> {
        let kind = file.metadata()?.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a file or block device"));
        }
        // The length in the metadata of a block device is 0.
        let length = file.seek(SeekFrom::End(0))?;
        Ok(Self { file, length })
    }

    /// The file itself.
    #[must_use]
    pub fn file(&self) -> &File {
        &self.file
    }

    /// The file itself, to be kept.
    #[must_use]
    pub fn into_file(self) -> File {
        self.file
    }
}

impl ImageRead for FileImage {
    fn length(&self) -> u64 {
        self.length
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<usize> {
        let mut done = 0;
        while done < buffer.len() {
            let Some(at) = offset.checked_add(done as u64) else { break };
            match self.file.read_at(&mut buffer[done..], at) {
                Ok(0) => break,
                Ok(length) => done += length,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(done)
    }
}
