//! How an entry stands in the file: its width and its byte order.

use core::fmt::Debug;

/// A kind of entry. Formats with other entries than these four implement it for a type of their own.
///
/// # Example
///
/// Entries of 32 bits in little-endian order that count sectors, as bytes:
///
/// ```
/// use instar_guest_sdk::table::EntryKind;
///
/// enum Sectors {}
///
/// impl EntryKind for Sectors {
///     type Number = u64;
///     type Bytes = [u8; 4];
///     const BYTES: u64 = 4;
///
///     fn decode(bytes: &[u8]) -> u64 {
///         bytes.first_chunk().map_or(0, |bytes| u64::from(u32::from_le_bytes(*bytes)) * 512)
///     }
///
///     fn encode(offset: u64) -> [u8; 4] {
///         u32::try_from(offset / 512).unwrap_or(u32::MAX).to_le_bytes()
///     }
/// }
///
/// assert_eq!(Sectors::decode(&Sectors::encode(1 << 20)), 1 << 20);
/// assert_eq!(Sectors::decode(&[]), 0);
/// ```
pub trait EntryKind {
    /// The entry as a number. Its default, 0, is what stands in a hole of the file.
    type Number: Copy + Debug + Default + PartialEq;
    /// The entry as bytes.
    type Bytes: AsRef<[u8]>;
    /// Bytes of an entry: a power of two, and 512 at most. Entries stand at multiples of it, so that each lies in one sector.
    const BYTES: u64;

    /// The number that stands in these [`BYTES`](Self::BYTES) bytes; of a slice that is shorter, 0.
    fn decode(bytes: &[u8]) -> Self::Number;

    /// The bytes of a number.
    fn encode(number: Self::Number) -> Self::Bytes;
}

macro_rules! kinds {
    ($($(#[$doc:meta])* $name:ident: $number:ty, $decode:ident, $encode:ident;)*) => { $(
        $(#[$doc])*
        #[derive(Clone, Copy, Debug)]
        pub enum $name {}

        impl EntryKind for $name {
            type Number = $number;
            type Bytes = [u8; size_of::<$number>()];
            const BYTES: u64 = size_of::<$number>() as u64;

            fn decode(bytes: &[u8]) -> $number {
                bytes.first_chunk().map_or(0, |bytes| <$number>::$decode(*bytes))
            }

            fn encode(number: $number) -> Self::Bytes {
                number.$encode()
            }
        }
    )* };
}

kinds! {
    /// Big-endian entries of four bytes, as VHD has them.
    Big32: u32, from_be_bytes, to_be_bytes;
    /// Big-endian entries of eight bytes, as qcow has them.
    Big64: u64, from_be_bytes, to_be_bytes;
    /// Little-endian entries of four bytes, as VDI and Parallels have them.
    Little32: u32, from_le_bytes, to_le_bytes;
    /// Little-endian entries of eight bytes, as VHDX and QED have them.
    Little64: u64, from_le_bytes, to_le_bytes;
}
