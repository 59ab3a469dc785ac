//! A plugin for the format `faulty` that misbehaves where and how `INSTAR_TEST_FAULT=CALL:HOW` says, and does nothing wrong
//! without it. Its images begin with `FAULTY`.

#![allow(clippy::panic, non_local_definitions)]

use instar_plugin_api::std_types::{RResult, RString, RVec, Tuple2};
use instar_plugin_api::v1::{PluginManifest, PluginModuleV1, PluginModuleV1_Ref};
use instar_plugin_api::{
    BackingPointer, Context, CreateSpec, CreatedImage, ErrorCode, FactValue, Feature, FormatPlugin, GuestModule,
    ImageFacts, ImageFile, ImageReader, ImageRegion, PluginError, ReservedRange, Role, Verdict, PROBE_CERTAIN,
    PROBE_NO,
};

use abi_stable::library::{CheckTypeLayout, LibHeader, RootModuleResult};
use abi_stable::prefix_type::PrefixTypeTrait;

struct Faulty;

/// How to misbehave in `call`, if it is its turn. `panic` is the same everywhere, and so is an error that is far too long and
/// writes to the terminal.
fn fault(call: &str) -> String {
    let fault = std::env::var("INSTAR_TEST_FAULT").unwrap_or_default();
    let how = match fault.split_once(':') {
        Some((name, how)) if name == call => how.to_owned(),
        _ => String::new(),
    };
    if how == "panic" {
        panic!("in {call}");
    }
    how
}

fn errors(how: &str) -> Result<(), PluginError> {
    match how {
        "error" => {
            Err(PluginError::new(ErrorCode::ParseFailed, format!("\x1b[2J{}\nsecond line", "x".repeat(100_000))))
        }
        "no-error" => Err(PluginError { code: 0, message: "fine".into() }),
        "unknown-error" => Err(PluginError { code: 9999, message: "who knows".into() }),
        _ => Ok(()),
    }
}

impl FormatPlugin for Faulty {
    const NAME: &'static str = "faulty";
    const DESCRIPTION: &'static str = "misbehaves on demand";
    const VERSION: &'static str = env!("CARGO_PKG_VERSION");
    const CAN_CREATE: bool = true;

    fn probe(image: &ImageReader<'_>) -> Result<u32, PluginError> {
        if image.read_vec(0, 6)? != b"FAULTY" {
            return Ok(PROBE_NO);
        }
        let how = fault("probe");
        errors(&how)?;
        Ok(if how == "score" { u32::MAX } else { PROBE_CERTAIN })
    }

    fn files(_: &ImageReader<'_>) -> Result<Vec<ImageFile>, PluginError> {
        let how = fault("files");
        errors(&how)?;
        let file = |name: &[u8]| ImageFile {
            name: RVec::from(name),
            other_names: RVec::new(),
            grows: false,
            format: "raw".into(),
        };
        Ok(match how.as_str() {
            "many" => vec![file(b"x"); 100_000],
            "empty" => vec![file(b"")],
            "zero" => vec![file(b"a\0b")],
            "long" => vec![file(&[b'x'; 100_000])],
            "outside" => vec![file(b"/etc/passwd")],
            _ => Vec::new(),
        })
    }

    fn facts(image: &ImageReader<'_>) -> Result<ImageFacts, PluginError> {
        let how = fault("facts");
        errors(&how)?;
        let mut facts = ImageFacts::new(Self::NAME, 1 << 20, 65536, image.length());
        let backing = |name: Vec<u8>, format: Vec<u8>| BackingPointer::new(name, Some(format));
        facts.backing = Some(backing(b"base.qcow2".to_vec(), b"qcow2".to_vec())).into();
        let feature = |name: &str, value: FactValue| Feature::new(name, value, true);
        let nested = |depth: usize| (0..depth).fold(FactValue::Number(1), |value, _| FactValue::list([value]));
        match how.as_str() {
            "name" => facts.format = "qcow2".into(),
            "long-name" => facts.format = "x".repeat(1 << 20).into(),
            "size" => facts.virtual_size = u64::MAX,
            "file-length" => facts.file_length += 1,
            "cluster-size" => facts.cluster_size = 3 << 16,
            "huge-cluster-size" => facts.cluster_size = 1 << 63,
            "long-backing" => facts.backing = Some(backing(vec![b'b'; 5000], b"raw".to_vec())).into(),
            "long-format" => facts.backing = Some(backing(b"base".to_vec(), vec![b'f'; 5000])).into(),
            "nested" => facts.features.push(feature("ratio", nested(4))),
            "deeply-nested" => facts.features.push(feature("ratio", nested(1000))),
            "long-text" => facts.features.push(feature("ratio", "x".repeat(9 << 20).into())),
            "long-list" => facts.features.push(feature("ratio", FactValue::list(vec![true; 1 << 20]))),
            "long-field" => {
                let record = FactValue::record([("x".repeat(9 << 20).as_str(), true.into())]);
                facts.features.push(feature("ratio", record));
            }
            "long-values" => facts.features = vec![feature("ratio", "x".repeat(1 << 20).into()); 9].into(),
            "no-feature-name" => facts.features.push(feature("", true.into())),
            "feature-name" => facts.features.push(feature("a\nb\x1b[2J", true.into())),
            "many-features" => facts.features = vec![feature("a", true.into()); 100_000].into(),
            "read" => loop {
                image.read_vec(0, 1 << 20)?;
            },
            _ => {}
        }
        Ok(facts)
    }

