//! A minor version may append a function to the root module: plugins and engines of before and after go together.

#![allow(missing_docs, non_camel_case_types, non_local_definitions, dead_code, clippy::unwrap_used)]

use abi_stable::library::{CheckTypeLayout, LibHeader, RootModule, RootModuleResult};
use abi_stable::prefix_type::PrefixTypeTrait;
use abi_stable::std_types::RResult;
use instar_plugin_api::loading::{origin, root_module, root_module_v1};
use instar_plugin_api::v1;
use instar_plugin_api::{
    export_plugin, Context, FormatPlugin, GuestModule, ImageFacts, ImageReader, PluginError, Role, Verdict,
    PROBE_CERTAIN, PROBE_NO,
};

struct Demo;

impl FormatPlugin for Demo {
    const NAME: &'static str = "demo";
    const DESCRIPTION: &'static str = "a format with a four-byte mark";
    const VERSION: &'static str = "1.2.3";

    fn probe(image: &ImageReader<'_>) -> Result<u32, PluginError> {
        Ok(if image.read_vec(0, 4)? == b"DEMO" { PROBE_CERTAIN } else { PROBE_NO })
    }

    fn facts(image: &ImageReader<'_>) -> Result<ImageFacts, PluginError> {
        Ok(ImageFacts::new(Self::NAME, 0, 0, image.length()))
    }

    fn verdict(_: Role, _: &ImageFacts, _: &Context<'_>) -> Verdict {
        Verdict::supported(0)
    }

    fn guest_module() -> GuestModule {
        GuestModule::source_only(b"\x7fELF")
    }
}

// The plugin as today's macro exports it: `INSTAR_PLUGIN_HEADER`.
export_plugin!(Demo);

