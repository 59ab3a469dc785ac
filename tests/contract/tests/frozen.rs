//! What was public when contract 1.0 was complete is public today, with the same signature and the same layout.
//!
//! If this fails, a plugin that compiles or runs today would not tomorrow. Take the change back: what is new is added beside
//! what there is. `make semver` looks deeper; this is what each run of the tests can afford.

#![allow(clippy::unwrap_used)]

use instar_contract_tests::{api, repository, Api, Public};
use std::path::Path;

/// Constants that say how far the contract has grown.
const GROWING: &[&str] = &["MODULE_ABI_MINOR"];
/// Tables to whose ends a minor version may append.
const TABLES: &[&str] = &["CallTable", "FormatOps", "OperationOps", "SinkOps", "SourceOps"];

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
    let is_new = |name: &str| !then.contains_key(name);
    let owner = |name: &str| name.split_once("::").map(|(owner, _)| owner.to_owned());
    // Something new in a trait that there was: an implementation of then does not have it.
    let traits: Vec<&str> =
        ["BlockIo", "FormatDriver", "FormatPlugin", "ReadBelow", "ReadImage", "Sink", "Source"].into();
    let demanded = now.iter().filter(|(name, item)| {
        is_new(name) && !item.has_default && owner(name).is_some_and(|owner| traits.contains(&owner.as_str()))
    });
    gone.chain(demanded.map(|(name, _)| format!("{name}: no implementation of then has it"))).collect()
}

/// FNV-1a of the frozen sources, paths and contents.
const DIGEST: u64 = 0x7ec5_528f_64ac_0a06;
/// How many files there are.
const FILES: usize = 58;

fn digest(folder: &Path, value: &mut u64) -> usize {
    let mut paths: Vec<_> = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    paths.sort();
    let mut files = 0;
    for path in paths.iter().filter(|path| !path.ends_with("target")) {
        if path.is_dir() {
            files += digest(path, value);
            continue;
        }
        let name = path.file_name().unwrap().to_string_lossy().into_owned().into_bytes();
        for byte in name.into_iter().chain(std::fs::read(path).unwrap()) {
            *value = (*value ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
        }
        files += 1;
    }
    files
}

/// If this fails, something in `tests/compat/plugin-api-1.0` was changed: take that back.
#[test]
fn the_frozen_crates_are_frozen() {
    let mut value = 0xcbf2_9ce4_8422_2325;
    assert_eq!(digest(&repository().join("tests/compat/plugin-api-1.0"), &mut value), FILES);
    assert_eq!(value, DIGEST, "{value:#x}");
}

#[test]
fn what_was_public_still_is() {
    let root = repository();
    let mut seen = 0;
    for folder in ["plugin-api", "guest/abi", "guest/sdk"] {
        let then = api(&root.join("tests/compat/plugin-api-1.0").join(folder)).unwrap();
        let now = api(&root.join(folder)).unwrap();
        assert_eq!(compare(&then, &now), Vec::<String>::new(), "{folder}");
        seen += then.len();
    }
    assert!(seen > 200, "{seen} items");
}

#[test]
fn what_breaks_a_plugin_is_noticed() {
    let root = repository();
    let then = api(&root.join("tests/compat/plugin-api-1.0/guest/abi")).unwrap();
    assert!(then.contains_key("SourceOps") && then.contains_key("error_codes! {}"));
    let changed = |change: &dyn Fn(&mut Api)| {
        let mut now = then.clone();
        change(&mut now);
        compare(&then, &now).len()
    };
    assert_eq!(changed(&|_| {}), 0);
    assert_eq!(changed(&|now| now.retain(|name, _| name != "Extent")), 1);
    assert_eq!(changed(&|now| now.get_mut("SourceOps").unwrap().fields.push("pub more : u64".to_owned())), 0);
    assert_eq!(changed(&|now| now.get_mut("SourceOps").unwrap().fields.swap(0, 1)), 1);
    assert_eq!(changed(&|now| now.get_mut("Extent").unwrap().fields.push("pub more : u64".to_owned())), 1);
    assert_eq!(changed(&|now| now.get_mut("Request::copy").unwrap().signature.push('x')), 1);
    assert_eq!(changed(&|now| now.get_mut("error_codes! {}").unwrap().signature.push('x')), 0);
    assert_eq!(changed(&|now| now.get_mut("error_codes! {}").unwrap().signature.insert(0, 'x')), 1);
    let item = Public { signature: String::new(), fields: Vec::new(), has_default: false };
    assert_eq!(changed(&|now| drop(now.insert("Source::more".to_owned(), item.clone()))), 1);
    let optional = Public { has_default: true, ..item };
    assert_eq!(changed(&|now| drop(now.insert("Source::more".to_owned(), optional.clone()))), 0);
}
