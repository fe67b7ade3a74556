#!/usr/bin/env bash
# Instructions per decision, selector by selector: what does not depend on what else the machine does. Each selector runs
# twice under callgrind, with 1 and with 6 rounds over the same contexts; the difference is 5 rounds and nothing else.
#
#   eval/bench/decide-instructions.sh [DIR]      writes DIR/instructions.tsv; needs valgrind and a release build
set -euo pipefail
cd "$(dirname "$0")/../.."
weir="${WEIR:-target/release/weir}"
out="${1:-}"
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

instructions() { # selector, rounds, examples
    valgrind --tool=callgrind --callgrind-out-file="$scratch/out" "$weir" bench decide --only "$1" --rounds "$2" \
        --examples "$3" 2>"$scratch/log" >/dev/null
    awk '/Collected/ {print $4}' "$scratch/log"
}

{
    printf 'selector\tinstructions per decision\n'
    for selector in static cheapest linucb thompson epsilon_greedy ridge graph knn; do
        contexts=200 examples=100
        # Fewer examples than `weir bench decide` measures: making 50,000 vectors takes most of an hour here.
        [ "$selector" = knn ] && contexts=20 examples=10000
        one=$(instructions "$selector" 1 "$examples")
        six=$(instructions "$selector" 6 "$examples")
        name="$selector"
        [ "$selector" = knn ] && name="knn, $examples examples"
        printf '%s\t%d\n' "$name" $(((six - one) / (5 * contexts)))
    done
} | tee ${out:+"$out/instructions.tsv"}
