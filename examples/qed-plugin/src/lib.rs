//! The QED plugin: its host half, and the bytes of its guest half.

use instar_plugin_api::std_types::ROption;
use instar_plugin_api::{
    export_plugin, BackingPointer, Context, ErrorCode, Feature, FormatPlugin, GuestModule, ImageFacts, ImageReader,
    PluginError, Role, Verdict, PROBE_CERTAIN, PROBE_NO,
};
use qed_driver::header::{Header, HEADER_BYTES, MAGIC, NEED_CHECK, NO_PROBE};

static GUEST_MODULE: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/qed-module.elf"));

/// The fact that says how many bytes a table takes.
const TABLE_BYTES: &str = "table-bytes";

struct Qed;

impl FormatPlugin for Qed {
    const NAME: &'static str = "qed";
    const DESCRIPTION: &'static str = "QEMU enhanced disk";
    const VERSION: &'static str = env!("CARGO_PKG_VERSION");
    const EXTENSIONS: &'static [&'static str] = &["qed"];

    fn probe(image: &ImageReader<'_>) -> Result<u32, PluginError> {
        let mut magic = [0; 4];
        image.read_at(0, &mut magic)?;
        Ok(if magic == MAGIC { PROBE_CERTAIN } else { PROBE_NO })
    }

    fn facts(image: &ImageReader<'_>) -> Result<ImageFacts, PluginError> {
        let mut bytes = [0; HEADER_BYTES];
        image.read_exact_at(0, &mut bytes)?;
        let header = Header::parse(&bytes).map_err(|text| PluginError::new(ErrorCode::ParseFailed, text))?;
        let facts = ImageFacts::new(Self::NAME, header.image_size, header.cluster_size, image.length());
        // An entry of 8 bytes stands for each cluster that the file holds.
        let mut facts = facts.with_clusters_at_most(image.length() / 8);
        facts.dirty = header.features & NEED_CHECK != 0;
        facts.features.push(Feature::number(TABLE_BYTES, header.table_bytes, false));
        if let Some((offset, length)) = header.backing {
            let raw = header.features & NO_PROBE != 0;
            let format = raw.then(|| b"raw".to_vec());
            facts.backing = ROption::RSome(BackingPointer::new(image.read_vec(offset, length)?, format));
        }
        Ok(facts)
    }

    fn verdict(role: Role, own: &ImageFacts, context: &Context<'_>) -> Verdict {
        if role != Role::Write {
            return Verdict::supported(0);
        }
        // Every cluster that arrives may be new, and every table: no more of them than the disk has room for.
        let table = own.number(TABLE_BYTES).unwrap_or(0);
        let coverage = (table / 8).saturating_mul(own.cluster_size).max(1);
        let cover = |part: u64, unit: u64| part.div_ceil(unit.max(1)).saturating_mul(unit);
        let data = context.arriving(own).units(own.cluster_size).saturating_mul(own.cluster_size);
        let tables = own.virtual_size.div_ceil(coverage).saturating_mul(table);
        let whole = cover(own.file_length, own.cluster_size);
        Verdict::supported(whole.saturating_add(data).saturating_add(tables))
    }

    fn guest_module() -> GuestModule {
        GuestModule::source_and_sink(GUEST_MODULE)
    }
}

export_plugin!(Qed);
