//! The plugin interfaces that this engine speaks.
//!
//! An interface is frozen when it is released. If it gets functions that older plugins lack, the method here returns the
//! default of [`FormatPlugin`](instar_plugin_api::FormatPlugin) for them. A new interface is a new variant of [`Interface`], a
//! new entry of [`KNOWN`] (newest first), and an arm in each method; nothing is removed.

use abi_stable::library::LibHeader;
use instar_plugin_api::loading::root_module_v1;
use instar_plugin_api::v1::{self, PluginManifest, PluginModuleV1_Ref};
use instar_plugin_api::{
    version, BitmapFacts, Context, CreateSpec, CreatedImage, Footprint, GuestModule, ImageFacts, ImageFile,
    ImageReader, PluginError, Role, Verdict, API_VERSION,
};

/// A loaded root module.
#[derive(Clone, Copy)]
pub enum Interface {
    /// Interface version 1: contract 1.0.
    V1(PluginModuleV1_Ref),
}

/// Makes an [`Interface`] from a library header, or says that the layout is not the expected one.
type Opener = fn(&LibHeader, Option<u64>) -> Option<Interface>;

/// Every interface by the name that stands in the library header, newest first.
const KNOWN: &[(&str, Opener)] = &[(v1::INTERFACE_NAME, open_v1)];

fn open_v1(header: &LibHeader, origin: Option<u64>) -> Option<Interface> {
    // Not `init_root_module`: the versions were compared before, by the contract's own rule.
    root_module_v1(header, origin).map(Interface::V1)
}

impl Interface {
    /// Take the root module out of a library header, version first. `origin` is what the library says of where its types come
    /// from, if it does.
    ///
    /// # Errors
    /// One clause that says why not, and what to do.
    pub fn open(header: &LibHeader, origin: Option<u64>) -> Result<Self, String> {
        let version = header.version_strings();
        version::accepts(API_VERSION, version.version.as_str())?;
        let name = header.root_mod_consts().name();
        let Some((_, open)) = KNOWN.iter().find(|(known, _)| *known == name.as_str()) else {
            let known: Vec<&str> = KNOWN.iter().map(|(known, _)| *known).collect();
            return Err(format!(
                "it speaks the plugin interface {:?}, this instar speaks {}: update instar",
                name.as_str(),
                known.join(", ")
            ));
        };
        open(header, origin)
            .ok_or_else(|| format!("its types differ from those of plugin API {}: rebuild the plugin", version.version))
    }

    /// What the plugin says about itself.
    pub fn manifest(self) -> Result<PluginManifest, PluginError> {
        match self {
            Self::V1(module) => module.manifest()().into_result(),
        }
    }

    /// How sure the plugin is that an image is of its format, 0 to 100.
    pub fn probe(self, image: &ImageReader<'_>) -> Result<u32, PluginError> {
        match self {
            Self::V1(module) => module.probe()(image).into_result(),
        }
    }

    /// The files of an image besides the one that it is named by.
    pub fn files(self, image: &ImageReader<'_>) -> Result<Vec<ImageFile>, PluginError> {
        match self {
            Self::V1(module) => module.files()(image).into_result().map(Into::into),
        }
    }

    /// What the header says.
    pub fn facts(self, image: &ImageReader<'_>) -> Result<ImageFacts, PluginError> {
        match self {
            Self::V1(module) => module.facts()(image).into_result(),
        }
    }

    /// Whether an image may take its part in an operation.
    pub fn verdict(self, role: Role, own: &ImageFacts, context: &Context<'_>) -> Verdict {
        match self {
            Self::V1(module) => module.verdict()(role, own, context),
        }
    }

    /// The identity that an image gets from what is above it.
    pub fn next_identity(self, own: &ImageFacts, child: &ImageFacts) -> Result<Vec<u8>, PluginError> {
        match self {
            Self::V1(module) => module.next_identity()(own, child).into_result().map(Into::into),
        }
    }

    /// The guest half.
    pub fn guest_module(self) -> Result<GuestModule, PluginError> {
        match self {
            Self::V1(module) => module.guest_module()().into_result(),
        }
    }

    /// A new, empty image.
    pub fn create(self, spec: &CreateSpec) -> Result<CreatedImage, PluginError> {
        match self {
            Self::V1(module) => module.create()(spec).into_result(),
        }
    }

    /// How much room a new image takes.
    pub fn measure(self, spec: &CreateSpec, bitmaps: &[BitmapFacts]) -> Result<Footprint, PluginError> {
        match self {
            Self::V1(module) => module.measure()(spec, bitmaps.into()).into_result(),
        }
    }

    /// What a person should know of an image, one line each.
    pub fn notes(self, image: &ImageReader<'_>, facts: &ImageFacts) -> Result<Vec<String>, PluginError> {
        match self {
            Self::V1(module) => {
                module.notes()(image, facts).into_result().map(|notes| notes.into_iter().map(Into::into).collect())
            }
        }
    }
}
