//! What an operation module gets to work with.

use super::{protocol, ForeignFormat};
use crate::{BlockIo, DriverError, DriverResult};
use alloc::format;
use core::slice;
use instar_guest_abi::{ChainConfig, CommitConfig, DeviceConfig, ErrorCode, FormatOps, MAX_MODULES};

/// An operation: it works on `operation`, does block I/O with the second argument, and sends encoded messages with the
/// third, the last of which is its result.
pub type OperationFn = fn(&Operation<'_>, &mut dyn BlockIo, &mut dyn FnMut(&[u8]));

/// What the host asked for, and the formats to do it with.
#[derive(Clone, Copy)]
pub struct Operation<'a> {
    /// The operation's settings.
    pub config: &'a CommitConfig,
    /// The devices.
    pub chain: &'a ChainConfig,
    formats: &'a [*const FormatOps],
}

impl<'a> Operation<'a> {
    /// From what core passes to [`OperationOps::run`](instar_guest_abi::OperationOps::run).
    ///
    /// # Safety
    /// Each pointer is null or points to what its type says, for `'a`; `formats` to `format_count` pointers,
    /// each null or a table that lives as long as the guest.
    pub unsafe fn new(
        config: *const CommitConfig,
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
                chain: chain.as_ref()?,
                formats: slice::from_raw_parts(formats, format_count),
            })
        }
    }

    /// The format that implements `device`.
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
