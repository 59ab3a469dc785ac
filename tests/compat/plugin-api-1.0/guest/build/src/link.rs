//! How a guest module is compiled and linked.

use std::io;
use std::path::{Path, PathBuf};

/// The only target that modules are built for.
pub const TARGET: &str = "x86_64-unknown-linux-gnu";

/// The variable that the `cc` crate takes flags for this target from.
pub const C_FLAGS_VARIABLE: &str = "CFLAGS_x86_64_unknown_linux_gnu";
/// How a module's C code, if it has any, is compiled: position-independent, and with nothing of a C library but the memory
/// routines. What some distributions switch on by themselves (stack canaries in thread-local storage, checked variants of
/// `memcpy`) is not there. Of Zstandard's ways to find repetitions, those of the level that images are compressed with are enough
/// (`ZSTD_fast`, `ZSTD_dfast`; `lib/README.md` of Zstandard): every module is loaded whole at each start. Its fast loop for
/// Huffman streams does not see whether a stream ends where it should, and hands out other bytes for a damaged one (as of
/// Zstandard 1.5.7); the plain loop refuses it (RFC 8878, section 4.2.2).
pub const C_FLAGS: &str = "-O3 -fPIC -fno-stack-protector -U_FORTIFY_SOURCE -fcf-protection=none -DNDEBUG \
    -DZSTD_EXCLUDE_GREEDY_BLOCK_COMPRESSOR -DZSTD_EXCLUDE_LAZY_BLOCK_COMPRESSOR -DZSTD_EXCLUDE_LAZY2_BLOCK_COMPRESSOR \
    -DZSTD_EXCLUDE_BTLAZY2_BLOCK_COMPRESSOR -DZSTD_EXCLUDE_BTOPT_BLOCK_COMPRESSOR -DZSTD_EXCLUDE_BTULTRA_BLOCK_COMPRESSOR \
    -DHUF_DISABLE_FAST_DECODE";

const SCRIPT: &str = include_str!("module.ld");

/// Settings of the release profile, as cargo's environment variables.
pub const PROFILE: &[(&str, &str)] = &[
    ("CARGO_PROFILE_RELEASE_PANIC", "abort"),
    ("CARGO_PROFILE_RELEASE_OPT_LEVEL", "3"),
    ("CARGO_PROFILE_RELEASE_LTO", "fat"),
    ("CARGO_PROFILE_RELEASE_CODEGEN_UNITS", "1"),
    ("CARGO_PROFILE_RELEASE_DEBUG", "false"),
    ("CARGO_PROFILE_RELEASE_STRIP", "symbols"),
    ("CARGO_PROFILE_RELEASE_INCREMENTAL", "false"),
    ("CARGO_PROFILE_RELEASE_OVERFLOW_CHECKS", "true"),
];

/// With this variable set, a module keeps its symbols and the lines of its sources, for `addr2line`. They are not loaded.
pub const SYMBOLS_VARIABLE: &str = "INSTAR_GUEST_SYMBOLS";

/// What of [`PROFILE`] is different then.
pub const WITH_SYMBOLS: &[(&str, &str)] =
    &[("CARGO_PROFILE_RELEASE_DEBUG", "line-tables-only"), ("CARGO_PROFILE_RELEASE_STRIP", "none")];

/// File name of the linker script. It carries a hash of the content, so that cargo sees a changed script as
/// changed flags.
pub fn script_name() -> String {
    let hash = SCRIPT
        .bytes()
        .fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3));
    format!("instar-module-{hash:016x}.ld")
}

/// Write the linker script into `folder`, atomically, as several build scripts may do it at once.
pub fn write_script(folder: &Path) -> io::Result<PathBuf> {
    let path = folder.join(script_name());
    if std::fs::read_to_string(&path).is_ok_and(|text| text == SCRIPT) {
        return Ok(path);
    }
    std::fs::create_dir_all(folder)?;
    let temporary = folder.join(format!("{}.{}", script_name(), std::process::id()));
    std::fs::write(&temporary, SCRIPT)?;
    std::fs::rename(&temporary, &path)?;
    Ok(path)
}

/// The compiler flags, joined as `CARGO_ENCODED_RUSTFLAGS` wants them. `remap` are folders whose names must
/// not appear in the module, with what stands for them.
///
/// No flag but `remap` holds an absolute path (the linker finds its script through `LIBRARY_PATH`), because
/// cargo hashes the flags into symbol names and so into the order of functions.
pub fn encoded_flags(remap: &[(PathBuf, &str)]) -> String {
    let mut flags = vec![
        "-Crelocation-model=pic".to_owned(),
        "-Clink-arg=-nostartfiles".to_owned(),
        "-Clink-arg=-nostdlib".to_owned(),
        "-Clink-arg=-static-pie".to_owned(),
        "-Clink-arg=-Wl,--build-id=none".to_owned(),
        "-Clink-arg=-Wl,--no-eh-frame-hdr".to_owned(),
        "-Clink-arg=-Wl,-z,norelro".to_owned(),
        "-Clink-arg=-Wl,-z,max-page-size=4096".to_owned(),
        "-Clink-arg=-Wl,--no-dynamic-linker".to_owned(),
        format!("-Clink-arg=-Wl,-T,{}", script_name()),
    ];
    for (folder, name) in remap {
        flags.push(format!("--remap-path-prefix={}={name}", folder.display()));
    }
    flags.join("\x1f")
}
