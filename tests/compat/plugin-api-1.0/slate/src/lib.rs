//! The slate plugin: its host half, with everything that contract 1.0 has but images in several files.

use instar_plugin_api::std_types::{ROption, RVec};
use instar_plugin_api::{
    export_plugin, BackingPointer, BitmapFacts, Context, CreateSpec, CreatedImage, ErrorCode, FactValue, Feature,
    Footprint, FormatPlugin, GuestModule, ImageFacts, ImageReader, ImageRegion, PluginError, ReservedRange, Role,
    Verdict, PROBE_CERTAIN, PROBE_NO,
};
use slate_driver::header::{next_content_id, Header, CLUSTER, HEADER_BYTES, MAGIC, NAME_AT};

static GUEST_MODULE: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/slate-module.elf"));

struct Slate;

fn refused<T>(text: impl Into<String>) -> Result<T, PluginError> {
    Err(PluginError::new(ErrorCode::UnsupportedFormat, text))
}

/// The header of a new image, which is not written yet, and whether its first cluster gets room.
fn planned(spec: &CreateSpec) -> Result<(Header, Vec<u8>, bool), PluginError> {
    let (mut content_id, mut reserve) = (1, false);
    for option in &spec.options {
        match (option.0.as_str(), option.1.as_str()) {
            ("content_id", value) => match value.parse() {
                Ok(value) => content_id = value,
                Err(_) => return refused("option content_id must be a number"),
            },
            ("reserve", "on") => reserve = true,
            ("reserve", "off") => reserve = false,
            ("reserve", _) => return refused("option reserve must be on or off"),
            (name, _) => return refused(format!("unknown option \"{name}\": there are content_id and reserve")),
        }
    }
    let (mut text, mut backing, mut parent_id) = (Vec::new(), (0, 0), 0);
    if let ROption::RSome(pointer) = &spec.backing {
        text = pointer.names().collect::<Vec<_>>().join(&0);
        backing.0 = text.len() as u64;
        text.extend_from_slice(pointer.format.as_ref().map_or(&[], |format| format.as_slice()));
        backing.1 = text.len() as u64 - backing.0;
        let facts = spec.backing_facts.as_ref().into_option().filter(|facts| facts.format.as_str() == Slate::NAME);
        let identity = facts.and_then(|facts| facts.identity.as_slice().try_into().ok());
        parent_id = identity.map_or(0, u64::from_le_bytes);
    }
    let header = Header { virtual_size: spec.virtual_size, backing, content_id, parent_id, announced: false };
    Header::parse(&header.bytes()).or_else(refused)?;
    Ok((header, text, reserve))
}

