//! The plugin loader: what it loads, what it refuses, and that refusing never runs code of the library.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use instar::plugins::{IdentifyError, ImageRead, PluginFailure, Registry, SearchPath};
use instar_plugin_api::loading::{origin, ORIGIN_SYMBOL};
use instar_plugin_api::std_types::{ROption, RVec};
use instar_plugin_api::{Context, CreateSpec, ErrorCode, ImageFacts, Role, API_VERSION, ROLE_SINK, ROLE_SOURCE};
use instar_test_lab::{built, qcow2_library, qcow2_registry, PluginDir};
use std::io;
use std::os::unix::fs::{symlink, PermissionsExt};
use std::process::Command;

struct Bytes(Vec<u8>);

impl ImageRead for Bytes {
    fn length(&self) -> u64 {
        self.0.len() as u64
    }
    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<usize> {
        if self.0.starts_with(b"IOERROR") {
            return Err(io::Error::from_raw_os_error(5));
        }
        let rest = self.0.get(usize::try_from(offset).unwrap()..).unwrap_or(&[]);
        let length = rest.len().min(buffer.len());
        buffer[..length].copy_from_slice(&rest[..length]);
        Ok(length)
    }
}

fn chmod(path: &std::path::Path, mode: u32) {
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
}

fn panicking() -> (PluginDir, Registry) {
    let dir = PluginDir::new();
    dir.copy("panic", &built("instar_test_plugin_panicking"));
    dir.copy("qcow2", &qcow2_library());
    let registry = dir.load();
    assert_eq!(registry.plugins().len(), 2, "{:?}", registry.skipped());
    (dir, registry)
}

fn a_qcow2(registry: &Registry) -> Bytes {
    let spec = CreateSpec {
        virtual_size: 1 << 20,
        file_name: RVec::new(),
        backing: ROption::RNone,
        backing_facts: ROption::RNone,
        options: RVec::new(),
    };
    let image = registry.by_format("qcow2").unwrap().create(&spec).unwrap();
    let mut bytes = vec![0; usize::try_from(image.length).unwrap()];
    for region in &image.regions {
        let at = usize::try_from(region.offset).unwrap();
        bytes[at..at + region.bytes.len()].copy_from_slice(&region.bytes);
    }
    Bytes(bytes)
}

#[test]
fn the_real_plugin_loads_and_answers() {
    let (dir, registry) = qcow2_registry();
    let plugin = registry.by_format("qcow2").unwrap();
    assert_eq!(plugin.name(), "qcow2");
    assert_eq!(plugin.api_version(), API_VERSION);
    assert_eq!(plugin.roles(), ROLE_SOURCE | ROLE_SINK);
    assert_eq!(plugin.path(), dir.path().canonicalize().unwrap().join("libinstar_plugin_qcow2.so"));
    assert!(plugin.guest_module().elf.starts_with(b"\x7fELF"));
    let image = a_qcow2(&registry);
    let found = registry.identify(&image, None).unwrap();
    assert_eq!(found.facts.virtual_size, 1 << 20);
    assert_eq!(found.facts.cluster_size, 65536);
    let verdict = plugin.verdict(Role::Write, &found.facts, &Context::reading(None, false));
    assert_eq!(verdict.code, 0, "{}", verdict.reason);
    assert!(verdict.max_length > found.facts.file_length);
    assert!(registry.identify(&image, Some("qcow2")).is_ok());
}

/// What is built with this program is not compared with it at each start.
#[test]
fn the_bundled_plugins_say_that_their_types_are_the_engines() {
    for format in ["parallels", "qcow", "qcow2", "raw", "vdi", "vhdx", "vmdk", "vpc"] {
        // SAFETY: a bundled plugin.
        let library = unsafe { libloading::Library::new(built(&format!("instar_plugin_{format}"))) }.unwrap();
        // SAFETY: what this symbol is belongs to the contract.
        let said = unsafe { library.get::<extern "C" fn() -> u64>(ORIGIN_SYMBOL.as_bytes()) }.unwrap();
        assert_eq!(said(), origin(), "{format}");
    }
}

#[test]
fn two_plugins_are_two_plugins() {
    // `RootModule::load_from_file` would answer with the first one for both.
    let (_dir, registry) = panicking();
    assert_eq!(registry.by_format("qcow2").unwrap().name(), "qcow2");
    assert_eq!(registry.by_format("panic").unwrap().name(), "panic");
    assert_eq!(registry.by_format("alarm").unwrap().name(), "panic");
}

