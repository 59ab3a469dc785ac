//! The parent that an image is to record.

use crate::error::{DriverError, DriverResult};
use alloc::format;
use alloc::string::String;
use instar_guest_abi::{ErrorCode, ImageId};

/// A parent for an image to record: name, format, identity and size. [`Source::plan_parent`](crate::Source::plan_parent) gets it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Parent<'a> {
    /// The parent's name as the image has to record it: not empty, without a zero byte, usually UTF-8.
    pub name: &'a [u8],
    /// Name of the parent's format.
    pub format: &'a str,
    /// The parent's identity, if it has one.
    pub identity: Option<ImageId>,
    /// Virtual size of the parent in bytes.
    pub virtual_size: u64,
}

impl<'a> Parent<'a> {
    /// Return name and identity of the parent for an image of `virtual_size` bytes whose format records only parents of the
    /// same format, by a Unicode name and an identity of `N` bytes.
    ///
    /// # Errors
    /// [`ErrorCode::UnsupportedFormat`] for a parent of another format or size, and for a name that is not UTF-8.
    pub fn of_format<const N: usize>(&self, format: &str, virtual_size: u64) -> DriverResult<(&'a str, [u8; N])> {
        let refuse = |text: String| Err(DriverError::new(ErrorCode::UnsupportedFormat, text));
        let identity = self.identity.as_ref().and_then(|id| id.as_bytes().try_into().ok());
        let Some(identity) = identity.filter(|_| self.format == format) else {
            return refuse(format!(
                "its parent has to be a {format} with an identity, and the new one is a {}: commit it into its present \
                 parent first",
                self.format
            ));
        };
        if self.virtual_size != virtual_size {
            return refuse(format!(
                "its disk has {virtual_size} bytes and that of the new parent {}, and both have to be equal: commit it \
                 into its present parent first",
                self.virtual_size
            ));
        }
        match core::str::from_utf8(self.name) {
            Ok(name) => Ok((name, identity)),
            Err(_) => refuse("the name of the parent is not UTF-8: give the parent another name".into()),
        }
    }
}
