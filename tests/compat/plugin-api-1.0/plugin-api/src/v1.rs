//! Interface version 1: the functions and values that cross the border between engine and plugin.
//!
//! The first release freezes this module and every type that it mentions: no field, type or order of fields may change from
//! then on. If both sides can do without a later addition, it becomes a function after the last one of [`PluginModuleV1`], with
//! `#[sabi(missing_field(option))]`; otherwise it becomes a module beside this one.
//!
//! Plugin authors implement [`FormatPlugin`] and need nothing from here.

// The accessors that the derive makes for the `_Ref` type carry no documentation, and abi_stable wants that name.
#![allow(missing_docs, non_camel_case_types)]

use crate::guard::guarded;
use crate::{
    BitmapFacts, Context, CreateSpec, CreatedImage, ErrorCode, Footprint, FormatPlugin, GuestModule, ImageFacts,
    ImageFile, ImageReader, PluginError, Role, Verdict,
};
use abi_stable::library::RootModule;
use abi_stable::sabi_types::VersionStrings;
use abi_stable::std_types::{RResult, RSlice, RString, RVec, Tuple2};
use abi_stable::StableAbi;

/// Name of this interface in the library header of a plugin.
pub const INTERFACE_NAME: &str = "instar-plugin-v1";

/// Description of a plugin: the constants of [`FormatPlugin`].
#[repr(C)]
#[derive(StableAbi, Clone, Debug, PartialEq, Eq)]
pub struct PluginManifest {
    /// [`FormatPlugin::NAME`].
    pub name: RString,
    /// [`FormatPlugin::DESCRIPTION`].
    pub description: RString,
    /// [`FormatPlugin::VERSION`].
    pub version: RString,
    /// [`FormatPlugin::ALIASES`].
    pub aliases: RVec<RString>,
    /// [`FormatPlugin::EXTENSIONS`].
    pub extensions: RVec<RString>,
    /// [`FormatPlugin::CREATE_OPTIONS`].
    pub create_options: RVec<Tuple2<RString, RString>>,
    /// [`FormatPlugin::CAN_CREATE`].
    pub can_create: bool,
}

