#!/bin/bash
# Run fuzz targets one after the other: run.sh SECONDS [TARGET...]; or merge what they found into the corpus of the repository:
# run.sh merge [TARGET...]. Every file beside a finding is in target/fuzz. See docs/fuzzing.md.
set -euo pipefail
cd "$(dirname "$0")/.."
what=$1
shift
fuzzer=$PWD/target/x86_64-unknown-linux-gnu/checked/instar-fuzz
found=0
mkdir -p target/fuzz
# To libFuzzer, a target that ends the program is a finding, with a file: what counts is what was written.
ends=(-artifact_prefix=target/fuzz/)

while read -r name longest; do
    [ $# = 0 ] || [[ " $* " == *" $name "* ]] || continue
    rm -rf "target/fuzz/seeds/$name"
    mkdir -p "target/fuzz/seeds/$name" "target/fuzz/corpus/$name"
    export FUZZ_TARGET=$name
    log=target/fuzz/$name.log
    limits=(-timeout=20 -rss_limit_mb=2560 "-max_len=$longest" "-artifact_prefix=target/fuzz/finding-$name-")
    FUZZ_SEEDS=target/fuzz/seeds/$name "$fuzzer" "${ends[@]}" < /dev/null 2> /dev/null || true
    [ -n "$(ls "target/fuzz/seeds/$name")" ] || { echo "$name: the fuzzer does not run" >&2; exit 1; }
    inputs=("target/fuzz/corpus/$name" "target/fuzz/seeds/$name")
    if [ "$what" = merge ]; then
        rm -rf target/fuzz/merged && mkdir target/fuzz/merged
        "$fuzzer" -set_cover_merge=1 -use_counters=0 "${limits[@]}" target/fuzz/merged "${inputs[@]}" < /dev/null 2> "$log"
        FUZZ_PACK=target/fuzz/merged "$fuzzer" "${ends[@]}" < /dev/null 2> /dev/null || true
        continue
    fi
    if "$fuzzer" -max_total_time="$what" -print_final_stats=1 "${limits[@]}" "${inputs[@]}" < /dev/null > "$log" 2>&1; then
        runs=$(awk '/stat::number_of_executed_units/ { print $2 }' "$log")
        cov=$(grep -oE 'cov: [0-9]+ ft: [0-9]+' "$log" | tail -1)
        echo "$name: $runs inputs, $cov, no finding"
    else
        found=1
        echo "$name: a finding, see $log" >&2
        grep -E 'panicked at|ERROR: libFuzzer' -A1 "$log" >&2 || true
        grep 'Test unit written' "$log" >&2 || true
    fi
done < <(FUZZ_TARGET=list "$fuzzer" "${ends[@]}" 2> /dev/null)
exit "$found"
