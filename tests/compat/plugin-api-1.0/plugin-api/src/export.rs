//! Exporting a plugin from its library.

use crate::v1::PluginModuleV1;
use crate::FormatPlugin;
use abi_stable::library::RootModuleResult;
use abi_stable::prefix_type::PrefixTypeTrait;
use abi_stable::std_types::RResult;

/// Name of the symbol that a plugin library exports, without the final zero byte: the library header of
/// `abi_stable` 0.11.
pub const HEADER_SYMBOL: &str = "_1as_0lib_1header_0root_bmodule_bloader";

/// Build the root module of `P`. The engine's loader calls this once, through the library header.
#[doc(hidden)]
pub extern "C" fn constructor<P: FormatPlugin>() -> RootModuleResult {
    crate::guard::install_hook();
    let module = PluginModuleV1::of::<P>().leak_into_prefix();
    // SAFETY: the library header that names this function carries the layout of `PluginModuleV1_Ref`, which the loader
    // checks before it casts back.
    RResult::ROk(unsafe { module.0.cast() })
}

/// Export a type that implements [`FormatPlugin`] as the plugin of this library. Once per library.
#[macro_export]
macro_rules! export_plugin {
    ($plugin:ty) => {
        #[cfg(panic = "abort")]
        compile_error!("an instar plugin must be built with panic = \"unwind\": a panic has to become an error");

        #[doc(hidden)]
        #[export_name = "_1as_0lib_1header_0root_bmodule_bloader"]
        pub static INSTAR_PLUGIN_HEADER: $crate::__private::LibHeader = {
            // SAFETY: `constructor` returns the root module of exactly this interface.
            unsafe {
                $crate::__private::LibHeader::from_constructor::<$crate::v1::PluginModuleV1_Ref>(
                    $crate::__private::constructor::<$plugin>,
                    $crate::__private::CheckTypeLayout::Yes,
                )
            }
        };

        #[doc(hidden)]
        #[export_name = "instar_plugin_origin"]
        pub extern "C" fn instar_plugin_origin() -> u64 {
            $crate::__private::origin()
        }
    };
}