impl FormatPlugin for Slate {
    const NAME: &'static str = "slate";
    const DESCRIPTION: &'static str = "Format of the compatibility tests";
    const VERSION: &'static str = env!("CARGO_PKG_VERSION");
    const ALIASES: &'static [&'static str] = &["tablet"];
    const EXTENSIONS: &'static [&'static str] = &["slate"];
    const CREATE_OPTIONS: &'static [(&'static str, &'static str)] =
        &[("content_id", "number of the first content"), ("reserve", "on: room for a cluster from the beginning")];
    const CAN_CREATE: bool = true;

    fn probe(image: &ImageReader<'_>) -> Result<u32, PluginError> {
        Ok(if image.read_vec(0, 8)? == MAGIC { PROBE_CERTAIN } else { PROBE_NO })
    }

    fn next_identity(own: &ImageFacts, child: &ImageFacts) -> Vec<u8> {
        let id = |facts: &ImageFacts| facts.identity.as_slice().try_into().ok().map(u64::from_le_bytes);
        id(own).map_or_else(Vec::new, |own| next_content_id(own, id(child)).to_le_bytes().to_vec())
    }

    fn facts(image: &ImageReader<'_>) -> Result<ImageFacts, PluginError> {
        let mut bytes = [0; 64];
        image.read_exact_at(0, &mut bytes)?;
        let header = Header::parse(&bytes).map_err(|text| PluginError::new(ErrorCode::ParseFailed, text))?;
        let entries = image.length().saturating_sub(HEADER_BYTES) / 8;
        let facts = ImageFacts::new(Self::NAME, header.virtual_size, CLUSTER, image.length());
        let mut facts = facts.with_clusters_at_most(entries);
        facts.identity = header.content_id.to_le_bytes().to_vec().into();
        facts.features.push(Feature::number("content-id", header.content_id, true));
        facts.features.push(Feature::number("data-start", header.data_start(), false));
        let (length, format) = (header.backing.0 as usize, header.backing.1 as usize);
        if length > 0 {
            let format = (format > 0).then(|| image.read_vec(NAME_AT + length as u64, format)).transpose()?;
            let text = image.read_vec(NAME_AT, length)?;
            let mut names = text.split(|&byte| byte == 0).map(<[u8]>::to_vec);
            let mut pointer = BackingPointer::new(names.next().unwrap_or_default(), format);
            pointer.other_names = names.map(RVec::from).collect();
            if header.parent_id != 0 {
                facts.parent_identity = header.parent_id.to_le_bytes().to_vec().into();
                facts.parent_announced = header.announced;
            }
            let names = pointer.names().map(|name| String::from_utf8_lossy(name).into_owned());
            let parent = FactValue::record([
                ("id", header.parent_id.into()),
                ("announced", header.announced.into()),
                ("names", FactValue::list(names)),
            ]);
            facts.features.push(Feature::new("parent", parent, true));
            facts.backing = ROption::RSome(pointer);
        }
        Ok(facts)
    }

    fn verdict(role: Role, own: &ImageFacts, context: &Context<'_>) -> Verdict {
        if own.number("data-start").is_none() {
            return Verdict::refused(ErrorCode::PluginRefused, "these facts are not those of a slate image");
        }
        match role {
            Role::Write => {
                let arriving = context.arriving(own).units(CLUSTER).saturating_mul(CLUSTER);
                Verdict::supported(own.file_length.next_multiple_of(CLUSTER).saturating_add(arriving))
            }
            // What is emptied is as long as its header and table, which may be longer than the file.
            Role::Empty => Verdict::supported(own.number("data-start").unwrap_or(0)),
            Role::Read | Role::Below => Verdict::supported(0),
        }
    }

    fn notes(_: &ImageReader<'_>, facts: &ImageFacts) -> Result<Vec<String>, PluginError> {
        let others = facts.backing.as_ref().map_or(0, |backing| backing.other_names.len());
        Ok(if others > 0 { vec![format!("its parent may have {} names", others + 1)] } else { Vec::new() })
    }

    fn guest_module() -> GuestModule {
        GuestModule::source_and_sink(GUEST_MODULE)
    }

    fn create(spec: &CreateSpec) -> Result<CreatedImage, PluginError> {
        let (header, text, reserve) = planned(spec)?;
        let mut start = header.bytes().to_vec();
        start.extend(text);
        start.resize(HEADER_BYTES as usize, 0);
        let regions = vec![ImageRegion { offset: 0, bytes: start.into() }];
        let reserved = ReservedRange { offset: header.data_start(), length: CLUSTER, written: false };
        Ok(CreatedImage {
            length: header.data_start() + if reserve { CLUSTER } else { 0 },
            regions: regions.into(),
            reserved: reserve.then_some(reserved).into_iter().collect(),
            files: RVec::new(),
        })
    }

    fn measure(spec: &CreateSpec, _: &[BitmapFacts]) -> Result<Footprint, PluginError> {
        let (header, _, _) = planned(spec)?;
        Ok(Footprint {
            virtual_size: header.virtual_size,
            unit: CLUSTER,
            overhead: header.data_start(),
            thin: true,
            bitmaps: ROption::RNone,
        })
    }
}

export_plugin!(Slate);
