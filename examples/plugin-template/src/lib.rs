//! The {{format}} plugin: its host half, and the bytes of its guest half.

use instar_plugin_api::{
    export_plugin, Context, ErrorCode, FormatPlugin, GuestModule, ImageFacts, ImageReader, PluginError, Role, Verdict,
    PROBE_CERTAIN, PROBE_NO,
};

static GUEST_MODULE: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/{{format}}-module.elf"));

/// The first bytes of an image: to be replaced by those of your format.
const MAGIC: &[u8] = b"{{format}} image\n";

struct Plugin;

impl FormatPlugin for Plugin {
    const NAME: &'static str = "{{format}}";
    const DESCRIPTION: &'static str = "{{format}} disk image";
    const VERSION: &'static str = env!("CARGO_PKG_VERSION");

    fn probe(image: &ImageReader<'_>) -> Result<u32, PluginError> {
        let mut magic = [0; MAGIC.len()];
        image.read_at(0, &mut magic)?;
        Ok(if magic == MAGIC { PROBE_CERTAIN } else { PROBE_NO })
    }

    /// What the header says. A header that makes no sense is a `PluginError`.
    fn facts(image: &ImageReader<'_>) -> Result<ImageFacts, PluginError> {
        let (virtual_size, cluster_size) = (0, 65536);
        Ok(ImageFacts::new(Self::NAME, virtual_size, cluster_size, image.length()))
    }

    /// Whether an image may take this part in an operation, and how long its file may become.
    fn verdict(_: Role, _: &ImageFacts, _: &Context<'_>) -> Verdict {
        Verdict::refused(ErrorCode::UnsupportedFormat, "{{format}} images can only be looked at yet")
    }

    fn guest_module() -> GuestModule {
        GuestModule::source_and_sink(GUEST_MODULE)
    }
}

export_plugin!(Plugin);
