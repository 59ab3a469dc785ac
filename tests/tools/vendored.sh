#!/usr/bin/env bash
# Builds the last commit as a distribution does: from vendored crates, with no network and an empty home of cargo, the guest
# modules (whose builds are cargo's of their own) included.
set -euo pipefail

repository=$(cd "$(dirname "$0")/../.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

git clone --quiet --no-hardlinks "$repository" "$work/instar"
cd "$work/instar"
mkdir .cargo
cargo vendor --locked > .cargo/config.toml 2> "$work/log" || { tail "$work/log" >&2; exit 1; }
echo "[net]
offline = true" >> .cargo/config.toml

unset CARGO_TARGET_DIR RUSTFLAGS CARGO_ENCODED_RUSTFLAGS
# A network of its own, in which nothing is up: not even a cached index could be refreshed.
CARGO_HOME=$work/empty unshare --net cargo build --release --offline --locked -p instar-cli \
    -p instar-plugin-parallels -p instar-plugin-qcow -p instar-plugin-qcow2 -p instar-plugin-raw -p instar-plugin-vdi -p instar-plugin-vhdx -p instar-plugin-vmdk -p instar-plugin-vpc > "$work/log" 2>&1 || { tail -30 "$work/log" >&2; exit 1; }
target/release/instar create -q -f qcow2 "$work/base" 1M
target/release/instar create -q -f qcow2 -b base -F qcow2 "$work/top"
target/release/instar commit "$work/top" > "$work/log"
echo "builds from $(find vendor -mindepth 1 -maxdepth 1 | wc -l) vendored crates without a network, and commits"
