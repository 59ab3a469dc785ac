//! Which format an open file is of, and who is believed about it.

use super::open::{ChainImage, OpenedFile};
use crate::error::Error;
use crate::plugins::{IdentifyError, Registry};
use instar_guest_abi::ErrorCode;

impl OpenedFile {
    /// Find out the format. A `hint` that the file does not match is refused; so is one for a format that any bytes
    /// are an image of (raw) where the file looks like another format.
    ///
    /// # Errors
    /// When no plugin, or not the one that `hint` names, recognises it; [`ErrorCode::FormatMismatch`].
    pub fn identify_as<'r>(self, registry: &'r Registry, hint: Option<&str>) -> Result<ChainImage<'r>, Error> {
        let found = registry.identify(&self.file, hint).map_err(|error| Error::identify(&self.path, &error))?;
        if let Some(other) = found.looks_like {
            let clause = format!("is said to be {}, but looks like {other}: name its real format", found.plugin.name());
            return Err(Error::image(&self.path, ErrorCode::FormatMismatch, clause));
        }
        Ok(ChainImage { opened: self, plugin: found.plugin, facts: found.facts, files: Vec::new(), follows: false })
    }

    /// Find out the format of a file that an image is backed by, and whose format that image may record.
    ///
    /// # Errors
    /// As [`OpenedFile::identify_as`].
    pub fn identify_recorded<'r>(
        self,
        registry: &'r Registry,
        recorded: Option<&[u8]>,
    ) -> Result<ChainImage<'r>, Error> {
        let recorded = recorded.filter(|name| !name.is_empty()).map(String::from_utf8_lossy);
        if recorded.is_none() && matches!(registry.identify(&self.file, None), Err(IdentifyError::Unrecognised)) {
            let clause =
                "begins like no known format, and the image above does not record which it is: if it used to be \
                          one, restore it; if it is a plain disk, record that it is raw in the image above";
            return Err(Error::image(&self.path, ErrorCode::UnsupportedFormat, clause));
        }
        self.identify_as(registry, recorded.as_deref())
    }
}