#[test]
fn a_wrong_hint_is_refused() {
    let (_dir, registry) = panicking();
    let image = a_qcow2(&registry);
    match registry.identify(&image, Some("panic")) {
        Err(IdentifyError::NotThisFormat { hint, actual }) => {
            assert_eq!((hint.as_str(), actual.as_deref()), ("panic", Some("qcow2")));
        }
        other => panic!("{other:?}"),
    }
    match registry.identify(&image, Some("raw")) {
        Err(error @ IdentifyError::UnknownFormat { .. }) => {
            let said = "unknown format 'raw': the plugins that are loaded are for panic, qcow2 (see `instar plugins`)";
            assert_eq!(error.to_string(), said);
        }
        other => panic!("{other:?}"),
    }
    let nothing = Bytes(vec![0; 4096]);
    assert!(matches!(registry.identify(&nothing, None), Err(IdentifyError::Unrecognised { .. })));
    assert!(matches!(
        registry.identify(&nothing, Some("qcow2")),
        Err(IdentifyError::NotThisFormat { actual: None, .. })
    ));
    let broken = Bytes(b"IOERROR".to_vec());
    assert!(matches!(
        registry.identify(&broken, None),
        Err(IdentifyError::Plugin(PluginFailure::Io { offset: 0, .. }))
    ));
}

#[test]
fn raw_is_taken_only_by_name_and_says_what_the_file_looks_like() {
    let (_dir, registry) = instar_test_lab::boxed_registry();
    let image = a_qcow2(&registry);
    let found = registry.identify(&image, Some("raw")).unwrap();
    assert_eq!(found.plugin.name(), "raw");
    let mark = found.mark.unwrap();
    assert_eq!((mark.format.as_str(), mark.certain, mark.bytes.start), ("qcow2", true, 0));
    assert!(mark.bytes.end >= 4 && mark.bytes.end <= 4096, "{mark:?}");
    assert_eq!(registry.identify(&image, None).unwrap().plugin.name(), "qcow2");
    let nothing = Bytes(vec![0; 4096]);
    let found = registry.identify(&nothing, Some("raw")).unwrap();
    assert_eq!((found.plugin.name(), found.mark), ("raw", None));
    assert!(matches!(registry.identify(&nothing, None), Err(IdentifyError::Unrecognised { .. })));
}

#[test]
fn a_format_that_is_not_known_is_said_with_those_that_are() {
    let (_dir, registry) = instar_test_lab::boxed_registry();
    let unknown = registry.identify(&Bytes(vec![7; 4096]), None).unwrap_err();
    let text = unknown.to_string();
    assert!(text.starts_with("begins like no known format (qcow2)"), "{text}");
    let damaged = registry.identify(&Bytes(vec![7; 4096]), Some("qcow2")).unwrap_err().to_string();
    assert!(damaged.contains("the qcow2 image that it is said to be: if it used to be one, its header"), "{damaged}");
    for version in [1, 2] {
        let luks = Bytes([&b"LUKS\xba\xbe\0"[..], &[version], &[0; 4096]].concat());
        for hint in [None, Some("qcow2"), Some("luks")] {
            let error = registry.identify(&luks, hint).unwrap_err();
            assert_eq!(error.code(), ErrorCode::LuksUnsupported, "{error}");
            assert!(error.to_string().contains("encrypted with LUKS"), "{error}");
        }
        // A guest that encrypts its disk.
        assert_eq!(registry.identify(&luks, Some("raw")).unwrap().mark, None);
    }
}

#[test]
fn a_panic_and_a_lie_are_errors() {
    let (_dir, registry) = panicking();
    let facts = |word: &str| {
        let image = Bytes(format!("PANIC {word}").into_bytes());
        registry.identify(&image, Some("panic")).map(|found| found.facts)
    };
    for (word, expected) in [
        ("inprobe ", "plugin panicked: probe of 14 bytes"),
        ("toosure ", "scored 101"),
        ("infacts ", "plugin panicked: index out of bounds"),
        ("lieforma", "reports the format \"qcow2\""),
        ("liesize ", "beyond 2^63"),
        ("longtext", "xxxx"),
    ] {
        match facts(word) {
            Err(IdentifyError::Plugin(failure @ PluginFailure::Faulty { .. })) => {
                let text = failure.to_string();
                assert!(text.contains(expected) && !text.contains('\n') && text.len() < 600, "{word}: {text}");
            }
            other => panic!("{word}: {other:?}"),
        }
    }
    match facts("readall ") {
        Err(IdentifyError::Plugin(failure @ PluginFailure::Refused { .. })) => {
            assert!(failure.to_string().contains("more than 8388608 bytes"), "{failure}");
        }
        // The image is shorter than the budget, and reads are charged by what was asked for.
        other => panic!("{other:?}"),
    }
    let good = facts("nothing ").unwrap();
    let context = Context::reading(Some(&good), true);
    let plugin = registry.by_format("panic").unwrap();
    let verdict = plugin.verdict(Role::Empty, &ImageFacts { dirty: true, ..good.clone() }, &context);
    assert!(verdict.code != 0 && verdict.reason.contains("in verdict"));
    assert_eq!(plugin.verdict(Role::Empty, &good, &context).code, 22);
    let spec = CreateSpec {
        virtual_size: 0,
        file_name: RVec::new(),
        backing: ROption::RNone,
        backing_facts: ROption::RNone,
        options: RVec::new(),
    };
    assert!(plugin.create(&spec).unwrap_err().to_string().contains("in create"));
    assert!(plugin.measure(&spec, &[]).unwrap_err().to_string().contains("cannot measure"));
    let measured =
        registry.by_format("qcow2").unwrap().measure(&CreateSpec { virtual_size: 1000, ..spec }, &[]).unwrap();
    assert_eq!((measured.virtual_size, measured.unit), (1024, 65536));
}

