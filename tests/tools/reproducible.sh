#!/usr/bin/env bash
# Builds the last commit twice, in folders of different names and with different homes of cargo, and compares the program, the
# plugins, everything beside them and both packages byte by byte. Takes as long as two full builds.
set -euo pipefail

repository=$(cd "$(dirname "$0")/../.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
epoch=$(git -C "$repository" log -1 --format=%ct)
home=${CARGO_HOME:-$HOME/.cargo}
cargo fetch --quiet --locked --manifest-path "$repository/Cargo.toml"

build() { # FOLDER CARGO_HOME UMASK
    git clone --quiet --no-hardlinks "$repository" "$1"
    (
        cd "$1"
        umask "$3"
        unset CARGO_TARGET_DIR RUSTFLAGS CARGO_ENCODED_RUSTFLAGS CARGO_BUILD_RUSTFLAGS MAKEFLAGS MAKELEVEL
        export CARGO_HOME=$2 SOURCE_DATE_EPOCH=$epoch
        make deb rpm
    ) > "$work/log" 2>&1 || { tail -30 "$work/log" >&2; echo "reproducible: the build in $1 failed" >&2; exit 1; }
    (
        cd "$1/target"
        sha256sum release/instar release/libinstar_plugin_{parallels,qcow,qcow2,raw,vdi,vhdx,vmdk,vpc}.so debian/*.deb generate-rpm/*.rpm
        find stage -type f | LC_ALL=C sort | xargs sha256sum
    ) > "$1.sums"
}

build "$work/first" "$home" 022
# Another home with the same content: its name must not matter.
other="$work/other-cargo"
mkdir "$other"
ln -s "$home"/* "$other"
build "$work/a/deeper/folder" "$other" 077

if ! diff "$work/first.sums" "$work/a/deeper/folder.sums"; then
    echo 'reproducible: the files above differ between two builds of the same commit' >&2
    exit 1
fi
echo "$(wc -l < "$work/first.sums") files are identical"
