#!/bin/bash
# Fuzzes every parser: fuzz/ has a target a family of them. libFuzzer on the pinned stable toolchain; nothing else is needed.
#
#   integration/fuzz.sh [SECONDS [TARGET...]]     60 seconds each, two at a time, unless told otherwise
#
# SEED repeats a run; CI sets it, so that one commit has one verdict. Begins with fuzz/corpus. What is found is in
# fuzz/artifacts/TARGET/, and the last lines say how to run it again.
set -euo pipefail
cd "$(dirname "$(readlink -f "$0")")/.."
. integration/setup.sh

seconds=${1:-60}
seed=${SEED:-$((RANDOM + 1))}
shift || true
targets=("$@")
[ ${#targets[@]} -gt 0 ] || for file in fuzz/fuzz_targets/*.rs; do targets+=("$(basename "$file" .rs)"); done

need_rust
command -v g++ >/dev/null || need_packages g++
triple=$(rustc -vV | sed -n 's/^host: //p')
say "building the fuzz targets"
RUSTC_WRAPPER=$PWD/fuzz/instrument cargo build --quiet --release --locked --target "$triple" --manifest-path fuzz/Cargo.toml
programs=fuzz/target/$triple/release

work=$(mktemp -d)
trap 'rm -rf "$work" /dev/shm/pod-fuzz-layer-*' EXIT
# Slow and large inputs count as crashes as well.
one() {
    mkdir -p "$work/$1" "fuzz/artifacts/$1" "fuzz/corpus/$1"
    nice "$programs/$1" -seed="$seed" -max_total_time="$seconds" -timeout=10 -rss_limit_mb=1024 -max_len=65536 \
        -print_final_stats=1 -artifact_prefix="fuzz/artifacts/$1/" "$work/$1" "fuzz/corpus/$1" >"$work/$1.log" 2>&1
}

say "fuzzing ${targets[*]}, $seconds s each, seed $seed"
failed=()
for ((n = 0; n < ${#targets[@]}; n += 2)); do
    pair=("${targets[@]:n:2}")
    pids=()
    for target in "${pair[@]}"; do
        one "$target" &
        pids+=($!)
    done
    for m in "${!pair[@]}"; do
        target=${pair[m]}
        if wait "${pids[m]}"; then
            runs=$(sed -n 's/^stat::number_of_executed_units: *//p' "$work/$target.log")
            edges=$(grep -o 'cov: [0-9]*' "$work/$target.log" | tail -1)
            say "$target: $runs runs, ${edges:-cov: ?}"
        else
            tail -40 "$work/$target.log"
            failed+=("$target")
        fi
    done
done
[ ${#failed[@]} -eq 0 ] || die "found something: ${failed[*]}. Again: $programs/TARGET fuzz/artifacts/TARGET/FILE"
