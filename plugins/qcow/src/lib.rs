//! The qcow plugin: its host half, and the bytes of its guest half.

mod create;
mod facts;
mod verdict;

use instar_plugin_api::{
    export_plugin, BitmapFacts, Context, CreateSpec, CreatedImage, Footprint, FormatPlugin, GuestModule, ImageFacts,
    ImageReader, PluginError, Role, Verdict,
};

static GUEST_MODULE: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/qcow-module.elf"));

/// The plugin.
pub struct Qcow;

impl FormatPlugin for Qcow {
    const NAME: &'static str = "qcow";
    const DESCRIPTION: &'static str = "QEMU copy-on-write image, version 1";
    const VERSION: &'static str = env!("CARGO_PKG_VERSION");
    const EXTENSIONS: &'static [&'static str] = &["qcow"];
    const CAN_CREATE: bool = true;

    fn probe(image: &ImageReader<'_>) -> Result<u32, PluginError> {
        facts::probe(image)
    }

    fn facts(image: &ImageReader<'_>) -> Result<ImageFacts, PluginError> {
        facts::read(image)
    }

    fn verdict(role: Role, own: &ImageFacts, context: &Context<'_>) -> Verdict {
        verdict::give(role, own, context)
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

export_plugin!(Qcow);
