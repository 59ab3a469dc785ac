//! The extents of a disk in several files: what their headers say.

use crate::encoding::recorded;
use crate::refusal::refused;
use instar_plugin_api::{ErrorCode, ImageFile, ImageReader, PluginError};
use instar_vmdk_format::{
    CowdHeader, Descriptor, DiskExtent, Header, SeSparseHeader, Storage, Trouble, COWD_HEADER_BYTES, HEADER_BYTES,
    SECTOR, SESPARSE_GRAIN_BYTES, SESPARSE_HEADER_BYTES,
};

/// What the headers of all extents come to.
#[derive(Debug, Default)]
pub struct Survey {
    /// Bytes of a grain of the first sparse extent; 0 without one.
    pub grain: u64,
    /// Length of all files in bytes.
    pub length: u64,
    /// An extent is plain bytes.
    pub flat: bool,
    /// An extent is a sparse one of ESX.
    pub cowd: bool,
    /// By how much the first free sectors of extents of ESX lie behind the ends of their files, in bytes.
    pub beyond: u64,
    /// An extent is a seSparse one.
    pub sesparse: bool,
    /// By how much the last extent, by its own header, is smaller than the descriptor says, in bytes: the disk was about to grow.
    pub missing: u64,
    /// Why an extent cannot be read, a sentence.
    pub unsupported: Option<String>,
}

impl Survey {
    /// Read the header of each extent.
    pub fn of(image: &ImageReader<'_>, extents: &[DiskExtent]) -> Result<Self, PluginError> {
        let mut all = Self::default();
        for (index, extent) in extents.iter().enumerate() {
            all.flat |= matches!(extent.storage, Storage::Flat(_));
            all.cowd |= extent.storage == Storage::Cowd;
            all.sesparse |= extent.storage == Storage::SeSparse;
            let Some(file) = image.file(index) else { continue };
            all.length = all.length.saturating_add(file.length());
            let is_last = index + 1 == extents.len();
            let look = match extent.storage {
                // Of the others, only the guest looks at every header.
                Storage::Sparse if all.grain == 0 || is_last => all.look_at_hosted(extent, &file, is_last),
                Storage::Sparse => Ok(()),
                _ => all.look(extent, &file),
            };
            look.map_err(|error| {
                let code = ErrorCode::from_u32(error.code).unwrap_or(ErrorCode::ParseFailed);
                PluginError::new(code, format!("extent {} of the descriptor: {}", index + 1, error.message))
            })?;
        }
        Ok(all)
    }

    fn look(&mut self, extent: &DiskExtent, file: &ImageReader<'_>) -> Result<(), PluginError> {
        let grain = match extent.storage {
            Storage::Flat(_) | Storage::Sparse => return Ok(()),
            Storage::Cowd => {
                let mut bytes = [0; COWD_HEADER_BYTES];
                file.read_exact_at(0, &mut bytes)?;
                let header = CowdHeader::parse(&bytes).map_err(refused)?;
                let free = u64::from(header.next_free) * SECTOR;
                self.beyond = self.beyond.saturating_add(free.saturating_sub(file.length()));
                header.layout().grain_bytes()
            }
            Storage::SeSparse => {
                self.look_at_sesparse(file)?;
                SESPARSE_GRAIN_BYTES
            }
        };
        if self.grain == 0 {
            self.grain = grain;
        }
        Ok(())
    }

    fn look_at_hosted(
        &mut self,
        extent: &DiskExtent,
        file: &ImageReader<'_>,
        is_last: bool,
    ) -> Result<(), PluginError> {
        let mut bytes = [0; HEADER_BYTES];
        file.read_exact_at(0, &mut bytes)?;
        let header = Header::parse(&bytes).map_err(refused)?;
        // What is missing of another one is damage, which the guest reports.
        self.missing = if is_last { extent.length.saturating_sub(header.virtual_size()) } else { 0 };
        if self.grain == 0 {
            self.grain = header.grain_bytes();
        }
        Ok(())
    }

    fn look_at_sesparse(&mut self, file: &ImageReader<'_>) -> Result<(), PluginError> {
        let mut bytes = [0; SESPARSE_HEADER_BYTES];
        file.read_exact_at(0, &mut bytes)?;
        let header = SeSparseHeader::parse(&bytes).map_err(refused)?;
        let Some((offset, _)) = header.volatile.within(file.length()) else {
            let text = "the volatile header of the seSparse extent lies past the end of the file";
            return Err(PluginError::new(ErrorCode::ParseFailed, text));
        };
        file.read_exact_at(offset, &mut bytes)?;
        match SeSparseHeader::check_volatile(&bytes) {
            // A fact, for the verdict to refuse: what the image says otherwise can be shown.
            Err(error) if error.trouble == Trouble::Unsupported => self.unsupported = Some(error.text),
            checked => checked.map_err(refused)?,
        }
        Ok(())
    }
}

/// The file of an extent, for [`FormatPlugin::files`](instar_plugin_api::FormatPlugin::files).
pub fn file_of(descriptor: &Descriptor, extent: &DiskExtent) -> Result<ImageFile, PluginError> {
    let (name, other_names) = recorded(descriptor, &extent.name)?;
    let format = if matches!(extent.storage, Storage::Flat(_)) { "raw" } else { "vmdk" };
    let grows = extent.storage != Storage::SeSparse;
    Ok(ImageFile { name, other_names, grows, format: format.into() })
}
