//! The raw plugin: its host half, and the bytes of its guest half. The file is the disk.

use instar_plugin_api::std_types::RVec;
use instar_plugin_api::{
    export_plugin, Context, CreateSpec, CreatedImage, ErrorCode, FormatPlugin, GuestModule, ImageFacts, ImageReader,
    PluginError, ReservedRange, Role, Verdict, PROBE_ANYTHING,
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
    const CAN_CREATE: bool = true;
    const CREATE_OPTIONS: &'static [(&'static str, &'static str)] =
        &[("preallocation", "off (default): space is allocated when it is written to")];

    fn probe(_: &ImageReader<'_>) -> Result<u32, PluginError> {
        Ok(PROBE_ANYTHING)
    }

    fn facts(image: &ImageReader<'_>) -> Result<ImageFacts, PluginError> {
        let virtual_size = image.length().div_ceil(SECTOR).checked_mul(SECTOR);
        let virtual_size = virtual_size
            .ok_or_else(|| PluginError::new(ErrorCode::UnsupportedFormat, "the file is longer than any disk"))?;
        Ok(ImageFacts::new(Self::NAME, virtual_size, 0, image.length()))
    }

    fn verdict(role: Role, own: &ImageFacts, context: &Context<'_>) -> Verdict {
        match role {
            Role::Empty => Verdict::refused(ErrorCode::NoBacking, "a raw image has no backing file"),
            Role::Write => {
                let size = context.arriving(own).virtual_size.max(own.virtual_size);
                match size.checked_next_multiple_of(SECTOR) {
                    Some(length) => Verdict::supported(length),
                    None => Verdict::refused(ErrorCode::UnsupportedFormat, "the overlay is larger than any file"),
                }
            }
            Role::Read | Role::Below => Verdict::supported(0),
        }
    }

    fn guest_module() -> GuestModule {
        GuestModule::source_and_sink(GUEST_MODULE)
    }

    fn create(spec: &CreateSpec) -> Result<CreatedImage, PluginError> {
        let refused = |text: String| Err(PluginError::new(ErrorCode::UnsupportedFormat, text));
        if spec.backing.is_some() {
            return refused("a raw image has no room for a backing file: make a qcow2 one".into());
        }
        // Whether all of it is reserved, and then written.
        let mut preallocation = None;
        for option in &spec.options {
            match (option.0.as_str(), option.1.as_str()) {
                ("preallocation", "off") => preallocation = None,
                ("preallocation", "falloc") => preallocation = Some(false),
                ("preallocation", "full") => preallocation = Some(true),
                ("preallocation", value) => {
                    let value = value.escape_default();
                    return refused(format!(
                        "option preallocation cannot be \"{value}\": it must be off, falloc or full"
                    ));
                }
                (name, _) => {
                    let name = name.escape_default();
                    return refused(format!("unknown option \"{name}\": the only one is preallocation"));
                }
            }
        }
        match spec.virtual_size.checked_next_multiple_of(SECTOR) {
            Some(length) => {
                let reserved = preallocation.map(|written| ReservedRange { offset: 0, length, written });
                let reserved = reserved.into_iter().collect();
                Ok(CreatedImage { length, regions: RVec::new(), reserved, files: RVec::new() })
            }
            None => refused("the disk is larger than any file".into()),
        }
    }
}

export_plugin!(Raw);
