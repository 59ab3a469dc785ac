//! Another parent for an image: its two UUIDs. A VDI has no place for the name of a file or for its format.

use crate::image::Image;
use instar_guest_sdk::abi::ErrorCode;
use instar_guest_sdk::{overflow, BlockIo, DriverError, DriverResult, Parent};
use instar_vdi_format::{Header, ImageType, Uuid, HEADER_BYTES, UUID_BYTES};

/// The header with this parent, or none.
///
/// # Errors
/// [`ErrorCode::UnsupportedFormat`] for a parent that is no VDI, and for a static image.
pub fn with_parent(image: &Image, parent: Option<&Parent<'_>>) -> DriverResult<[u8; HEADER_BYTES]> {
    let refused = |text: &str| DriverError::new(ErrorCode::UnsupportedFormat, text).at(image.device, 0);
    let mut header: Header = image.header.clone();
    if header.image_type == ImageType::Static && parent.is_some() {
        return Err(refused("it is a static image, which holds all of its disk and has no parent"));
    }
    let (link, modify) = match parent {
        None => (Uuid::NULL, Uuid::NULL),
        Some(parent) => {
            let identity = parent.identity.filter(|_| parent.format == "vdi");
            let identity = identity.ok_or_else(|| {
                refused(
                    "a VDI names its parent by its UUIDs, and can have no other parent than a VDI: convert it to qcow2",
                )
            })?;
            let (create, modify) = identity.as_bytes().split_at_checked(UUID_BYTES).unwrap_or_default();
            let uuid = |bytes: &[u8]| bytes.try_into().map(Uuid).map_err(|_| refused("the parent's UUIDs are not two"));
            (uuid(create)?, uuid(modify)?)
        }
    };
    if parent.is_some() && link.is_null() {
        return Err(refused("the parent's uuidCreate is null, which stands for no parent"));
    }
    header.set_parent(link, modify);
    Ok(header.bytes)
}

/// Write that header, in one write of a sector, which a crash leaves as it was or whole.
///
/// # Errors
/// I/O errors.
pub fn record(io: &mut dyn BlockIo, image: &mut Image, bytes: &[u8; HEADER_BYTES]) -> DriverResult<()> {
    image.header = Header::parse(bytes).map_err(|_| overflow("a header with another parent"))?;
    io.write(image.device, 0, bytes)?;
    io.flush(image.device)
}
