//! The stable contract between the instar engine and its format plugins.
//!
//! A plugin is one shared library with two halves. This crate defines the *host half*: before anything is launched, it answers
//! three questions (which format is this image, what backs it, may it take its part in an operation) and hands over the bytes
//! of the *guest half*, which does the work in the sandbox.
//!
//! # Writing a plugin
//!
//! Make a library crate with `crate-type = ["cdylib"]` whose file is called `libinstar_plugin_NAME.so`,
//! implement [`FormatPlugin`] and export it:
//!
//! ```
//! use instar_plugin_api::{
//!     export_plugin, Context, FormatPlugin, GuestModule, ImageFacts, ImageReader, PluginError, Role, Verdict,
//!     PROBE_CERTAIN, PROBE_NO,
//! };
//!
//! struct Demo;
//!
//! impl FormatPlugin for Demo {
//!     const NAME: &'static str = "demo";
//!     const DESCRIPTION: &'static str = "a format with a four-byte header";
//!     const VERSION: &'static str = "1.2.3";
//!
//!     fn probe(image: &ImageReader<'_>) -> Result<u32, PluginError> {
//!         let magic = image.read_vec(0, 4)?;
//!         Ok(if magic == b"DEMO" { PROBE_CERTAIN } else { PROBE_NO })
//!     }
//!
//!     fn facts(image: &ImageReader<'_>) -> Result<ImageFacts, PluginError> {
//!         Ok(ImageFacts::new(Self::NAME, image.length().saturating_sub(4), 0, image.length()))
//!     }
//!
//!     fn verdict(_role: Role, own: &ImageFacts, context: &Context<'_>) -> Verdict {
//!         // The disk stands in the file as it is.
//!         Verdict::supported(own.virtual_size.max(context.arriving(own).virtual_size).saturating_add(4))
//!     }
//!
//!     fn guest_module() -> GuestModule {
//!         // A real plugin embeds the ELF that its build script linked.
//!         GuestModule::sink_only(b"\x7fELF")
//!     }
//! }
//!
//! export_plugin!(Demo);
//! # fn main() {}
//! ```
//!
//! # What a plugin may do
//!
//! A plugin opens no file: the engine opens the image and passes an [`ImageReader`]. It keeps no state between calls and prints
//! nothing. All sizes and offsets are in bytes. The engine makes one call at a time, but not always from the same thread.
//! Everything that comes from an image is hostile: check it, and answer with a [`PluginError`]. A guard around every call turns
//! a panic into an error; the panic is still a bug.
//!
//! # Versions
//!
//! [`API_VERSION`] is the version of this crate and follows semver. An engine loads every plugin with the same major version,
//! older or newer (see [`version::accepts`]). To keep that promise, a released interface only grows: the first release freezes
//! [`v1`] (contract 1.0) and every type that it mentions. A minor version appends optional functions to the root module; a side
//! that lacks one works without it (see [`loading`]). A change that both sides *need* becomes a `v2` module beside it, with its own
//! root module, types and name. The library header tells the engine which interface a plugin speaks, and the engine keeps an
//! adapter for every interface it has ever known.
// The derives of abi_stable 0.11 define impls inside functions.
#![allow(non_local_definitions)]

mod contents;
mod context;
mod export;
mod fnv;
mod footprint;
mod guard;
pub mod loading;
mod origin;
mod plugin;
mod reader;
mod types;
pub mod v1;
mod value;
pub mod version;

pub use contents::{BitmapFacts, SnapshotFacts};
pub use context::{Context, Incoming};
pub use footprint::Footprint;
pub use instar_guest_abi::ErrorCode;
pub use plugin::{FormatPlugin, PROBE_ANYTHING, PROBE_CERTAIN, PROBE_LIKELY, PROBE_NO};
pub use reader::{ImageReader, ReadImage, READ_BUDGET};
pub use types::{
    BackingPointer, CreateSpec, CreatedFile, CreatedImage, GuestModule, ImageFacts, ImageFile, ImageRegion,
    PluginError, ReservedRange, Role, Verdict, IDENTITY_MAX, ROLE_SINK, ROLE_SOURCE,
};
pub use value::{printable, FactValue, Feature, Field, VALUES_MAX, VALUE_BYTES, VALUE_DEPTH};
pub use version::API_VERSION;

/// The `abi_stable` types that the values of this crate consist of.
pub use abi_stable::std_types;

/// What the expansion of [`export_plugin!`] uses. Not part of the contract.
#[doc(hidden)]
pub mod __private {
    pub use crate::export::{constructor, HEADER_SYMBOL};
    pub use crate::origin::origin;
    pub use abi_stable::library::{CheckTypeLayout, LibHeader, RootModuleResult};
}
