//! The images that are to name the target: the members that are relinked, with what the host says that they record.

use crate::open::open;
use alloc::boxed::Box;
use alloc::vec::Vec;
use instar_guest_protocol::commit::Relinked as Wanted;
use instar_guest_sdk::abi::{DeviceConfig, ErrorCode, ImageId, MemberRole};
use instar_guest_sdk::ffi::Operation;
use instar_guest_sdk::{BlockIo, DriverError, DriverResult, Relinked};

/// The identity of the target before the commit, if it has one.
///
/// # Errors
/// [`ErrorCode::GuestProtocol`] for one that is too long.
pub fn identity(wanted: &Wanted) -> DriverResult<Option<ImageId>> {
    match wanted.identity.as_slice() {
        [] => Ok(None),
        bytes => ImageId::new(bytes).map(Some).ok_or_else(|| wrong("the identity of the target is too long")),
    }
}

/// The members that are relinked, each with its name of the target.
///
/// # Errors
/// [`ErrorCode::GuestProtocol`] if there is not one name for each.
pub fn children<'a>(operation: &'a Operation<'a>, wanted: &'a Wanted) -> DriverResult<Vec<Relinked<'a>>> {
    let devices: Vec<_> = operation.devices(&[MemberRole::Relinked]).collect();
    if devices.len() != wanted.chosen.len() {
        return Err(wrong("not every image that is relinked has a name for the target"));
    }
    let child = |(device, chosen): (&'a DeviceConfig, &u32)| {
        let name = usize::try_from(*chosen).ok().and_then(|index| wanted.names.get(index));
        let name = name.filter(|name| !name.is_empty()).ok_or_else(|| wrong("a name of the target is missing"))?;
        let open = Box::new(move |_: &mut dyn BlockIo| open(operation, device));
        Ok(Relinked { open, device: device.device, name })
    };
    devices.into_iter().zip(&wanted.chosen).map(child).collect()
}

fn wrong(text: &str) -> DriverError {
    DriverError::new(ErrorCode::GuestProtocol, text)
}
