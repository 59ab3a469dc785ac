//! Structures shared with the guest, as bytes.

use instar_guest_abi::{ChainConfig, FileDevice, Member, ModuleTable, OperationConfig, Request};
use instar_guest_starter::{FaultRecord, MappedRange, Plan, MAX_RANGES};

/// A type that is its bytes.
///
/// # Safety
/// The type has no padding, and any bytes of its size are a value of it.
pub unsafe trait Plain: Copy {}

// SAFETY: 64-bit and 32-bit integers in pairs: no padding, any bytes are a value.
unsafe impl Plain for OperationConfig {}
// SAFETY: as above.
unsafe impl Plain for ChainConfig {}
// SAFETY: as above.
unsafe impl Plain for Member {}
// SAFETY: as above.
unsafe impl Plain for FileDevice {}
// SAFETY: as above, and bytes in a multiple of 8.
unsafe impl Plain for ModuleTable {}
// SAFETY: as above.
unsafe impl Plain for Request {}
// SAFETY: 64-bit integers.
unsafe impl Plain for Plan {}
// SAFETY: as above.
unsafe impl Plain for FaultRecord {}

const _: () = assert!(size_of::<OperationConfig>() == 8 + 2 * 4 + 4 * 8);
const _: () = assert!(size_of::<ChainConfig>() == 3 * 8);
const _: () = assert!(size_of::<Member>() == 4 * 4 + 4 * 4 + 7 * 8);
const _: () = assert!(size_of::<FileDevice>() == 2 * 4 + 2 * 8);
const _: () = assert!(size_of::<MappedRange>() == 3 * 8 && size_of::<Plan>() == 3 * 8 + MAX_RANGES * 3 * 8);
const _: () = assert!(size_of::<FaultRecord>() == 5 * 8);
const _: () = assert!(size_of::<ModuleTable>() == 8 + 2 * 4 + 16 * (3 * 8 + 32));

/// The bytes of `values`.
pub fn bytes<T: Plain>(values: &[T]) -> &[u8] {
    // SAFETY: the type is its bytes, without padding.
    unsafe { std::slice::from_raw_parts(values.as_ptr().cast(), size_of_val(values)) }
}

/// The bytes of `values`, to be written.
pub fn bytes_mut<T: Plain>(values: &mut [T]) -> &mut [u8] {
    // SAFETY: the type is its bytes, without padding, and any bytes are a value.
    unsafe { std::slice::from_raw_parts_mut(values.as_mut_ptr().cast(), size_of_val(values)) }
}
