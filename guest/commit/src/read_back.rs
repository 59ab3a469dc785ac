//! What is looked at before the first change, and read back afterwards.

use crate::target::Target;
use crate::{digest, verify};
use alloc::vec::Vec;
use instar_guest_sdk::abi::DeviceConfig;
use instar_guest_sdk::commit::ReadBack;
use instar_guest_sdk::{BlockIo, DriverResult, Source};

/// What the operator wants of the target.
pub struct LookBack<'a, 'r, 's> {
    /// The target.
    pub target: Target<'a, 'r, 's>,
    /// The layers that are committed, the overlay first.
    pub merged: Vec<&'a DeviceConfig>,
    /// What was written is compared with what the layers hold.
    pub verify: bool,
    /// The disk is hashed before and afterwards.
    pub digest: bool,
}

impl LookBack<'_, '_, '_> {
    /// Bytes of the overlay's disk.
    fn size(&self) -> u64 {
        self.merged.first().map_or(0, |overlay| overlay.virtual_size)
    }
}

impl ReadBack for LookBack<'_, '_, '_> {
    fn look_before(&mut self, io: &mut dyn BlockIo) -> DriverResult<()> {
        match self.digest {
            true => digest::hash(&self.target, io, &self.merged, self.size(), self.target.output.virtual_size),
            false => Ok(()),
        }
    }

    fn read_back(
        &mut self,
        io: &mut dyn BlockIo,
        source: &mut dyn Source,
        virtual_size: u64,
        done: &mut dyn FnMut(u64),
    ) -> DriverResult<()> {
        if self.verify {
            verify::verify(&self.target, io, source, virtual_size, done)?;
        }
        if self.digest {
            digest::hash(&self.target, io, &[], self.size(), virtual_size)?;
        }
        Ok(())
    }
}
