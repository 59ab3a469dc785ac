//! The committed Rust code must be what `prost-build` makes of the files in `proto`.
//!
//! The code is committed so that building a guest module needs no protobuf compiler. To renew it:
//! `INSTAR_REGENERATE=1 cargo test -p instar-guest-protocol`.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

/// Names of the files in a folder, without what is after the first dot.
fn names(folder: &Path) -> BTreeSet<String> {
    let stem = |name: String| name.split('.').next().unwrap().to_owned();
    fs::read_dir(folder).unwrap().map(|entry| stem(entry.unwrap().file_name().into_string().unwrap())).collect()
}

#[test]
fn generated_code_matches_the_proto_files() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let protos = names(&root.join("proto"));
    let files = protox::compile(protos.iter().map(|name| format!("proto/{name}.proto")), [root]).unwrap();
    let out = tempfile::tempdir().unwrap();
    prost_build::Config::new().btree_map(["."]).out_dir(out.path()).compile_fds(files).unwrap();
    let committed = root.join("src/generated");
    let renew = std::env::var_os("INSTAR_REGENERATE").is_some();
    for name in &protos {
        // The package of guest.proto is the one that the others lie in.
        let package = if name == "guest" { String::new() } else { format!(".{name}") };
        let fresh = fs::read_to_string(out.path().join(format!("instar.guest.v1{package}.rs"))).unwrap();
        let file = committed.join(format!("{name}.rs"));
        if renew {
            fs::write(&file, &fresh).unwrap();
        }
        assert_eq!(fs::read_to_string(&file).unwrap(), fresh, "{name}.proto changed: see this test's header");
    }
    assert_eq!(names(&committed), protos);
}
