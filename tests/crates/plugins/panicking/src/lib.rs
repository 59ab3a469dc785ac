//! A plugin for the format `panic` that misbehaves as the second word of the image says.

#![allow(clippy::panic)]

use instar_plugin_api::{
    export_plugin, BackingPointer, Context, CreateSpec, CreatedImage, FormatPlugin, GuestModule, ImageFacts,
    ImageReader, PluginError, Role, Verdict, PROBE_CERTAIN, PROBE_NO,
};

struct Panicking;

fn word(image: &ImageReader<'_>) -> Result<Vec<u8>, PluginError> {
    image.read_vec(6, 8)
}

impl FormatPlugin for Panicking {
    const NAME: &'static str = "panic";
    const DESCRIPTION: &'static str = "misbehaves on demand";
    const VERSION: &'static str = env!("CARGO_PKG_VERSION");
    const ALIASES: &'static [&'static str] = &["alarm"];

    fn probe(image: &ImageReader<'_>) -> Result<u32, PluginError> {
        if image.read_vec(0, 6)? != b"PANIC " {
            return Ok(PROBE_NO);
        }
        match word(image)?.as_slice() {
            b"inprobe " => panic!("probe of {} bytes", image.length()),
            b"toosure " => Ok(101),
            _ => Ok(PROBE_CERTAIN),
        }
    }

    fn facts(image: &ImageReader<'_>) -> Result<ImageFacts, PluginError> {
        let mut facts = ImageFacts::new("panic", 512, 0, image.length());
        match word(image)?.as_slice() {
            b"infacts " => {
                let empty: &[u8] = &[];
                // An index out of bounds that no compiler sees.
                facts.virtual_size = u64::from(empty[usize::try_from(image.length()).unwrap_or(0)]);
            }
            b"lieforma" => facts.format = "qcow2".into(),
            b"liesize " => facts.virtual_size = u64::MAX,
            b"readall " => loop {
                image.read_vec(0, 1 << 20)?;
            },
            // An image, what is below it, and something else, by an identity that proves it or does not.
            b"parent  " => facts.identity = vec![7; 16].into(),
            b"stranger" => facts.identity = vec![8; 16].into(),
            word @ (b"child   " | b"unproven" | b"nameless") => {
                let name = if word == b"nameless" { Vec::new() } else { b"gone".to_vec() };
                facts.backing = Some(BackingPointer::new(name, Some(b"panic".to_vec()))).into();
                facts.parent_identity = vec![7; 16].into();
                facts.parent_identity_unique = word != b"unproven";
            }
            // Nothing is recorded of a parent, and the operator may know one.
            b"unsaid  " => {
                facts.backing = Some(BackingPointer::new(Vec::new(), None)).into();
                facts.parent_identity_unique = true;
            }
            b"longtext" => panic!("{}", "x".repeat(100_000)),
            _ => {}
        }
        Ok(facts)
    }

    fn verdict(_: Role, own: &ImageFacts, _: &Context<'_>) -> Verdict {
        if own.dirty {
            panic!("in verdict");
        }
        Verdict { code: 12345, reason: "an unknown code".into(), max_length: 0 }
    }

    fn guest_module() -> GuestModule {
        GuestModule::sink_only(b"\x7fELF")
    }

    fn create(_: &CreateSpec) -> Result<CreatedImage, PluginError> {
        panic!("in create");
    }
}

export_plugin!(Panicking);
