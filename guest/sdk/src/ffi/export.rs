//! The tables and the entry of a module.

use super::{sink_ops, source_ops};
use crate::{BlockIo, FormatDriver};
use core::marker::PhantomData;
use core::ptr::null;
use instar_guest_abi::{
    FormatOps, ModuleDescriptor, ModuleKind, OperationOps, SinkOps, SourceOps, MODULE_ABI_MAJOR, MODULE_ABI_MINOR,
    MODULE_MAGIC,
};

/// The tables of driver `D` as constants that live as long as the module.
pub struct FormatTables<D, Io>(PhantomData<(D, Io)>);

impl<D: FormatDriver + 'static, Io: BlockIo + Default + 'static> FormatTables<D, Io> {
    const SOURCE: &'static SourceOps = &source_ops::<D, Io>();
    const SINK: &'static SinkOps = &sink_ops::<D, Io>();

    /// Make the format's table with the roles that it offers.
    #[must_use]
    pub const fn ops(source: bool, sink: bool) -> FormatOps {
        FormatOps { source: if source { Self::SOURCE } else { null() }, sink: if sink { Self::SINK } else { null() } }
    }
}

const fn descriptor(kind: ModuleKind, ops: *const core::ffi::c_void) -> ModuleDescriptor {
    ModuleDescriptor {
        magic: MODULE_MAGIC,
        abi_major: MODULE_ABI_MAJOR,
        abi_minor: MODULE_ABI_MINOR,
        kind: kind as u32,
        reserved: 0,
        ops,
    }
}

/// Make the descriptor of a format module.
#[must_use]
pub const fn descriptor_of_format(ops: &'static FormatOps) -> ModuleDescriptor {
    descriptor(ModuleKind::Format, core::ptr::from_ref(ops).cast())
}

/// Make the descriptor of an operation module.
#[must_use]
pub const fn descriptor_of_operation(ops: &'static OperationOps) -> ModuleDescriptor {
    descriptor(ModuleKind::Operation, core::ptr::from_ref(ops).cast())
}

/// Make the entry of a format module: `export_format!(Driver)` for both roles, `export_format!(Driver, source)` or
/// `export_format!(Driver, sink)` for one.
///
/// Use it once, in the binary of the guest half, which is `#![no_std]` and `#![no_main]`.
#[cfg(feature = "guest")]
#[macro_export]
macro_rules! export_format {
    ($driver:ty) => {
        $crate::export_format!(@roles $driver, true, true);
    };
    ($driver:ty, source) => {
        $crate::export_format!(@roles $driver, true, false);
    };
    ($driver:ty, sink) => {
        $crate::export_format!(@roles $driver, false, true);
    };
    ($driver:ty, source, sink) => {
        $crate::export_format!(@roles $driver, true, true);
    };
    (@roles $driver:ty, $source:literal, $sink:literal) => {
        /// Entry of the module.
        ///
        /// # Safety
        /// `table` is null or core's call table, which lives as long as the guest.
        #[no_mangle]
        pub unsafe extern "C" fn instar_module_entry(
            table: *const $crate::abi::CallTable,
        ) -> *const $crate::abi::ModuleDescriptor {
            static OPS: $crate::abi::FormatOps =
                $crate::ffi::FormatTables::<$driver, $crate::runtime::GuestIo>::ops($source, $sink);
            static DESCRIPTOR: $crate::abi::ModuleDescriptor = $crate::ffi::descriptor_of_format(&OPS);
            // SAFETY: core passes its call table, which lives as long as the guest.
            if unsafe { $crate::runtime::init(table) } {
                &raw const DESCRIPTOR
            } else {
                ::core::ptr::null()
            }
        }
    };
}

/// Make the entry of an operation module from an [`OperationFn`](crate::ffi::OperationFn).
#[cfg(feature = "guest")]
#[macro_export]
macro_rules! export_operation {
    ($operation:expr) => {
        /// Entry of the module.
        ///
        /// # Safety
        /// `table` is null or core's call table, which lives as long as the guest.
        #[no_mangle]
        pub unsafe extern "C" fn instar_module_entry(
            table: *const $crate::abi::CallTable,
        ) -> *const $crate::abi::ModuleDescriptor {
            extern "C" fn instar_operation_run(
                _table: *const $crate::abi::CallTable,
                config: *const $crate::abi::OperationConfig,
                chain: *const $crate::abi::ChainConfig,
                formats: *const *const $crate::abi::FormatOps,
                format_count: usize,
            ) {
                const OPERATION: $crate::ffi::OperationFn = $operation;
                // SAFETY: core passes live configuration and tables.
                let operation = unsafe { $crate::ffi::Operation::new(config, chain, formats, format_count) };
                if let Some(operation) = operation {
                    OPERATION(&operation, &mut $crate::runtime::GuestIo, &mut $crate::runtime::send);
                }
            }
            static OPS: $crate::abi::OperationOps = $crate::abi::OperationOps { run: instar_operation_run };
            static DESCRIPTOR: $crate::abi::ModuleDescriptor = $crate::ffi::descriptor_of_operation(&OPS);
            // SAFETY: core passes its call table, which lives as long as the guest.
            if unsafe { $crate::runtime::init(table) } {
                &raw const DESCRIPTOR
            } else {
                ::core::ptr::null()
            }
        }
    };
}
