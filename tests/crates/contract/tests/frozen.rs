//! What was public when contract 1.0 was complete is public today, with the same signature and the same layout.
//!
//! If this fails, a plugin that compiles or runs today would not tomorrow. Take the change back: add new items beside
//! the old ones. `make semver` looks deeper; this is what each run of the tests can afford.

#![allow(clippy::unwrap_used)]

use instar_contract_tests::{api, repository, Api, Public};
use std::path::Path;

/// The copy of the crates of then.
const FROZEN: &str = "tests/compat/plugin-api-1.0";
/// Constants that say how far the contract has grown.
const GROWING: &[&str] = &["MODULE_ABI_LEAST_MINOR", "MODULE_ABI_MINOR"];
/// Tables to whose ends a minor version may append.
const TABLES: &[&str] = &["CallTable", "PluginModuleV1", "SinkOps", "SourceOps"];
/// What plugins and their tests implement: of something new, an implementation of then has nothing.
const TRAITS: &[&str] =
    &["BlockIo", "Builder", "FormatDriver", "FormatPlugin", "ImageKit", "ReadBelow", "ReadImage", "Sink", "Source"];

/// What is wrong with today's item, if anything.
fn broken(name: &str, then: &Public, now: Option<&Public>) -> Option<String> {
    let Some(now) = now else { return Some(format!("{name}: it is gone")) };
    if GROWING.contains(&name) {
        return None;
    }
    // Codes of errors are appended.
    let appended = name.ends_with("! {}") && now.signature.starts_with(&then.signature);
    if then.signature != now.signature && !appended {
        return Some(format!("{name}: it was {:?} and is {:?}", then.signature, now.signature));
    }
    let kept = if TABLES.contains(&name) { now.fields.get(..then.fields.len()) } else { Some(now.fields.as_slice()) };
    if kept != Some(then.fields.as_slice()) {
        return Some(format!("{name}: its fields were {:?} and are {:?}", then.fields, now.fields));
    }
    (then.has_default && !now.has_default).then(|| format!("{name}: an implementation could leave it out"))
}

fn compare(then: &Api, now: &Api) -> Vec<String> {
    let gone = then.iter().filter_map(|(name, item)| broken(name, item, now.get(name)));
    let demanded = now.iter().filter(|(name, item)| {
        let owner = name.split_once("::").map_or("", |(owner, _)| owner);
        !then.contains_key(*name) && !item.has_default && TRAITS.contains(&owner)
    });
    gone.chain(demanded.map(|(name, _)| format!("{name}: no implementation of then has it"))).collect()
}

/// All files of a folder but those of a build, as names relative to it.
fn files(folder: &Path, within: &str, names: &mut Vec<String>) {
    for entry in std::fs::read_dir(folder.join(within)).unwrap() {
        let entry = entry.unwrap();
        let name = format!("{within}{}", entry.file_name().to_string_lossy());
        if name == "target" {
            continue;
        }
        if entry.file_type().unwrap().is_dir() {
            files(folder, &format!("{name}/"), names);
        } else {
            names.push(name);
        }
    }
}

