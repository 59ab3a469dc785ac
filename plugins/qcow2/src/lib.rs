//! The qcow2 plugin: its host half, which looks at headers, and the bytes of its guest half, which does the work.

mod create;
mod data_file;
mod facts;
mod listed;
mod verdict;

use instar_plugin_api::{
    export_plugin, BitmapFacts, Context, CreateSpec, CreatedImage, Footprint, FormatPlugin, GuestModule, ImageFacts,
    ImageFile, ImageReader, PluginError, Role, Verdict, PROBE_CERTAIN, PROBE_LIKELY, PROBE_NO,
};

static GUEST_MODULE: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/qcow2-module.elf"));

/// The plugin.
pub struct Qcow2;

impl FormatPlugin for Qcow2 {
    const NAME: &'static str = "qcow2";
    const DESCRIPTION: &'static str = "QEMU copy-on-write image, versions 2 and 3";
    const VERSION: &'static str = env!("CARGO_PKG_VERSION");
    const EXTENSIONS: &'static [&'static str] = &["qcow2"];
    const CREATE_OPTIONS: &'static [(&'static str, &'static str)] = create::OPTIONS;
    const CAN_CREATE: bool = true;

    fn probe(image: &ImageReader<'_>) -> Result<u32, PluginError> {
        let start = image.read_vec(0, 8)?;
        Ok(match start.as_slice() {
            // Version 1 is another format, called qcow.
            [b'Q', b'F', b'I', 0xfb, 0, 0, 0, 0 | 1] => PROBE_NO,
            [b'Q', b'F', b'I', 0xfb, 0, 0, 0, 2 | 3] => PROBE_CERTAIN,
            [b'Q', b'F', b'I', 0xfb, ..] => PROBE_LIKELY,
            _ => PROBE_NO,
        })
    }

    fn files(image: &ImageReader<'_>) -> Result<Vec<ImageFile>, PluginError> {
        facts::header(image).map(|header| data_file::files(&header))
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

    fn measure(spec: &CreateSpec, bitmaps: &[BitmapFacts]) -> Result<Footprint, PluginError> {
        create::measure(spec, bitmaps)
    }
}

export_plugin!(Qcow2);
