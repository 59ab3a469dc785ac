//! The raw plugin: its host half, and the bytes of its guest half. The file is the disk.

use instar_plugin_api::{
    export_plugin, CommitRole, ErrorCode, FormatPlugin, GuestModule, ImageFacts, ImageReader, PluginError, Verdict,
    PROBE_ANYTHING,
};

static GUEST_MODULE: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/raw-module.elf"));

/// Disks are made of sectors of this many bytes; a file that ends within one is a disk that is rounded up.
const SECTOR: u64 = 512;

/// The plugin.
pub struct Raw;

impl FormatPlugin for Raw {
    const NAME: &'static str = "raw";
    const DESCRIPTION: &'static str = "Plain disk image without metadata";
    const VERSION: &'static str = env!("CARGO_PKG_VERSION");
    const EXTENSIONS: &'static [&'static str] = &["raw", "img"];

    fn probe(_: &ImageReader<'_>) -> Result<u32, PluginError> {
        Ok(PROBE_ANYTHING)
    }

    fn facts(image: &ImageReader<'_>) -> Result<ImageFacts, PluginError> {
        let virtual_size = image.length().div_ceil(SECTOR).checked_mul(SECTOR);
        let virtual_size = virtual_size
            .ok_or_else(|| PluginError::new(ErrorCode::UnsupportedFormat, "the file is longer than any disk"))?;
        Ok(ImageFacts::new(Self::NAME, virtual_size, 0, image.length()))
    }

    fn verdict(role: CommitRole, _: &ImageFacts, _: &ImageFacts) -> Verdict {
        match role {
            CommitRole::Overlay => Verdict::refused(ErrorCode::NoBacking, "a raw image has no backing file"),
            CommitRole::Backing => Verdict::refused(
                ErrorCode::UnsupportedFormat,
                "committing into a raw image is not supported yet: use a qcow2 backing",
            ),
            CommitRole::Ancestor => Verdict::supported(0),
        }
    }

    fn guest_module() -> GuestModule {
        GuestModule::source_only(GUEST_MODULE)
    }
}

export_plugin!(Raw);
