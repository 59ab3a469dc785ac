//! Offsets and cluster indices as types of their own, so that they cannot be mixed up.

use core::fmt;

macro_rules! number_type {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(pub u64);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(&self.0, f)
            }
        }
    };
}

number_type! {
    /// A byte offset in the image file.
    HostOffset
}
number_type! {
    /// A byte offset on the virtual disk.
    GuestOffset
}
number_type! {
    /// Index of a cluster of the image file: host offset divided by the cluster size.
    HostCluster
}
number_type! {
    /// Index of a cluster of the virtual disk: guest offset divided by the cluster size.
    GuestCluster
}

/// The cluster size of an image: a power of two from 512 bytes to 2 MiB.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ClusterSize {
    bits: u32,
}

impl ClusterSize {
    /// Smallest number of bits that the specification allows ("Header", `cluster_bits`).
    pub const MIN_BITS: u32 = 9;
    /// Largest number of bits that QEMU opens (2 MiB).
    pub const MAX_BITS: u32 = 21;

    /// 64 KiB, what `qemu-img create` makes without options.
    pub const DEFAULT: Self = Self { bits: 16 };

    /// The size of `1 << bits` bytes, if that is allowed.
    #[must_use]
    pub const fn from_bits(bits: u32) -> Option<Self> {
        if bits >= Self::MIN_BITS && bits <= Self::MAX_BITS {
            Some(Self { bits })
        } else {
            None
        }
    }

    /// log2 of the size.
    #[must_use]
    pub const fn bits(self) -> u32 {
        self.bits
    }

    /// The size in bytes.
    #[must_use]
    pub const fn bytes(self) -> u64 {
        1 << self.bits
    }

    /// Entries of an L2 table of this size (8 bytes each; "L2 table entry").
    #[must_use]
    pub const fn l2_entries(self) -> u64 {
        self.bytes() / 8
    }

    /// Guest bytes that one L2 table maps.
    #[must_use]
    pub const fn l2_coverage(self) -> u64 {
        self.bytes() * self.l2_entries()
    }

    /// Offset within its cluster.
    #[must_use]
    pub const fn offset_in(self, offset: u64) -> u64 {
        offset & (self.bytes() - 1)
    }

    /// Number of clusters that hold `bytes` bytes.
    #[must_use]
    pub const fn count_for(self, bytes: u64) -> u64 {
        (bytes >> self.bits) + ((bytes & (self.bytes() - 1) != 0) as u64)
    }

    /// `bytes` rounded up to whole clusters, unless that overflows.
    #[must_use]
    pub const fn round_up(self, bytes: u64) -> Option<u64> {
        self.count_for(bytes).checked_mul(self.bytes())
    }

    /// The cluster that holds a host offset.
    #[must_use]
    pub const fn host_cluster(self, offset: HostOffset) -> HostCluster {
        HostCluster(offset.0 >> self.bits)
    }

    /// Where a host cluster begins, unless that overflows.
    #[must_use]
    pub const fn host_offset(self, cluster: HostCluster) -> Option<HostOffset> {
        match cluster.0.checked_mul(self.bytes()) {
            Some(offset) => Some(HostOffset(offset)),
            None => None,
        }
    }

    /// The cluster that holds a guest offset.
    #[must_use]
    pub const fn guest_cluster(self, offset: GuestOffset) -> GuestCluster {
        GuestCluster(offset.0 >> self.bits)
    }
}
