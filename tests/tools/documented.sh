#!/usr/bin/env bash
# The crates whose documentation has examples, as options of cargo. To look for examples in all of them takes cargo as long as
# it takes to run those there are.
set -euo pipefail
cd "$(dirname "$0")/../.."

grep -rlE '^\s*//[/!] ```' --include='*.rs' --exclude-dir=target --exclude-dir=compat . | sed -n 's@/src/.*@/Cargo.toml@p' |
    sort -u | xargs grep -hm1 '^name = ' | sed 's/name = "\(.*\)"/-p \1/'
