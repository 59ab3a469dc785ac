//! The record of changes to devices in memory, which tests replay.

use alloc::collections::BTreeMap;
use alloc::vec::Vec;

/// One recorded change.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// Bytes were written.
    Write {
        /// The device.
        device: u32,
        /// Byte offset.
        offset: u64,
        /// The bytes.
        bytes: Vec<u8>,
    },
    /// The length was set, in bytes.
    SetLength {
        /// The device.
        device: u32,
        /// The new length in bytes.
        length: u64,
    },
    /// Everything before it on the device is durable.
    Flush {
        /// The device.
        device: u32,
    },
}

impl Change {
    /// Return the number of the device that the change concerns.
    #[must_use]
    pub fn device(&self) -> u32 {
        match self {
            Self::Write { device, .. } | Self::SetLength { device, .. } | Self::Flush { device } => *device,
        }
    }

    /// Apply the change to the devices. A flush does nothing.
    pub fn apply(&self, devices: &mut BTreeMap<u32, Vec<u8>>) {
        match self {
            Self::Write { device, offset, bytes } => {
                let file = devices.entry(*device).or_default();
                let start = usize::try_from(*offset).unwrap_or(usize::MAX);
                let end = start.saturating_add(bytes.len());
                if file.len() < end {
                    file.resize(end, 0);
                }
                file[start..end].copy_from_slice(bytes);
            }
            Self::SetLength { device, length } => {
                devices.entry(*device).or_default().resize(usize::try_from(*length).unwrap_or(usize::MAX), 0);
            }
            Self::Flush { .. } => {}
        }
    }
}