    fn notes(_: &ImageReader<'_>, _: &ImageFacts) -> Result<Vec<String>, PluginError> {
        let how = fault("notes");
        errors(&how)?;
        Ok(match how.as_str() {
            "many" => vec!["x".to_owned(); 17],
            "long" => vec!["x".repeat(301)],
            "lines" => vec!["one\ntwo".to_owned()],
            "empty" => vec![String::new()],
            _ => vec!["nothing is wrong".to_owned()],
        })
    }

    fn verdict(_: Role, _: &ImageFacts, _: &Context<'_>) -> Verdict {
        match fault("verdict").as_str() {
            "code" => Verdict { code: 12345, reason: "an unknown code".into(), max_length: 0 },
            "reason" => Verdict::refused(ErrorCode::PluginRefused, format!("\x1b[2J{}\nsecond", "x".repeat(100_000))),
            // Its guest module is no module.
            _ => Verdict::supported(u64::MAX),
        }
    }

    fn guest_module() -> GuestModule {
        let mut module = GuestModule::source_and_sink(b"\x7fELF");
        match fault("guest_module").as_str() {
            "elf" => module = GuestModule::source_and_sink(b"MZ"),
            "none" => module.roles = 0,
            "roles" => module.roles = 8,
            "major" => module.abi_major = 2,
            "minor" => module.least_minor = 99,
            "newer" => module.abi_minor = 99,
            "old" => module.abi_major = 0,
            _ => {}
        }
        module
    }

    fn create(spec: &CreateSpec) -> Result<CreatedImage, PluginError> {
        let how = fault("create");
        errors(&how)?;
        let region = |offset| vec![ImageRegion { offset, bytes: b"FAULTY".to_vec().into() }].into();
        let _ = spec;
        let reserved = |offset| vec![ReservedRange { offset, length: 512, written: true }].into();
        Ok(match how.as_str() {
            "reserved" => CreatedImage { length: 512, regions: RVec::new(), reserved: reserved(1), files: RVec::new() },
            "outside" => CreatedImage { length: 512, regions: region(510), reserved: RVec::new(), files: RVec::new() },
            "overflow" => {
                CreatedImage { length: 512, regions: region(u64::MAX), reserved: RVec::new(), files: RVec::new() }
            }
            "huge" => CreatedImage { length: u64::MAX, regions: region(0), reserved: RVec::new(), files: RVec::new() },
            _ => CreatedImage { length: 512, regions: region(0), reserved: RVec::new(), files: RVec::new() },
        })
    }
}

/// What no implementation of the trait can say.
extern "C" fn manifest() -> RResult<PluginManifest, PluginError> {
    let how = std::env::var("INSTAR_TEST_FAULT").unwrap_or_default();
    let mut manifest = PluginManifest {
        name: Faulty::NAME.into(),
        description: Faulty::DESCRIPTION.into(),
        version: Faulty::VERSION.into(),
        aliases: RVec::new(),
        extensions: RVec::new(),
        create_options: RVec::new(),
        can_create: true,
    };
    match how.as_str() {
        "manifest:name" => manifest.name = "Not A Name".into(),
        "manifest:long-name" => manifest.name = "x".repeat(1 << 20).into(),
        "manifest:reserved" => manifest.name = "core".into(),
        "manifest:alias" => manifest.aliases.push("a/b".into()),
        "manifest:aliases" => manifest.aliases = (0..1000).map(|n| RString::from(format!("a{n}"))).collect(),
        "manifest:taken" => manifest.aliases.push("raw".into()),
        "manifest:version" => manifest.version = "1\n2".into(),
        "manifest:description" => manifest.description = "x".repeat(1 << 20).into(),
        "manifest:option" => manifest.create_options.push(Tuple2("\x1b[2J".into(), "help".into())),
        "manifest:error" => return RResult::RErr(PluginError::new(ErrorCode::ParseFailed, "it does not want to")),
        _ => {}
    }
    RResult::ROk(manifest)
}

extern "C" fn constructor() -> RootModuleResult {
    // For what it does besides: from here on panics are silent.
    let _ = instar_plugin_api::__private::constructor::<Faulty>();
    let module = PluginModuleV1 { manifest, ..PluginModuleV1::of::<Faulty>() }.leak_into_prefix();
    // SAFETY: the header below carries the layout of `PluginModuleV1_Ref`.
    RResult::ROk(unsafe { module.0.cast() })
}

/// As `export_plugin!` makes it, around a manifest of its own.
#[export_name = "_1as_0lib_1header_0root_bmodule_bloader"]
pub static HEADER: LibHeader = {
    // SAFETY: `constructor` returns a `PluginModuleV1_Ref`.
    unsafe { LibHeader::from_constructor::<PluginModuleV1_Ref>(constructor, CheckTypeLayout::Yes) }
};
