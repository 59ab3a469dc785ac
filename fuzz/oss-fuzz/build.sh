#!/bin/bash -eu
# Builds every fuzz target for OSS-Fuzz: one program, linked once for each name, since a target is what its name says
# (fuzz/src/main.rs). Seeds and corpus of each are packed beside it.
cd "$SRC/instar"
fuzzer=$PWD/target/x86_64-unknown-linux-gnu/checked/instar-fuzz

# The C code (zstd) gets its flags by CFLAGS, which OSS-Fuzz sets.
make fuzzer SANITIZE="$SANITIZER"

# To libFuzzer, a target that ends the program is a finding: what counts is what was written.
FUZZ_TARGET=list "$fuzzer" < /dev/null > targets.txt 2> /dev/null || true
[ -s targets.txt ]
first=
while read -r name longest; do
    program=$OUT/instar-fuzz-$name
    # All programs are one file.
    if [ -z "$first" ]; then cp "$fuzzer" "$program"; first=$program; else ln -f "$first" "$program"; fi
    printf '[libfuzzer]\nmax_len = %s\ntimeout = 20\nrss_limit_mb = 2560\n' "$longest" > "$program.options"
    seeds=$(mktemp -d)
    FUZZ_TARGET=$name FUZZ_SEEDS=$seeds "$fuzzer" < /dev/null > /dev/null 2>&1 || true
    [ -n "$(ls "$seeds")" ]
    zip -q -j -r "${program}_seed_corpus.zip" "$seeds"
    rm -rf "$seeds"
done < targets.txt
