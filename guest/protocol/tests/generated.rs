//! The committed Rust code must be what `prost-build` makes of `guest.proto`.
//!
//! The code is committed so that building a guest module needs no protobuf compiler. To renew it:
//! `INSTAR_REGENERATE=1 cargo test -p instar-guest-protocol`.
#![allow(clippy::unwrap_used)]

use std::path::Path;

#[test]
fn generated_code_matches_the_proto_file() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let files = protox::compile(["proto/guest.proto"], [root]).unwrap();
    let out = tempfile::tempdir().unwrap();
    prost_build::Config::new().btree_map(["."]).out_dir(out.path()).compile_fds(files).unwrap();
    let fresh = std::fs::read_to_string(out.path().join("instar.guest.v1.rs")).unwrap();
    let committed = root.join("src/generated.rs");
    if std::env::var_os("INSTAR_REGENERATE").is_some() {
        std::fs::write(&committed, &fresh).unwrap();
    }
    assert_eq!(std::fs::read_to_string(&committed).unwrap(), fresh, "guest.proto changed: see this test's header");
}
