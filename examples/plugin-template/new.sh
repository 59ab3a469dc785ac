#!/bin/sh
# Makes a plugin of this template, anywhere: new.sh FORMAT FOLDER [--published]
# Without --published the plugin uses the crates of this checkout; with it, those on crates.io.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
usage() { echo "usage: $0 FORMAT FOLDER [--published]" >&2; exit 2; }
[ $# -ge 2 ] || usage
format=$1 folder=$2
case $format in *[!a-z0-9]* | [!a-z]* | '') echo "$0: a format's name is lower-case letters and digits: $format" >&2; exit 2 ;; esac
case ${3-} in '' | --published) ;; *) usage ;; esac
[ ! -e "$folder" ] || { echo "$0: $folder exists" >&2; exit 1; }
for file in Cargo.toml build.rs src/lib.rs driver/Cargo.toml driver/src/lib.rs driver/src/bin/module.rs driver/tests/conformance.rs; do
    mkdir -p "$(dirname "$folder/$file")"
    sed "s/{{format}}/$format/g" "$here/$file" > "$folder/$file"
done
[ "${3-}" != --published ] || exit 0
root=$(cd "$here/../.." && pwd)
cat >> "$folder/Cargo.toml" <<END

# Remove this to use the crates that are published.
[patch.crates-io]
instar-guest-abi = { path = "$root/guest/abi" }
instar-guest-build = { path = "$root/guest/build" }
instar-guest-sdk = { path = "$root/guest/sdk" }
instar-plugin-api = { path = "$root/plugin-api" }
END
