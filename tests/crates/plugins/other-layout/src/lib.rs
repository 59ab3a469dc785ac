//! A library that claims to be built for this plugin API, but whose root module has other types.

#![allow(missing_docs, non_camel_case_types, non_local_definitions)]

use abi_stable::library::{CheckTypeLayout, LibHeader, RootModule, RootModuleResult};
use abi_stable::prefix_type::PrefixTypeTrait;
use abi_stable::sabi_types::VersionStrings;
use abi_stable::std_types::RResult;
use abi_stable::StableAbi;

#[repr(C)]
#[derive(StableAbi)]
#[sabi(kind(Prefix(prefix_ref = Module_Ref, prefix_fields = Module_Prefix)))]
pub struct Module {
    #[sabi(last_prefix_field)]
    pub something: extern "C" fn(u64) -> u64,
}

impl RootModule for Module_Ref {
    abi_stable::declare_root_module_statics! {Module_Ref}
    const BASE_NAME: &'static str = "instar_plugin";
    const NAME: &'static str = instar_plugin_api::v1::INTERFACE_NAME;
    const VERSION_STRINGS: VersionStrings = VersionStrings::new("1.0.0");
}

extern "C" fn something(value: u64) -> u64 {
    value
}

extern "C" fn constructor() -> RootModuleResult {
    let module = Module { something }.leak_into_prefix();
    // SAFETY: the header below carries the layout of `Module_Ref`.
    RResult::ROk(unsafe { module.0.cast() })
}

#[export_name = "_1as_0lib_1header_0root_bmodule_bloader"]
pub static HEADER: LibHeader = {
    // SAFETY: `constructor` returns a `Module_Ref`.
    unsafe { LibHeader::from_constructor::<Module_Ref>(constructor, CheckTypeLayout::Yes) }
};
