//! The slate plugin: its host half, with everything that contract 1.0 has but images in several files.

use instar_plugin_api::std_types::{ROption, RVec};
use instar_plugin_api::{
    export_plugin, BackingPointer, CommitRole, CreateSpec, CreatedImage, ErrorCode, Feature, FormatPlugin, GuestModule,
    ImageFacts, ImageReader, ImageRegion, PluginError, Verdict, PROBE_CERTAIN, PROBE_NO,
};
use slate_driver::header::{Header, CLUSTER, HEADER_BYTES, MAGIC, NAME_AT};

static GUEST_MODULE: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/slate-module.elf"));

const CONTENT_ID: &str = "content-id";
const PARENT_ID: &str = "parent-id";

struct Slate;

fn number(facts: &ImageFacts, name: &str) -> Option<u64> {
    facts.feature(name)?.parse().ok()
}

fn refused<T>(text: impl Into<String>) -> Result<T, PluginError> {
    Err(PluginError::new(ErrorCode::UnsupportedFormat, text))
}

impl FormatPlugin for Slate {
    const NAME: &'static str = "slate";
    const DESCRIPTION: &'static str = "Format of the compatibility tests";
    const VERSION: &'static str = env!("CARGO_PKG_VERSION");
    const ALIASES: &'static [&'static str] = &["tablet"];
    const EXTENSIONS: &'static [&'static str] = &["slate"];
    const CREATE_OPTIONS: &'static [(&'static str, &'static str)] = &[("content_id", "number of the first content")];
    const CAN_CREATE: bool = true;

    fn probe(image: &ImageReader<'_>) -> Result<u32, PluginError> {
        Ok(if image.read_vec(0, 8)? == MAGIC { PROBE_CERTAIN } else { PROBE_NO })
    }

    fn facts(image: &ImageReader<'_>) -> Result<ImageFacts, PluginError> {
        let mut bytes = [0; 64];
        image.read_exact_at(0, &mut bytes)?;
        let header = Header::parse(&bytes).map_err(|text| PluginError::new(ErrorCode::ParseFailed, text))?;
        let mut facts = ImageFacts::new(Self::NAME, header.virtual_size, CLUSTER, image.length());
        facts.features.push(Feature::number(CONTENT_ID, header.content_id, true));
        facts.features.push(Feature::number(PARENT_ID, header.parent_id, true));
        let (name, format) = (header.backing.0 as usize, header.backing.1 as usize);
        if name > 0 {
            let format = (format > 0).then(|| image.read_vec(NAME_AT + name as u64, format)).transpose()?;
            let name = image.read_vec(NAME_AT, name)?.into();
            facts.backing = ROption::RSome(BackingPointer { name, format: format.map(RVec::from).into() });
        }
        Ok(facts)
    }

    fn verdict(role: CommitRole, own: &ImageFacts, other: &ImageFacts) -> Verdict {
        if role == CommitRole::Backing {
            let clusters = own.virtual_size.div_ceil(CLUSTER).saturating_mul(CLUSTER);
            return Verdict::supported(own.file_length.next_multiple_of(CLUSTER).saturating_add(clusters));
        }
        let is_below = role == CommitRole::Overlay && other.format.as_str() == Self::NAME;
        match (number(own, PARENT_ID), number(other, CONTENT_ID).filter(|_| is_below)) {
            (Some(parent), Some(id)) if parent != id && parent != id.wrapping_add(1) => Verdict::refused(
                ErrorCode::PluginRefused,
                format!("its parent had the content ID {parent}, and has {id}: it was changed in between"),
            ),
            _ => Verdict::supported(0),
        }
    }

    fn guest_module() -> GuestModule {
        GuestModule::source_and_sink(GUEST_MODULE)
    }

    fn create(spec: &CreateSpec) -> Result<CreatedImage, PluginError> {
        let mut content_id = 1;
        for option in &spec.options {
            match (option.0.as_str(), option.1.parse()) {
                ("content_id", Ok(value)) => content_id = value,
                ("content_id", Err(_)) => return refused("option content_id must be a number"),
                (name, _) => return refused(format!("unknown option \"{name}\": the only one is content_id")),
            }
        }
        let mut names = Vec::new();
        let mut backing = (0, 0);
        if let ROption::RSome(pointer) = &spec.backing {
            names.extend_from_slice(&pointer.name);
            backing.0 = names.len() as u64;
            names.extend_from_slice(pointer.format.as_ref().map_or(&[], |format| format.as_slice()));
            backing.1 = names.len() as u64 - backing.0;
        }
        let parent = spec.backing_facts.as_ref().into_option().and_then(|facts| number(facts, CONTENT_ID));
        let header = Header { virtual_size: spec.virtual_size, backing, content_id, parent_id: parent.unwrap_or(0) };
        let bytes = header.bytes();
        Header::parse(&bytes).or_else(refused)?;
        let mut start = bytes.to_vec();
        start.extend(names);
        start.resize(HEADER_BYTES as usize, 0);
        let regions = vec![ImageRegion { offset: 0, bytes: start.into() }];
        Ok(CreatedImage { length: header.data_start(), regions: regions.into(), files: RVec::new() })
    }
}

export_plugin!(Slate);
