//! The vmdk plugin: its host half, and the bytes of its guest half.

mod create;
mod encoding;
mod extents;
mod facts;
mod refusal;
mod verdict;

use instar_plugin_api::{
    export_plugin, BitmapFacts, Context, CreateSpec, CreatedImage, Footprint, FormatPlugin, GuestModule, ImageFacts,
    ImageFile, ImageReader, PluginError, Role, Verdict,
};

static GUEST_MODULE: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/vmdk-module.elf"));

/// The plugin.
pub struct Vmdk;

impl FormatPlugin for Vmdk {
    const NAME: &'static str = "vmdk";
    const DESCRIPTION: &'static str = "VMware disk image";
    const VERSION: &'static str = env!("CARGO_PKG_VERSION");
    const EXTENSIONS: &'static [&'static str] = &["vmdk"];
    const CAN_CREATE: bool = true;
    const CREATE_OPTIONS: &'static [(&'static str, &'static str)] = create::OPTIONS;

    fn probe(image: &ImageReader<'_>) -> Result<u32, PluginError> {
        facts::probe(image)
    }

    fn files(image: &ImageReader<'_>) -> Result<Vec<ImageFile>, PluginError> {
        facts::files(image)
    }

    fn facts(image: &ImageReader<'_>) -> Result<ImageFacts, PluginError> {
        facts::read(image)
    }

    fn verdict(role: Role, own: &ImageFacts, context: &Context<'_>) -> Verdict {
        verdict::give(role, own, context)
    }

    fn next_identity(own: &ImageFacts, child: &ImageFacts) -> Vec<u8> {
        facts::next_identity(own, child)
    }

    fn notes(_: &ImageReader<'_>, facts: &ImageFacts) -> Result<Vec<String>, PluginError> {
        Ok(verdict::notes(facts))
    }

    fn guest_module() -> GuestModule {
        GuestModule::source_and_sink(GUEST_MODULE)
    }

    fn create(spec: &CreateSpec) -> Result<CreatedImage, PluginError> {
        create::create(spec)
    }

    fn measure(spec: &CreateSpec, _: &[BitmapFacts]) -> Result<Footprint, PluginError> {
        create::measure(spec)
    }
}

export_plugin!(Vmdk);
