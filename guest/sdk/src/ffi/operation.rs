//! The environment of an operation module.

use super::{protocol, ForeignFormat};
use crate::{BlockIo, DriverError, DriverResult};
use alloc::format;
use core::slice;
use instar_guest_abi::{
    ChainConfig, DeviceConfig, ErrorCode, FormatOps, Member, MemberRole, OperationConfig, MAX_MODULES,
};

/// An operation: it works on `operation`, does block I/O with the second argument, and sends encoded messages with the
/// third, the last of which is its result.
pub type OperationFn = fn(&Operation<'_>, &mut dyn BlockIo, &mut dyn FnMut(&[u8]));

/// The order of the host, and the formats that carry it out.
#[derive(Clone, Copy)]
pub struct Operation<'a> {
    /// The configuration that every operation has.
    pub config: &'a OperationConfig,
    /// The participating images, by group and, within a group, by depth.
    pub members: &'a [Member],
    formats: &'a [*const FormatOps],
}

impl<'a> Operation<'a> {
    /// Wrap the arguments of [`OperationOps::run`](instar_guest_abi::OperationOps::run).
    ///
    /// # Safety
    /// Each pointer is null or points to what its type says, for `'a`; `formats` to `format_count` pointers,
    /// each null or a table that lives as long as the guest.
    pub unsafe fn new(
        config: *const OperationConfig,
        chain: *const ChainConfig,
        formats: *const *const FormatOps,
        format_count: usize,
    ) -> Option<Self> {
        if formats.is_null() || format_count > MAX_MODULES {
            return None;
        }
        // SAFETY: the caller promises it.
        unsafe {
            Some(Self {
                config: config.as_ref()?,
                members: chain.as_ref()?.members.as_slice(),
                formats: slice::from_raw_parts(formats, format_count),
            })
        }
    }

    /// Return the operation's own configuration, an encoded message.
    #[must_use]
    pub fn payload(&self) -> &'a [u8] {
        self.config.payload.as_slice()
    }

    /// The members that have one of these roles, in their order.
    fn members_of<'r>(&self, roles: &'r [MemberRole]) -> impl Iterator<Item = &'a Member> + use<'a, 'r> {
        let wanted = |member: &&Member| MemberRole::from_u32(member.role).is_some_and(|role| roles.contains(&role));
        self.members.iter().filter(wanted)
    }

    /// Iterate over the devices of the members that have one of these roles, in their order.
    pub fn devices<'r>(&self, roles: &'r [MemberRole]) -> impl Iterator<Item = &'a DeviceConfig> + use<'a, 'r> {
        self.members_of(roles).map(|member| &member.device)
    }

    /// Do the same for one group.
    pub fn devices_of_group<'r>(
        &self,
        group: u32,
        roles: &'r [MemberRole],
    ) -> impl Iterator<Item = &'a DeviceConfig> + use<'a, 'r> {
        self.members_of(roles).filter(move |member| member.group == group).map(|member| &member.device)
    }

    /// Return the format that implements `device`.
    ///
    /// # Errors
    /// [`ErrorCode::PluginUnavailable`] if there is no such module; [`ErrorCode::GuestProtocol`] if it is not
    /// a format.
    pub fn format_of(&self, device: &DeviceConfig) -> DriverResult<ForeignFormat> {
        let ops = usize::try_from(device.module).ok().and_then(|module| self.formats.get(module));
        let Some(&ops) = ops else {
            let text = format!("device {} needs module {}, which is not loaded", device.device, device.module);
            return Err(DriverError::new(ErrorCode::PluginUnavailable, text));
        };
        if ops.is_null() {
            return Err(protocol("the device's module does not implement a format"));
        }
        // SAFETY: `new`'s caller promises that the table lives as long as the guest.
        unsafe { ForeignFormat::new(ops) }
    }
}
