//! The raw plugin: its host half, and the bytes of its guest half. The file is the disk.

use instar_plugin_api::std_types::{ROption, RVec};
use instar_plugin_api::{
    export_plugin, BitmapFacts, Context, CreateSpec, CreatedImage, ErrorCode, Footprint, FormatPlugin, GuestModule,
    ImageFacts, ImageReader, PluginError, ReservedRange, Role, Verdict, PROBE_ANYTHING,
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
        let preallocation = preallocation(spec)?;
        let length = length(spec)?;
        let reserved = preallocation.map(|written| ReservedRange { offset: 0, length, written });
        let reserved = reserved.into_iter().collect();
        Ok(CreatedImage { length, regions: RVec::new(), reserved, files: RVec::new() })
    }

    fn measure(spec: &CreateSpec, _: &[BitmapFacts]) -> Result<Footprint, PluginError> {
        preallocation(spec)?;
        Ok(Footprint { virtual_size: length(spec)?, unit: 1, overhead: 0, thin: false, bitmaps: ROption::RNone })
    }
}

/// Whether all of a new image is reserved, and then whether it is written, too.
fn preallocation(spec: &CreateSpec) -> Result<Option<bool>, PluginError> {
    let refused = |text: String| Err(PluginError::new(ErrorCode::UnsupportedFormat, text));
    if spec.backing.is_some() {
        return refused("a raw image has no room for a backing file: make a qcow2 one".into());
    }
    let mut preallocation = None;
    for option in &spec.options {
        match (option.0.as_str(), option.1.as_str()) {
            ("preallocation", "off") => preallocation = None,
            ("preallocation", "falloc") => preallocation = Some(false),
            ("preallocation", "full") => preallocation = Some(true),
            ("preallocation", value) => {
                let value = value.escape_default();
                return refused(format!("option preallocation cannot be \"{value}\": it must be off, falloc or full"));
            }
            (name, _) => {
                let name = name.escape_default();
                return refused(format!("unknown option \"{name}\": the only one is preallocation"));
            }
        }
    }
    Ok(preallocation)
}

/// Length of the file of a new image in bytes.
fn length(spec: &CreateSpec) -> Result<u64, PluginError> {
    let length = spec.virtual_size.checked_next_multiple_of(SECTOR);
    length.ok_or_else(|| PluginError::new(ErrorCode::UnsupportedFormat, "the disk is larger than any file"))
}

export_plugin!(Raw);

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use instar_plugin_api::std_types::ROption;

    #[test]
    fn a_new_image_takes_its_size() {
        let none = (ROption::RNone, ROption::RNone);
        let spec = |virtual_size| CreateSpec {
            virtual_size,
            file_name: RVec::new(),
            backing: none.0.clone(),
            backing_facts: none.1.clone(),
            options: RVec::new(),
        };
        for (size, length) in [(0, 0), (1, 512), (512, 512), (1000, 1024)] {
            let footprint = Raw::measure(&spec(size), &[]).unwrap();
            assert_eq!((footprint.required(0), footprint.fully_allocated()), (Some(length), Some(length)), "{size}");
            assert_eq!(Raw::create(&spec(size)).unwrap().length, length);
        }
        assert!(Raw::measure(&spec(u64::MAX), &[]).is_err());
    }
}