#[test]
fn a_truncated_library_is_refused_wherever_it_is_cut() {
    let whole = std::fs::read(qcow2_library()).unwrap();
    let n = whole.len();
    let cuts = [0, 1, 16, 63, 64, 65, 1000, 4096, n / 10, n / 4, n / 2, n * 3 / 4, n - 4096, n - 64, n - 1];
    for cut in cuts {
        let dir = PluginDir::new();
        dir.put("cut", &whole[..cut]);
        let reason = dir.reason();
        assert!(reason.contains("ELF") || reason.contains("damaged"), "{cut}: {reason}");
    }
}

#[test]
fn a_library_with_holes_in_its_headers_does_not_kill_the_process() {
    let whole = std::fs::read(qcow2_library()).unwrap();
    let section_headers = u64::from_le_bytes(whole[0x28..0x30].try_into().unwrap());
    for (at, bytes) in [
        (0x20, u64::MAX.to_le_bytes()),
        (0x28, u64::MAX.to_le_bytes()),
        (0x28, (section_headers + 1).to_le_bytes()),
        (64 + 8, (1u64 << 62).to_le_bytes()),
        (64 + 56 + 8, (1u64 << 62).to_le_bytes()),
    ] {
        let mut broken = whole.clone();
        broken[at..at + 8].copy_from_slice(&bytes);
        let dir = PluginDir::new();
        dir.put("broken", &broken);
        let reason = dir.reason();
        assert!(reason.contains("damaged") || reason.contains("ELF"), "{at:#x}: {reason}");
    }
}

#[test]
fn what_is_no_library_for_this_machine_is_refused() {
    let whole = std::fs::read(qcow2_library()).unwrap();
    let mut arm = whole.clone();
    arm[18..20].copy_from_slice(&183u16.to_le_bytes());
    let mut relocatable = whole.clone();
    relocatable[16..18].copy_from_slice(&1u16.to_le_bytes());
    let mut elf32 = whole;
    elf32[4] = 1;
    for (bytes, words) in [
        (b"#!/bin/sh\n".repeat(100), "not an ELF file"),
        (arm, "another machine"),
        (relocatable, "not a shared library"),
        (elf32, "not an ELF file for 64-bit"),
    ] {
        let dir = PluginDir::new();
        dir.put("other", &bytes);
        assert!(dir.reason().contains(words), "{}", dir.reason());
    }
    let dir = PluginDir::new();
    std::fs::create_dir(dir.path().join("libinstar_plugin_dir.so")).unwrap();
    assert!(dir.reason().contains("not a regular file"));
    let dir = PluginDir::new();
    let fifo = dir.path().join("libinstar_plugin_fifo.so");
    assert!(Command::new("mkfifo").arg("-m").arg("644").arg(&fifo).status().unwrap().success());
    assert!(dir.reason().contains("not a regular file"));
}

#[test]
fn constructors_of_an_unrelated_library_do_not_run() {
    let dir = PluginDir::new();
    let mark = dir.path().join("mark");
    let source = dir.path().join("unrelated.c");
    let code = format!(
        "#include <stdio.h>\n__attribute__((constructor)) static void run(void) {{ fopen(\"{}\", \"w\"); }}\n",
        mark.display()
    );
    std::fs::write(&source, code).unwrap();
    let library = dir.path().join("libinstar_plugin_unrelated.so");
    let compiled = Command::new("cc").args(["-shared", "-fPIC", "-o"]).arg(&library).arg(&source).status();
    assert!(compiled.unwrap().success());
    chmod(&library, 0o644);
    assert!(dir.reason().contains("not an instar plugin"), "{}", dir.reason());
    assert!(!mark.exists());
}

