//! Refcounts ("Host cluster management" in the specification): width, geometry, access.

use crate::types::{ClusterSize, HostCluster};

/// `refcount_order`: a refcount has `1 << order` bits, 1 to 64.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RefcountOrder(u32);

impl RefcountOrder {
    /// 16-bit refcounts, the only ones of version 2.
    pub const BITS_16: Self = Self(4);

    /// The order, if it is 0 to 6.
    #[must_use]
    pub const fn new(order: u32) -> Option<Self> {
        if order <= 6 {
            Some(Self(order))
        } else {
            None
        }
    }

    /// The order itself.
    #[must_use]
    pub const fn order(self) -> u32 {
        self.0
    }

    /// Width of a refcount in bits.
    #[must_use]
    pub const fn bits(self) -> u32 {
        1 << self.0
    }

    /// The largest refcount.
    #[must_use]
    pub const fn max(self) -> u64 {
        u64::MAX >> (64 - self.bits())
    }

    /// Refcounts in `bytes` bytes.
    #[must_use]
    pub const fn entries_in(self, bytes: u64) -> u64 {
        (bytes << 3) >> self.0
    }

    /// Which refcount block describes a cluster, and the index of the cluster in it.
    #[must_use]
    pub const fn locate(self, size: ClusterSize, cluster: HostCluster) -> (u64, u64) {
        let per_block = self.entries_in(size.bytes());
        (cluster.0 / per_block, cluster.0 % per_block)
    }
}

/// Refcount `index` of a (piece of a) refcount block; `None` past its end.
///
/// Widths of a byte and more are big-endian; narrower ones start at the least significant bit of each byte.
#[must_use]
pub fn get_refcount(block: &[u8], order: RefcountOrder, index: usize) -> Option<u64> {
    let bits = order.bits() as usize;
    if bits < 8 {
        let per_byte = 8 / bits;
        let byte = *block.get(index / per_byte)?;
        return Some(u64::from(byte >> (index % per_byte * bits)) & order.max());
    }
    let bytes = bits / 8;
    let start = index.checked_mul(bytes)?;
    let field = block.get(start..start.checked_add(bytes)?)?;
    Some(field.iter().fold(0, |value, &byte| (value << 8) | u64::from(byte)))
}

/// Set refcount `index` of a (piece of a) refcount block. Returns `None`, and changes nothing, past its end
/// or when the value is too large for the width.
#[must_use]
pub fn set_refcount(block: &mut [u8], order: RefcountOrder, index: usize, value: u64) -> Option<()> {
    if value > order.max() {
        return None;
    }
    let bits = order.bits() as usize;
    if bits < 8 {
        let per_byte = 8 / bits;
        let byte = block.get_mut(index / per_byte)?;
        let shift = index % per_byte * bits;
        let [mask, low, ..] = [order.max().to_le_bytes()[0], value.to_le_bytes()[0]];
        *byte = (*byte & !(mask << shift)) | (low << shift);
        return Some(());
    }
    let bytes = bits / 8;
    let start = index.checked_mul(bytes)?;
    let field = block.get_mut(start..start.checked_add(bytes)?)?;
    field.copy_from_slice(&value.to_be_bytes()[8 - bytes..]);
    Some(())
}