/// The root module of interface version 1. No function panics or unwinds.
///
/// `last_prefix_field` must not move: abi_stable refuses a prefix of another length.
#[repr(C)]
#[derive(StableAbi)]
#[sabi(kind(Prefix(prefix_ref = PluginModuleV1_Ref, prefix_fields = PluginModuleV1_Prefix)))]
pub struct PluginModuleV1 {
    /// What the plugin says about itself.
    pub manifest: extern "C" fn() -> RResult<PluginManifest, PluginError>,
    /// [`FormatPlugin::probe`].
    pub probe: extern "C" fn(image: &ImageReader<'_>) -> RResult<u32, PluginError>,
    /// [`FormatPlugin::files`].
    pub files: extern "C" fn(image: &ImageReader<'_>) -> RResult<RVec<ImageFile>, PluginError>,
    /// [`FormatPlugin::facts`].
    pub facts: extern "C" fn(image: &ImageReader<'_>) -> RResult<ImageFacts, PluginError>,
    /// [`FormatPlugin::verdict`].
    pub verdict: extern "C" fn(role: Role, own: &ImageFacts, context: &Context<'_>) -> Verdict,
    /// [`FormatPlugin::guest_module`].
    pub guest_module: extern "C" fn() -> RResult<GuestModule, PluginError>,
    /// [`FormatPlugin::create`].
    pub create: extern "C" fn(spec: &CreateSpec) -> RResult<CreatedImage, PluginError>,
    /// [`FormatPlugin::measure`].
    pub measure: extern "C" fn(spec: &CreateSpec, bitmaps: RSlice<'_, BitmapFacts>) -> RResult<Footprint, PluginError>,
    /// [`FormatPlugin::next_identity`].
    pub next_identity: extern "C" fn(own: &ImageFacts, child: &ImageFacts) -> RResult<RVec<u8>, PluginError>,
    /// [`FormatPlugin::notes`].
    #[sabi(last_prefix_field)]
    pub notes: extern "C" fn(image: &ImageReader<'_>, facts: &ImageFacts) -> RResult<RVec<RString>, PluginError>,
}

impl RootModule for PluginModuleV1_Ref {
    abi_stable::declare_root_module_statics! {PluginModuleV1_Ref}
    const BASE_NAME: &'static str = "instar_plugin";
    const NAME: &'static str = INTERFACE_NAME;
    const VERSION_STRINGS: VersionStrings = VersionStrings::new(crate::API_VERSION);
}

impl PluginModuleV1 {
    /// Build the root module of `P`, with the guard around each call.
    #[must_use]
    pub fn of<P: FormatPlugin>() -> Self {
        Self {
            manifest: manifest::<P>,
            probe: probe::<P>,
            files: files::<P>,
            facts: facts::<P>,
            verdict: verdict::<P>,
            guest_module: guest_module::<P>,
            create: create::<P>,
            measure: measure::<P>,
            next_identity: next_identity::<P>,
            notes: notes::<P>,
        }
    }
}

fn strings(list: &[&str]) -> RVec<RString> {
    list.iter().map(|&text| RString::from(text)).collect()
}

extern "C" fn manifest<P: FormatPlugin>() -> RResult<PluginManifest, PluginError> {
    guarded(|| {
        Ok(PluginManifest {
            name: P::NAME.into(),
            description: P::DESCRIPTION.into(),
            version: P::VERSION.into(),
            aliases: strings(P::ALIASES),
            extensions: strings(P::EXTENSIONS),
            create_options: P::CREATE_OPTIONS.iter().map(|&(k, v)| Tuple2(k.into(), v.into())).collect(),
            can_create: P::CAN_CREATE,
        })
    })
    .into()
}

extern "C" fn probe<P: FormatPlugin>(image: &ImageReader<'_>) -> RResult<u32, PluginError> {
    guarded(|| P::probe(image)).into()
}

extern "C" fn files<P: FormatPlugin>(image: &ImageReader<'_>) -> RResult<RVec<ImageFile>, PluginError> {
    guarded(|| Ok(P::files(image)?.into())).into()
}

extern "C" fn facts<P: FormatPlugin>(image: &ImageReader<'_>) -> RResult<ImageFacts, PluginError> {
    guarded(|| P::facts(image)).into()
}

extern "C" fn verdict<P: FormatPlugin>(role: Role, own: &ImageFacts, context: &Context<'_>) -> Verdict {
    match guarded(|| Ok(P::verdict(role, own, context))) {
        Ok(verdict) => verdict,
        Err(error) => Verdict::refused(ErrorCode::PluginUnavailable, error.message.into_string()),
    }
}

extern "C" fn next_identity<P: FormatPlugin>(own: &ImageFacts, child: &ImageFacts) -> RResult<RVec<u8>, PluginError> {
    guarded(|| Ok(P::next_identity(own, child).into())).into()
}

extern "C" fn guest_module<P: FormatPlugin>() -> RResult<GuestModule, PluginError> {
    guarded(|| Ok(P::guest_module())).into()
}

extern "C" fn create<P: FormatPlugin>(spec: &CreateSpec) -> RResult<CreatedImage, PluginError> {
    guarded(|| P::create(spec)).into()
}

extern "C" fn measure<P: FormatPlugin>(
    spec: &CreateSpec,
    bitmaps: RSlice<'_, BitmapFacts>,
) -> RResult<Footprint, PluginError> {
    guarded(|| P::measure(spec, bitmaps.as_slice())).into()
}

extern "C" fn notes<P: FormatPlugin>(
    image: &ImageReader<'_>,
    facts: &ImageFacts,
) -> RResult<RVec<RString>, PluginError> {
    guarded(|| Ok(P::notes(image, facts)?.into_iter().map(RString::from).collect())).into()
}
