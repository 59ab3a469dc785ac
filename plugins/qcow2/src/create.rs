//! New images: the options of `instar create -f qcow2 -o …`.

use instar_plugin_api::std_types::RVec;
use instar_plugin_api::{
    BitmapFacts, CreateSpec, CreatedImage, ErrorCode, Footprint, ImageRegion, PluginError, ReservedRange,
};
use instar_qcow2_format::{ClusterSize, CompressionType, CreateOptions, Preallocation, RefcountOrder, Version};

/// The options with their help.
pub const OPTIONS: &[(&str, &str)] = &[
    ("cluster_size", "cluster size, a power of two from 512 to 2M (default 64k)"),
    ("compat", "compatibility level: v2 (0.10) or v3 (1.1, default)"),
    ("refcount_bits", "width of a refcount in bits, a power of two from 1 to 64 (default 16)"),
    ("lazy_refcounts", "put refcount updates off: on or off (default)"),
    ("compression_type", "how clusters are compressed: zlib (default) or zstd"),
    ("extended_l2", "subclusters, 32 to a cluster of 16k or more: on or off (default)"),
    ("preallocation", "what is allocated at once: off (default), metadata, falloc or full"),
];

/// The options of a new image.
fn options(spec: &CreateSpec) -> Result<CreateOptions, PluginError> {
    let mut options = CreateOptions::new(spec.virtual_size);
    for option in &spec.options {
        set(&mut options, option.0.as_str(), option.1.as_str()).map_err(refuse)?;
    }
    if let Some(backing) = spec.backing.as_ref().into_option() {
        options.backing_name = Some(backing.name.to_vec());
        options.backing_format = backing.format.as_ref().into_option().map(|format| format.to_vec());
    }
    Ok(options)
}

/// How long a new image becomes.
pub fn measure(spec: &CreateSpec, bitmaps: &[BitmapFacts]) -> Result<Footprint, PluginError> {
    let options = options(spec)?;
    let measure = instar_qcow2_format::measure(&options).map_err(|error| refuse(error.0))?;
    let each = bitmaps.iter().map(|bitmap| (bitmap.granularity, bitmap.name.len()));
    Ok(Footprint {
        virtual_size: measure.virtual_size,
        unit: options.cluster_size.bytes(),
        overhead: measure.metadata,
        thin: !measure.preallocated,
        bitmaps: instar_qcow2_format::measure_bitmaps(&options, each).into(),
    })
}

/// Make a new image.
pub fn create(spec: &CreateSpec) -> Result<CreatedImage, PluginError> {
    let options = options(spec)?;
    let image = instar_qcow2_format::create(&options).map_err(|error| refuse(error.0))?;
    let mut reserved = RVec::new();
    let metadata = image.metadata.len() as u64;
    match options.preallocation {
        Preallocation::Off | Preallocation::Metadata => {}
        Preallocation::Falloc => reserved.push(ReservedRange { offset: 0, length: image.length, written: false }),
        // The rest is written anyway.
        Preallocation::Full => reserved.push(ReservedRange {
            offset: metadata,
            length: image.length.saturating_sub(metadata),
            written: true,
        }),
    }
    let mut regions = RVec::new();
    regions.push(ImageRegion { offset: 0, bytes: image.metadata.into() });
    Ok(CreatedImage { length: image.length, regions, reserved, files: RVec::new() })
}

fn refuse(message: String) -> PluginError {
    PluginError::new(ErrorCode::UnsupportedFormat, message)
}

fn set(options: &mut CreateOptions, name: &str, value: &str) -> Result<(), String> {
    let wrong = |wanted: &str| format!("option {name} cannot be \"{}\": {wanted}", value.escape_default());
    match name {
        "cluster_size" => {
            options.cluster_size = size(value)
                .filter(|bytes| bytes.is_power_of_two())
                .and_then(|bytes| ClusterSize::from_bits(bytes.trailing_zeros()))
                .ok_or_else(|| wrong("it must be a power of two from 512 to 2M"))?;
        }
        "compat" => {
            options.version = match value {
                "0.10" | "v2" => Version::V2,
                "1.1" | "v3" => Version::V3,
                _ => return Err(wrong("it must be v2 (0.10) or v3 (1.1)")),
            };
        }
        "refcount_bits" => {
            options.refcount_order = value
                .parse()
                .ok()
                .filter(|bits: &u32| bits.is_power_of_two())
                .and_then(|bits| RefcountOrder::new(bits.trailing_zeros()))
                .ok_or_else(|| wrong("it must be a power of two from 1 to 64"))?;
        }
        "lazy_refcounts" | "extended_l2" => {
            let on = match value {
                "on" => true,
                "off" => false,
                _ => return Err(wrong("it must be on or off")),
            };
            let option = if name == "extended_l2" { &mut options.extended_l2 } else { &mut options.lazy_refcounts };
            *option = on;
        }
        "preallocation" => {
            options.preallocation = match value {
                "off" => Preallocation::Off,
                "metadata" => Preallocation::Metadata,
                "falloc" => Preallocation::Falloc,
                "full" => Preallocation::Full,
                _ => return Err(wrong("it must be off, metadata, falloc or full")),
            };
        }
        "compression_type" => {
            options.compression = match value {
                "zlib" => CompressionType::Zlib,
                "zstd" => CompressionType::Zstd,
                _ => return Err(wrong("it must be zlib or zstd")),
            };
        }
        "data_file" | "data_file_raw" => {
            return Err(format!("a new image with an external data file is not supported: leave {name} out of -o"));
        }
        _ if name == "encryption" || name.starts_with("encrypt.") => {
            return Err(format!("a new image is not encrypted: leave {} out of -o", name.escape_default()));
        }
        _ => {
            let known: Vec<&str> = OPTIONS.iter().map(|(name, _)| *name).collect();
            return Err(format!("unknown option \"{}\": there are {}", name.escape_default(), known.join(", ")));
        }
    }
    Ok(())
}

/// A number of bytes with an optional suffix `k` or `M`.
fn size(text: &str) -> Option<u64> {
    let (digits, factor) = match text.as_bytes().last()? {
        b'k' | b'K' => (&text[..text.len() - 1], 1 << 10),
        b'M' | b'm' => (&text[..text.len() - 1], 1 << 20),
        _ => (text, 1u64),
    };
    if !digits.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    digits.parse::<u64>().ok()?.checked_mul(factor)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        assert_eq!(size("65536"), Some(65536));
        assert_eq!(size("64k"), Some(65536));
        assert_eq!(size("2M"), Some(2 << 20));
        for bad in ["", "k", "-1", "+1", "1.5k", "64kk", "99999999999999999999", "99999999999999999M"] {
            assert_eq!(size(bad), None, "{bad}");
        }
    }

    #[test]
    fn unknown_options_are_refused_by_name() {
        let mut options = CreateOptions::new(0);
        let error = set(&mut options, "bogus\n", "1").unwrap_err();
        assert!(error.contains("bogus\\n") && error.contains("cluster_size"), "{error}");
        for (name, value) in [
            ("cluster_size", "4M"),
            ("cluster_size", "1000"),
            ("compat", "3"),
            ("refcount_bits", "3"),
            ("refcount_bits", "128"),
            ("lazy_refcounts", "yes"),
            ("compression_type", "lzma"),
            ("extended_l2", "1"),
            ("preallocation", "on"),
        ] {
            assert!(set(&mut options, name, value).is_err(), "{name} {value}");
        }
    }
}