#[test]
fn what_others_may_change_is_refused() {
    let dir = PluginDir::new();
    let library = dir.copy("qcow2", &qcow2_library());
    for mode in [0o646, 0o664, 0o666, 0o777] {
        chmod(&library, mode);
        assert!(dir.reason().contains("the file is writable by others"), "{}", dir.reason());
    }
    chmod(&library, 0o600);
    assert_eq!(dir.load().plugins().len(), 1);
    for mode in [0o757, 0o775, 0o777, 0o1777] {
        chmod(dir.path(), mode);
        assert!(dir.reason().contains("the directory is writable by others"), "{}", dir.reason());
    }
    chmod(dir.path(), 0o755);
    let open = dir.path().join("open");
    let inner = open.join("inner");
    std::fs::create_dir_all(&inner).unwrap();
    std::fs::copy(&library, inner.join("libinstar_plugin_qcow2.so")).unwrap();
    chmod(&open, 0o777);
    let registry = Registry::load(&SearchPath::of(vec![inner.clone()]));
    assert!(registry.plugins().is_empty());
    assert!(registry.skipped()[0].reason.contains("above it is writable by others"), "{:?}", registry.skipped());
    chmod(&open, 0o1777);
    assert_eq!(Registry::load(&SearchPath::of(vec![inner])).plugins().len(), 1);
}

#[test]
fn what_belongs_to_another_user_is_refused() {
    let dir = PluginDir::new();
    let library = dir.copy("qcow2", &qcow2_library());
    // Only root can give files away.
    if std::os::unix::fs::chown(&library, Some(65534), None).is_ok() {
        assert!(dir.reason().contains("belongs to another user (uid 65534)"), "{}", dir.reason());
    }
}

#[test]
fn a_link_is_followed_into_a_trusted_directory_only() {
    let real = PluginDir::new();
    let library = real.copy("qcow2", &qcow2_library());
    let dir = PluginDir::new();
    symlink(&library, dir.path().join("libinstar_plugin_link.so")).unwrap();
    assert_eq!(dir.load().plugins().len(), 1);
    chmod(real.path(), 0o777);
    assert!(dir.reason().contains("writable by others"));
}

#[test]
fn two_plugins_for_one_format_are_both_refused() {
    let dir = PluginDir::new();
    let a = dir.copy("a", &qcow2_library());
    let b = dir.copy("b", &qcow2_library());
    let registry = dir.load();
    assert!(registry.plugins().is_empty());
    assert_eq!(registry.skipped().len(), 2);
    let reasons = format!("{:?}", registry.skipped());
    assert!(reasons.contains(a.to_str().unwrap()) && reasons.contains(b.to_str().unwrap()), "{reasons}");
    let error = registry.identify(&Bytes(b"QFI\xfb".to_vec()), Some("qcow2")).unwrap_err();
    let text = error.to_string();
    assert!(text.contains("libinstar_plugin_a.so") && text.contains("libinstar_plugin_b.so"), "{text}");
}

#[test]
fn earlier_directories_hide_later_ones_and_one_file_is_loaded_once() {
    let (first, second) = (PluginDir::new(), PluginDir::new());
    let kept = first.copy("qcow2", &qcow2_library());
    second.copy("qcow2", &qcow2_library());
    let search = SearchPath::of(vec![first.path().to_owned(), second.path().to_owned(), first.path().join(".")]);
    let registry = Registry::load(&search);
    assert_eq!(registry.plugins().len(), 1);
    assert_eq!(registry.plugins()[0].path(), kept.canonicalize().unwrap());
    assert_eq!(registry.skipped().len(), 1, "{:?}", registry.skipped());
    assert!(registry.skipped()[0].reason.contains("hidden by"));

    let missing = Registry::load(&SearchPath::of(vec![first.path().join("missing")]));
    assert!(missing.skipped()[0].reason.contains("does not exist"));
}

#[test]
fn versions_are_compared_before_layouts() {
    let dir = PluginDir::new();
    dir.copy("newer", &built("instar_test_plugin_newer_api"));
    let reason = dir.reason();
    assert!(reason.contains("99.1.0") && reason.contains("update instar"), "{reason}");

    let dir = PluginDir::new();
    dir.copy("layout", &built("instar_test_plugin_other_layout"));
    let reason = dir.reason();
    assert!(reason.contains("types differ") && reason.contains("1.0.0"), "{reason}");
}

/// A figure for people (`--nocapture`, alone, in release): what loading costs a process that starts.
#[test]
fn loading_is_quick() {
    let dir = PluginDir::new();
    dir.copy("qcow2", &qcow2_library());
    dir.copy("raw", &instar_test_lab::raw_library());
    let start = std::time::Instant::now();
    let registry = dir.load();
    let took = start.elapsed();
    assert_eq!(registry.plugins().len(), 2);
    println!("loading two plugins took {took:?}");
    // A start-up that takes long is a bug, also on a slow machine and without optimization.
    assert!(took < std::time::Duration::from_millis(500), "{took:?}");
}
