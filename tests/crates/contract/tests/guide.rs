//! `docs/plugins.md` has everything: every callback, the template as it is, the reasons as they are printed.

#![allow(clippy::unwrap_used, clippy::panic)]

use instar_contract_tests::{api, repository};
use instar_guest_sdk::abi::{MODULE_ABI_MAJOR, MODULE_ABI_MINOR};
use std::collections::BTreeSet;
use std::fs::read_to_string;

fn guide() -> String {
    read_to_string(repository().join("docs/plugins.md")).unwrap()
}

/// Whether a text has a name as code: `name`, `name(…)`, `Owner::name`.
fn names(text: &str, name: &str) -> bool {
    let code = text.split('`').skip(1).step_by(2);
    code.flat_map(|code| code.split(|c: char| !c.is_alphanumeric() && c != '_')).any(|word| word == name)
}

#[test]
fn every_callback_is_named() {
    let guide = guide();
    // Code blocks do not explain anything.
    let prose: String = guide.split("```").step_by(2).collect();
    let man = read_to_string(repository().join("docs/man/instar-plugin.7")).unwrap();
    let explained = [
        "Batch",
        "BlockIo",
        "Builder",
        "Content",
        "Context",
        "Crashes",
        "DeviceConfig",
        "Extent",
        "Extents",
        "Footprint",
        "FormatDriver",
        "FormatPlugin",
        "GuestModule",
        "ImageKit",
        "ImageReader",
        "Incoming",
        "ReadBelow",
        "ReadImage",
        "Request",
        "Sink",
        "Source",
        "Verdict",
    ];
    let callbacks = ["FormatDriver", "FormatPlugin", "Sink", "Source"];
    let (mut missing, mut count) = (Vec::new(), 0);
    for folder in ["plugin-api", "guest/abi", "guest/sdk"] {
        for (full, _) in api(&repository().join(folder)).unwrap() {
            let Some((owner, name)) = full.split_once("::") else { continue };
            // Made by the SDK, for the SDK.
            if !explained.contains(&owner) || full == "DeviceConfig::default" {
                continue;
            }
            count += 1;
            if !names(&prose, name) {
                missing.push(format!("docs/plugins.md: {full}"));
            }
            let in_man = || man.split(|c: char| !c.is_alphanumeric() && c != '_').any(|word| word == name);
            if callbacks.contains(&owner) && !in_man() {
                missing.push(format!("docs/man/instar-plugin.7: {full}"));
            }
        }
    }
    assert_eq!(missing, Vec::<String>::new());
    assert!(count > 50, "{count} names were looked for");
    assert!(!names(&prose, "frobnicate"));
}

#[test]
fn it_names_the_versions_of_today() {
    let manifest = read_to_string(repository().join("plugin-api/Cargo.toml")).unwrap();
    let version = manifest.lines().find_map(|line| line.strip_prefix("version = \"")).unwrap();
    let api = version.rsplit_once('.').unwrap().0;
    let module = format!("{MODULE_ABI_MAJOR}.{MODULE_ABI_MINOR}");
    let guide = guide();
    assert!(guide.contains(&format!("`instar-plugin-api` | {api} |")), "{api}");
    assert!(guide.contains(&format!("of `instar-guest-abi` | {module} |")), "{module}");
    let man = read_to_string(repository().join("docs/man/instar-plugin.7")).unwrap();
    assert!(man.contains(&format!("This is plugin API {api}, module interface {module}.")), "{api}, {module}");
}

#[test]
fn its_example_is_the_template() {
    let (guide, mut shown) = (guide(), BTreeSet::new());
    for part in guide.split("<!-- examples/plugin-template/").skip(1) {
        let (file, rest) = part.split_once(" -->\n```").unwrap();
        let code = rest.split_once('\n').and_then(|(_, code)| code.split_once("\n```\n")).unwrap().0;
        // tests/integration/test_plugin_template.py compiles and loads it.
        let template = read_to_string(repository().join("examples/plugin-template").join(file)).unwrap();
        assert_eq!(code, template.replace("{{format}}", "myformat").trim_end(), "{file}");
        shown.insert(file.to_owned());
    }
    let all = [
        "Cargo.toml",
        "build.rs",
        "driver/Cargo.toml",
        "driver/src/bin/module.rs",
        "driver/src/lib.rs",
        "driver/tests/conformance.rs",
        "src/lib.rs",
    ];
    assert_eq!(shown, all.into_iter().map(str::to_owned).collect());
}

#[test]
fn its_test_of_a_driver_is_one() {
    let guide = guide();
    let part = guide.split_once("<!-- tests/crates/contract/tests/driver.rs -->\n```rust\n").unwrap().1;
    let code = part.split_once("\n```\n").unwrap().0;
    let real = include_str!("driver.rs");
    assert_eq!(code, real.split_once("\n\n").unwrap().1.trim_end());
}

#[test]
fn its_reasons_are_those_of_the_loader() {
    let mut sources = String::new();
    for folder in ["engine/src/plugins", "plugin-api/src"] {
        for entry in std::fs::read_dir(repository().join(folder)).unwrap() {
            sources += &read_to_string(entry.unwrap().path()).unwrap();
        }
    }
    // A line that goes on behind a backslash.
    let sources: String =
        sources.split("\\\n").enumerate().map(|(i, part)| if i == 0 { part } else { part.trim_start() }).collect();
    let guide = guide();
    let table = guide.split_once("| reason | because |\n").and_then(|(_, rest)| rest.split_once("\n\n")).unwrap().0;
    let mut looked_for = 0;
    for row in table.lines().skip(1) {
        let cell = row.split('|').nth(1).unwrap();
        for reason in cell.split('`').skip(1).step_by(2) {
            for fragment in
                reason.split('…').map(|part| part.trim_matches([' ', ',', ':'])).filter(|part| part.len() > 5)
            {
                looked_for += 1;
                assert!(sources.contains(fragment), "no reason has the words {fragment:?}: {reason}");
            }
        }
    }
    assert!(looked_for > 25, "{looked_for} fragments");
}
