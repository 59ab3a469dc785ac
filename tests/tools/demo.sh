#!/usr/bin/env bash
# `make demo`: a base and an overlay with data in it, committed. Needs /dev/kvm (or SANDBOX=process) and python3, no qemu.
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
instar=${INSTAR_BIN:-$here/../../target/release/instar}
python=${PYTHON:-python3}
sandbox=${INSTAR_TEST_SANDBOX:-kvm}
MiB=$((1 << 20))

[ -x "$instar" ] || { echo "demo: $instar is not there: run \`make instar\`" >&2; exit 1; }
if [ "$sandbox" = kvm ] && { [ ! -r /dev/kvm ] || [ ! -w /dev/kvm ]; }; then
    echo "demo: /dev/kvm cannot be used: it is missing, or this user is not in the group kvm; \`make demo SANDBOX=process\`" \
        "does without" >&2
    exit 1
fi

directory=$(mktemp -d "${TMPDIR:-/tmp}/instar-demo.XXXXXX")
trap 'rm -rf "$directory"' EXIT
cd "$directory"

if [ -t 1 ]; then bold=$'\e[1m' plain=$'\e[0m'; else bold='' plain=''; fi
title() { printf '\n%s%s%s\n' "$bold" "$1" "$plain"; }
run() { printf '$ instar %s\n' "$*"; "$instar" "$@"; }
fill() { "$python" "$here/demo_fill.py" write "$@"; }
hash_of() { "$python" "$here/demo_fill.py" hash "$1"; }
sizes() {
    local image
    for image in base.qcow2 overlay.qcow2; do
        printf '%-14s %10s bytes long, %10s bytes on disk\n' "$image" "$(stat -c %s "$image")" \
            "$(($(stat -c %b "$image") * 512))"
    done
}

title '1. A base, and an overlay that is backed by it'
run create -f qcow2 base.qcow2 64M
run create -f qcow2 -b base.qcow2 -F qcow2 overlay.qcow2

title '2. Data: 8 MiB in the base; in the overlay 4 MiB, half of it over data of the base, and 1 MiB further up'
fill base.qcow2 base 0 $((8 * MiB))
fill overlay.qcow2 overlay $((6 * MiB)) $((4 * MiB)) $((40 * MiB)) $((1 * MiB))
run info overlay.qcow2
echo
sizes
base_before=$(hash_of base.qcow2)
before=$(hash_of overlay.qcow2)
echo "the base reads       $base_before"
echo "the overlay reads    $before"

title '3. The commit'
run commit -v --sandbox "$sandbox" overlay.qcow2

title '4. Afterwards'
sizes
base_after=$(hash_of base.qcow2)
after=$(hash_of overlay.qcow2)
echo "the base reads       $base_after"
echo "the overlay reads    $after"
echo

if [ "$base_before" = "$before" ]; then
    echo 'demo: base and overlay read the same before the commit: the demo is broken' >&2
    exit 1
fi
if [ "$after" != "$before" ] || [ "$base_after" != "$before" ]; then
    echo "demo: the bytes differ after the commit" >&2
    exit 1
fi
echo "${bold}The bytes are equal: the base reads what the overlay read before, and the overlay still does.${plain}"
