//! Interface version 2, which came with contract 1.1: version 1, and [`FormatPlugin::notes`]. Frozen, like
//! [version 1](crate::v1).
//!
//! Plugin authors do not need it: they implement [`FormatPlugin`].

// The accessors that the derive makes for the `_Ref` type carry no documentation, and abi_stable wants that name.
#![allow(missing_docs, non_camel_case_types)]

use crate::guard::guarded;
use crate::v1::{PluginManifest, PluginModuleV1};
use crate::{
    CommitRole, CreateSpec, CreatedImage, FormatPlugin, GuestModule, ImageFacts, ImageFile, ImageReader, PluginError,
    Verdict,
};
use abi_stable::library::RootModule;
use abi_stable::sabi_types::VersionStrings;
use abi_stable::std_types::{RResult, RString, RVec};
use abi_stable::StableAbi;

/// Name of this interface in the library header of a plugin.
pub const INTERFACE_NAME: &str = "instar-plugin-v2";

/// The root module of interface version 2. No function panics or unwinds.
#[repr(C)]
#[derive(StableAbi)]
#[sabi(kind(Prefix(prefix_ref = PluginModuleV2_Ref, prefix_fields = PluginModuleV2_Prefix)))]
pub struct PluginModuleV2 {
    /// What the plugin says about itself.
    pub manifest: extern "C" fn() -> RResult<PluginManifest, PluginError>,
    /// [`FormatPlugin::probe`].
    pub probe: extern "C" fn(image: &ImageReader<'_>) -> RResult<u32, PluginError>,
    /// [`FormatPlugin::files`].
    pub files: extern "C" fn(image: &ImageReader<'_>) -> RResult<RVec<ImageFile>, PluginError>,
    /// [`FormatPlugin::facts`].
    pub facts: extern "C" fn(image: &ImageReader<'_>) -> RResult<ImageFacts, PluginError>,
    /// [`FormatPlugin::verdict`].
    pub verdict: extern "C" fn(role: CommitRole, own: &ImageFacts, other: &ImageFacts) -> Verdict,
    /// [`FormatPlugin::guest_module`].
    pub guest_module: extern "C" fn() -> RResult<GuestModule, PluginError>,
    /// [`FormatPlugin::create`].
    pub create: extern "C" fn(spec: &CreateSpec) -> RResult<CreatedImage, PluginError>,
    /// [`FormatPlugin::notes`].
    #[sabi(last_prefix_field)]
    pub notes: extern "C" fn(image: &ImageReader<'_>, facts: &ImageFacts) -> RResult<RVec<RString>, PluginError>,
}

impl RootModule for PluginModuleV2_Ref {
    abi_stable::declare_root_module_statics! {PluginModuleV2_Ref}
    const BASE_NAME: &'static str = "instar_plugin";
    const NAME: &'static str = INTERFACE_NAME;
    const VERSION_STRINGS: VersionStrings = VersionStrings::new(crate::API_VERSION);
}

impl PluginModuleV2 {
    /// The root module of `P`, each call behind the guard.
    #[must_use]
    pub fn of<P: FormatPlugin>() -> Self {
        let PluginModuleV1 { manifest, probe, files, facts, verdict, guest_module, create } = PluginModuleV1::of::<P>();
        Self { manifest, probe, files, facts, verdict, guest_module, create, notes: notes::<P> }
    }
}

extern "C" fn notes<P: FormatPlugin>(
    image: &ImageReader<'_>,
    facts: &ImageFacts,
) -> RResult<RVec<RString>, PluginError> {
    guarded(|| Ok(P::notes(image, facts)?.into_iter().map(RString::from).collect())).into()
}