/// FNV-1a over the names and contents of all files, and their number: `tests/tools/freeze.py` does the same.
fn digest(folder: &Path) -> String {
    let mut names = Vec::new();
    files(folder, "", &mut names);
    names.sort_unstable();
    let mut value = 0xcbf2_9ce4_8422_2325_u64;
    let mut add = |bytes: &[u8]| {
        for &byte in bytes {
            value = (value ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
        }
    };
    for name in &names {
        let content = std::fs::read(folder.join(name)).unwrap();
        add(name.as_bytes());
        add(&[0]);
        add(&(content.len() as u64).to_le_bytes());
        add(&content);
    }
    format!("{} files, {value:016x}\n", names.len())
}

/// If this fails, something in the frozen folder was changed: take that back.
#[test]
fn the_frozen_crates_are_frozen() {
    let folder = repository().join(FROZEN);
    let recorded = std::fs::read_to_string(folder.with_file_name("plugin-api-1.0.digest")).unwrap();
    assert_eq!(digest(&folder), recorded);
}

#[test]
fn a_change_of_a_frozen_file_is_noticed() {
    let folder = std::env::temp_dir().join(format!("instar-frozen-{}", std::process::id()));
    std::fs::create_dir_all(folder.join("sub")).unwrap();
    std::fs::create_dir_all(folder.join("target")).unwrap();
    let write = |name: &str, text: &str| std::fs::write(folder.join(name), text).unwrap();
    write("a", "one");
    write("sub/b", "two");
    let before = digest(&folder);
    write("target/built", "by cargo");
    assert_eq!(digest(&folder), before);
    write("a", "onf");
    assert_ne!(digest(&folder), before);
    write("a", "one");
    write("sub/c", "");
    assert_ne!(digest(&folder), before);
    std::fs::rename(folder.join("sub/c"), folder.join("sub/b")).unwrap();
    assert_ne!(digest(&folder), before);
    write("sub/b", "two");
    assert_eq!(digest(&folder), before);
    std::fs::remove_dir_all(&folder).unwrap();
}

#[test]
fn what_was_public_still_is() {
    let root = repository();
    let mut seen = 0;
    for folder in ["plugin-api", "guest/abi", "guest/build", "guest/sdk"] {
        let then = api(&root.join(FROZEN).join(folder)).unwrap();
        let now = api(&root.join(folder)).unwrap();
        assert_eq!(compare(&then, &now), Vec::<String>::new(), "{folder}");
        seen += then.len();
    }
    assert!(seen > 400, "{seen} items");
}

#[test]
fn what_breaks_a_plugin_is_noticed() {
    let root = repository();
    let then = api(&root.join(FROZEN).join("guest/abi")).unwrap();
    assert!(then.contains_key("SourceOps") && then.contains_key("error_codes! {}"));
    let changed = |change: &dyn Fn(&mut Api)| {
        let mut now = then.clone();
        change(&mut now);
        compare(&then, &now).len()
    };
    assert_eq!(changed(&|_| {}), 0);
    assert_eq!(changed(&|now| now.retain(|name, _| name != "WireExtent")), 1);
    assert_eq!(changed(&|now| now.get_mut("SourceOps").unwrap().fields.push("pub more : u64".to_owned())), 0);
    assert_eq!(changed(&|now| now.get_mut("SourceOps").unwrap().fields.swap(0, 1)), 1);
    assert_eq!(changed(&|now| now.get_mut("WireExtent").unwrap().fields.push("pub more : u64".to_owned())), 1);
    assert_eq!(changed(&|now| now.get_mut("Request::copy").unwrap().signature.push('x')), 1);
    assert_eq!(changed(&|now| now.get_mut("MODULE_ABI_MINOR").unwrap().signature.push('1')), 0);
    assert_eq!(changed(&|now| now.get_mut("MODULE_ABI_MAJOR").unwrap().signature.push('1')), 1);
    assert_eq!(changed(&|now| now.get_mut("error_codes! {}").unwrap().signature.push('x')), 0);
    assert_eq!(changed(&|now| now.get_mut("error_codes! {}").unwrap().signature.insert(0, 'x')), 1);
    let item = Public { signature: String::new(), fields: Vec::new(), has_default: false };
    assert_eq!(changed(&|now| drop(now.insert("Source::more".to_owned(), item.clone()))), 1);
    let optional = Public { has_default: true, ..item };
    assert_eq!(changed(&|now| drop(now.insert("Source::more".to_owned(), optional.clone()))), 0);
}

#[test]
fn a_root_module_grows_at_its_end_only() {
    let then = api(&repository().join(FROZEN).join("plugin-api")).unwrap();
    let with = |change: &dyn Fn(&mut Vec<String>)| {
        let mut now = then.clone();
        change(&mut now.get_mut("PluginModuleV1").unwrap().fields);
        compare(&then, &now).len()
    };
    let more = "pub more : extern \"C\" fn () -> u64".to_owned();
    assert_eq!(with(&|fields| fields.push(more.clone())), 0);
    assert_eq!(with(&|fields| fields.insert(0, more.clone())), 1);
    assert_eq!(with(&|fields| fields.truncate(3)), 1);
    // abi_stable refuses a prefix of another length.
    let last = |field: &String| field.contains("last_prefix_field");
    assert!(then["PluginModuleV1"].fields.last().is_some_and(last));
    assert_eq!(with(&|fields| fields.iter_mut().for_each(|field| *field = field.replace("last_prefix_field", ""))), 1);
}