/// Declares a module with a root module of the name, package and interface of today's, whose last functions differ.
macro_rules! root_module_with {
    ($module:ident { $($last:tt)* }) => {
        mod $module {
            use abi_stable::library::RootModule;
            use abi_stable::sabi_types::VersionStrings;
            use abi_stable::std_types::{RResult, RSlice, RString, RVec};
            use abi_stable::StableAbi;
            use instar_plugin_api::v1::PluginManifest;
            use instar_plugin_api::{
                BitmapFacts, Context, CreateSpec, CreatedImage, Footprint, GuestModule, ImageFacts, ImageFile,
                ImageReader, PluginError, Role, Verdict,
            };

            #[repr(C)]
            #[derive(StableAbi)]
            #[sabi(kind(Prefix(prefix_ref = PluginModuleV1_Ref, prefix_fields = PluginModuleV1_Prefix)))]
            pub struct PluginModuleV1 {
                pub manifest: extern "C" fn() -> RResult<PluginManifest, PluginError>,
                pub probe: extern "C" fn(image: &ImageReader<'_>) -> RResult<u32, PluginError>,
                pub files: extern "C" fn(image: &ImageReader<'_>) -> RResult<RVec<ImageFile>, PluginError>,
                pub facts: extern "C" fn(image: &ImageReader<'_>) -> RResult<ImageFacts, PluginError>,
                pub verdict: extern "C" fn(role: Role, own: &ImageFacts, context: &Context<'_>) -> Verdict,
                pub guest_module: extern "C" fn() -> RResult<GuestModule, PluginError>,
                pub create: extern "C" fn(spec: &CreateSpec) -> RResult<CreatedImage, PluginError>,
                pub measure:
                    extern "C" fn(spec: &CreateSpec, bitmaps: RSlice<'_, BitmapFacts>) -> RResult<Footprint, PluginError>,
                pub next_identity: extern "C" fn(own: &ImageFacts, child: &ImageFacts) -> RResult<RVec<u8>, PluginError>,
                $($last)*
            }

            impl RootModule for PluginModuleV1_Ref {
                abi_stable::declare_root_module_statics! {PluginModuleV1_Ref}
                const BASE_NAME: &'static str = "instar_plugin";
                const NAME: &'static str = instar_plugin_api::v1::INTERFACE_NAME;
                const VERSION_STRINGS: VersionStrings = VersionStrings::new("1.1.0");
            }
        }
    };
}

root_module_with!(later {
    #[sabi(last_prefix_field)]
    pub notes: extern "C" fn(image: &ImageReader<'_>, facts: &ImageFacts) -> RResult<RVec<RString>, PluginError>,
    #[sabi(missing_field(option))]
    pub more: extern "C" fn(number: u64) -> u64,
});

root_module_with!(longer_prefix {
    pub notes: extern "C" fn(image: &ImageReader<'_>, facts: &ImageFacts) -> RResult<RVec<RString>, PluginError>,
    #[sabi(last_prefix_field)]
    pub more: extern "C" fn(number: u64) -> u64,
});

root_module_with!(other_signature {
    #[sabi(last_prefix_field)]
    pub notes: extern "C" fn(image: &ImageReader<'_>) -> RResult<RVec<RString>, PluginError>,
    #[sabi(missing_field(option))]
    pub more: extern "C" fn(number: u64) -> u64,
});

extern "C" fn more(number: u64) -> u64 {
    number + 1
}

extern "C" fn later_constructor() -> RootModuleResult {
    let v1::PluginModuleV1 {
        manifest,
        probe,
        files,
        facts,
        verdict,
        guest_module,
        create,
        measure,
        next_identity,
        notes,
    } = v1::PluginModuleV1::of::<Demo>();
    let module = later::PluginModuleV1 {
        manifest,
        probe,
        files,
        facts,
        verdict,
        guest_module,
        create,
        measure,
        next_identity,
        notes,
        more,
    };
    // SAFETY: the header below carries the layout of this root module.
    RResult::ROk(unsafe { module.leak_into_prefix().0.cast() })
}

/// The plugin as a later contract exports it.
static LATER: LibHeader = {
    // SAFETY: `later_constructor` returns the root module of this interface.
    unsafe { LibHeader::from_constructor::<later::PluginModuleV1_Ref>(later_constructor, CheckTypeLayout::Yes) }
};

fn image() -> Vec<u8> {
    b"DEMO and more".to_vec()
}

#[test]
fn a_later_engine_finds_that_a_plugin_of_today_lacks_a_function() {
    // What `loading` is for.
    assert!(INSTAR_PLUGIN_HEADER.check_layout::<later::PluginModuleV1_Ref>().is_err());
    let module = root_module::<later::PluginModuleV1_Ref>(&INSTAR_PLUGIN_HEADER).unwrap();
    assert!(module.more().is_none());
    assert_eq!(module.manifest()().unwrap().name, "demo");
    let image = image();
    assert_eq!(module.probe()(&ImageReader::new(13, &image)).unwrap(), PROBE_CERTAIN);
    let facts = ImageFacts::new("demo", 0, 0, 13);
    assert!(module.notes()(&ImageReader::new(13, &image), &facts).unwrap().is_empty());
}

#[test]
fn an_engine_of_today_uses_what_it_knows_of_a_later_plugin() {
    let module = root_module::<v1::PluginModuleV1_Ref>(&LATER).unwrap();
    assert_eq!(module.manifest()().unwrap().name, "demo");
    let image = image();
    assert_eq!(module.facts()(&ImageReader::new(13, &image)).unwrap().file_length, 13);
    // The plugin does have the function.
    let module = root_module::<later::PluginModuleV1_Ref>(&LATER).unwrap();
    assert_eq!(module.more().map(|more| more(6)), Some(7));
}

/// A library whose root module is not what its constructor returns, which nobody calls.
static OTHER: LibHeader = {
    // SAFETY: the tests only look at the layout.
    unsafe {
        LibHeader::from_constructor::<other_signature::PluginModuleV1_Ref>(later_constructor, CheckTypeLayout::Yes)
    }
};

#[test]
fn types_are_compared_unless_they_come_from_the_same_sources() {
    let own = Some(instar_plugin_origin());
    assert_eq!(own, Some(origin()));
    for header in [&INSTAR_PLUGIN_HEADER, &LATER] {
        for origin in [own, own.map(|own| own ^ 1), None] {
            let module = root_module_v1(header, origin).unwrap();
            assert_eq!(module.manifest()().unwrap().name, "demo");
        }
    }
    for origin in [own.map(|own| own ^ 1), Some(0), None] {
        assert!(root_module_v1(&OTHER, origin).is_none());
    }
}

#[test]
fn what_differs_otherwise_is_refused_either_way() {
    for header in [&INSTAR_PLUGIN_HEADER, &LATER] {
        assert!(root_module::<longer_prefix::PluginModuleV1_Ref>(header).is_none());
        assert!(root_module::<other_signature::PluginModuleV1_Ref>(header).is_none());
    }
    assert_eq!(<v1::PluginModuleV1_Ref as RootModule>::NAME, <later::PluginModuleV1_Ref as RootModule>::NAME);
}
